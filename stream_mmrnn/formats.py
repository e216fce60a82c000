"""What each topic's messages look like inside a recording: bytes <-> envelope contents, and their schemas.

Features and the clock are small protobuf messages with fixed places, so that numpy reads the numbers where they lie;
sessions, ticks and predictions are the JSON that was on the bus. Pure. Knows nothing about files or MCAP.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from stream_mmrnn import topics, wire
from stream_mmrnn.errors import RecordingError, WireError
from stream_mmrnn.types import Envelope

_FEATURES_HEAD = struct.Struct("<BqBqB")
_CLOCK = struct.Struct("<Bq")
_TAG_1_FIXED64, _TAG_2_FIXED64, _TAG_3_BYTES = 0x09, 0x11, 0x1A


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


def encode_features(envelope: Envelope) -> bytes:
    if isinstance(envelope.payload, bytes) or envelope.payload.dtype != np.float32:
        raise WireError("features are float32")
    body = envelope.payload.tobytes()
    head = _FEATURES_HEAD.pack(_TAG_1_FIXED64, envelope.event_ns, _TAG_2_FIXED64, envelope.capture_ns, _TAG_3_BYTES)
    return head + _varint(len(body)) + body


def decode_features(data: bytes) -> tuple[int, int, np.ndarray[Any, np.dtype[np.float32]]]:
    tag_1, event_ns, tag_2, capture_ns, tag_3 = _FEATURES_HEAD.unpack_from(data)
    if (tag_1, tag_2, tag_3) != (_TAG_1_FIXED64, _TAG_2_FIXED64, _TAG_3_BYTES):
        raise RecordingError("a feature message is not laid out as this release writes it")
    at, shift, size = _FEATURES_HEAD.size, 0, 0
    while True:
        byte = data[at]
        size |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            break
    if at + size != len(data):
        raise RecordingError("a feature message is shorter than it says")
    return event_ns, capture_ns, np.frombuffer(data, "<f4", offset=at)


class _EventTime(msgspec.Struct):
    event_ns: int


event_time = msgspec.json.Decoder(_EventTime)


def encode_clock(envelope: Envelope) -> bytes:
    return _CLOCK.pack(_TAG_1_FIXED64, envelope.event_ns)


def decode_json(data: bytes) -> tuple[int, None, bytes]:
    return event_time.decode(data).event_ns, None, data


def decode_clock(data: bytes) -> tuple[int, None, bytes]:
    return _CLOCK.unpack(data)[1], None, b""


Decode = Callable[[bytes], tuple[int, int | None, Any]]
"""Content of a message -> event_ns, capture_ns where it is there, payload."""


def own_schema(name: str) -> bytes:
    """A FileDescriptorSet of our two protobuf messages, for readers that know nothing of us."""
    from google.protobuf import descriptor_pb2 as pb

    file = pb.FileDescriptorProto(name="stream_mmrnn.proto", package="stream_mmrnn", syntax="proto3")
    field = pb.FieldDescriptorProto
    message = file.message_type.add(name=name)
    message.field.add(name="event_ns", number=1, type=field.TYPE_SFIXED64, label=field.LABEL_OPTIONAL)
    if name == "Features":
        message.field.add(name="capture_ns", number=2, type=field.TYPE_SFIXED64, label=field.LABEL_OPTIONAL)
        message.field.add(name="values", number=3, type=field.TYPE_FLOAT, label=field.LABEL_REPEATED)
    data: bytes = pb.FileDescriptorSet(file=[file]).SerializeToString()
    return data


JSON_KINDS = {
    topics.SESSION: wire.SessionMessage,
    topics.TICK: wire.TickMessage,
    topics.PREDICTION: wire.PredictionMessage,
}


def _inline(schema: Any, definitions: dict[str, Any]) -> Any:
    """The schema with its references written out: Foxglove's reader takes no `$ref` at the top."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            return _inline(definitions[schema["$ref"].rsplit("/", 1)[1]], definitions)
        return {k: _inline(v, definitions) for k, v in schema.items() if k != "$defs"}
    return [_inline(v, definitions) for v in schema] if isinstance(schema, list) else schema


def json_schema(topic: str) -> bytes:
    schema = msgspec.json.schema(JSON_KINDS[topic])
    return msgspec.json.encode(_inline(schema, schema.get("$defs", {})))
