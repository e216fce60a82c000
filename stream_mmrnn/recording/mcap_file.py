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
"""Written every few seconds: drop counts, channels and sometimes a copy of the first metadata, so that a file without
an end or with a damaged head still has them."""
FORMAT = "1"
LIBRARY = "stream_mmrnn"
MAX_RECORD_BYTES = 256 * 2**20
_HEAD_PERIOD_NS = 10_000_000_000
MAX_CHUNK_BYTES = 64 * 2**20
"""Maximum uncompressed size of a chunk: ours close at 1 MiB, and the longest message adds 16."""
_INDEXES_AT_ONCE = 256
_MAX_CHANNELS = 1024
"""A channel is a topic and an origin. Normal sessions have about twenty."""

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
"""Head of a message record: opcode, length, channel, seq, log time (not read), publish time."""
_CHUNK = struct.Struct("<16xQII")
"""Head of a chunk: start and end time (not read), uncompressed size, checksum, length of the compression's name. Then
follow that name, the length of the records, and the records."""
_LENGTH = struct.Struct("<Q")


def checked(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata with a checksum, which MCAP does not have."""
    return {**metadata, "checksum": _checksum(metadata)}


def is_sound(metadata: Mapping[str, str]) -> bool:
    """Whether the checksum matches; True without one (older releases did not write it)."""
    return metadata.get("checksum", "") in ("", _checksum(metadata))


def _checksum(metadata: Mapping[str, str]) -> str:
    pairs = [pair for pair in sorted(metadata.items()) if pair[0] != "checksum"]
    return f"{zlib.crc32(msgspec.json.encode(pairs)):08x}"


def scheme(topic: str) -> tuple[str, tuple[str, str, bytes]]:
    """Message encoding of a topic, and its schema: (name, encoding, data)."""
    name = topics.TOPICS[topic].schema
    if name.startswith("foxglove."):
        from foxglove import messages

        schema = getattr(messages, name.removeprefix("foxglove.")).get_schema()
        return "protobuf", (name, schema.encoding, schema.data)
    if topic in JSON_KINDS:
        return "json", (name, "jsonschema", json_schema(topic))
    return "protobuf", (name, "protobuf", own_schema(name.removeprefix("stream_mmrnn.")))


def encoded(envelope: Envelope, wall_offset_ns: int) -> bytes:
    """Encode a message as `scheme` says; `wall_offset_ns` converts event times to Unix times.

    Raises one of `UNWRITABLE` if the message cannot be encoded.
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
"""What `encoded` raises for a message that cannot be written."""


class _Channel(NamedTuple):
    """A channel of a file, and its decoder."""

    topic: str
    session: str
    origin: str
    decode: Decode


def _stream(data: bytes) -> ReadDataStream:
    return ReadDataStream(BytesIO(data))


class _Indexes:
    """The writer's index list, kept in a temporary file: in memory, an hour's chunk index takes 20 MB.

    The writer appends to it and iterates over it once. Entries that cannot be written to disk stay in memory.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        weakref.finalize(self, file.close)
        self._waiting: list[bytes] = []
        self._kept = 0
        """Bytes written to the file; always complete records."""

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
        """The entries in order, several per item; closes the file."""
        self._file.seek(0)
        for at in range(0, self._kept, 1 << 20):
            yield _Written(self._file.read(min(1 << 20, self._kept - at)))
        yield _Written(b"".join(self._waiting))
        self._file.close()

    def __del__(self) -> None:
        self._file.close()


class _Written(NamedTuple):
    """Records that are encoded already."""

    data: bytes

    def write(self, builder: RecordBuilder) -> None:
        builder.write(self.data)


def _stamp(text: str) -> int:
    """A time in the metadata; raises ValueError if it is out of range."""
    value = int(text)
    if abs(value) >= 2**62:
        raise ValueError(f"{text[:32]!r} is no time")
    return value


class Recorder:
    """Writes the envelopes of one session, and closes chunks often, so that a crash loses little.

    Data that the disk refuses stays in memory until it accepts it (`trouble` says why); the caller must bound how much
    it writes meanwhile. Only `sync` may be called from another thread.
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
        """`metadata`: additional metadata for the file's head.

        `wall_offset_ns`: offset of the previous part, because all parts of a recording share it; None measures it.

        Raises:
            FileError: the file cannot be created, or exists already.

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
                file = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  # unlinked: it disappears with the process
                setattr(self._writer, f"_Writer__{kind}", _Indexes(file))
        self._writer.start(profile="", library=LIBRARY)
        self._offset_ns = clock.wall_offset_ns() if wall_offset_ns is None else wall_offset_ns
        self._schemas: dict[str, int] = {}
        self._channels: dict[tuple[str, str], int] = {}
        self._last_log_ns = 0
        self.messages = 0
        self.unwritable = 0
        """Messages that could not be encoded."""
        self.counts: dict[str, int] = {}
        """Written messages by topic; `refused` counts the unwritable ones."""
        self.refused: dict[str, int] = {}
        self._head = {
            "format": FORMAT,
            "session": session,
            "wall_offset_ns": str(self._offset_ns),
            "started_ns": str(now_ns()),
            **metadata,
        }
        self._head_again = (0, 0)
        """When the head was last repeated, and the number of channels then."""
        self._writer.add_metadata(METADATA, checked(self._head))
        self._chunked_ns = now_ns()
        self._tail.drain()

    @property
    def trouble(self) -> str:
        """The last write error, while writing fails; else ""."""
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
        """Append one message, in call order; a message that cannot be encoded is counted in `unwritable`."""
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
        """Record that the wall clock was set: times in the file keep the offset from the beginning."""
        self._writer.add_metadata(METADATA_WALL, checked({"at_ns": str(at_ns), "step_ns": str(step_ns)}))

    def flush_due(self, at_ns: int) -> bool:
        """Close the chunk if it is due, and write buffered data; call it often. True if a chunk was closed: all
        messages so far are then in the file or in the buffer.
        """
        closed = at_ns - self._chunked_ns >= self._chunk_ns
        if closed:
            self._chunked_ns = at_ns
            self._writer.flush()
        self._tail.drain()
        return closed

    @property
    def news(self) -> bool:
        """Whether there are channels that are not in the periodic metadata yet."""
        return len(self._channels) != self._head_again[1]

    def note(self, so_far: Mapping[str, str], at_ns: int) -> None:
        """Write the periodic metadata. Call it right after `flush_due` has closed a chunk."""
        channels = {str(number): key for key, number in self._channels.items()}
        so_far = {**so_far, "channels": msgspec.json.encode(channels).decode()}
        if at_ns - self._head_again[0] >= _HEAD_PERIOD_NS or self.news:
            self._head_again = (at_ns, len(self._channels))
            so_far["head"] = msgspec.json.encode(self._head).decode()
        self._writer.add_metadata(METADATA_SO_FAR, checked({"at_ns": str(at_ns), **so_far}))
        self._tail.drain()

    def sync(self) -> None:
        """Fsync the file; raises OSError if the disk reports lost data."""
        self._disk.sync()

    def close(self, end: Mapping[str, str]) -> bool:
        """Finish the file with the metadata `end`. False if the disk refused the rest: the file is readable, but has
        no end.
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
        """Close the file without an end."""
        self._disk.close()

    @property
    def bytes(self) -> int:
        """Size of the file, including buffered data."""
        return self._tail.size


_zstd = zstandard.ZstdDecompressor()


def unpack_chunk(chunk: bytes) -> bytes:
    """The uncompressed records of a chunk, verified by its checksum; raises one of `UNREADABLE`."""
    size, checksum, name_size = _CHUNK.unpack_from(chunk)
    at = _CHUNK.size + name_size
    compression = chunk[_CHUNK.size : at].decode()
    (length,) = _LENGTH.unpack_from(chunk, at)
    at += _LENGTH.size
    if size > MAX_CHUNK_BYTES:
        raise RecordingError(f"it says that it holds {size} bytes")
    if at + length != len(chunk):  # the length of the whole record is wrong
        raise RecordingError("its records are not as long as it is")
    records = memoryview(chunk)[at : at + length]
    if compression == "zstd":
        # the library allocates what the frame header says, whatever `max_output_size` is
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
        self._raw_decoders: dict[int, Any] = {}

    def _head(self) -> dict[str, str]:
        """The metadata at the beginning of the file."""
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
