"""The two distributions that install this package: `stream-mmrnn`, and `stream-mmrnn-client` with a few of its modules.

An environment has one of them. Where both are installed, each has overwritten files of the other.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path

FULL = "stream-mmrnn"
CLIENT = "stream-mmrnn-client"
BOTH = f"{FULL} and {CLIENT} are both installed, and each has overwritten files of the other"
REMEDY = f"pip uninstall -y {FULL} {CLIENT}, then install the one that you want"


def version() -> str:
    """The version of the installed distribution.

    Raises:
        importlib.metadata.PackageNotFoundError: none is installed.

    """
    from importlib import metadata  # here: it takes longer to import than the package

    return metadata.version(CLIENT if installed() == {CLIENT} else FULL)


def installed(folder: Path = Path(__file__).parents[2]) -> set[str]:
    """Which of the two are installed in `folder`, by default the one of this package; a checkout has none."""
    kinds = {name: f"{name.replace('-', '_')}-*.dist-info" for name in (FULL, CLIENT)}
    return {name for name, pattern in kinds.items() if next(folder.glob(pattern), None)}


@cache
def warn_of_both() -> None:
    """Warn if both are installed here; once per process."""
    if len(installed()) > 1:
        warnings.warn(f"{BOTH}; {REMEDY}", RuntimeWarning, stacklevel=3)


def not_in_client(name: str) -> str:
    """What is wrong where the client is asked for a public name that only the full distribution has."""
    return f"{name} is not part of {CLIENT}: install {FULL} for it, in place of the client or in another environment"
