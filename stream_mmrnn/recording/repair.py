"""What is in a recording that was cut off or damaged (`verify`), and a whole file made of it (`repair`).

A recording may have parts: `x.mcap`, and `x.part2.mcap` from a recorder that was restarted. Existing files are never
changed.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from mcap.writer import CompressionType, IndexType, Writer

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import FileError, RecordingError
from stream_mmrnn.core.sequence import SequenceTracker
from stream_mmrnn.recording.append_file import later_parts
from stream_mmrnn.recording.damaged_file import DamagedFileReader, Hole, Message, Note, number
from stream_mmrnn.recording.mcap_file import (
    FORMAT,
    LIBRARY,
    METADATA,
    METADATA_END,
    METADATA_SO_FAR,
    Recording,
    checked,
    scheme,
)
from stream_mmrnn.recording.message_counts import MISSING, MessageCounts

_Holes = list[dict[str, Any]]
_UNKNOWN = {"format": FORMAT, "session": "unknown", "wall_offset_ns": "0", "started_ns": "0"}
"""The head of a file that lost it, and every copy."""


class Account:
    """What the messages of one file, or of its parts one after the other, add up to."""

    def __init__(self) -> None:
        self.messages: Counter[str] = Counter()
        self.missing: Counter[str] = Counter()
        """By topic, what the sequence numbers say that holes have swallowed, dropped messages there among it."""
        self.unnamed = 0
        """Messages of channels of which nothing says what they are."""
        self.first_ns = self.last_ns = 0
        """Unix time of the first and the last message's publishing."""
        self.told: MessageCounts | None = None
        """What the file said last of where messages went."""
        self.told_at_ns = 0
        self.adds_up = True
        """Whether the file's own sums hold, and count the messages that are there."""
        self._hole = 0
        self._numbers: SequenceTracker[str] = SequenceTracker()
        self._holes_before: dict[str, int] = {}
        """By topic: how many holes there were when the last message came."""
        self._here: Counter[str] = Counter()

    def add(self, part: DamagedFileReader, holes: _Holes) -> Iterator[list[Message]]:
        """Count what is in `part`, chunk by chunk; its holes come into `holes`, with what is missing there."""
        self._here.clear()
        broken = False
        for piece in part.walk():
            if isinstance(piece, Hole):
                self._open(holes, part, piece, part.began_ns)
                broken = True
            elif isinstance(piece, Note):
                self._compare(piece, broken)
            else:
                self._count(piece, part, holes)
                yield piece

    def _open(self, holes: _Holes, part: DamagedFileReader, hole: Hole, began_ns: int) -> None:
        self._hole += 1
        holes.append(
            {
                "file": part.path.name,
                "from_byte": hole.at,
                "to_byte": hole.end,
                "after_s": _seconds(began_ns, self.last_ns),
                "why": hole.why,
                "missing": {},
            }
        )

    def between_parts(self, holes: _Holes, before: DamagedFileReader, after: DamagedFileReader) -> None:
        """What was on the bus between them is missing, too."""
        why = f"{after.path.name} goes on"
        if before.tail is None:
            self._open(holes, before, Hole(before.bytes, before.bytes, why), before.began_ns)
        else:
            holes[-1]["why"] += f"; {why}"

    def _count(self, messages: list[Message], part: DamagedFileReader, holes: _Holes) -> None:
        for message in messages:
            topic = part.topic(message.channel_id)
            if not topic:
                self.unnamed += 1
                continue
            self.messages[topic] += 1
            self._here[topic] += 1
            if not self.first_ns:
                self.first_ns = message.publish_ns
            self.last_ns = max(self.last_ns, message.publish_ns)
            # a session's streams begin with its first part, the clock runs before
            first = 0 if topic != topics.CLOCK and number(part.head, "part") < 2 else message.seq
            gap = self._numbers.observe(topic, message.seq, first)
            if gap and self._holes_before.get(topic, 0) != self._hole:
                self.missing[topic] += gap
                holes[-1]["missing"][topic] = holes[-1]["missing"].get(topic, 0) + gap
            self._holes_before[topic] = self._hole

    def _compare(self, note: Note, broken: bool) -> None:
        if note.name not in (METADATA_SO_FAR, METADATA_END) or not note.metadata.keys() >= {"produced", "checksum"}:
            return
        self.told = MessageCounts.of(note.metadata)
        self.told_at_ns = number(note.metadata, "at_ns")
        if self.told.off or (not broken and self.told.recorded != dict(self._here)):
            self.adds_up = False


def _seconds(from_ns: int, to_ns: int) -> float:
    return round(max(to_ns - from_ns, 0) / 1e9, 3)


def _parts(path: Path) -> list[DamagedFileReader]:
    """The file and, where it is the first part of a recording, the others that belong to it.

    Raises:
        FileError: the file is missing, unreadable or no recording.

    """
    first = DamagedFileReader(path)
    parts = [first]
    if first.head.get("part", "1") != "1":
        return parts
    for other in later_parts(path).values():
        try:
            later = DamagedFileReader(other)
        except FileError:
            continue
        # parts of one recording share the clock offset to the nanosecond, others never do
        if later.head and (not first.head or _offset(later) == _offset(first)):
            parts.append(later)
    return parts


def _offset(part: DamagedFileReader) -> tuple[str, str]:
    return part.head.get("session", ""), part.head.get("wall_offset_ns", "")


def verify(path: Path) -> dict[str, Any]:
    """What is in a recording, and whether it is whole.

    `state` is `whole`, `cut off` (it never got an end, or lost it), `damaged` (inside) or `partial` (it is one of
    several parts, or was repaired and lacks something).

    Raises:
        FileError: missing, unreadable, or no recording of this program.

    """
    first, *later = _parts(path)
    account, holes = Account(), _Holes()
    for _ in account.add(first, holes):
        pass
    state, why = _state(first, later, account)
    head = first.head
    counts = account.told or MessageCounts({}, {}, {}, {})
    return {
        "recording": str(path),
        "whole": state == "whole",
        "state": state,
        "why": why,
        "bytes": first.bytes,
        "session": head.get("session", ""),
        "started_unix_ns": first.began_ns,
        "seconds": _seconds(account.first_ns, account.last_ns),
        "messages": dict(sorted(account.messages.items())),
        "predictions": account.messages[topics.PREDICTION],
        "chunks": first.chunks,
        "ends": {
            "how": first.end.get("ended", "not finished"),
            "at_s": _seconds(first.began_ns, account.last_ns),
            "at_byte": first.tail.at if first.tail else first.bytes,
        },
        "dropped": counts.dropped,
        "waiting": {} if first.end else counts.waiting,
        "counted_until_s": _seconds(first.began_ns, account.told_at_ns + number(head, "wall_offset_ns"))
        if account.told_at_ns and not first.end
        else None,
        "adds_up": account.adds_up,
        "holes": holes,
        "repaired": _repairs(first),
        "part": number(head, "part") or 1,
        "parts": [_part_row(part) for part in later],
    }


def _repairs(part: DamagedFileReader) -> dict[str, Any] | None:
    if "repaired" not in part.end:
        return None
    try:
        return msgspec.json.decode(part.end["repaired"], type=dict[str, Any])
    except msgspec.MsgspecError:
        return {}


def _part_row(part: DamagedFileReader) -> dict[str, Any]:
    account = Account()
    for _ in account.add(part, []):
        pass
    return {
        "recording": str(part.path),
        "part": number(part.head, "part"),
        "state": _state(part, [], account)[0],
        "seconds": _seconds(account.first_ns, account.last_ns),
        "messages": account.messages.total(),
    }


def _state(part: DamagedFileReader, later: list[DamagedFileReader], account: Account) -> tuple[str, str]:
    """What state a file is in, and why it is not whole."""
    name = part.path.name
    inside = [h for h in part.holes if h.end < part.bytes]
    if part.damaged:
        where = f" at byte {inside[0].at} of {part.bytes}: {inside[0].why}" if inside else ": an index of it is wrong"
        return "damaged", f"{name} is damaged{where}"
    if part.cut:
        at = part.tail.at if part.tail else part.bytes
        return "cut off", f"{name} was cut off at byte {at}" + ("" if part.chunks else ", before its first message")
    if not account.adds_up or account.unnamed:
        return "damaged", f"{name} does not hold what it says that it holds"
    if damage := _unreadable(part.path):
        return "damaged", damage
    repaired = _repairs(part)
    if repaired is not None and repaired.get("holes"):
        return "partial", f"{name} was repaired and lacks what is named"
    if later:
        return "partial", f"{name} is the first of {1 + len(later)} parts of a recording"
    if (which := number(part.head, "part")) > 1:
        return "partial", f"{name} is part {which} of a recording"
    return "whole", ""


def _unreadable(path: Path) -> str:
    """What keeps a replay from reading all of it; "" where nothing does."""
    recording = Recording(path)
    for _ in recording.batches():
        pass
    return recording.damage


# ---- repair ------------------------------------------------------------------------------------------------------


def repair(path: Path, out: Path) -> dict[str, Any]:
    """Write all that is sound in `path`, and in its later parts, into the new file `out`: with an index, and an end
    that says what it was made of and what is known to be missing. `path` stays as it is. A whole file is copied.

    Raises:
        FileError: `path` is missing or no recording; `out` is there already or cannot be written.
        RecordingError: nothing in `path` can be saved.

    """
    checked_first = verify(path)
    parts = _parts(path)
    if not any(part.channels or part.names for part in parts):
        raise RecordingError(f"{path} holds no message that could be saved: {checked_first['why']}")
    try:
        file = out.open("xb")
    except OSError as e:
        raise FileError(f"{out} cannot be made: {e.strerror}; choose another name") from e
    try:
        with file:
            if checked_first["whole"]:
                with path.open("rb") as source:
                    shutil.copyfileobj(source, file)
                holes, unnamed = _Holes(), 0
            else:
                holes, unnamed = _Join(file, parts).write()
            file.flush()
            os.fsync(file.fileno())
    except BaseException as e:
        out.unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise FileError(f"{out} cannot be written: {e.strerror}") from e
        raise
    return {
        "recording": str(path),
        "was": checked_first["state"],
        "out": str(out),
        "of": [str(part.path) for part in parts],
        "holes": holes,
        "not_named": unnamed,
        "result": verify(out),
    }


class _Join:
    """Parts of a recording on their way into one file."""

    def __init__(self, file: BinaryIO, parts: list[DamagedFileReader]) -> None:
        self._parts = parts
        self._head = next((part.head for part in parts if part.head), _UNKNOWN)
        self._writer: Any = Writer(file, compression=CompressionType.ZSTD, index_types=IndexType.ALL)
        self._schemas: dict[tuple[str, str, bytes], int] = {}
        self._channels: dict[Any, int] = {}
        self._account = Account()

    def write(self) -> tuple[_Holes, int]:
        """What is missing, and how many messages could not be named."""
        writer, account, holes = self._writer, self._account, _Holes()
        writer.start(profile="", library=LIBRARY)
        kept = {key: text for key, text in self._head.items() if key not in ("checksum", "part")}
        writer.add_metadata(METADATA, checked(kept))
        all_counts: list[MessageCounts] = []
        last_ns = 0
        for i, part in enumerate(self._parts):
            if i:
                account.between_parts(holes, self._parts[i - 1], part)
            account.told = None
            for messages in account.add(part, holes):
                for m in messages:
                    channel_id = self._channel(part, m.channel_id)
                    if channel_id:
                        last_ns = max(last_ns, m.log_ns)
                        writer.add_message(channel_id, last_ns, m.data, m.publish_ns, m.seq)
                writer.flush()
            if account.told is not None:
                all_counts.append(account.told)
            if part.tail and "produced" in part.end:
                del holes[-1]  # its index alone: the end comes after the last message
        writer.add_metadata(METADATA_END, checked(self._end(all_counts, holes)))
        writer.finish()
        return holes, account.unnamed

    def _channel(self, part: DamagedFileReader, channel_id: int) -> int:
        """The number of a channel in the new file; 0 where nothing says what it is."""
        channel = part.channels.get(channel_id)
        if channel is not None and channel.schema_id in part.schemas:
            schema = part.schemas[channel.schema_id]
            form = (schema.name, schema.encoding, schema.data)
            key = (channel.topic, channel.message_encoding, tuple(sorted(channel.metadata.items())), form)
        else:
            topic, origin = part.names.get(channel_id, ("", ""))
            if topic not in topics.TOPICS:
                return 0
            encoding, form = scheme(topic)
            about = {"origin": origin, "modality": topics.TOPICS[topic].modality}
            key = (topic, encoding, tuple(sorted(about.items())), form)
        if key not in self._channels:
            if form not in self._schemas:
                self._schemas[form] = self._writer.register_schema(*form)
            self._channels[key] = self._writer.register_channel(key[0], key[1], self._schemas[form], dict(key[2]))
        return self._channels[key]

    def _end(self, all_counts: list[MessageCounts], holes: _Holes) -> dict[str, str]:
        account = self._account
        dropped: dict[str, dict[str, int]] = {}
        for counts in all_counts:
            for topic, reasons in counts.dropped.items():
                row = dropped.setdefault(topic, {})
                for reason, n in reasons.items():
                    row[reason] = row.get(reason, 0) + n
        for topic, n in account.missing.items():
            dropped.setdefault(topic, {})[MISSING] = n
        recorded = dict(account.messages)
        produced = {
            topic: recorded.get(topic, 0) + sum(dropped.get(topic, {}).values()) for topic in recorded | dropped
        }
        end = next((part.end for part in reversed(self._parts) if part.end), {})
        about = {
            "of": [{"file": part.path.name, "bytes": part.bytes} for part in self._parts],
            "holes": holes,
            "not_named": account.unnamed,
        }
        return {
            **MessageCounts(produced, recorded, {}, dropped).as_metadata(),
            "messages": str(account.messages.total()),
            "ended": end.get("ended", "cut off"),
            "statuses": end.get("statuses", "{}"),
            "repaired": msgspec.json.encode(about).decode(),
        }
