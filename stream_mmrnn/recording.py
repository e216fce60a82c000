"""Recorder and Recording: the bus written down as MCAP, and read back as the same sequence of envelopes.

The only file that knows MCAP. Camera, microphone and text are Foxglove messages (protobuf); the others are as `formats`
says. One file is one session. Times in the file are Unix times: the bus's monotonic ones plus
`wall_offset_ns`, which the metadata holds, so that viewers show dates and reading gives back the exact stamps.
Knows nothing about sockets or models.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import msgspec
import numpy as np
import zstandard
from mcap.data_stream import ReadDataStream, RecordBuilder
from mcap.exceptions import McapError
from mcap.opcode import Opcode
from mcap.records import Channel, ChunkIndex, Metadata, Schema
from mcap.writer import CompressionType, IndexType, Writer

from stream_mmrnn import topics, wire
from stream_mmrnn.clock import now_ns
from stream_mmrnn.errors import FileError, RecordingError, WireError
from stream_mmrnn.formats import (
    JSON_KINDS,
    Decode,
    decode_clock,
    decode_features,
    decode_json,
    encode_clock,
    encode_features,
    event_time,
    json_schema,
    own_schema,
)
from stream_mmrnn.types import Envelope

METADATA = "stream_mmrnn"
METADATA_END = "stream_mmrnn.end"
FORMAT = "1"
_MAX_RECORD_BYTES = 256 * 2**20
_MAX_CHUNK_BYTES = 64 * 2**20
"""Of the records of one chunk: ours close at 1 MiB, and the longest message adds 16."""
_INDEXES_AT_ONCE = 256
_MAX_CHANNELS = 1024
"""A channel is a topic and who made it. Our own sessions have some twenty."""

_MAGIC = b"\x89MCAP0\r\n"
_OURS = (Opcode.CHUNK, Opcode.METADATA)
_RECORD = struct.Struct("<BQ")
_UNREADABLE = (
    struct.error,
    IndexError,
    KeyError,
    ValueError,
    OverflowError,
    RecursionError,
    McapError,
    zstandard.ZstdError,
    msgspec.MsgspecError,
    RecordingError,
)
_MESSAGE = struct.Struct("<BQHI8xQ")
"""A message record until its data: opcode, length, channel, seq, log time (not read), publish time."""
_CHUNK = struct.Struct("<16xQII")
"""A chunk's content: start and end time (not read), size and checksum uncompressed, length of what comes next, the
compression's name. Then the length of the records, and these."""
_LENGTH = struct.Struct("<Q")


class _Channel(NamedTuple):
    """A channel of a file, and how to read it."""

    topic: str
    session: str
    origin: str
    decode: Decode


def _stream(data: bytes) -> ReadDataStream:
    return ReadDataStream(BytesIO(data))


class _Indexes:
    """The writer's index of chunks, on the disk until the file's end: in memory an hour of it is 20 MB.

    The writer appends to it and goes through it once. What the disk does not take stays in memory.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._waiting: list[bytes] = []
        self._kept = 0
        """Bytes that are in the file, whole records all."""

    def append(self, index: ChunkIndex) -> None:
        builder = RecordBuilder()
        index.write(builder)
        self._waiting.append(builder.end())  # type: ignore[no-untyped-call]
        if len(self._waiting) >= _INDEXES_AT_ONCE:
            piece = b"".join(self._waiting)
            with contextlib.suppress(OSError):
                self._file.seek(self._kept)
                self._file.write(piece)
                self._file.flush()
                self._kept += len(piece)
                self._waiting = []

    def __iter__(self) -> Iterator[_Written]:
        """In order, some together; ends with the file."""
        self._file.seek(0)
        for at in range(0, self._kept, 1 << 20):
            yield _Written(self._file.read(min(1 << 20, self._kept - at)))
        yield _Written(b"".join(self._waiting))
        self._file.close()

    def __del__(self) -> None:
        self._file.close()


class _Written(NamedTuple):
    """Records as they are in a file already."""

    data: bytes

    def write(self, builder: RecordBuilder) -> None:
        builder.write(self.data)


def _stamp(text: str) -> int:
    """A time in the metadata; ValueError where it is none that a clock could show."""
    value = int(text)
    if abs(value) >= 2**62:
        raise ValueError(f"{text[:32]!r} is no time")
    return value


class Recorder:
    """Writes one session's envelopes; closes a chunk and syncs the file often enough that a crash costs little."""

    def __init__(
        self,
        path: Path,
        session: str,
        metadata: Mapping[str, str],
        chunk_ms: float = 250.0,
        fsync_ms: float = 1000.0,
    ) -> None:
        """`metadata`: what the file shall say of its making, beside what the recorder knows itself.

        Raises:
            FileError: the file cannot be made, or there is one already.

        """
        from foxglove import messages

        from stream_mmrnn.clock import wall_offset_ns

        self.path, self.session = path, session
        self._foxglove = messages
        self._chunk_ns, self._fsync_ns = int(chunk_ms * 1e6), int(fsync_ms * 1e6)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("xb")
        except OSError as e:
            raise FileError(f"the recording {path} cannot be made: {e.strerror}; choose another path") from e
        self._writer: Any = Writer(
            self._file, chunk_size=1 << 20, compression=CompressionType.ZSTD, index_types=IndexType.ALL
        )
        with contextlib.suppress(OSError):
            file = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  # has no name: it goes with the process
            cast(Any, self._writer)._Writer__chunk_indices = _Indexes(file)
        self._writer.start(profile="", library="stream_mmrnn")
        self._offset_ns = wall_offset_ns()
        self._schemas: dict[str, int] = {}
        self._channels: dict[tuple[str, str], int] = {}
        self._last_log_ns = 0
        self.messages = 0
        self.unwritable = 0
        """Messages whose stamps or payload no reader could read back."""
        self.counts: dict[str, int] = {}
        self._writer.add_metadata(
            METADATA,
            {
                "format": FORMAT,
                "session": session,
                "wall_offset_ns": str(self._offset_ns),
                "started_ns": str(now_ns()),
                **metadata,
            },
        )
        self._chunked_ns = self._synced_ns = now_ns()
        self.sync()

    def _schema(self, topic: str) -> int:
        name = topics.TOPICS[topic].schema
        if name not in self._schemas:
            if name.startswith("foxglove."):
                schema = getattr(self._foxglove, name.removeprefix("foxglove.")).get_schema()
                encoding, data = schema.encoding, schema.data
            elif topic in JSON_KINDS:
                encoding, data = "jsonschema", json_schema(topic)
            else:
                encoding, data = "protobuf", own_schema(name.removeprefix("stream_mmrnn."))
            self._schemas[name] = self._writer.register_schema(name, encoding, data)
        return self._schemas[name]

    def _channel(self, envelope: Envelope) -> int:
        key = (envelope.topic, envelope.origin)
        if key not in self._channels:
            if envelope.topic not in topics.TOPICS or not topics.TOPICS[envelope.topic].recorded:
                raise WireError(f"{envelope.topic} is not recorded")
            if len(self._channels) >= _MAX_CHANNELS:
                raise WireError(f"a file has at most {_MAX_CHANNELS} channels")
            self._channels[key] = self._writer.register_channel(
                envelope.topic,
                "json" if envelope.topic in JSON_KINDS else "protobuf",
                self._schema(envelope.topic),
                {"origin": envelope.origin, "modality": topics.TOPICS[envelope.topic].modality},
            )
        return self._channels[key]

    def _data(self, envelope: Envelope) -> bytes:
        payload, topic = envelope.payload, envelope.topic
        if topic.startswith(topics.FEATURE):
            return encode_features(envelope)
        if topic == topics.CLOCK:
            return encode_clock(envelope)
        if topic in JSON_KINDS:
            if not isinstance(payload, bytes):
                raise WireError(f"{topic} is JSON")
            event_time.decode(payload)
            return payload
        seconds, nanoseconds = divmod(envelope.event_ns + self._offset_ns, 1_000_000_000)
        stamp = self._foxglove.Timestamp(seconds, nanoseconds)
        body = payload if isinstance(payload, bytes) else payload.tobytes()
        message: Any
        kind = topics.kind_of(topic)
        if kind == "vision":
            message = self._foxglove.CompressedImage(timestamp=stamp, frame_id="camera", data=body, format="jpeg")
        elif kind == "audio":
            if len(body) % 2 or not (isinstance(payload, bytes) or payload.dtype == np.int16):
                raise WireError(f"{topic} is sound in 16 bits")
            message = self._foxglove.RawAudio(
                timestamp=stamp, data=body, format="pcm-s16", sample_rate=topics.AUDIO_RATE_HZ, number_of_channels=1
            )
        else:
            message = self._foxglove.Log(
                timestamp=stamp,
                level=self._foxglove.LogLevel.Info,
                message=body.decode("utf-8", "replace"),
                name=topics.TOPICS[topic].modality or topic,
            )
        data: bytes = message.encode()
        return data

    def write(self, envelope: Envelope) -> None:
        """Append one message; the file's order is the order of the calls. One that no file can hold is counted."""
        publish_ns = envelope.publish_ns + self._offset_ns
        try:
            if not 0 <= publish_ns < 2**63:
                raise WireError(f"publish_ns {envelope.publish_ns} is no time that a file can hold")
            data = self._data(envelope)
            channel = self._channel(envelope)
        except (WireError, OverflowError, struct.error, TypeError, KeyError, RecursionError, msgspec.MsgspecError):
            self.unwritable += 1
            return
        received_ns = envelope.received_ns or now_ns()
        self._last_log_ns = max(self._last_log_ns, received_ns + self._offset_ns)
        self._writer.add_message(channel, self._last_log_ns, data, publish_ns, envelope.seq)
        self.messages += 1
        self.counts[envelope.topic] = self.counts.get(envelope.topic, 0) + 1

    def keep(self, at_ns: int) -> None:
        """Close the chunk and sync the file where it is time; call it often."""
        if at_ns - self._chunked_ns >= self._chunk_ns:
            self._chunked_ns = at_ns
            self._writer.flush()
            self._file.flush()
        if at_ns - self._synced_ns >= self._fsync_ns:
            self.sync()

    def sync(self) -> None:
        self._synced_ns = now_ns()
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self, end: Mapping[str, str]) -> None:
        """Finish the file: `end` says what was lost and how it ended."""
        self._writer.add_metadata(
            METADATA_END, {"messages": str(self.messages), "unwritable": str(self.unwritable), **end}
        )
        self._writer.finish()
        self.sync()
        self._file.close()

    @property
    def bytes(self) -> int:
        return self._file.tell() if not self._file.closed else self.path.stat().st_size


class Recording:
    """A recording as an iterable of the envelopes that were on the bus, in their order."""

    def __init__(self, path: Path) -> None:
        """Open and read the head.

        Raises:
            FileError: missing, unreadable, no MCAP file, or not made by this program.

        """
        self.path = path
        self.metadata: dict[str, str] = {}
        self.end: dict[str, str] = {}
        """What the recorder wrote when it finished; empty in a file that was cut off."""
        self.damage = ""
        """One sentence once reading met the end of a file that was cut off; "" for a whole one."""
        try:
            self.metadata = self._head()
            self.session = self.metadata["session"]
            if not re.match(topics.SESSION_NAME, self.session):
                raise ValueError("its session has no name that a session may have")
            self._offset_ns = _stamp(self.metadata["wall_offset_ns"])
            self.started_unix_ns = _stamp(self.metadata["started_ns"]) + self._offset_ns
        except _UNREADABLE as e:
            raise FileError(f"{path} has a damaged head ({type(e).__name__}); nothing can be read from it") from e
        self._raw_decoders: dict[int, Any] = {}
        self._zstd = zstandard.ZstdDecompressor()

    def _head(self) -> dict[str, str]:
        """The metadata that the recorder wrote first."""
        for opcode, data in self._records():
            if opcode == Opcode.CHUNK:
                break
            record = Metadata.read(_stream(data))
            if record.name == METADATA and record.metadata.get("format") == FORMAT:
                self.damage = ""
                return dict(record.metadata)
        raise FileError(
            f"{self.path} is no recording of this program in format {FORMAT}"
            + (f": {self.damage}" if self.damage else "; record it again, or use the release that made it")
        )

    def _records(self) -> Iterator[tuple[int, bytes]]:
        """(opcode, content) of the top-level records that hold something of ours, in file order.

        A file that was cut off ends where it was cut, and `damage` says so. Indexes are passed over unread: the
        sequence is all that is wanted, and parsing them would cost more than the messages do.
        """
        try:
            file = self.path.open("rb")
        except OSError as e:
            raise FileError(f"the recording {self.path} cannot be read: {e.strerror}") from e
        with file:
            size = os.fstat(file.fileno()).st_size
            if file.read(len(_MAGIC)) != _MAGIC:
                raise FileError(f"{self.path} is no MCAP file")
            at = len(_MAGIC)
            while True:
                head = file.read(_RECORD.size)
                if len(head) < _RECORD.size:
                    break
                opcode, length = _RECORD.unpack(head)
                at += _RECORD.size + length
                if at > size or length > _MAX_RECORD_BYTES:
                    break
                if opcode in _OURS:
                    yield opcode, file.read(length)
                else:
                    file.seek(at)
                if opcode == Opcode.FOOTER:
                    if file.read(len(_MAGIC)) == _MAGIC:
                        return
                    break
            self.damage = f"{self.path.name} was cut off or damaged at byte {file.tell()} of {size}"

    def envelopes(self, wanted: Collection[str] | None = None) -> Iterator[Envelope]:
        """Messages of the topics in `wanted` (all where None), in the order in which they were on the bus.

        A file that was cut off yields what is whole; `damage` then says so.
        """
        return chain.from_iterable(self.batches(wanted))

    def batches(self, wanted: Collection[str] | None = None) -> Iterator[list[Envelope]]:
        """The same, some at a time: who handles them so spares a step of a generator for each."""
        channels: dict[int, _Channel | None] = {}
        schemas: dict[int, Schema] = {}
        for opcode, content in self._records():
            batch: list[Envelope] = []
            try:
                if opcode == Opcode.CHUNK:
                    self._read(self._unpacked(content), channels, schemas, wanted, batch)
                elif opcode == Opcode.METADATA:
                    record = Metadata.read(_stream(content))
                    if record.name == METADATA_END:
                        self.end = record.metadata
            except _UNREADABLE as e:
                self.damage = f"{self.path.name} has a damaged record ({e})"
                yield batch
                return
            yield batch

    def _unpacked(self, chunk: bytes) -> bytes:
        """The records of a chunk, as its checksum says they were written."""
        size, checksum, name_size = _CHUNK.unpack_from(chunk)
        at = _CHUNK.size + name_size
        compression = chunk[_CHUNK.size : at].decode()
        (length,) = _LENGTH.unpack_from(chunk, at)
        at += _LENGTH.size
        if size > _MAX_CHUNK_BYTES:
            raise RecordingError(f"it says that it holds {size} bytes")
        if at + length > len(chunk):
            raise RecordingError("its records are longer than it is")
        records = memoryview(chunk)[at : at + length]
        if compression == "zstd":
            # the library gives as much memory as the frame asks for, whatever limit it is told
            if zstandard.frame_content_size(records) not in (size, -1):
                raise RecordingError("its size is not what it says")
            data = self._zstd.decompress(records, max_output_size=size)
        elif compression:
            raise RecordingError(f"compression {compression[:16]!r} is not one that this program writes")
        else:
            data = bytes(records)
        if checksum and zlib.crc32(data) != checksum:
            raise RecordingError("its checksum is wrong")
        return data

    def _read(
        self,
        data: bytes,
        channels: dict[int, _Channel | None],
        schemas: dict[int, Schema],
        wanted: Collection[str] | None,
        batch: list[Envelope],
    ) -> None:
        """Put the messages in the records of one chunk into `batch`. The hot loop of every replay.

        `channels` holds None for those that nobody wants: theirs are stepped over, whatever is in them.
        """
        at, end, offset_ns = 0, len(data), self._offset_ns
        message, message_size, head_size = _MESSAGE.unpack_from, _MESSAGE.size, _RECORD.size
        add = batch.append
        last = end - message_size  # no message begins later than here
        while at < end:
            if at <= last:
                # as if every record were a message: nearly all are, and one reading is cheaper than two
                opcode, length, channel_id, seq, publish_ns = message(data, at)
            else:
                opcode, length = _RECORD.unpack_from(data, at)
            following = at + head_size + length
            if following > end:
                raise RecordingError("a record is longer than its chunk")
            if opcode == 0x05:
                if following < at + message_size:
                    raise RecordingError("a message is shorter than its head")
                channel = channels[channel_id]
                if channel is not None:
                    topic, session, origin, decode = channel
                    event_ns, capture_ns, payload = decode(data, at + message_size, following)
                    publish_ns -= offset_ns
                    if capture_ns is None:
                        capture_ns = publish_ns
                    add(Envelope(topic, session, seq, event_ns, capture_ns, publish_ns, payload, origin))
            elif opcode == 0x03:
                schema = Schema.read(_stream(data[at + head_size : following]))
                schemas[schema.id] = schema
            elif opcode == 0x04:
                record = Channel.read(_stream(data[at + head_size : following]))
                channel = self._plan(record, schemas[record.schema_id])
                channels[record.id] = channel if wanted is None or record.topic in wanted else None
            at = following

    def _plan(self, record: Channel, schema: Schema) -> _Channel:
        topic = record.topic
        decode: Decode
        if topic.startswith(topics.FEATURE):
            decode = decode_features
        elif topic == topics.CLOCK:
            decode = decode_clock
        elif topic in JSON_KINDS:
            decode = decode_json
        else:

            def decode(data: bytes, at: int, end: int) -> tuple[int, None, Any]:
                event_ns, payload = self._foxglove_payload(topic, schema, data[at:end])
                return event_ns, None, payload

        return _Channel(
            topic,
            topics.EVERYONE if topic == topics.CLOCK else self.session,
            record.metadata.get("origin", ""),
            decode,
        )

    def _foxglove_payload(self, topic: str, schema: Schema, body: bytes) -> tuple[int, Any]:
        from mcap_protobuf.decoder import DecoderFactory

        try:
            if schema.id not in self._raw_decoders:
                self._raw_decoders[schema.id] = DecoderFactory().decoder_for("protobuf", schema)
            message = self._raw_decoders[schema.id](body)
            payload = message.message.encode() if hasattr(message, "message") else bytes(message.data)
            event_ns = int(message.timestamp.seconds * 1_000_000_000 + message.timestamp.nanos)
        except Exception as e:  # schema and message come from outside; protobuf's errors share no base
            raise RecordingError(f"a message on {topic} is no {schema.name[:64]}") from e
        event_ns -= self._offset_ns
        if topics.kind_of(topic) == "audio":
            return event_ns, np.frombuffer(payload, "<i2")
        return event_ns, payload

    def predictions(self) -> Iterator[wire.PredictionMessage]:
        for envelope in self.envelopes({topics.PREDICTION}):
            yield wire.unpack(envelope.payload, wire.PredictionMessage)
