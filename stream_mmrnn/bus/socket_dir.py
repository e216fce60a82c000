"""A private folder for sockets, with a short path: systems limit the length of a socket's path."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from stream_mmrnn.core.errors import ProcessError

_PATH_BYTES = 103 if sys.platform == "darwin" else 107
"""Maximum length of a socket's path: `sun_path` without its closing zero (unix(7); sys/un.h on macOS)."""
_NAME_BYTES = 20
"""Reserved for the slash and the socket's name in the folder."""


def private_folder(prefix: str, short: str = "/tmp") -> str:  # noqa: S108 mkdtemp creates a private folder in it
    """Create a folder (0700) in the temporary folder or, if its path would be too long, in `short`.

    Raises:
        ProcessError: no folder with a short path can be created.

    """
    for place in (None, short):
        try:
            folder = tempfile.mkdtemp(prefix=prefix, dir=place)
        except OSError:
            continue
        if sys.platform == "win32" or len(os.fsencode(folder)) + _NAME_BYTES <= _PATH_BYTES:
            return folder
        Path(folder).rmdir()
    most = _PATH_BYTES - _NAME_BYTES - len(prefix) - 9
    raise ProcessError(
        f"no folder for sockets can be made in {tempfile.gettempdir()}: set TMPDIR to one that can be written to, with "
        f"a path of at most {most} bytes"
    )
