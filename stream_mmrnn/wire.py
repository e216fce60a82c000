"""Envelope <-> bytes. Pure: no sockets, no clocks, and nothing that can run code.

Three frames: the topic (so that a subscription is a prefix), a msgpack header, the payload's raw bytes.
The header is the array [version, session, seq, event_ns, capture_ns, publish_ns, origin, dtype, shape];
`dtype` is numpy's name of a little-endian number, or "" for plain bytes. Knows nothing about what a payload means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
import numpy as np

from stream_mmrnn.errors import WireError
from stream_mmrnn.types import Envelope

VERSION = 1
MAX_PAYLOAD_BYTES = 16 * 2**20
MAX_TOPIC_BYTES = 64

_DTYPES = {"": None, "<f4": np.dtype("<f4"), "<i2": np.dtype("<i2"), "|u1": np.dtype("u1")}
_Stamp = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _Header(msgspec.Struct, array_like=True, frozen=True, gc=False):
    version: int
    session: Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seq: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
    event_ns: _Stamp
    capture_ns: _Stamp
    publish_ns: _Stamp
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
        body = memoryview(np.ascontiguousarray(payload)).cast("B") if payload.size else memoryview(b"")
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
        header = _decode(head)
    except (msgspec.MsgspecError, UnicodeDecodeError) as e:
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
