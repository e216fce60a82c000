"""Labels that were given to a recording afterwards: a file beside it, read wherever the recording's labels are read.

`x.mcap` has them in `x.labels.json`. A tier in it takes the place of the same tier in the recording, which is not
changed. Knows nothing about the formats that labels come from.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import FileError
from stream_mmrnn.core.message_columns import MessageColumns
from stream_mmrnn.core.types import Envelope

SUFFIX = ".labels.json"
NOTHING = ("", "none")
"""Labels that mean: no label."""
MAX_TIERS = 64
MAX_BYTES = 256 * 2**20

Change = tuple[Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)], str]
"""From this event time on, this label is true; `none` ends one."""


class LabelFile(msgspec.Struct, forbid_unknown_fields=True):
    """The contents of the file. `session` to `wall_offset_ns` are those of the recording, and say which one it is."""

    format: Literal[1]
    session: str
    started_ns: str
    wall_offset_ns: str
    sources: list[str]
    """The names of the files that the labels are from."""
    tiers: dict[Annotated[str, msgspec.Meta(pattern=topics.STREAM_NAME)], list[Change]]
    """By tier the labels by time; `label` is the tier of typed ones."""


def counted(labels: LabelFile) -> dict[str, int]:
    """By tier how often a label begins."""
    return {tier: sum(name not in NOTHING for _, name in changes) for tier, changes in labels.tiers.items()}


def place_of(recording: Path) -> Path:
    """The place of the labels that belong to a recording."""
    return recording.with_suffix(SUFFIX)


def made_for(metadata: Mapping[str, str], sources: Sequence[str], tiers: Mapping[str, list[Change]]) -> LabelFile:
    """Labels for the recording with this metadata."""
    return LabelFile(1, *_identity(metadata), sources=[*sources], tiers=dict(tiers))


def _identity(metadata: Mapping[str, str]) -> tuple[str, str, str]:
    return metadata.get("session", ""), metadata.get("started_ns", ""), metadata.get("wall_offset_ns", "")


def read(recording: Path, metadata: Mapping[str, str]) -> LabelFile | None:
    """The labels beside a recording with this metadata; None if there are none.

    Raises:
        FileError: they cannot be read, or are another recording's.

    """
    path = place_of(recording)
    try:
        if not path.exists():
            return None
        if path.stat().st_size > MAX_BYTES:
            raise FileError(f"{path} has more than {MAX_BYTES} bytes, which no labels have; {_AGAIN}")
        found = msgspec.json.decode(path.read_bytes(), type=LabelFile)
    except OSError as e:
        raise FileError(f"the labels {path} cannot be read: {e.strerror}; {_AGAIN}") from e
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        raise FileError(f"{path} holds no labels: {str(e)[:200]}; {_AGAIN}") from e
    if (found.session, found.started_ns, found.wall_offset_ns) != _identity(metadata):
        raise FileError(
            f"{path} holds labels of another recording, of the session {found.session[:64]!r}; move it away, or give "
            "this recording its own with stream-mmrnn label --force"
        )
    if len(found.tiers) > MAX_TIERS:
        raise FileError(f"{path} has {len(found.tiers)} tiers, at most {MAX_TIERS} are read; {_AGAIN}")
    for changes in found.tiers.values():
        changes.sort(key=lambda change: change[0])
    return found


_AGAIN = "give them again with stream-mmrnn label --force, or move the file away"


def write(recording: Path, labels: LabelFile, force: bool) -> Path:
    """Write labels beside a recording; returns the place.

    Raises:
        FileError: there are some already (unless `force`), or they cannot be written; the old ones are kept then.

    """
    path = place_of(recording)
    if len(labels.tiers) > MAX_TIERS:
        raise FileError(f"{path} would have {len(labels.tiers)} tiers; expected at most {MAX_TIERS}, so leave some out")
    if path.exists() and not force:
        raise FileError(f"{path} is there already; use --force to give the recording other labels")
    new = path.with_name(f".{path.name}.new")
    try:
        with new.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(labels), indent=1) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as e:
        with contextlib.suppress(OSError):  # where nothing can be written, nothing can be removed
            new.unlink(missing_ok=True)
        raise FileError(f"{path} cannot be written: {e.strerror}; make room, or use --out for a new recording") from e
    return path


class Merge:
    """Puts labels into the messages of a recording where they would be if they had been typed."""

    def __init__(self, session: str, labels: LabelFile) -> None:
        self._tiers = frozenset(labels.tiers)
        every = sorted((at_ns, tier, name) for tier, changes in labels.tiers.items() for at_ns, name in changes)
        self._waiting = [
            Envelope(topics.LABEL, session, seq, at_ns, at_ns, at_ns, name.encode(), topics.TIER + tier)
            for seq, (at_ns, tier, name) in enumerate(every)
        ]
        self._times = np.array([at_ns for at_ns, _, _ in every], np.int64)
        self._done = 0

    def into(self, messages: MessageColumns) -> MessageColumns:
        """The messages with the labels that are due among them, and without those whose place these take."""
        others = [
            (place, e)
            for place, e in messages.others
            if not (e.topic == topics.LABEL and topics.tier_of(e.origin) in self._tiers)
        ]
        place = np.concatenate([*(c.place for c in messages.channels), np.array([p for p, _ in others], np.int64)])
        if not len(place):
            return MessageColumns(messages.begin, messages.end, messages.channels, others)
        published = np.concatenate(
            [*(c.publish_ns for c in messages.channels), np.array([e.publish_ns for _, e in others], np.int64)]
        )
        order = np.argsort(place)
        place, published = place[order], np.maximum.accumulate(published[order])
        due = int(np.searchsorted(self._times, published[-1], "right"))
        new, self._done = self._waiting[self._done : due], max(self._done, due)
        if not new:
            return MessageColumns(messages.begin, messages.end, messages.channels, others)
        after = np.searchsorted(published, [e.publish_ns for e in new], "right")
        before = np.append(place, messages.end)[after]
        """The places that follow the labels."""
        channels = [
            msgspec.structs.replace(c, place=c.place + np.searchsorted(before, c.place, "right"))
            for c in messages.channels
        ]
        moved = [(p + int(np.searchsorted(before, p, "right")), e) for p, e in others]
        moved += [(p + i, e) for i, (p, e) in enumerate(zip(before.tolist(), new, strict=True))]
        return MessageColumns(messages.begin, messages.end + len(new), channels, sorted(moved, key=lambda one: one[0]))

    def rest(self) -> Iterable[MessageColumns]:
        """The labels after the last message."""
        new, self._done = self._waiting[self._done :], len(self._waiting)
        if new:
            yield MessageColumns(0, len(new), [], [*enumerate(new)])
