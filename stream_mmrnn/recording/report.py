"""What is in a recording, what is missing and what is damaged: the verbs `info` and `verify`.

A recording may have parts: `x.mcap`, and `x.part2.mcap` from a recorder that was restarted.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import FileError
from stream_mmrnn.recording import label_file
from stream_mmrnn.recording.append_file import is_being_written, later_parts
from stream_mmrnn.recording.column_reader import decoder_of
from stream_mmrnn.recording.damaged_file import DamagedFileReader
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.mcap_format import LATE, METADATA_END, METADATA_SO_FAR, METADATA_WALL, UNREADABLE, number
from stream_mmrnn.recording.message_counts import LOST, MessageCounts
from stream_mmrnn.recording.pieces import Chunk, Foreign, Hole, Message, MetadataRecord
from stream_mmrnn.recording.schemas import Decode
from stream_mmrnn.recording.settings import encoders_of


class RecordingSummary:
    """Counts of the messages in one file, or in all parts of a recording."""

    def __init__(self) -> None:
        self.files: list[DamagedFileReader] = []
        self.messages: Counter[str] = Counter()
        self.origins: dict[str, str] = {}
        self.gaps: Counter[str] = Counter()
        """By topic, messages missing after the first one by their sequence numbers."""
        self.missing: Counter[str] = Counter()
        """By topic, messages missing at holes by their sequence numbers (including any that were dropped there)."""
        self.unnamed = 0
        """Messages of unknown channels."""
        self.holes: list[dict[str, Any]] = []
        self.first_ns = self.last_ns = 0
        """Publish times of the first and the last message, in Unix time."""
        self.wall_steps: list[dict[str, int]] = []
        self.stated = MessageCounts.of({})
        """The last counts in the file's metadata."""
        self.stated_at_ns = 0
        self.adds_up = True
        """Whether the file's own counts are consistent and match the messages in it."""
        self.undecodable = ""
        """Why a replay could not decode a message."""
        self._next: dict[str, int] = {}
        """By topic, the expected sequence number."""
        self._holes_before: dict[str, int] = {}
        """By topic, the number of holes before its last message."""

    def add(self, file: DamagedFileReader) -> Iterator[Chunk | MetadataRecord | Foreign]:
        """Count the messages of a file, or of the recording's next part, and yield its intact pieces."""
        if self.files:
            self._between_parts(f"{file.path.name} goes on")
        self.files.append(file)
        self.stated, before, broken = MessageCounts.of({}), self.messages.copy(), False
        for piece in file.walk():
            if isinstance(piece, Hole):
                self._open(piece)
                broken = True
                continue
            if isinstance(piece, Chunk):
                self._count(piece.messages)
            elif isinstance(piece, Foreign):
                pass
            elif piece.name == METADATA_WALL:
                self.wall_steps.append({name: number(piece.metadata, name) for name in ("at_ns", "step_ns")})
            elif piece.name in (METADATA_SO_FAR, METADATA_END) and piece.metadata.keys() >= {"produced", "checksum"}:
                self.stated = MessageCounts.of(piece.metadata)
                self.stated_at_ns = number(piece.metadata, "at_ns")
                if self.stated.off or (not broken and self.stated.recorded != self.messages - before):
                    self.adds_up = False
            yield piece

    def _open(self, hole: Hole) -> None:
        self.holes.append(
            {
                "file": self.file.path.name,
                "from_byte": hole.at,
                "to_byte": hole.end,
                "after_s": _seconds(self.file.began_ns, self.last_ns),
                "why": hole.why,
                "missing": Counter(),
            }
        )

    def _between_parts(self, why: str) -> None:
        if self.file.tail is None:
            self._open(Hole(self.file.bytes, self.file.bytes, why))
        else:
            self.holes[-1]["why"] += f"; {why}"

    def _count(self, messages: list[Message]) -> None:
        names, numbers, holes, last_ns = self.file.names, self._next, len(self.holes), self.last_ns
        for m in messages:
            topic, origin = names.get(m.channel_id, ("", ""))
            if topic not in numbers:
                if not topic:
                    self.unnamed += 1
                    continue
                # a session's streams begin at 0 in its first part, unless it began late; the clock began earlier
                later = number(self.file.head, "part") > 1 or LATE in self.file.head
                numbers[topic] = m.seq if topic == topics.CLOCK or later else 0
                self.origins[topic] = origin
            gap = m.seq - numbers[topic]
            if gap > 0:
                self.gaps[topic] += gap if self.messages[topic] else 0
                if self._holes_before.get(topic, 0) != holes:
                    self.missing[topic] += gap
                    self.holes[-1]["missing"][topic] += gap
            numbers[topic] = m.seq + 1
            self.messages[topic] += 1
            self._holes_before[topic] = holes
            self.first_ns = self.first_ns or m.publish_ns
            if m.publish_ns > last_ns:
                last_ns = m.publish_ns
        self.last_ns = last_ns

    @property
    def file(self) -> DamagedFileReader:
        """The file that was counted last."""
        return self.files[-1]


def _seconds(from_ns: int, to_ns: int) -> float:
    return round(max(to_ns - from_ns, 0) / 1e9, 3)


def summarise(path: Path) -> RecordingSummary:
    """Count the messages of one file."""
    file = DamagedFileReader(path)
    summary = _read(file)
    # what damage destroyed (head, channels) may be repeated later in the file
    return _read(file) if file.damaged else summary


def _read(file: DamagedFileReader) -> RecordingSummary:
    """Count the messages in one pass, and decode those of an intact file as a replay would: a checksum does not say
    that a message is valid.
    """
    summary = RecordingSummary()
    decoders: dict[int, Decode] = {}
    for chunk in summary.add(file):
        if not isinstance(chunk, Chunk) or file.holes or summary.undecodable:
            continue
        try:
            for m in chunk.messages:
                decode = decoders.get(m.channel_id)
                if decode is None:
                    channel = file.channels[m.channel_id]
                    decode = decoder_of(channel.topic, file.schemas[channel.schema_id], 0)
                    decoders[m.channel_id] = decode
                decode(m.data, 0, len(m.data))
        except UNREADABLE as e:
            summary.undecodable = f"{file.path.name} has a damaged record ({e})"
    return summary


def summarise_parts(path: Path) -> list[RecordingSummary]:
    """The file and, where it is the first part of a recording, the others that belong to it."""
    summaries = [first := summarise(path)]
    if first.file.head.get("part", "1") == "1":
        for other in later_parts(path).values():
            with contextlib.suppress(FileError):
                later = summarise(other)
                a, b = first.file.head, later.file.head
                # the clock offset in nanoseconds identifies the parts of one recording
                if b and (not a or all(a.get(key) == b.get(key) for key in ("session", "wall_offset_ns"))):
                    summaries.append(later)
    return summaries


RECORDING = "being recorded"
"""The state of a file whose recorder still runs."""


def state_of(first: RecordingSummary, later: Sequence[RecordingSummary] = ()) -> tuple[str, str]:
    """The state of a file, and the reason if it is not whole.

    It is `whole`, `cut off` (it has no end), `being recorded` (it has no end yet), `damaged` (inside) or `partial` (one
    of several parts, or repaired with messages missing).
    """
    file, name = first.file, first.file.path.name
    if file.damaged:
        inside = [h for h in file.holes if h.end < file.bytes]
        where = f" at byte {inside[0].at} of {file.bytes}: {inside[0].why}" if inside else ": an index of it is wrong"
        return "damaged", f"{name} is damaged{where}"
    if file.cut and is_being_written(file.path):
        return RECORDING, f"{name} is being recorded; this is what is in it so far"
    if file.cut:
        at = file.tail.at if file.tail else file.bytes
        return "cut off", f"{name} was cut off at byte {at}" + ("" if file.chunks else ", before its first message")
    if not first.adds_up or first.unnamed:
        return "damaged", f"{name} does not hold what it says that it holds"
    Recording(file.path)  # raises FileError if a replay would refuse the head
    if first.undecodable:
        return "damaged", first.undecodable
    if (_repairs(file) or {}).get("holes"):
        return "partial", f"{name} was repaired and lacks what is named"
    if later:
        return "partial", f"{name} is the first of {1 + len(later)} parts of a recording"
    if (which := number(file.head, "part")) > 1:
        return "partial", f"{name} is part {which} of a recording"
    return "whole", ""


def _repairs(file: DamagedFileReader) -> dict[str, Any] | None:
    if "repaired" not in file.end:
        return None
    try:
        return msgspec.json.decode(file.end["repaired"], type=dict[str, Any])
    except msgspec.MsgspecError:
        return {}


def info(path: Path) -> dict[str, Any]:
    """The contents of a recording: streams with their counts and rates, model, encoders, losses, and any damage.

    Raises:
        FileError: missing, unreadable, or not a recording of this program.

    """
    summary = summarise(path)
    head, end = summary.file.head, summary.file.end
    state, why = state_of(summary)
    damage = why if state in ("damaged", "cut off") else ""
    try:
        lost = msgspec.json.decode(end.get("lost", "{}"), type=dict[str, int])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        lost = {}
        damage = damage or f"{path.name} has a damaged end: what it lost cannot be read"
    seconds = (summary.last_ns - summary.first_ns) / 1e9
    recorded = {topics.stream_of(topic) for topic in summary.messages}
    return {
        **_about(summary),
        "model": {"name": head.get("model", ""), "sha256": head.get("model_sha256", "")},
        "raw": head.get("raw") == "true",
        "encoders": {name: msgspec.to_builtins(c) for name, c in encoders_of(head).items() if name in recorded},
        "wall_steps": summary.wall_steps,
        "channels": {
            topic: {
                "messages": count,
                "origin": summary.origins[topic],
                "gaps": summary.gaps[topic],
                "rate_hz": _rate_hz(count, seconds),
            }
            for topic, count in sorted(summary.messages.items())
        },
        "labels_beside": _labels_beside(path, head),
        "lost": summary.stated.by_reason(LOST) or lost,
        "ended": RECORDING if state == RECORDING else end.get("ended", "not finished"),
        "whole": not damage,
        "damage": damage,
    }


def _labels_beside(path: Path, head: Mapping[str, str]) -> dict[str, Any] | None:
    """The labels that were given afterwards, by tier; None if there are none. `damage`: why they cannot be read."""
    about: dict[str, Any] = {"file": str(label_file.place_of(path)), "from": [], "tiers": {}, "damage": ""}
    try:
        found = label_file.read(path, head)
    except FileError as e:
        return {**about, "damage": str(e)}
    if found is None:
        return None
    return {**about, "from": found.sources, "tiers": label_file.counted(found)}


def _rate_hz(count: int, seconds: float) -> float:
    """Messages per second, also where there is one per day."""
    if not seconds:
        return 0.0
    rate_hz = count / seconds
    return round(rate_hz, 2) if rate_hz >= 0.1 else float(f"{rate_hz:.3g}")


def _about(summary: RecordingSummary) -> dict[str, Any]:
    """What `info` and `verify` both say."""
    return {
        "recording": str(summary.file.path),
        "bytes": summary.file.bytes,
        "session": summary.file.head.get("session", ""),
        "started_unix_ns": summary.file.began_ns,
        "seconds": _seconds(summary.first_ns, summary.last_ns),
        "dropped": summary.stated.dropped,
    }


def verify(path: Path) -> dict[str, Any]:
    """Report what is in a recording, and whether it is whole.

    Raises:
        FileError: missing, unreadable, or not a recording of this program.

    """
    first, *later = summarise_parts(path)
    file, (state, why) = first.file, state_of(first, later)
    return {
        **_about(first),
        "whole": state == "whole",
        "state": state,
        "why": why,
        "messages": dict(sorted(first.messages.items())),
        "predictions": first.messages[topics.PREDICTION],
        "chunks": file.chunks,
        "ends": {
            "how": file.end.get("ended", "not finished"),
            "at_s": _seconds(file.began_ns, first.last_ns),
            "at_byte": file.tail.at if file.tail else file.bytes,
        },
        "waiting": {} if file.end else first.stated.waiting,
        "counted_until_s": _seconds(file.began_ns, first.stated_at_ns + number(file.head, "wall_offset_ns"))
        if first.stated_at_ns and not file.end
        else None,
        "adds_up": first.adds_up,
        "holes": first.holes,
        "repaired": _repairs(file),
        "part": number(file.head, "part") or 1,
        "parts": [
            {
                "recording": str(part.file.path),
                "part": number(part.file.head, "part"),
                "state": state_of(part)[0],
                "seconds": _seconds(part.first_ns, part.last_ns),
                "messages": part.messages.total(),
            }
            for part in later
        ],
    }
