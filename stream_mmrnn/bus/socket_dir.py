"""Private folders in the temporary folder: with a short path, as systems limit the length of a socket's path.

A folder belongs to the process that made it, which holds a lock in it. What a killed process left has no holder, and
the next process that makes a folder removes it. Knows nothing about what is kept in them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

from stream_mmrnn.core.errors import ProcessError

_PATH_BYTES = 103 if sys.platform == "darwin" else 107
"""Maximum length of a socket's path: `sun_path` without its closing zero (unix(7); sys/un.h on macOS)."""
_NAME_BYTES = 20
"""Reserved for the slash and the socket's name in the folder."""


_LOCK = "owner"
"""The file in a folder that its owner has locked."""
_PREFIXES = ("stream-mmrnn-", "pymp-")
_locks: dict[str, int] = {}
"""By folder of this process, the descriptor that holds its lock."""


def private_folder(prefix: str, short: str = "/tmp") -> str:  # noqa: S108 mkdtemp creates a private folder in it
    """Create a folder (0700) in the temporary folder or, if its path would be too long, in `short`.

    The first call also removes the folders of processes that were killed.

    Raises:
        ProcessError: no folder with a short path can be created.

    """
    if not _locks:
        for parent in {tempfile.gettempdir(), short}:
            _remove_left(Path(parent))
    for place in (None, short):
        try:
            folder = _locked(prefix, place)
        except OSError:
            continue
        if sys.platform == "win32" or len(os.fsencode(folder)) + _NAME_BYTES <= _PATH_BYTES:
            return folder
        remove_folder(folder)
    most = _PATH_BYTES - _NAME_BYTES - len(prefix) - 9
    raise ProcessError(
        f"no folder for sockets can be made in {tempfile.gettempdir()}: set TMPDIR to one that can be written to, with "
        f"a path of at most {most} bytes"
    )


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A `private_folder` inside the `with` block."""
    folder = private_folder(prefix)
    try:
        yield Path(folder)
    finally:
        remove_folder(folder)


def remove_folder(folder: str) -> None:
    """Remove a folder of this process; safe at any moment, also a second time."""
    shutil.rmtree(folder, ignore_errors=True)
    descriptor = _locks.pop(folder, None)
    if descriptor is not None:
        os.close(descriptor)


def _locked(prefix: str, place: str | None) -> str:
    """A new folder whose lock this process holds. Raises OSError."""
    while True:
        folder = tempfile.mkdtemp(prefix=prefix, dir=place)
        if sys.platform == "win32":  # an open file could not be removed with its folder
            return folder
        lock = Path(folder, _LOCK)
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock.exists():
                _locks[folder] = descriptor
                return folder
        except BlockingIOError:
            pass  # taken for what a killed process left, between the two calls
        except OSError:  # a file system without locks
            lock.unlink(missing_ok=True)
            os.close(descriptor)
            return folder
        os.close(descriptor)


def _remove_left(place: Path) -> None:
    """Remove folders whose owner is gone. Those without a lock, or of another user, are not ours."""
    if sys.platform == "win32":
        return
    with contextlib.suppress(OSError):
        for entry in os.scandir(place):
            if entry.name.startswith(_PREFIXES):
                with contextlib.suppress(OSError):
                    _remove_if_left(entry)


def _remove_if_left(entry: os.DirEntry[str]) -> None:
    if sys.platform == "win32" or entry.path in _locks or entry.is_symlink():
        return
    if entry.stat(follow_symlinks=False).st_uid != os.getuid():
        return
    descriptor = os.open(Path(entry.path, _LOCK), os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(entry.path, ignore_errors=True)
    finally:
        os.close(descriptor)
