"""Recording: an MCAP file read back as the sequence of envelopes that was on the bus.

Times in the file are Unix times: the bus's monotonic ones plus `wall_offset_ns` from the metadata, so viewers show
dates, and reading gives back the exact stamps. Damaged files are read by `damaged_file`.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mcap.opcode import Opcode
from mcap.records import Channel, Metadata, Schema

from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.errors import FileError, RecordingError
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.recording.mcap_format import (
    FEATURES,
    FORMAT,
    MAGIC,
    MAX_RECORD_BYTES,
    METADATA,
    METADATA_END,
    METADATA_SO_FAR,
    METADATA_WALL,
    RECORD,
    UNREADABLE,
    is_sound,
    number,
    stream_of,
    unpack_chunk,
)
from stream_mmrnn.recording.schemas import (
    JSON_KINDS,
    Decode,
    decode_clock,
    decode_features,
    decode_json,
)

_OURS = (Opcode.CHUNK, Opcode.METADATA)
_MESSAGE = struct.Struct("<BQHI8xQ")
"""Head of a message record: opcode, length, channel, seq, log time (not read), publish time."""


class _Channel(NamedTuple):
    """A channel of a file, and its decoder."""

    topic: str
    session: str
    origin: str
    decode: Decode


def _stamp(text: str) -> int:
    """A time in the metadata; raises ValueError if it is out of range."""
    value = int(text)
    if abs(value) >= 2**62:
        raise ValueError(f"{text[:32]!r} is no time")
    return value


def decoder_of(topic: str, schema: Schema, offset_ns: int) -> Decode:
    """The decoder of a channel's messages; it raises RecordingError if one is invalid."""
    if topic.startswith(topics.FEATURE) or schema.name == FEATURES:  # samples of a signal have the same form
        return decode_features
    if topic == topics.CLOCK:
        return decode_clock
    if topic in JSON_KINDS:
        return decode_json
    parse: Any = None

    def decode(data: bytes, at: int, end: int) -> tuple[int, None, Any, int]:
        nonlocal parse
        try:
            if parse is None:
                from mcap_protobuf.decoder import DecoderFactory

                parse = DecoderFactory().decoder_for("protobuf", schema)
            message = parse(data[at:end])
            payload = message.message.encode() if hasattr(message, "message") else bytes(message.data)
            event_ns = int(message.timestamp.seconds * 1_000_000_000 + message.timestamp.nanos)
        except Exception as e:  # schema and message come from outside; protobuf's errors share no base
            raise RecordingError(f"a message on {topic} is no {schema.name[:64]}") from e
        audio = schema.name == "foxglove.RawAudio"
        return event_ns - offset_ns, None, np.frombuffer(payload, "<i2") if audio else payload, 0

    return decode


class Recording:
    """A recording as an iterable of the envelopes that were on the bus, in their order."""

    def __init__(self, path: Path) -> None:
        """Open and read the head.

        Raises:
            FileError: missing, unreadable, not an MCAP file, or not made by this program.

        """
        self.path = path
        self.metadata: dict[str, str] = {}
        self.end: dict[str, str] = {}
        """Metadata at the end; empty if the file was cut off or is not read to its end yet."""
        self.wall_steps: list[tuple[int, int]] = []
        """(time, step in ns) of each time the wall clock was set, as far as the file was read. Times in the file are
        not affected."""
        self.so_far: dict[str, str] = {}
        """The last periodic metadata, as far as the file was read."""
        self.damage = ""
        """One sentence once reading met damage or a cut; "" for a whole file."""
        try:
            self.metadata = self._head()
            self.session = self.metadata["session"]
            if not re.match(topics.SESSION_NAME, self.session):
                raise ValueError("its session has no name that a session may have")
            self._offset_ns = _stamp(self.metadata["wall_offset_ns"])
            self.started_unix_ns = _stamp(self.metadata["started_ns"]) + self._offset_ns
        except UNREADABLE as e:
            raise FileError(f"{path} has a damaged head ({type(e).__name__}); nothing can be read from it") from e

    def _head(self) -> dict[str, str]:
        """The metadata at the beginning of the file."""
        for opcode, data in self._records():
            if opcode == Opcode.CHUNK:
                break
            record = Metadata.read(stream_of(data))
            if record.name == METADATA and record.metadata.get("format") == FORMAT:
                if not is_sound(record.metadata):
                    raise RecordingError("its checksum is wrong")
                self.damage = ""
                return dict(record.metadata)
        raise FileError(
            f"{self.path} is no recording of this program in format {FORMAT}"
            + (f": {self.damage}" if self.damage else "; record it again, or use the release that made it")
        )

    def _records(self) -> Iterator[tuple[int, bytes]]:
        """(opcode, content) of the top-level records that hold messages or metadata of this program, in file order.

        If the file was cut off, iteration ends there and `damage` is set. Indexes are skipped: sequential reading does
        not need them, and parsing them would cost more than the messages.
        """
        try:
            file = self.path.open("rb")
        except OSError as e:
            raise FileError(f"the recording {self.path} cannot be read: {e.strerror}") from e
        with file:
            size = os.fstat(file.fileno()).st_size
            if file.read(len(MAGIC)) != MAGIC:
                raise FileError(f"{self.path} is no MCAP file")
            at = len(MAGIC)
            while True:
                head = file.read(RECORD.size)
                if len(head) < RECORD.size:
                    break
                opcode, length = RECORD.unpack(head)
                at += RECORD.size + length
                if at > size or length > MAX_RECORD_BYTES:
                    break
                if opcode in _OURS:
                    yield opcode, file.read(length)
                else:
                    file.seek(at)
                if opcode == Opcode.FOOTER:
                    if file.read(len(MAGIC)) == MAGIC:
                        return
                    break
            self.damage = f"{self.path.name} was cut off or damaged at byte {file.tell()} of {size}"

    def envelopes(self, wanted: Collection[str] | None = None) -> Iterator[Envelope]:
        """Messages of the topics in `wanted` (None: all), in the order of the bus.

        If the file was cut off or damaged, the intact part is returned and `damage` is set.
        """
        return chain.from_iterable(self.batches(wanted))

    def batches(self, wanted: Collection[str] | None = None) -> Iterator[list[Envelope]]:
        """The same in batches, which is faster than one generator step per message."""
        channels: dict[int, _Channel | None] = {}
        schemas: dict[int, Schema] = {}
        steps = self.wall_steps = []
        for opcode, content in self._records():
            batch: list[Envelope] = []
            try:
                if opcode == Opcode.CHUNK:
                    self._read(unpack_chunk(content), channels, schemas, wanted, batch)
                elif opcode == Opcode.METADATA:
                    record = Metadata.read(stream_of(content))
                    if not is_sound(record.metadata):
                        raise RecordingError("the checksum of its metadata is wrong")
                    if record.name == METADATA_END:
                        self.end = record.metadata
                    elif record.name == METADATA_SO_FAR:
                        self.so_far = record.metadata
                    elif record.name == METADATA_WALL:
                        steps.append((number(record.metadata, "at_ns"), number(record.metadata, "step_ns")))
            except UNREADABLE as e:
                self.damage = f"{self.path.name} has a damaged record ({e})"
                yield batch
                return
            yield batch

    def _read(
        self,
        data: bytes,
        channels: dict[int, _Channel | None],
        schemas: dict[int, Schema],
        wanted: Collection[str] | None,
        batch: list[Envelope],
    ) -> None:
        """Append the messages of one chunk to `batch`. The hot loop of every replay.

        `channels` holds None for channels that are not wanted: their messages are skipped without decoding.
        """
        at, end, offset_ns = 0, len(data), self._offset_ns
        message, message_size, head_size = _MESSAGE.unpack_from, _MESSAGE.size, RECORD.size
        add = batch.append
        last = end - message_size  # no message begins later than here
        while at < end:
            if at <= last:
                # parse every record as a message: nearly all are, and one unpack is cheaper than two
                opcode, length, channel_id, seq, publish_ns = message(data, at)
            else:
                opcode, length = RECORD.unpack_from(data, at)
            following = at + head_size + length
            if following > end:
                raise RecordingError("a record is longer than its chunk")
            if opcode == 0x05:
                if following < at + message_size:
                    raise RecordingError("a message is shorter than its head")
                channel = channels[channel_id]
                if channel is not None:
                    topic, session, origin, decode = channel
                    event_ns, capture_ns, payload, device_ns = decode(data, at + message_size, following)
                    publish_ns -= offset_ns
                    if capture_ns is None:
                        capture_ns = publish_ns
                    add(Envelope(topic, session, seq, event_ns, capture_ns, publish_ns, payload, origin, 0, device_ns))
            elif opcode == 0x03:
                schema = Schema.read(stream_of(data[at + head_size : following]))
                schemas[schema.id] = schema
            elif opcode == 0x04:
                record = Channel.read(stream_of(data[at + head_size : following]))
                topic = record.topic
                channel = _Channel(
                    topic,
                    topics.EVERYONE if topic == topics.CLOCK else self.session,
                    record.metadata.get("origin", ""),
                    decoder_of(topic, schemas[record.schema_id], offset_ns),
                )
                channels[record.id] = channel if wanted is None or topic in wanted else None
            at = following

    def predictions(self) -> Iterator[wire.PredictionMessage]:
        for envelope in self.envelopes({topics.PREDICTION}):
            yield wire.unpack(envelope.payload, wire.PredictionMessage)
