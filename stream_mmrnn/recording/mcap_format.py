"""The layout of a recording in MCAP: names of its metadata, checksums, chunks, and the encoding of messages.

The recorder and the readers use it. Camera, microphone and text are Foxglove messages (protobuf); the others are as in
`schemas`. Pure: no files.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import msgspec
import numpy as np
import zstandard
from mcap.data_stream import ReadDataStream
from mcap.exceptions import McapError

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import RecordingError, WireError
from stream_mmrnn.core.streams import KINDS, Kind
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.recording.schemas import (
    JSON_KINDS,
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


LATE = "late"
"""In the head of a recording that began in the middle of its session."""


FORMAT = "1"


LIBRARY = "stream_mmrnn"


MAX_RECORD_BYTES = 256 * 2**20


MAX_CHUNK_BYTES = 64 * 2**20
"""Maximum uncompressed size of a chunk: ours close at 1 MiB, and the longest message adds 16."""


MAGIC = b"\x89MCAP0\r\n"


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


def number(metadata: dict[str, str], key: str) -> int:
    """An integer in the metadata; 0 if it is missing or invalid."""
    text = metadata.get(key, "0")
    return int(text) if text.removeprefix("-").isdecimal() and len(text) < 30 else 0


FEATURES = "stream_mmrnn.Features"


def scheme(topic: str, kind: Kind | None = None) -> tuple[str, tuple[str, str, bytes]]:
    """Message encoding of a topic, and its schema: (name, encoding, data). `kind`: of a raw topic's stream.

    Raises WireError if messages of this topic are not recorded.
    """
    if topic in topics.TOPICS:
        name = topics.TOPICS[topic].schema
    elif topic.startswith(topics.FEATURE):
        name = FEATURES
    elif kind is not None:
        name = KINDS[kind].schema
    else:
        raise WireError(f"the session has no stream for {topic}")
    if name.startswith("foxglove."):
        from foxglove import messages

        schema = getattr(messages, name.removeprefix("foxglove.")).get_schema()
        return "protobuf", (name, schema.encoding, schema.data)
    if topic in JSON_KINDS:
        return "json", (name, "jsonschema", json_schema(topic))
    return "protobuf", (name, "protobuf", own_schema(name.removeprefix("stream_mmrnn.")))


def encoded(envelope: Envelope, wall_offset_ns: int, kind: Kind | None = None) -> bytes:
    """Encode a message as `scheme` says; `wall_offset_ns` converts event times to Unix times.

    Raises one of `UNWRITABLE` if the message cannot be encoded.
    """
    payload, topic = envelope.payload, envelope.topic
    if kind == "signal" or topic.startswith(topics.FEATURE):
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
            name=topics.stream_of(topic) or topic,
        )
    data: bytes = message.encode()
    return data


UNWRITABLE = (WireError, OverflowError, struct.error, TypeError, KeyError, RecursionError, msgspec.MsgspecError)
"""What `encoded` raises for a message that cannot be written."""


def stream_of(data: bytes) -> ReadDataStream:
    return ReadDataStream(BytesIO(data))


class _OfThread(threading.local):
    """A decompressor of each thread's own: two threads in one of them crash the program."""

    def __init__(self) -> None:
        self.zstd = zstandard.ZstdDecompressor()


_of_thread = _OfThread()


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
        data = _of_thread.zstd.decompress(records, max_output_size=size)
    elif compression:
        raise RecordingError(f"compression {compression[:16]!r} is not one that this program writes")
    else:
        data = bytes(records)
    if checksum and zlib.crc32(data) != checksum:
        raise RecordingError("its checksum is wrong")
    return data
