"""`repair` writes the intact part of a recording, and of its later parts, to a new file.

Existing files are never changed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from mcap.opcode import Opcode
from mcap.records import Attachment
from mcap.writer import CompressionType, IndexType, Writer

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import FileError, RecordingError, WireError
from stream_mmrnn.recording import label_file
from stream_mmrnn.recording.damaged_file import DamagedFileReader
from stream_mmrnn.recording.mcap_format import (
    FORMAT,
    LIBRARY,
    METADATA,
    METADATA_END,
    METADATA_SO_FAR,
    RECORD,
    checked,
    scheme,
    stream_of,
)
from stream_mmrnn.recording.message_counts import MISSING, MessageCounts
from stream_mmrnn.recording.pieces import Foreign, MetadataRecord
from stream_mmrnn.recording.report import RecordingSummary, state_of, summarise_parts, verify
from stream_mmrnn.recording.settings import streams_of

_UNKNOWN = {"format": FORMAT, "session": "unknown", "wall_offset_ns": "0", "started_ns": "0"}
"""The head used for a file that lost its head and every copy of it."""
_WRITTEN_ANEW = (METADATA, METADATA_END, METADATA_SO_FAR)
_NUMBERED = (Opcode.SCHEMA, Opcode.CHANNEL, Opcode.MESSAGE)
"""Records outside of chunks that belong to channels by their numbers, which change."""


def repair(path: Path, out: Path) -> dict[str, Any]:
    """Write all intact messages of `path`, and of its later parts, into the new file `out`.

    It gets an index, and an end that names its sources and what is known to be missing. `path` is not changed. A whole
    file is copied. Labels that were given afterwards, and lie beside `path`, are laid beside `out`, too.

    Raises:
        FileError: `path` is missing or not a recording; `out` exists already or cannot be written.
        RecordingError: no message in `path` can be saved.

    """
    first, *later = summaries = summarise_parts(path)
    state, why = state_of(first, later)
    parts = [summary.file for summary in summaries]
    if not any(part.names for part in parts):
        raise RecordingError(f"{path} holds no message that could be saved: {why}")
    try:
        file = out.open("xb")
    except OSError as e:
        raise FileError(f"{out} cannot be made: {e.strerror}; choose another name") from e
    saved, left_out = RecordingSummary(), 0
    try:
        with file:
            if state == "whole":
                with path.open("rb") as source:
                    shutil.copyfileobj(source, file)
            else:
                join = _Join(file, parts, saved)
                join.write()
                left_out = join.left_out
            file.flush()
            os.fsync(file.fileno())
    except BaseException as e:
        out.unlink(missing_ok=True)
        if isinstance(e, OSError):
            raise FileError(f"{out} cannot be written: {e.strerror}") from e
        raise
    return {
        "recording": str(path),
        "was": state,
        "out": str(out),
        "of": [str(part.path) for part in parts],
        "holes": saved.holes,
        "not_named": saved.unnamed,
        "foreign_left_out": left_out,
        "labels": _carry_labels(path, next((part.head for part in parts if part.head), _UNKNOWN), out),
        "result": verify(out),
    }


def _carry_labels(path: Path, head: Mapping[str, str], out: Path) -> dict[str, str]:
    """Lay the labels beside `path` beside `out`: `out` is their file, `why` says why they are not there; "" both where
    there are none.
    """
    try:
        labels = label_file.read(path, head)
        place = str(label_file.write(out, labels, force=False)) if labels is not None else ""
    except FileError as e:
        return {"out": "", "why": str(e)}
    return {"out": place, "why": ""}


class _Join:
    """Writes the parts of a recording into one file."""

    def __init__(self, file: BinaryIO, parts: list[DamagedFileReader], saved: RecordingSummary) -> None:
        self._file, self._parts, self._saved = file, parts, saved
        self.left_out = 0
        """Records of other programs that could not be written."""
        self._head = next((part.head for part in parts if part.head), _UNKNOWN)
        self._writer: Any = Writer(file, compression=CompressionType.ZSTD, index_types=IndexType.ALL)
        self._schemas: dict[tuple[str, str, bytes], int] = {}
        self._channels: dict[Any, int] = {}
        self._kinds = {topics.raw(row.name): row.kind for row in streams_of(self._head).values()}

    def write(self) -> None:
        writer, saved = self._writer, self._saved
        writer.start(profile="", library=LIBRARY)
        kept = {key: text for key, text in self._head.items() if key not in ("checksum", "part")}
        writer.add_metadata(METADATA, checked(kept))
        all_counts: list[MessageCounts] = []
        last_ns = 0
        for part in self._parts:
            for piece in saved.add(part):
                if isinstance(piece, Foreign):
                    self._keep(piece)
                elif isinstance(piece, MetadataRecord):
                    if piece.name not in _WRITTEN_ANEW:
                        writer.add_metadata(piece.name, piece.metadata)
                else:
                    for m in piece.messages:
                        channel_id = self._channel(part, m.channel_id)
                        if channel_id:
                            last_ns = max(last_ns, m.log_ns)
                            writer.add_message(channel_id, last_ns, m.data, m.publish_ns, m.seq)
                    writer.flush()
            all_counts.append(saved.stated)
        last = self._parts[-1]
        if last.tail and "produced" in last.end:
            del saved.holes[-1]  # only the index is missing: the end metadata follows the last message
        writer.add_metadata(METADATA_END, checked(self._end(all_counts)))
        writer.finish()

    def _keep(self, piece: Foreign) -> None:
        """Write a record of another program as it was; one that refers to channels by number cannot be."""
        if piece.opcode == Opcode.ATTACHMENT:
            a = Attachment.read(stream_of(piece.content))
            self._writer.add_attachment(a.create_time, a.log_time, a.name, a.media_type, a.data)
        elif piece.opcode not in _NUMBERED:
            self._file.write(RECORD.pack(piece.opcode, len(piece.content)) + piece.content)
        else:
            self.left_out += 1

    def _channel(self, part: DamagedFileReader, channel_id: int) -> int:
        """The id of a channel in the new file; 0 if its topic is unknown."""
        channel = part.channels.get(channel_id)
        if channel is not None and channel.schema_id in part.schemas:
            schema = part.schemas[channel.schema_id]
            form = (schema.name, schema.encoding, schema.data)
            key = (channel.topic, channel.message_encoding, tuple(sorted(channel.metadata.items())), form)
        else:
            topic, origin = part.names.get(channel_id, ("", ""))
            try:
                encoding, form = scheme(topic, self._kinds.get(topic))
            except WireError:
                return 0
            about = {"origin": origin, "modality": topics.stream_of(topic)}
            key = (topic, encoding, tuple(sorted(about.items())), form)
        if key not in self._channels:
            if form not in self._schemas:
                self._schemas[form] = self._writer.register_schema(*form)
            self._channels[key] = self._writer.register_channel(key[0], key[1], self._schemas[form], dict(key[2]))
        return self._channels[key]

    def _end(self, all_counts: list[MessageCounts]) -> dict[str, str]:
        saved = self._saved
        dropped: dict[str, dict[str, int]] = {}
        for counts in all_counts:
            for topic, reasons in counts.dropped.items():
                row = dropped.setdefault(topic, {})
                for reason, n in reasons.items():
                    row[reason] = row.get(reason, 0) + n
        for topic, n in saved.missing.items():
            dropped.setdefault(topic, {})[MISSING] = n
        recorded = dict(saved.messages)
        produced = {
            topic: recorded.get(topic, 0) + sum(dropped.get(topic, {}).values()) for topic in recorded | dropped
        }
        end = next((part.end for part in reversed(self._parts) if part.end), {})
        about = {
            "of": [{"file": part.path.name, "bytes": part.bytes} for part in self._parts],
            "holes": saved.holes,
            "not_named": saved.unnamed,
        }
        return {
            **MessageCounts(produced, recorded, {}, dropped).as_metadata(),
            "messages": str(saved.messages.total()),
            "ended": end.get("ended", "cut off"),
            "statuses": end.get("statuses", "{}"),
            "repaired": msgspec.json.encode(about).decode(),
        }
