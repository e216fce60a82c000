"""Envelope <-> bytes. Pure: no sockets, no clocks, and nothing that can run code.

Three frames: the topic (so that a subscription is a prefix), a msgpack header, the payload's raw bytes.
The header is the array [version, session, seq, event_ns, capture_ns, publish_ns, origin, dtype, shape];
`dtype` is numpy's name of a little-endian number, or "" for plain bytes. The payloads of `session`, `tick`,
`prediction` and `status` are JSON, whose forms stand at the end. Knows nothing about who sends or reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np

from stream_mmrnn import topics
from stream_mmrnn.errors import WireError
from stream_mmrnn.types import Envelope, Nanoseconds, Prediction, Stamps, Tick

VERSION = 1
MAX_PAYLOAD_BYTES = 16 * 2**20
MAX_TOPIC_BYTES = 64
MAX_JSON_BYTES = 2**20
"""Of a payload that is JSON: the longest honest one is a prediction of some ten thousand numbers."""

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


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Header).decode


def encode(envelope: Envelope) -> list[bytes | memoryview]:
    """Three frames. The payload is not copied where it is contiguous."""
    payload = envelope.payload
    if isinstance(payload, bytes):
        dtype, shape, body = "", (len(payload),), memoryview(payload)
    else:
        if payload.dtype.str not in _DTYPES:
            raise WireError(f"a payload of {payload.dtype} cannot be sent; use float32, int16 or uint8")
        dtype, shape = payload.dtype.str, payload.shape
        body = np.ascontiguousarray(payload).reshape(-1).view(np.uint8).data if payload.size else memoryview(b"")
    header = _encode(
        _Header(
            VERSION,
            envelope.session,
            envelope.seq,
            envelope.event_ns,
            envelope.capture_ns,
            envelope.publish_ns,
            envelope.origin,
            dtype,
            shape,
        )
    )
    return [envelope.topic.encode(), header, body]


def decode(frames: Sequence[bytes | memoryview], received_ns: int = 0) -> Envelope:
    """The envelope of three frames from outside.

    Raises:
        WireError: the frames are not a message of this version; it names what is wrong.

    """
    if len(frames) != 3:
        raise WireError(f"a message has 3 frames, this one has {len(frames)}")
    topic, head, body = frames
    if len(topic) > MAX_TOPIC_BYTES:
        raise WireError(f"a topic has at most {MAX_TOPIC_BYTES} bytes, this one has {len(topic)}")
    try:
        name = bytes(topic).decode("ascii")
        if name not in topics.TOPICS and not name.startswith(topics.STATUS):
            raise WireError(f"{name!r} is no topic of ours")
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
    )


class SessionMessage(msgspec.Struct, frozen=True):
    """The payload of `session`: a session begins, ends, or has other streams than before."""

    op: Literal["open", "close", "streams"]
    event_ns: Nanoseconds
    streams: tuple[str, ...] = ()
    """The modalities that the aligner shall wait for."""


class TickMessage(msgspec.Struct, frozen=True):
    """The payload of `tick`: what the step saw, without the features, which are messages of their own."""

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
    """float32 written so that it reads back bit for bit; null is not a number."""
    present: dict[str, bool]
    age_ns: dict[str, Nanoseconds]
    closed: Stamps
    step_start_ns: Nanoseconds
    step_end_ns: Nanoseconds
    model: str


class StatusMessage(msgspec.Struct, frozen=True, omit_defaults=True):
    """The payload of `status/NODE`: how a process is doing."""

    node: str
    state: Literal["starting", "ready", "open", "missing", "ended", "closed"]
    pid: int = 0
    modality: str = ""
    reason: str = ""
    """Why it is not well, as one sentence."""
    counts: dict[str, _Count] = {}
    detail: dict[str, Any] = {}
    """Source: what was asked and got. Engine: the model's contract and the streams' counts. Recorder: the file."""


_Message = TypeVar("_Message", SessionMessage, TickMessage, PredictionMessage, StatusMessage)
_json_encode = msgspec.json.Encoder().encode
_json_decoders: dict[type, msgspec.json.Decoder[Any]] = {
    t: msgspec.json.Decoder(t) for t in (SessionMessage, TickMessage, PredictionMessage, StatusMessage)
}


def pack(message: SessionMessage | TickMessage | PredictionMessage | StatusMessage) -> bytes:
    """A JSON payload."""
    return _json_encode(message)


def unpack(payload: Any, kind: type[_Message]) -> _Message:
    """The message of a JSON payload; raises WireError where it is none."""
    if not isinstance(payload, bytes) or len(payload) > MAX_JSON_BYTES:
        raise WireError(f"the payload is no {kind.__name__}: expected JSON of at most {MAX_JSON_BYTES} bytes")
    try:
        message: _Message = _json_decoders[kind].decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise WireError(f"the payload is no {kind.__name__}: {e}") from e
    return message


def tick_message(tick: Tick) -> TickMessage:
    return TickMessage(tick.index, tick.event_ns, tick.present, tick.age_ns, tick.closed)


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
