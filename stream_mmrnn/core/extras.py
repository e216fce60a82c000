"""Optional packages: whether they are installed, and how to install them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from stream_mmrnn.core.errors import UsageError


def missing(packages: Iterable[str]) -> list[str]:
    """The packages that are not installed. Imports nothing except the parents of dotted names."""
    return [name for name in packages if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is not
        return False


def need(what: str, extra: str, *packages: str, of: str = "stream-mmrnn") -> None:
    """Raises UsageError, with the command that installs the extra of `of`, if one of its packages is missing."""
    if absent := missing(packages):
        are = ", ".join(absent)
        raise UsageError(f"{what} needs the extra `{extra}` ({are} missing): pip install '{of}[{extra}]'")
