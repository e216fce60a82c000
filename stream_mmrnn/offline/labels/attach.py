"""Give labels to a recording afterwards: check them against its span, and write them beside it or into a new one.

The labels become what they would be if they had been typed: a change at a time, valid until the next one. Nothing is
written if one label is wrong. Knows nothing about the formats (`formats`).
"""

from __future__ import annotations

import re
import zoneinfo
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.offline.convert.unpack import Contents, inspect
from stream_mmrnn.offline.labels import formats
from stream_mmrnn.offline.labels.entries import Clock, Entry
from stream_mmrnn.offline.labels.new_recording import copy_with
from stream_mmrnn.recording import label_file
from stream_mmrnn.recording.label_file import MAX_TIERS, NOTHING, Change, place_of
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.training.tasks.recordings import TypedEvents

_TOUCH_NS = 10_000_000
"""Overlaps up to this are rounding, as of times in hundredths of a second: the earlier label ends sooner."""


_FOREVER_NS = 2**62


class LabelOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How labels are understood."""

    clock: Clock = "session"
    timezone: str = "UTC"
    """Of dates and times without one."""
    shift_ns: int = 0
    """Added to every time: how much later than the session the labelled video or sound begins."""
    tiers: dict[str, str] = msgspec.field(default_factory=dict)
    """By tier of the file, its name here; without any, all tiers."""
    fill: str = ""
    """The label of the time between labels; without it, no label is true there."""
    apart: bool = False
    """Whether each label gets a tier of its own, so that labels may overlap."""


class _Span(msgspec.Struct, frozen=True):
    """From when to when a recording is, and how its times are shown."""

    zero_ns: int
    end_ns: int
    wall_ns: int
    """What Unix time is ahead of the recording's."""
    clock: Clock

    def shown(self, at_ns: int) -> str:
        """A time for people, of the clock that they use."""
        if self.clock == "session":
            return f"{(at_ns - self.zero_ns) / 1e9:.3f} s"
        try:
            when = datetime.fromtimestamp((at_ns + self.wall_ns) / 1e9, UTC)
        except (ValueError, OverflowError, OSError):
            return f"{(at_ns + self.wall_ns) / 1e9:.3f} s since 1970"
        return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def attach(
    path: Path, sources: Sequence[Path], options: LabelOptions, out: Path | None = None, force: bool = False
) -> dict[str, Any]:
    """Give the labels of `sources` to a recording; returns what was done. `out`: a new recording, instead of the labels
    beside `path`.

    Raises:
        UsageError: an option is wrong.
        FileError: a file cannot be read or written, or a label is wrong; nothing is written then.

    """
    zone = _zone(options.timezone)
    if options.fill in NOTHING[1:]:
        raise UsageError("--fill is a label; without it there is none between labels")
    for source in sources:
        formats.check(source)
    if out is None and place_of(path).exists() and not force:
        raise FileError(f"{place_of(path)} is there already; use --force to give the recording other labels")
    seen, recording = inspect(path, labels_beside=False), Recording(path, labels_beside=False)
    if out is not None and seen.damage:
        raise FileError(f"{seen.damage}; stream-mmrnn repair makes a whole one of it, which can be labelled")
    wall_ns = recording.started_unix_ns - int(recording.metadata["started_ns"])
    span = _Span(seen.zero_ns, seen.end_ns, wall_ns, options.clock)
    notes: list[str] = []
    names = (path.stem, recording.session)
    giver = _Giver(span, options, notes.append)
    for source in sources:
        giver.add(source, formats.read(source, names, options.clock, zone, notes.append))
    tiers = giver.tiers()
    typed = TypedEvents.of(recording).tiers
    if options.clock == "wall" and recording.wall_steps:
        at_ns, step_ns = recording.wall_steps[0]
        notes.append(
            f"the wall clock was set by {step_ns / 1e9:.3f} s at {(at_ns - span.zero_ns) / 1e9:.1f} s: times are those "
            "of the clock as it was before"
        )
    labels = label_file.made_for(recording.metadata, [source.name for source in sources], tiers)
    written = label_file.write(path, labels, force) if out is None else copy_with(path, labels, out)
    return {
        "recording": str(path),
        "written": str(written),
        "from": [str(source) for source in sources],
        "clock": options.clock,
        "seconds": round((span.end_ns - span.zero_ns) / 1e9, 3),
        "zero_unix_ns": span.zero_ns + wall_ns,
        "tiers": {tier: described(changes, span.end_ns) for tier, changes in tiers.items()},
        "clipped": giver.clipped,
        "empty": giver.empty,
        "replaced": {tier: len(typed[tier]) for tier in tiers if typed.get(tier)},
        "notes": notes,
        "damage": seen.damage,
    }


def _zone(name: str) -> Any:
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as e:
        raise UsageError(f"--timezone {name!r} is not known; use a name such as Europe/Berlin") from e


def described(changes: Sequence[tuple[int, str]], end_ns: int) -> dict[str, dict[str, Any]]:
    """By label of a tier, how often it begins and for how long it is true."""
    found: dict[str, dict[str, Any]] = {}
    for begin_ns, stop_ns, name in spans_of(changes, end_ns):
        row = found.setdefault(name, {"count": 0, "seconds": 0.0})
        row["count"] += 1
        row["seconds"] = round(row["seconds"] + (stop_ns - begin_ns) / 1e9, 3)
    return found


def spans_of(changes: Sequence[tuple[int, str]], end_ns: int) -> list[tuple[int, int, str]]:
    """Begin, end and name of each time that a label is true."""
    ends = [at_ns for at_ns, _ in changes[1:]] + [end_ns]
    spans = [(at_ns, min(stop, end_ns), name) for (at_ns, name), stop in zip(changes, ends, strict=False)]
    return [(begin, stop, name) for begin, stop, name in spans if name not in NOTHING and begin < stop]


class _Giver:
    """Collects the labels of files, and makes the changes of each tier."""

    def __init__(self, span: _Span, options: LabelOptions, note: Callable[[str], None]) -> None:
        self._span, self._options, self._note = span, options, note
        self._offset_ns = (span.zero_ns if options.clock == "session" else -span.wall_ns) + options.shift_ns
        self._entries: dict[str, list[tuple[Path, Entry]]] = {}
        self.clipped = self.empty = 0

    def add(self, path: Path, entries: Sequence[Entry]) -> None:
        """Add those of a file."""
        names = self._names(path, list(dict.fromkeys(e.tier for e in entries)))
        before: dict[str, Entry] = {}
        begins: dict[str, list[int]] = {}
        for e in entries:
            begins.setdefault(e.tier, []).append(e.begin_ns)
        for found in begins.values():
            found.sort()
        noted = False
        for e in entries:
            if e.tier not in names:
                continue
            if not e.name:
                self.empty += 1
                continue
            tier = names[e.tier]
            if tier in before and e.begin_ns < before[tier].begin_ns and not noted:
                self._note(f"{path.name}: {e.where} begins before {before[tier].where}; the labels were sorted by time")
                noted = True
            before[tier] = e
            if self._options.apart:
                if e.end_ns is None:
                    raise FileError(
                        f"{path}: {e.where} has no end, which --apart needs; give one, or leave --apart out"
                    )
                if e.name in NOTHING:
                    continue
                tier = _tier_name(e.name)
            until = bisect_right(begins[e.tier], e.begin_ns)
            next_ns = begins[e.tier][until] if until < len(begins[e.tier]) else _FOREVER_NS
            self._entries.setdefault(tier, []).append((path, self._placed(path, e, next_ns)))

    def _names(self, path: Path, tiers: Sequence[str]) -> dict[str, str]:
        """By tier of a file that is taken, its name here."""
        chosen = self._options.tiers
        if unknown := [tier for tier in chosen if tier not in tiers]:
            raise UsageError(f"{path} has no tier {unknown[0]!r}; it has {', '.join(map(repr, tiers[:50]))}")
        names = {tier: chosen.get(tier) or _tier_name(tier) for tier in (chosen or tiers)}
        if bad := next((name for name in names.values() if not re.match(topics.STREAM_NAME, name)), None):
            raise UsageError(f"--tier names {bad[:64]!r}: expected 1 to 32 letters, digits, `_` or `-`")
        if len(set(names.values())) < len(names):
            raise UsageError(f"two tiers of {path} would have one name; give them others with --tier OLD=NEW")
        for old, new in names.items():
            if old != new and not chosen:
                self._note(f"{path.name}: the tier {old!r} is called {new} here")
        return names

    def _placed(self, path: Path, e: Entry, next_ns: int) -> Entry:
        """The entry in the recording's time and within its span. `next_ns`: of the file's next label of the tier."""
        span, named = self._span, f"{path}: {e.where} ({e.name[:40]!r})"
        begin_ns = e.begin_ns + self._offset_ns
        end_ns = None if e.end_ns is None else e.end_ns + self._offset_ns
        if end_ns is not None and end_ns <= begin_ns:
            raise FileError(
                f"{named} begins at {span.shown(begin_ns)} and ends at {span.shown(end_ns)}; expected an end after the "
                "begin, so correct one of them"
            )
        shifted_ns = e.begin_ns + self._options.shift_ns
        if shifted_ns < 0:
            raise FileError(
                f"{named} begins at {shifted_ns / 1e9:.3f} s; expected times from 0 on, so correct it, or move all by "
                "--shift"
            )
        if begin_ns >= span.end_ns or (next_ns + self._offset_ns if end_ns is None else end_ns) <= span.zero_ns:
            until = "" if end_ns is None else f" and ends at {span.shown(end_ns)}"
            raise FileError(
                f"{named} begins at {span.shown(begin_ns)}{until}, outside of the recording, which is from "
                f"{span.shown(span.zero_ns)} to {span.shown(span.end_ns)}; nothing was written: are the labels of this "
                "recording, and of the clock that --clock names?"
            )
        if begin_ns < span.zero_ns or (end_ns or 0) > span.end_ns:
            self.clipped += 1
            begin_ns = max(begin_ns, span.zero_ns)
            end_ns = None if end_ns is None else min(end_ns, span.end_ns)
        return e._replace(begin_ns=begin_ns, end_ns=end_ns)

    def tiers(self) -> dict[str, list[Change]]:
        """The changes by tier; raises FileError if labels of a tier overlap, or there are none."""
        if not self._entries:
            raise FileError("there is no label to give: every one is empty; expected names")
        if len(self._entries) > MAX_TIERS:
            raise FileError(
                f"there are {len(self._entries)} tiers, at most {MAX_TIERS} are kept; choose some by --tier"
            )
        return {tier: self._changes(entries) for tier, entries in self._entries.items()}

    def _changes(self, entries: list[tuple[Path, Entry]]) -> list[Change]:
        nothing, end_ns = self._options.fill or NOTHING[1], self._span.end_ns
        entries = sorted(entries, key=lambda one: one[1].begin_ns)
        changes: list[Change] = []
        if self._options.fill and entries[0][1].begin_ns > self._span.zero_ns:
            changes.append((self._span.zero_ns, nothing))
        for i, (path, e) in enumerate(entries):
            changes.append((e.begin_ns, nothing if e.name in NOTHING else e.name))
            following = entries[i + 1] if i + 1 < len(entries) else None
            next_ns = end_ns if following is None else following[1].begin_ns
            stop_ns = next_ns if e.end_ns is None else e.end_ns
            if following is not None and (next_ns <= e.begin_ns or stop_ns - next_ns > _TOUCH_NS):
                raise self._overlap((path, e), following)
            if stop_ns < next_ns:
                changes.append((stop_ns, nothing))
        return changes

    def _overlap(self, one: tuple[Path, Entry], other: tuple[Path, Entry]) -> FileError:
        (path, e), (next_path, following) = one, other
        until = "" if e.end_ns is None else f" to {self._span.shown(e.end_ns)}"
        file = "" if path == next_path else f"{next_path}: "
        return FileError(
            f"{path}: {e.where} ({e.name[:40]!r}, from {self._span.shown(e.begin_ns)}{until}) overlaps {file}"
            f"{following.where} ({following.name[:40]!r}, from {self._span.shown(following.begin_ns)}); expected one "
            "label at a time in a tier, so correct one, or give each label a tier of its own with --apart"
        )


def _tier_name(name: str) -> str:
    """A name that a tier may have here, from any."""
    kept = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_-")[:32]
    return kept if kept and kept[0].isalnum() else f"tier_{kept}"[:32].rstrip("_") or "tier"


def existing(path: Path) -> tuple[Contents, Mapping[str, list[tuple[int, str]]]]:
    """What is in a recording, and its labels by tier, typed or given afterwards."""
    tiers = TypedEvents.of(Recording(path)).tiers
    return inspect(path), {tier: changes for tier, changes in tiers.items() if changes}
