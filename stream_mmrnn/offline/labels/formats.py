"""The formats of labels by the end of their files' names: read entries, and write them so that they read back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, tzinfo
from itertools import pairwise
from pathlib import Path

from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.offline.labels import csv_file, eaf, line_files, textgrid
from stream_mmrnn.offline.labels.entries import Clock, Entry

SUFFIXES = (".csv", ".tsv", ".eaf", ".TextGrid", ".rttm", ".ctm")
_KNOWN = tuple(suffix.lower() for suffix in SUFFIXES)


def is_of_labels(path: Path) -> bool:
    """Whether a file's name ends as that of labels in a format that holds nothing else."""
    return path.suffix.lower() in _KNOWN[2:]


def check(path: Path) -> None:
    """Raises UsageError if the name ends like no format of labels, or the format's package is missing."""
    suffix = path.suffix.lower()
    if suffix not in _KNOWN:
        raise UsageError(f"{path} is no format of labels; use a name that ends in {', '.join(SUFFIXES)}")
    if suffix in (".eaf", ".textgrid"):
        (eaf if suffix == ".eaf" else textgrid).check()


def read(
    path: Path,
    names: Sequence[str],
    clock: Clock = "session",
    zone: tzinfo = UTC,
    note: Callable[[str], None] = lambda _: None,
) -> list[Entry]:
    """The labels of a file, in its order.

    `names`: how the file may call the recording; `zone`: of dates and times without one.

    Raises:
        UsageError: no format of labels, or its package is missing.
        FileError: the file is wrong; the sentence names the line.

    """
    check(path)
    suffix = path.suffix.lower()
    if suffix == ".eaf":
        return eaf.read(path)
    if suffix == ".textgrid":
        return textgrid.read(path)
    if suffix == ".rttm":
        return line_files.read_rttm(path, names, note)
    if suffix == ".ctm":
        return line_files.read_ctm(path, names)
    return list(csv_file.read(path, clock, zone))


def write(path: Path, entries: Sequence[Entry], name: str, end_ns: int, force: bool = False) -> None:
    """Write labels of the recording `name`, whose end is `end_ns`; what is there is replaced if `force`.

    The file is read back before it takes its place: a label that the format cannot hold is an error, not a loss.

    Raises:
        UsageError: no format of labels, or its package is missing.
        FileError: the file is there already, cannot be written, or the format cannot hold a label.

    """
    check(path)
    if path.exists() and not (force and path.is_file()):
        raise FileError(f"{path} is there already; choose another name, or use --force for a file")
    tiers = list(dict.fromkeys(e.tier for e in entries))
    try:
        with tempfile.TemporaryDirectory(prefix=".label-", dir=path.parent) as folder:
            made = Path(folder) / path.name
            suffix = path.suffix.lower()
            if suffix == ".eaf":
                eaf.write(made, entries, tiers)
            elif suffix == ".textgrid":
                textgrid.write(made, entries, tiers, end_ns)
            elif suffix in (".rttm", ".ctm"):
                line_files.write(made, entries, name)
            else:
                csv_file.write(made, entries)
            _check_same(made, path, entries)
            made.replace(path)
    except OSError as e:
        raise FileError(f"{path} cannot be written: {e.strerror}; choose another place") from e


def _check_same(made: Path, path: Path, entries: Sequence[Entry]) -> None:
    """Raises FileError if the file does not hold the labels."""
    by_place = sorted(entries, key=lambda e: (e.tier, e.begin_ns))
    if made.suffix.lower() in (".rttm", ".ctm"):
        by_place = [e._replace(tier="") for e in by_place]
    try:
        found = [e for e in read(made, ()) if e.name] if entries else []
    except FileError as e:
        raise FileError(
            f"{path} cannot hold these labels ({str(e).replace(str(made), 'it')[:300]}); use .csv, which holds any"
        ) from e
    if made.suffix.lower() in (".rttm", ".ctm"):
        found = [e._replace(tier="") for e in found]
    found.sort(key=lambda e: (e.tier, e.begin_ns))
    for wanted, got in zip(by_place, found, strict=False):
        if (wanted.tier, wanted.name) != (got.tier, got.name):
            raise FileError(f"{path} cannot hold the label {wanted.name[:80]!r}; use .csv, which holds any")
    for one, other in pairwise(found if made.suffix.lower() not in (".rttm", ".ctm") else ()):
        if (one.tier, one.begin_ns) == (other.tier, other.begin_ns):
            raise FileError(
                f"{path} cannot hold the labels {one.name[:80]!r} and {other.name[:80]!r}, which begin in the same "
                "unit of its time; use .csv, which holds any"
            )
    if len(found) != len(entries):
        raise FileError(f"{path} cannot hold these {len(entries)} labels: {len(found)} read back; use .csv")
