"""Labels as ELAN writes them (.eaf, times in milliseconds), by pympi-ling."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stream_mmrnn.core.errors import FileError
from stream_mmrnn.core.extras import need
from stream_mmrnn.offline.labels.entries import MAX_NS, Entry, bytes_of, name_of

_MS = 1_000_000


def check() -> None:
    """Raises UsageError if the package is missing."""
    need(".eaf", "labels", "pympi")


def read(path: Path) -> list[Entry]:
    """The annotations of all tiers; raises FileError if it is no such file, or an annotation has no time."""
    check()
    import pympi

    bytes_of(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = pympi.Eaf(str(path), suppress_version_warning=True)
        units = str(found.header.get("TIME_UNITS", "milliseconds"))
        if units != "milliseconds":
            raise FileError(f"{path} counts time in {units[:40]!r}; expected milliseconds, so save it in ELAN again")
        entries = []
        for tier in found.tiers:
            entries += _tier(path, found, tier)
    except FileError:
        raise
    except Exception as e:  # pympi raises what it meets, and Exception itself
        why = str(e).splitlines()[0][:200] if str(e) else ""
        raise FileError(
            f"{path} is no ELAN file that pympi can read ({type(e).__name__}: {why}); open it in ELAN and save it again"
        ) from e
    return entries


def _tier(path: Path, found: Any, tier: str) -> list[Entry]:
    aligned, references, _, _ = found.tiers[tier]
    entries = []
    for mark, value in [(m, a[2]) for m, a in aligned.items()] + [(m, r[1]) for m, r in references.items()]:
        where = f"the annotation {mark!r} of the tier {tier!r}"
        begin, end, _, _ = _aligned(path, found, mark, where)
        times = [found.timeslots.get(slot) for slot in (begin, end)]
        if times[0] is None or times[1] is None:
            raise FileError(
                f"{path}: {where} has no time of its own; align it in ELAN, or leave its tier out by --tier"
            )
        if not 0 <= max(times) < MAX_NS // _MS:
            raise FileError(f"{path}: {where} is at {str(max(times))[:20]}… ms; expected a time within a session")
        name = name_of(path, where, value)
        entries.append(Entry(where, tier, times[0] * _MS, times[1] * _MS, name))
    return entries


def _aligned(path: Path, found: Any, mark: str, where: str) -> Any:
    """The annotation with times that one is or refers to."""
    seen = set()
    while mark not in seen:
        seen.add(mark)
        tier = found.annotations.get(mark)
        if tier is None:
            break
        aligned, references, _, _ = found.tiers[tier]
        if mark in aligned:
            return aligned[mark]
        mark = references[mark][0]
    raise FileError(f"{path}: {where} refers to {mark[:40]!r}, which has no time; open it in ELAN and save it again")


def write(path: Path, entries: Sequence[Entry], tiers: Sequence[str]) -> None:
    """Write labels as tiers; an annotation shorter than a millisecond gets one."""
    check()
    import pympi

    made: Any = pympi.Eaf(author="stream_mmrnn")
    made.remove_tier("default")
    for tier in tiers:
        made.add_tier(tier)
    for e in entries:
        assert e.end_ns is not None
        begin = (e.begin_ns + _MS // 2) // _MS
        made.add_annotation(e.tier, begin, max(begin + 1, (e.end_ns + _MS // 2) // _MS), e.name)
    made.to_file(str(path))
