"""The files of a data set, one after another, from a folder, a zip or a tar, without unpacking anything to disk.

In messages a file inside an archive is called `ARCHIVE/NAME`.
"""

from __future__ import annotations

import io
import lzma
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.errors import FileError, UsageError

Wanted = Callable[[str], bool]

_DAMAGED = (EOFError, OSError, RuntimeError, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, zlib.error)
"""Exceptions of the archive readers for a truncated, changed or encrypted file."""


def files(path: Path, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    """Name (relative, with `/`) and content of every wanted file: sorted in a folder, else in the archive's order.

    An archive is read once from start to end, with one file in memory at a time.

    Raises:
        FileError: the path does not exist, or cannot be read completely.

    """
    if path.is_dir():
        yield from _in_folder(path, wanted)
        return
    if not path.is_file():
        raise FileError(f"{path} does not exist; give the folder or archive of the data set")
    try:
        yield from _in_zip(path, wanted) if zipfile.is_zipfile(path) else _in_tar(path, wanted)
    except _DAMAGED as e:
        raise FileError(f"{path} is not a readable zip or tar archive ({reason(e)}); fetch it again") from e


def names(folder: Path) -> list[str]:
    """All files below a folder, relative, with `/`, sorted.

    Raises:
        FileError: there is no such folder.

    """
    if not folder.is_dir():
        raise FileError(f"{folder} is not a folder; give the folder that the data set was unpacked to")
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise FileError(f"the file {path} cannot be read: {e.strerror}; check its name and rights") from e


def text(where: str, raw: bytes) -> str:
    """Decode as strict UTF-8: a guessed encoding would give wrong letters."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise FileError(f"the file {where} is not UTF-8 at byte {e.start}; fetch the data set again") from e


def table(where: str, raw: bytes, columns: int) -> npt.NDArray[np.float64]:
    """Lines of numbers separated by spaces, all with the same number of columns.

    Raises:
        FileError: it is empty, or a line has not this many finite numbers.

    """
    content = text(where, raw)
    expected = f"{columns} numbers in every line"
    if not content.strip():
        raise FileError(f"the file {where} is empty, expected {expected}; fetch the data set again")
    try:
        rows = np.loadtxt(io.StringIO(content), dtype=np.float64, comments=None, ndmin=2)
    except ValueError as e:
        raise FileError(
            f"the file {where} is damaged, expected {expected} ({reason(e)}); fetch the data set again"
        ) from e
    if rows.shape[1] != columns or not np.isfinite(rows).all():
        raise FileError(f"the file {where} does not hold {expected}; fetch the data set again")
    return rows


def complete(where: str, what: str, numbers: Iterable[int]) -> None:
    """Check that the numbers are 0 to n - 1, each once; otherwise a file is missing.

    Raises:
        FileError: a number is missing or occurs twice.

    """
    found = sorted(numbers)
    for expected, number in enumerate(found):
        if number > expected:
            raise FileError(f"{where} has {what} {number} but not {expected}; fetch the data set again")
        if number < expected:
            raise FileError(f"{where} has {what} {number} twice; keep one of them")


def reason(error: Exception) -> str:
    """The first clause of a library's error message, because some are long or give wrong advice."""
    return re.split(r"[\n;]|\. ", str(error))[0].rstrip(".: ") or type(error).__name__


def choose(what: str, choice: str, choices: Iterable[str]) -> None:
    known = list(choices)
    if choice not in known:
        raise UsageError(f"{what} `{choice}` is not known; choose one of {', '.join(known)}")


def _in_folder(folder: Path, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    for name in names(folder):
        if wanted(name):
            yield name, read(folder / name)


def _in_zip(path: Path, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if not info.is_dir() and wanted(info.filename):
                yield info.filename, archive.read(info)


def _in_tar(path: Path, wanted: Wanted) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in archive:
            # skip links: they could point outside the archive, and the published sets have none
            if member.isreg() and wanted(member.name) and (content := archive.extractfile(member)) is not None:
                with content:
                    yield member.name, content.read()
