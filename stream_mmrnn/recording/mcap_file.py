"""Recorder and Recording: the bus written as MCAP, and read back as the same sequence of envelopes.

Camera, microphone and text are Foxglove messages (protobuf); the others are as `schemas` says. One file is one session.
Times in the file are Unix times: the bus's monotonic ones plus `wall_offset_ns` from the metadata, so viewers show
dates, and reading gives back the exact stamps. Damaged files are read by `damaged_file`.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import tempfile
import weakref
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec
import numpy as np
import zstandard
from mcap.data_stream import ReadDataStream, RecordBuilder
from mcap.exceptions import McapError
from mcap.opcode import Opcode
from mcap.records import Channel, ChunkIndex, Metadata, MetadataIndex, Schema
from mcap.writer import CompressionType, IndexType, Writer

from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import FileError, RecordingError, WireError
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.recording.append_file import Disk, Tail
from stream_mmrnn.recording.schemas import (
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

METADATA = "stream_mmrnn"
METADATA_END = "stream_mmrnn.end"
METADATA_WALL = "stream_mmrnn.wall_step"
METADATA_SO_FAR = "stream_mmrnn.so_far"
"""Every few seconds: what was dropped until there, which channels there are and, now and then, the first metadata once
more, so that a file that never gets an end or loses its head says it too."""
FORMAT = "1"
LIBRARY = "stream_mmrnn"
MAX_RECORD_BYTES = 256 * 2**20
_HEAD_PERIOD_NS = 10_000_000_000
MAX_CHUNK_BYTES = 64 * 2**20
"""Of the records of one chunk: ours close at 1 MiB, and the longest message adds 16."""
_INDEXES_AT_ONCE = 256
_MAX_CHANNELS = 1024
"""A channel is a topic and who made it. Our own sessions have some twenty."""

MAGIC = b"\x89MCAP0\r\n"
_OURS = (Opcode.CHUNK, Opcode.METADATA)
RECORD = struct.Struct("<BQ")
UNREADABLE = (
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


def checked(metadata: Mapping[str, str]) -> dict[str, str]:
    """With a checksum: MCAP has none for metadata."""
    return {**metadata, "checksum": _checksum(metadata)}


def is_sound(metadata: Mapping[str, str]) -> bool:
    """False where the metadata is not what was written; a file of an older release cannot tell."""
    return metadata.get("checksum", "") in ("", _checksum(metadata))


def _checksum(metadata: Mapping[str, str]) -> str:
    pairs = [pair for pair in sorted(metadata.items()) if pair[0] != "checksum"]
    return f"{zlib.crc32(msgspec.json.encode(pairs)):08x}"


def scheme(topic: str) -> tuple[str, tuple[str, str, bytes]]:
    """How messages of a topic are encoded, and their schema: its name, its encoding and itself."""
    name = topics.TOPICS[topic].schema
    if name.startswith("foxglove."):
        from foxglove import messages

        schema = getattr(messages, name.removeprefix("foxglove.")).get_schema()
        return "protobuf", (name, schema.encoding, schema.data)
    if topic in JSON_KINDS:
        return "json", (name, "jsonschema", json_schema(topic))
    return "protobuf", (name, "protobuf", own_schema(name.removeprefix("stream_mmrnn.")))


def encoded(envelope: Envelope, wall_offset_ns: int) -> bytes:
    """A message as `scheme` says; `wall_offset_ns` makes its event time a date, where it has one.

    Raises one of `UNWRITABLE` where no reader could read it back.
    """
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
    from foxglove import messages

    seconds, nanoseconds = divmod(envelope.event_ns + wall_offset_ns, 1_000_000_000)
    stamp = messages.Timestamp(seconds, nanoseconds)
    body = payload if isinstance(payload, bytes) else payload.tobytes()
    message: Any
    kind = topics.kind_of(topic)
    if kind == "vision":
        message = messages.CompressedImage(timestamp=stamp, frame_id="camera", data=body, format="jpeg")
    elif kind == "audio":
        if len(body) % 2 or not (isinstance(payload, bytes) or payload.dtype == np.int16):
            raise WireError(f"{topic} is sound in 16 bits")
        message = messages.RawAudio(
            timestamp=stamp, data=body, format="pcm-s16", sample_rate=topics.AUDIO_RATE_HZ, number_of_channels=1
        )
    else:
        message = messages.Log(
            timestamp=stamp,
            level=messages.LogLevel.Info,
            message=body.decode("utf-8", "replace"),
            name=topics.TOPICS[topic].modality or topic,
        )
    data: bytes = message.encode()
    return data


UNWRITABLE = (WireError, OverflowError, struct.error, TypeError, KeyError, RecursionError, msgspec.MsgspecError)
"""What `encoded` raises of a message that no file can hold."""


class _Channel(NamedTuple):
    """A channel of a file, and how to read it."""

    topic: str
    session: str
    origin: str
    decode: Decode


def _stream(data: bytes) -> ReadDataStream:
    return ReadDataStream(BytesIO(data))


class _Indexes:
    """An index that the writer keeps, on the disk until the file's end: of chunks an hour is 20 MB in memory.

    The writer appends to it and goes through it once. What the disk does not take stays in memory.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        weakref.finalize(self, file.close)
        self._waiting: list[bytes] = []
        self._kept = 0
        """Bytes that are in the file, whole records all."""

    def append(self, index: ChunkIndex | MetadataIndex) -> None:
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
    """Writes one session's envelopes, and closes a chunk often enough that a crash costs little.

    What the disk does not take stays in memory until it does (`trouble` says why); who calls bounds how much comes
    meanwhile. `sync` may be called from another thread, nothing else.
    """

    def __init__(
        self,
        path: Path,
        session: str,
        metadata: Mapping[str, str],
        chunk_ms: float = 250.0,
        wall_offset_ns: int | None = None,
        open_disk: Callable[[Path], Disk] = Disk,
    ) -> None:
        """`metadata`: what the file shall say of its making, beside what the recorder knows itself.

        `wall_offset_ns`: that of the part before, so that all parts of a recording share it; None measures it.

        Raises:
            FileError: the file cannot be made, or there is one already.

        """
        from stream_mmrnn.core import clock

        self.path, self.session = path, session
        self._chunk_ns = int(chunk_ms * 1e6)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._disk = open_disk(path)
        except OSError as e:
            raise FileError(f"the recording {path} cannot be made: {e.strerror}; choose another path") from e
        self._tail = Tail(self._disk)
        self._writer: Any = Writer(
            self._tail,  # type: ignore[arg-type]
            chunk_size=1 << 20,
            compression=CompressionType.ZSTD,
            index_types=IndexType.ALL,
        )
        with contextlib.suppress(OSError):
            for kind in ("chunk_indices", "metadata_indexes"):
                file = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  # has no name: it goes with the process
                setattr(self._writer, f"_Writer__{kind}", _Indexes(file))
        self._writer.start(profile="", library=LIBRARY)
        self._offset_ns = clock.wall_offset_ns() if wall_offset_ns is None else wall_offset_ns
        self._schemas: dict[str, int] = {}
        self._channels: dict[tuple[str, str], int] = {}
        self._last_log_ns = 0
        self.messages = 0
        self.unwritable = 0
        """Messages whose stamps or payload no reader could read back."""
        self.counts: dict[str, int] = {}
        """Messages by topic; `refused` those that are unwritable."""
        self.refused: dict[str, int] = {}
        self._head = {
            "format": FORMAT,
            "session": session,
            "wall_offset_ns": str(self._offset_ns),
            "started_ns": str(now_ns()),
            **metadata,
        }
        self._head_again = (0, 0)
        """When the head was last repeated, and how many channels there were."""
        self._writer.add_metadata(METADATA, checked(self._head))
        self._chunked_ns = now_ns()
        self._tail.drain()

    @property
    def trouble(self) -> str:
        """Why the disk takes nothing now, or ""."""
        return self._tail.trouble

    def _channel(self, envelope: Envelope) -> int:
        key = (envelope.topic, envelope.origin)
        if key not in self._channels:
            if envelope.topic not in topics.TOPICS or not topics.TOPICS[envelope.topic].recorded:
                raise WireError(f"{envelope.topic} is not recorded")
            if len(self._channels) >= _MAX_CHANNELS:
                raise WireError(f"a file has at most {_MAX_CHANNELS} channels")
            encoding, schema = scheme(envelope.topic)
            if schema[0] not in self._schemas:
                self._schemas[schema[0]] = self._writer.register_schema(*schema)
            about = {"origin": envelope.origin, "modality": topics.TOPICS[envelope.topic].modality}
            self._channels[key] = self._writer.register_channel(
                envelope.topic, encoding, self._schemas[schema[0]], about
            )
        return self._channels[key]

    def write(self, envelope: Envelope) -> None:
        """Append one message; the file's order is the order of the calls. One that no file can hold is counted."""
        publish_ns = envelope.publish_ns + self._offset_ns
        try:
            if not 0 <= publish_ns < 2**63:
                raise WireError(f"publish_ns {envelope.publish_ns} is no time that a file can hold")
            data = encoded(envelope, self._offset_ns)
            channel = self._channel(envelope)
        except UNWRITABLE:
            self.unwritable += 1
            self.refused[envelope.topic] = self.refused.get(envelope.topic, 0) + 1
            return
        received_ns = envelope.received_ns or now_ns()
        self._last_log_ns = max(self._last_log_ns, received_ns + self._offset_ns)
        self._writer.add_message(channel, self._last_log_ns, data, publish_ns, envelope.seq)
        self.messages += 1
        self.counts[envelope.topic] = self.counts.get(envelope.topic, 0) + 1

    def note_wall_step(self, at_ns: int, step_ns: int) -> None:
        """Write down that the wall clock was set: our dates are those of the clock as it was at the beginning."""
        self._writer.add_metadata(METADATA_WALL, checked({"at_ns": str(at_ns), "step_ns": str(step_ns)}))

    def flush_due(self, at_ns: int) -> bool:
        """Close the chunk where it is time, and give the disk what it takes; call it often. True: a chunk was closed,
        so that all messages until here are in the file or wait for the disk.
        """
        closed = at_ns - self._chunked_ns >= self._chunk_ns
        if closed:
            self._chunked_ns = at_ns
            self._writer.flush()
        self._tail.drain()
        return closed

    @property
    def news(self) -> bool:
        """There are channels of which the file says nothing outside the chunks that they began in."""
        return len(self._channels) != self._head_again[1]

    def note(self, so_far: Mapping[str, str], at_ns: int) -> None:
        """Put into the file what happened until here. To be called where `keep` has just closed a chunk."""
        channels = {str(number): key for key, number in self._channels.items()}
        so_far = {**so_far, "channels": msgspec.json.encode(channels).decode()}
        if at_ns - self._head_again[0] >= _HEAD_PERIOD_NS or self.news:
            self._head_again = (at_ns, len(self._channels))
            so_far["head"] = msgspec.json.encode(self._head).decode()
        self._writer.add_metadata(METADATA_SO_FAR, checked({"at_ns": str(at_ns), **so_far}))
        self._tail.drain()

    def sync(self) -> None:
        """Wait until the disk has what it took; raises OSError where it says that it lost it."""
        self._disk.sync()

    def close(self, end: Mapping[str, str]) -> bool:
        """Finish the file: `end` says what was lost and how it ended. False where the disk does not take the rest:
        the file is readable, and ends earlier.
        """
        self._writer.flush()
        counts = {"messages": str(self.messages), "unwritable": str(self.unwritable)}
        self._writer.add_metadata(METADATA_END, checked({**counts, **end}))
        self._writer.finish()
        taken = self._tail.drain()
        with contextlib.suppress(OSError):
            self._disk.sync()
        self._disk.close()
        return taken

    def abandon(self) -> None:
        """Close the file as it is, without an end."""
        self._disk.close()

    @property
    def bytes(self) -> int:
        """Of the file, once the disk has taken all."""
        return self._tail.size


_zstd = zstandard.ZstdDecompressor()


def unpack_chunk(chunk: bytes) -> bytes:
    """The records of a chunk, as its checksum says they were written; raises one of `UNREADABLE`."""
    size, checksum, name_size = _CHUNK.unpack_from(chunk)
    at = _CHUNK.size + name_size
    compression = chunk[_CHUNK.size : at].decode()
    (length,) = _LENGTH.unpack_from(chunk, at)
    at += _LENGTH.size
    if size > MAX_CHUNK_BYTES:
        raise RecordingError(f"it says that it holds {size} bytes")
    if at + length != len(chunk):  # a wrong length of the whole would end it in the middle of the next one
        raise RecordingError("its records are not as long as it is")
    records = memoryview(chunk)[at : at + length]
    if compression == "zstd":
        # the library gives as much memory as the frame asks for, whatever limit it is told
        if zstandard.frame_content_size(records) not in (size, -1):
            raise RecordingError("its size is not what it says")
        data = _zstd.decompress(records, max_output_size=size)
    elif compression:
        raise RecordingError(f"compression {compression[:16]!r} is not one that this program writes")
    else:
        data = bytes(records)
    if checksum and zlib.crc32(data) != checksum:
        raise RecordingError("its checksum is wrong")
    return data


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
        self.wall_steps: list[tuple[int, int]] = []
        """When the wall clock was set while this was recorded, and by how many ns; known once it was read. The dates in
        the file go on as if it had not been."""
        self.so_far: dict[str, str] = {}
        """What it wrote last while it went on: as far as one has read."""
        self.damage = ""
        """One sentence once reading met the end of a file that was cut off; "" for a whole one."""
        try:
            self.metadata = self._head()
            self.session = self.metadata["session"]
            if not re.match(topics.SESSION_NAME, self.session):
                raise ValueError("its session has no name that a session may have")
            self._offset_ns = _stamp(self.metadata["wall_offset_ns"])
            self.started_unix_ns = _stamp(self.metadata["started_ns"]) + self._offset_ns
        except UNREADABLE as e:
            raise FileError(f"{path} has a damaged head ({type(e).__name__}); nothing can be read from it") from e
        self._raw_decoders: dict[int, Any] = {}

    def _head(self) -> dict[str, str]:
        """The metadata that the recorder wrote first."""
        for opcode, data in self._records():
            if opcode == Opcode.CHUNK:
                break
            record = Metadata.read(_stream(data))
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

        A file that was cut off ends where it was cut, and `damage` says so. Indexes are passed over unread: the
        sequence is all that is wanted, and parsing them would cost more than the messages do.
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
        """Messages of the topics in `wanted` (all where None), in the order in which they were on the bus.

        A file that was cut off yields what is whole; `damage` then says so.
        """
        return chain.from_iterable(self.batches(wanted))

    def batches(self, wanted: Collection[str] | None = None) -> Iterator[list[Envelope]]:
        """The same, some at a time: who handles them so spares a step of a generator for each."""
        channels: dict[int, _Channel | None] = {}
        schemas: dict[int, Schema] = {}
        steps = self.wall_steps = []
        for opcode, content in self._records():
            batch: list[Envelope] = []
            try:
                if opcode == Opcode.CHUNK:
                    self._read(unpack_chunk(content), channels, schemas, wanted, batch)
                elif opcode == Opcode.METADATA:
                    record = Metadata.read(_stream(content))
                    if not is_sound(record.metadata):
                        raise RecordingError("the checksum of its metadata is wrong")
                    if record.name == METADATA_END:
                        self.end = record.metadata
                    elif record.name == METADATA_SO_FAR:
                        self.so_far = record.metadata
                    elif record.name == METADATA_WALL:
                        steps.append((int(record.metadata["at_ns"]), int(record.metadata["step_ns"])))
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
        """Put the messages in the records of one chunk into `batch`. The hot loop of every replay.

        `channels` holds None for channels that are not wanted: their messages are skipped unread.
        """
        at, end, offset_ns = 0, len(data), self._offset_ns
        message, message_size, head_size = _MESSAGE.unpack_from, _MESSAGE.size, RECORD.size
        add = batch.append
        last = end - message_size  # no message begins later than here
        while at < end:
            if at <= last:
                # as if every record were a message: nearly all are, and one reading is cheaper than two
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

            def decode(data: bytes, at: int, end: int) -> tuple[int, None, Any, int]:
                event_ns, payload = self._foxglove_payload(topic, schema, data[at:end])
                return event_ns, None, payload, 0

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
