"""`verify` reports what is in a recording and whether it is intact; `repair` writes the intact part to a new file.

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
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.mcap_format import FORMAT, LIBRARY, METADATA, METADATA_END, METADATA_SO_FAR, checked, scheme
from stream_mmrnn.recording.message_counts import MISSING, MessageCounts

_Holes = list[dict[str, Any]]
_UNKNOWN = {"format": FORMAT, "session": "unknown", "wall_offset_ns": "0", "started_ns": "0"}
"""The head used for a file that lost its head and every copy of it."""


class Account:
    """Counts of the messages in one file, or in all parts of a recording."""

    def __init__(self) -> None:
        self.messages: Counter[str] = Counter()
        self.missing: Counter[str] = Counter()
        """By topic, messages missing at holes by their sequence numbers (including any that were dropped there)."""
        self.unnamed = 0
        """Messages of unknown channels."""
        self.first_ns = self.last_ns = 0
        """Publish times of the first and the last message, in Unix time."""
        self.stated: MessageCounts | None = None
        """The last counts in the file's metadata."""
        self.stated_at_ns = 0
        self.adds_up = True
        """Whether the file's own counts are consistent and match the messages in it."""
        self._hole = 0
        self._numbers: SequenceTracker[str] = SequenceTracker()
        self._holes_before: dict[str, int] = {}
        """By topic, the number of holes before its last message."""
        self._here: Counter[str] = Counter()

    def add(self, part: DamagedFileReader, holes: _Holes) -> Iterator[list[Message]]:
        """Count the messages of `part` and yield them by chunk; its holes are appended to `holes`."""
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
        """Add a hole for the messages between two parts."""
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
            # a session's streams begin at 0 in its first part; the clock began earlier
            first = 0 if topic != topics.CLOCK and number(part.head, "part") < 2 else message.seq
            gap = self._numbers.observe(topic, message.seq, first)
            if gap and self._holes_before.get(topic, 0) != self._hole:
                self.missing[topic] += gap
                holes[-1]["missing"][topic] = holes[-1]["missing"].get(topic, 0) + gap
            self._holes_before[topic] = self._hole

    def _compare(self, note: Note, broken: bool) -> None:
        if note.name not in (METADATA_SO_FAR, METADATA_END) or not note.metadata.keys() >= {"produced", "checksum"}:
            return
        self.stated = MessageCounts.of(note.metadata)
        self.stated_at_ns = number(note.metadata, "at_ns")
        if self.stated.off or (not broken and self.stated.recorded != dict(self._here)):
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
        # the clock offset in nanoseconds identifies the parts of one recording
        if later.head and (not first.head or _offset(later) == _offset(first)):
            parts.append(later)
    return parts


def _offset(part: DamagedFileReader) -> tuple[str, str]:
    return part.head.get("session", ""), part.head.get("wall_offset_ns", "")


def verify(path: Path) -> dict[str, Any]:
    """Report what is in a recording, and whether it is whole.

    `state` is `whole`, `cut off` (it has no end), `damaged` (inside) or `partial` (one of several parts, or repaired
    with messages missing).

    Raises:
        FileError: missing, unreadable, or not a recording of this program.

    """
    first, *later = _parts(path)
    account, holes = Account(), _Holes()
    for _ in account.add(first, holes):
        pass
    state, why = _state(first, later, account)
    head = first.head
    counts = account.stated or MessageCounts({}, {}, {}, {})
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
        "counted_until_s": _seconds(first.began_ns, account.stated_at_ns + number(head, "wall_offset_ns"))
        if account.stated_at_ns and not first.end
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
    """The state of a file, and the reason if it is not whole."""
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
    """The damage that a replay would meet; "" if none."""
    recording = Recording(path)
    for _ in recording.batches():
        pass
    return recording.damage


# ---- repair ------------------------------------------------------------------------------------------------------


def repair(path: Path, out: Path) -> dict[str, Any]:
    """Write all intact messages of `path`, and of its later parts, into the new file `out`.

    It gets an index, and an end that names its sources and what is known to be missing. `path` is not changed. A whole
    file is copied.

    Raises:
        FileError: `path` is missing or not a recording; `out` exists already or cannot be written.
        RecordingError: no message in `path` can be saved.

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
    """Writes the parts of a recording into one file."""

    def __init__(self, file: BinaryIO, parts: list[DamagedFileReader]) -> None:
        self._parts = parts
        self._head = next((part.head for part in parts if part.head), _UNKNOWN)
        self._writer: Any = Writer(file, compression=CompressionType.ZSTD, index_types=IndexType.ALL)
        self._schemas: dict[tuple[str, str, bytes], int] = {}
        self._channels: dict[Any, int] = {}
        self._account = Account()

    def write(self) -> tuple[_Holes, int]:
        """Returns the holes, and the number of messages of unknown channels."""
        writer, account, holes = self._writer, self._account, _Holes()
        writer.start(profile="", library=LIBRARY)
        kept = {key: text for key, text in self._head.items() if key not in ("checksum", "part")}
        writer.add_metadata(METADATA, checked(kept))
        all_counts: list[MessageCounts] = []
        last_ns = 0
        for i, part in enumerate(self._parts):
            if i:
                account.between_parts(holes, self._parts[i - 1], part)
            account.stated = None
            for messages in account.add(part, holes):
                for m in messages:
                    channel_id = self._channel(part, m.channel_id)
                    if channel_id:
                        last_ns = max(last_ns, m.log_ns)
                        writer.add_message(channel_id, last_ns, m.data, m.publish_ns, m.seq)
                writer.flush()
            if account.stated is not None:
                all_counts.append(account.stated)
            if part.tail and "produced" in part.end:
                del holes[-1]  # only the index is missing: the end metadata follows the last message
        writer.add_metadata(METADATA_END, checked(self._end(all_counts, holes)))
        writer.finish()
        return holes, account.unnamed

    def _channel(self, part: DamagedFileReader, channel_id: int) -> int:
        """The id of a channel in the new file; 0 if its topic is unknown."""
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
