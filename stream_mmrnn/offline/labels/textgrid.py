"""Labels as Praat writes them (.TextGrid, long and short), by praatio."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from stream_mmrnn.core.errors import FileError
from stream_mmrnn.core.extras import need
from stream_mmrnn.offline.labels.entries import Entry, name_of, seconds_ns, text_of

_COUNT = re.compile(
    r'"(?:IntervalTier|TextTier)"\s+(?:name\s*=\s*)?"(?:[^"]|"")*"\s+(?:xmin\s*=\s*)?\S+\s+(?:xmax\s*=\s*)?\S+\s+'
    r"(?:(?:intervals|points)\s*:\s*size\s*=\s*)?(\d+)"
)
"""A tier's head up to its number of labels, in both forms."""


def check() -> None:
    """Raises UsageError if the package is missing."""
    need(".TextGrid", "labels", "praatio")


def read(path: Path) -> list[Entry]:
    """The intervals and points of all tiers; raises FileError if it is no such file, or is not whole."""
    check()
    from praatio.utilities import textgrid_io

    text = text_of(path)
    if "ooTextFile" not in text[:200] or "TextGrid" not in text[:400]:
        raise FileError(
            f"{path}: line 1 is {text[:40].splitlines()[0]!r}; expected a TextGrid as Praat saves it as text"
        )
    try:
        found = textgrid_io.parseTextgridStr(text.rstrip("\n") + "\n", includeEmptyIntervals=True)
        tiers = [(t["name"], [tuple(entry) for entry in t["entries"]]) for t in found["tiers"]]
    except Exception as e:  # praatio raises what it meets
        why = (str(e).splitlines() or [type(e).__name__])[0][:200]
        raise FileError(
            f"{path} is no TextGrid that praatio can read ({why}); open it in Praat and save it again as text"
        ) from e
    stated = [int(count) for count in _COUNT.findall(text)]
    if stated != [len(entries) for _, entries in tiers]:
        raise FileError(
            f"{path} holds {sum(len(entries) for _, entries in tiers)} labels in {len(tiers)} tiers, and states "
            f"{sum(stated)} in {len(stated)}; it was cut off or damaged: save it again in Praat"
        )
    names = [name for name, _ in tiers]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise FileError(f"{path} has two tiers {twice!r}; give each another name")
    return [_entry(path, tier, i, entry) for tier, entries in tiers for i, entry in enumerate(entries, 1)]


def _entry(path: Path, tier: str, number: int, entry: tuple[Any, ...]) -> Entry:
    is_point = len(entry) == 2
    where = f"{'point' if is_point else 'interval'} {number} of the tier {tier!r}"
    begin_ns = seconds_ns(path, where, "begin", _plain(entry[0]))
    end_ns = None if is_point else seconds_ns(path, where, "end", _plain(entry[1]))
    return Entry(where, tier, begin_ns, end_ns, name_of(path, where, str(entry[-1])))


def _plain(number: Any) -> str:
    return number.strip() if isinstance(number, str) else repr(number)


def write(path: Path, entries: Sequence[Entry], tiers: Sequence[str], end_ns: int) -> None:
    """Write labels as tiers of intervals from 0 to `end_ns`."""
    check()
    from praatio import textgrid

    made = textgrid.Textgrid(0, _seconds(end_ns))
    for tier in tiers:
        intervals = [(_seconds(e.begin_ns), _seconds(e.end_ns or end_ns), e.name) for e in entries if e.tier == tier]
        made.addTier(textgrid.IntervalTier(tier, intervals, 0, _seconds(end_ns)))
    made.save(str(path), format="long_textgrid", includeBlankSpaces=True, minimumIntervalLength=None)


def _seconds(ns: int) -> float:
    return float(Decimal(ns) / 10**9)
