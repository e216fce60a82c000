"""Envelope <-> bytes. Pure: no sockets, no clocks, and no format that can execute code.

Three frames: the topic (so that a subscription is a prefix), a msgpack header, the payload's raw bytes.
The header is the array [version, session, seq, event_ns, capture_ns, publish_ns, origin, dtype, shape, device_ns];
the last may be missing (messages of the first release) and is 0 then. `dtype` is numpy's name of a little-endian
number, or "" for plain bytes. The payloads of `session`, `tick`, `prediction` and `status` are JSON, those of
`push/STREAM` msgpack; their types are at the end of this file.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import msgspec
import numpy as np

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.types import Envelope, Mark, Nanoseconds, Prediction, Stamps

VERSION = 1
MAX_PAYLOAD_BYTES = 16 * 2**20
MAX_TOPIC_BYTES = 64
MAX_JSON_BYTES = 2**20
"""Maximum size of a JSON payload: the longest valid one is a prediction of about ten thousand numbers."""

_Count = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
_DTYPES = {"": None, "<f4": np.dtype("<f4"), "<i2": np.dtype("<i2"), "|u1": np.dtype("u1")}


class _Header(msgspec.Struct, array_like=True, frozen=True, gc=False):
    version: int
    session: Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=topics.SESSION_NAME)]
    seq: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
    event_ns: Nanoseconds
    capture_ns: Nanoseconds
    publish_ns: Nanoseconds
    origin: Annotated[str, msgspec.Meta(max_length=256)]
    dtype: Annotated[str, msgspec.Meta(max_length=4)]
    shape: Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, le=MAX_PAYLOAD_BYTES)], ...], msgspec.Meta(max_length=4)]
    device_ns: Nanoseconds = 0


_pack = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Header).decode

# The messages of a stream differ in five numbers and a length. These are written with a fixed width, so that the other
# header bytes are constant and cached: msgspec and a regex, 0.1 ms with cold caches, are needed once per stream.
_INTS = struct.Struct(">BIBqBqBq")
"""seq, event_ns, capture_ns, publish_ns, each after its type in msgpack."""
_END = struct.Struct(">BBIBq")
"""The shape of a row and device_ns, in msgpack."""
_U32, _I64, _ROW = 0xCE, 0xD3, 0x91
MAX_KNOWN = 1024
_COPIED_AT_MOST_BYTES = 65_536

known_written: dict[tuple[str, str, str], tuple[bytes, bytes]] = {}
"""The header bytes around the numbers, by session, origin and type."""


class _Stream(NamedTuple):
    """The header parts that all messages of a stream share."""

    after: bytes
    topic: str
    session: str
    origin: str
    dtype: np.dtype[Any] | None


known_read: dict[tuple[bytes | memoryview, bytes | memoryview], _Stream] = {}
"""Known streams, by topic and the header bytes before the numbers."""


def _numbers_at(head: bytes | memoryview) -> int:
    """Offset of the numbers in a header written by `encode`; any offset for other headers."""
    if len(head) < 4:
        return 0
    kind = head[2]
    return 4 + head[3] if kind == 0xD9 else 3 + (kind & 0x1F)


def _around(session: str, origin: str, dtype: str) -> tuple[bytes, bytes]:
    """The header's bytes before and after its numbers."""
    return b"\x9a" + _pack(VERSION) + _pack(session), _pack(origin) + _pack(dtype)


def encode(envelope: Envelope) -> list[bytes | memoryview]:
    """Encode as three frames. A large contiguous payload is not copied."""
    payload = envelope.payload
    body: bytes | memoryview
    if isinstance(payload, bytes):
        dtype, shape, body = "", (len(payload),), payload
    else:
        dtype, shape = payload.dtype.str, payload.shape
        if dtype not in _DTYPES:
            raise WireError(f"a payload of {payload.dtype} cannot be sent; use float32, int16 or uint8")
        if payload.nbytes <= _COPIED_AT_MOST_BYTES:
            body = payload.tobytes()
        else:
            body = np.ascontiguousarray(payload).reshape(-1).view(np.uint8).data
    key = (envelope.session, envelope.origin, dtype)
    around = known_written.get(key)
    if around is None:
        if len(known_written) >= MAX_KNOWN:
            known_written.clear()
        around = known_written[key] = _around(*key)
    numbers = _INTS.pack(
        _U32, envelope.seq, _I64, envelope.event_ns, _I64, envelope.capture_ns, _I64, envelope.publish_ns
    )
    device_ns = envelope.device_ns
    end = _END.pack(_ROW, _U32, shape[0], _I64, device_ns) if len(shape) == 1 else _pack(shape) + _pack(device_ns)
    return [envelope.topic.encode(), b"".join((around[0], numbers, around[1], end)), body]


def decode(frames: Sequence[bytes | memoryview], received_ns: int = 0) -> Envelope:
    """Decode three frames from outside.

    Raises:
        WireError: the frames are not a message of this version; the text names the fault.

    """
    if len(frames) != 3:
        raise WireError(f"a message has 3 frames, this one has {len(frames)}")
    topic, head, body = frames
    at = _numbers_at(head)
    stream = known_read.get((topic, head[:at]))
    if stream is None or (envelope := _decode_known(stream, at, head, body, received_ns)) is None:
        return decode_any(topic, head, body, received_ns)
    return envelope


def _decode_known(
    stream: _Stream, at: int, head: bytes | memoryview, body: bytes | memoryview, received_ns: int
) -> Envelope | None:
    """Fast path for a message of a known stream; None if the header differs from the expected layout."""
    after = at + _INTS.size
    length = after + len(stream.after)
    if len(head) != length + _END.size or head[after:length] != stream.after or len(body) > MAX_PAYLOAD_BYTES:
        return None
    u32, seq, first, event_ns, second, capture_ns, third, publish_ns = _INTS.unpack_from(head, at)
    row, size, count, last, device_ns = _END.unpack_from(head, length)
    if (u32, first, second, third, row, size, last) != (_U32, _I64, _I64, _I64, _ROW, _U32, _I64):
        return None
    dtype = stream.dtype
    if count * (1 if dtype is None else dtype.itemsize) != len(body):
        return None
    payload = bytes(body) if dtype is None else np.frombuffer(body, dtype)
    return Envelope(
        stream.topic,
        stream.session,
        seq,
        event_ns,
        capture_ns,
        publish_ns,
        payload,
        stream.origin,
        received_ns,
        device_ns,
    )


def decode_any(
    topic: bytes | memoryview, head: bytes | memoryview, body: bytes | memoryview, received_ns: int
) -> Envelope:
    """As `decode`, for a message of any stream, known or not."""
    if len(topic) > MAX_TOPIC_BYTES:
        raise WireError(f"a topic has at most {MAX_TOPIC_BYTES} bytes, this one has {len(topic)}")
    try:
        name = bytes(topic).decode("ascii")
        if not topics.is_known(name):
            raise WireError(f"{name!r} is no known topic")
        header = _decode(head)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise WireError(f"the header is not valid: {e}") from e
    if header.version != VERSION:
        raise WireError(f"wire version {header.version} is not {VERSION}; use the same release on both sides")
    if header.dtype not in _DTYPES:
        raise WireError(f"payload type {header.dtype!r} is not one of {sorted(_DTYPES)}")
    if len(body) > MAX_PAYLOAD_BYTES:
        raise WireError(f"a payload has at most {MAX_PAYLOAD_BYTES} bytes, this one has {len(body)}")
    dtype = _DTYPES[header.dtype]
    count = 1
    for n in header.shape:
        count *= n
    if count * (dtype.itemsize if dtype else 1) != len(body):
        raise WireError(f"shape {header.shape} of {header.dtype or 'bytes'} does not fit {len(body)} bytes")
    payload = bytes(body) if dtype is None else np.frombuffer(body, dtype).reshape(header.shape)
    if not name.startswith(topics.STATUS):
        before, after = _around(header.session, header.origin, header.dtype)
        if len(known_read) >= MAX_KNOWN:
            known_read.clear()
        known_read[bytes(topic), before] = _Stream(after, name, header.session, header.origin, dtype)
    return Envelope(
        name,
        header.session,
        header.seq,
        header.event_ns,
        header.capture_ns,
        header.publish_ns,
        payload,
        header.origin,
        received_ns,
        header.device_ns,
    )


def mark_of(frames: Sequence[bytes | memoryview]) -> Mark:
    """The identity of a message, from topic and header only; raises WireError if they are invalid."""
    try:
        header = _decode(frames[1])
        return Mark(bytes(frames[0]).decode("ascii"), header.session, header.seq, header.publish_ns)
    except (msgspec.MsgspecError, UnicodeDecodeError, IndexError, RecursionError) as e:
        raise WireError(f"the header is not valid: {e}") from e


class SessionMessage(msgspec.Struct, frozen=True):
    """The payload of `session`: a session opens, closes, or changes its streams."""

    op: Literal["open", "close", "streams"]
    event_ns: Nanoseconds
    streams: tuple[str, ...] = ()
    """The modalities that the aligner waits for."""


class RequestMessage(msgspec.Struct, frozen=True):
    """The payload of `request`: what the supervisor is asked to do."""

    op: Literal["stop", "record", "end_recording"]


class CheckpointMessage(msgspec.Struct, frozen=True):
    """The payload of `checkpoint`: what came before the beginning of a recording has left in aligner and model."""

    event_ns: Nanoseconds
    content: bytes
    """As `live.checkpoint` writes it."""


class TickMessage(msgspec.Struct, frozen=True):
    """The payload of `tick`, a channel of recordings up to 0.1.0: the input of a step. Predictions include the same."""

    tick: _Count
    event_ns: Nanoseconds
    present: dict[str, bool]
    age_ns: dict[str, Nanoseconds]
    closed: Stamps


class PredictionMessage(msgspec.Struct, frozen=True):
    """The payload of `prediction`."""

    tick: _Count
    event_ns: Nanoseconds
    heads: dict[str, list[float | None]]
    """float32 values that survive the round trip bit for bit; null means not finite."""
    present: dict[str, bool]
    age_ns: dict[str, Nanoseconds]
    closed: Stamps
    step_start_ns: Nanoseconds
    step_end_ns: Nanoseconds
    model: str


class StatusMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """The payload of `status/NODE`: how a process is doing."""

    node: str
    state: Literal["starting", "ready", "open", "stale", "missing", "ended", "closed", "restarting", "failed"]
    """For a source: `stale` (no sample for twice its period), `missing` (not available). The supervisor sets
    `restarting` and `failed` (died too often) for a dead process."""
    pid: int = 0
    modality: str = ""
    """Of a worker: its stream."""
    reason: str = ""
    """The reason of a bad state, as one sentence."""
    counts: dict[str, _Count] = {}
    detail: dict[str, Any] = {}
    """Source: requested and actual settings. Engine: the model's contract and the stream counts. Recorder: the file."""


class PushMessage(msgspec.Struct, frozen=True, gc=False):
    """The payload of `push/STREAM`, as msgpack: one sample from another program."""

    data: bytes
    """Sound: mono int16, little-endian. Picture: JPEG. Text: UTF-8. Signal: float32, little-endian."""
    rate_hz: Annotated[int, msgspec.Meta(ge=1000, le=384_000)] = topics.AUDIO_RATE_HZ
    """Of sound."""


pack_push = msgspec.msgpack.Encoder().encode
_read_push = msgspec.msgpack.Decoder(PushMessage).decode


def read_push(payload: Any) -> PushMessage:
    """Decode the payload of `push/STREAM`; raises WireError if it is invalid."""
    try:
        return _read_push(payload)
    except (msgspec.MsgspecError, TypeError, ValueError, RecursionError) as e:
        raise WireError(f"the payload is no pushed sample: {e}") from e


_Message = TypeVar(
    "_Message", SessionMessage, RequestMessage, CheckpointMessage, TickMessage, PredictionMessage, StatusMessage
)
_json_encode = msgspec.json.Encoder().encode
_json_decoders: dict[type, msgspec.json.Decoder[Any]] = {
    t: msgspec.json.Decoder(t)
    for t in (SessionMessage, RequestMessage, CheckpointMessage, TickMessage, PredictionMessage, StatusMessage)
}


def pack(
    message: SessionMessage | RequestMessage | CheckpointMessage | TickMessage | PredictionMessage | StatusMessage,
) -> bytes:
    """Encode a message as a JSON payload."""
    try:
        return _json_encode(message)
    except UnicodeEncodeError:  # a path that is no UTF-8
        return _json_encode(encodable(msgspec.to_builtins(message)))


def unpack(payload: Any, kind: type[_Message]) -> _Message:
    """Decode a JSON payload; raises WireError if it is invalid."""
    if not isinstance(payload, bytes) or len(payload) > MAX_JSON_BYTES:
        raise WireError(f"the payload is no {kind.__name__}: expected JSON of at most {MAX_JSON_BYTES} bytes")
    try:
        message: _Message = _json_decoders[kind].decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise WireError(f"the payload is no {kind.__name__}: {e}") from e
    return message


class _Tick(msgspec.Struct, frozen=True, gc=False):
    tick: _Count


_read_tick = msgspec.json.Decoder(_Tick).decode


def tick_index(payload: Any) -> int:
    """The tick index of a `tick` or `prediction` payload, without decoding the rest; raises WireError if invalid."""
    try:
        return _read_tick(payload).tick
    except (msgspec.MsgspecError, TypeError, UnicodeDecodeError, RecursionError) as e:
        raise WireError(f"the payload names no tick: {e}") from e


def prediction_message(prediction: Prediction) -> PredictionMessage:
    tick = prediction.tick
    return PredictionMessage(
        tick.index,
        tick.event_ns,
        {name: values.tolist() for name, values in prediction.heads.items()},
        tick.present,
        tick.age_ns,
        tick.closed,
        prediction.step_start_ns,
        prediction.step_end_ns,
        prediction.model,
    )


def encodable(value: Any) -> Any:
    """Text, or what JSON is made of, with text that UTF-8 can carry.

    Of a path whose bytes are no letters of the system's encoding Python keeps the bytes; they are read as UTF-8 here.
    """
    if isinstance(value, str):
        try:
            return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        except UnicodeEncodeError:
            return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {encodable(key): encodable(entry) for key, entry in value.items()}
    return [encodable(entry) for entry in value] if isinstance(value, list | tuple) else value
