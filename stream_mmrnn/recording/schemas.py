"""How each topic's messages look inside a recording: bytes <-> envelope contents, and their schemas.

Features and the clock are small protobuf messages. This program writes them with a fixed layout and decodes that layout
without protobuf, which would create a Python float for every number; protobuf decodes any other layout. Features also
hold the device's own time stamp, beside the event time that was computed from it. Sessions, ticks and predictions are
the JSON of the bus. Pure.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.errors import RecordingError, WireError
from stream_mmrnn.core.types import Envelope

_STAMPS = struct.Struct("<BqBq")
_STAMPS_SIZE, _unpack_stamps = _STAMPS.size, _STAMPS.unpack_from
_THREE = struct.Struct("<BqBqBq")
_THREE_SIZE, _unpack_three = _THREE.size, _THREE.unpack_from
_DEVICE_SIZE = _THREE_SIZE - _STAMPS_SIZE
_CLOCK = struct.Struct("<Bq")
_CLOCK_SIZE, _unpack_clock = _CLOCK.size, _CLOCK.unpack_from
_TAG_1_FIXED64, _TAG_2_FIXED64, _TAG_3_BYTES, _TAG_4_FIXED64 = 0x09, 0x11, 0x1A, 0x21
_FLOAT32 = np.dtype(np.float32)
_frombuffer = np.frombuffer


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
    if envelope.device_ns:
        stamps = _THREE.pack(
            _TAG_1_FIXED64, envelope.event_ns, _TAG_2_FIXED64, envelope.capture_ns, _TAG_4_FIXED64, envelope.device_ns
        )
    else:
        stamps = _STAMPS.pack(_TAG_1_FIXED64, envelope.event_ns, _TAG_2_FIXED64, envelope.capture_ns)
    return stamps + _values_head(len(body)) + body


def _values_head(size: int) -> bytes:
    """Tag and length prefix of `size` bytes of numbers."""
    return bytes((_TAG_3_BYTES,)) + _varint(size)


@lru_cache(maxsize=256)
def _layout(length: int) -> tuple[int, bytes]:
    """Offset of the numbers in a feature message of `length` bytes, and the prefix before them.

    (0, b"") if no message can have that length. Cached: all messages of a stream have the same length.
    """
    for head_size in range(2, 7):
        begin = _STAMPS_SIZE + head_size
        size = length - begin
        if size >= 0 and size % _FLOAT32.itemsize == 0 and len(_values_head(size)) == head_size:
            return begin, _values_head(size)
    return 0, b""


def decode_features(data: bytes, at: int, end: int) -> tuple[int, int, np.ndarray[Any, np.dtype[np.float32]], int]:
    """Event time, capture time, numbers and device time; raises RecordingError if protobuf cannot decode it."""
    begin, head = _layout(end - at)
    if begin:
        tag_1, event_ns, tag_2, capture_ns = _unpack_stamps(data, at)
        begin += at
        if tag_1 == _TAG_1_FIXED64 and tag_2 == _TAG_2_FIXED64 and data[at + _STAMPS_SIZE : begin] == head:
            # copied: the numbers are unaligned in the message, which would slow down every later use
            return event_ns, capture_ns, _frombuffer(data[begin:end], _FLOAT32), 0
    begin, head = _layout(end - at - _DEVICE_SIZE)
    if begin:
        tag_1, event_ns, tag_2, capture_ns, tag_4, device_ns = _unpack_three(data, at)
        begin += at + _DEVICE_SIZE
        tags = tag_1 == _TAG_1_FIXED64 and tag_2 == _TAG_2_FIXED64 and tag_4 == _TAG_4_FIXED64
        if tags and data[at + _THREE_SIZE : begin] == head:
            return event_ns, capture_ns, _frombuffer(data[begin:end], _FLOAT32), device_ns
    message = _by_protobuf("Features", data[at:end])
    return message.event_ns, message.capture_ns, np.array(message.values, np.float32), message.device_ns


Bytes = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]


def gathered(data: Bytes, at: Integers, size: int) -> np.ndarray[Any, Any]:
    """The `size` bytes from each offset on, as an array of their own; of dtype V`size`."""
    # numpy copies each void item by one memcpy, 0.1 us a message
    return np.ndarray((max(len(data) - size + 1, 0),), f"V{size}", data, 0, (1,))[at]


@cache
def _stamps_dtype(count: int, after: int) -> np.dtype[Any]:
    fields: list[Any] = [field for i in range(count) for field in ((f"tag_{i}", "u1"), (f"ns_{i}", "<i8"))]
    return np.dtype([*fields, ("after", "u1", (after,))])


def _stamps_in(data: Bytes, at: Integers, tags: tuple[int, ...], after: bytes) -> tuple[npt.NDArray[np.bool_], Any]:
    """Whether the messages begin with fixed-width fields of these tags and then `after`, and those fields."""
    dtype = _stamps_dtype(len(tags), len(after))
    heads = gathered(data, at, dtype.itemsize).view(dtype)
    usual = (heads["after"] == np.frombuffer(after, np.uint8)).all(axis=1)
    for i, tag in enumerate(tags):
        usual &= heads[f"tag_{i}"] == tag
    return usual, heads


def _numbers(data: Bytes, at: Integers, size: int) -> npt.NDArray[np.float32]:
    if not size:
        return np.zeros((len(at), 0), np.float32)
    return gathered(data, at, size).view(_FLOAT32).reshape(len(at), -1)


def clock_columns(data: Bytes, at: Integers, length: int) -> tuple[npt.NDArray[np.bool_], Integers]:
    """N clock messages of `length` bytes, as `decode_clock` decodes each: which have the usual layout, event times."""
    if length != _CLOCK_SIZE:
        return np.zeros(len(at), np.bool_), np.zeros(len(at), np.int64)
    usual, heads = _stamps_in(data, at, (_TAG_1_FIXED64,), b"")
    return usual, heads["ns_0"]


def feature_columns(
    data: Bytes, at: Integers, length: int
) -> tuple[npt.NDArray[np.bool_], Integers, Integers, Integers, npt.NDArray[np.float32]]:
    """N feature messages of `length` bytes at these offsets of `data`, as `decode_features` decodes each.

    Returns which of them have the layout that this program writes [N]; and for these event times, capture times and
    device times [N], and numbers [N, size]. What the others have there means nothing.
    """
    count = len(at)
    usual = np.zeros(count, np.bool_)
    event_ns, capture_ns, device_ns = (np.zeros(count, np.int64) for _ in range(3))
    values = np.zeros((count, 0), np.float32)
    three = (_TAG_1_FIXED64, _TAG_2_FIXED64, _TAG_4_FIXED64)
    for tags, more in ((three[:2], 0), (three, _DEVICE_SIZE)):
        begin, head = _layout(length - more)
        rows = np.flatnonzero(~usual)
        if not begin or not len(rows):
            continue
        fits, heads = _stamps_in(data, at[rows], tags, head)
        if not fits.any():
            continue
        found = rows[fits]
        numbers = _numbers(data, at[found] + (begin + more), length - more - begin)
        if len(found) == count:
            values = numbers
        elif usual.any() and values.shape[1] != numbers.shape[1]:
            continue  # vectors of two sizes in messages of one length: the second ones are decoded one by one
        else:
            if not usual.any():
                values = np.zeros((count, numbers.shape[1]), np.float32)
            values[found] = numbers
        usual[found] = True
        event_ns[found], capture_ns[found] = heads["ns_0"][fits], heads["ns_1"][fits]
        if more:
            device_ns[found] = heads["ns_2"][fits]
    values.setflags(write=False)
    return usual, event_ns, capture_ns, device_ns, values


class _EventTime(msgspec.Struct):
    event_ns: int


event_time = msgspec.json.Decoder(_EventTime)


def encode_clock(envelope: Envelope) -> bytes:
    return _CLOCK.pack(_TAG_1_FIXED64, envelope.event_ns)


def decode_json(data: bytes, at: int, end: int) -> tuple[int, None, bytes, int]:
    message = data[at:end]
    return event_time.decode(message).event_ns, None, message, 0


def decode_clock(data: bytes, at: int, end: int) -> tuple[int, None, bytes, int]:
    """Event time; raises RecordingError if protobuf cannot decode the message."""
    if end - at == _CLOCK_SIZE:
        tag, event_ns = _unpack_clock(data, at)
        if tag == _TAG_1_FIXED64:
            return event_ns, None, b"", 0
    return _by_protobuf("Clock", data[at:end]).event_ns, None, b"", 0


Decode = Callable[[bytes, int, int], tuple[int, int | None, Any, int]]
"""(bytes, begin, end of a message in them) -> event_ns, capture_ns or None, payload, device_ns or 0."""


def own_schema(name: str) -> bytes:
    """A FileDescriptorSet with one of our two protobuf messages, for readers of other programs."""
    from google.protobuf import descriptor_pb2 as pb

    file = pb.FileDescriptorProto(name="stream_mmrnn.proto", package="stream_mmrnn", syntax="proto3")
    field = pb.FieldDescriptorProto
    message = file.message_type.add(name=name)
    message.field.add(name="event_ns", number=1, type=field.TYPE_SFIXED64, label=field.LABEL_OPTIONAL)
    if name == "Features":
        message.field.add(name="capture_ns", number=2, type=field.TYPE_SFIXED64, label=field.LABEL_OPTIONAL)
        message.field.add(name="values", number=3, type=field.TYPE_FLOAT, label=field.LABEL_REPEATED)
        message.field.add(name="device_ns", number=4, type=field.TYPE_SFIXED64, label=field.LABEL_OPTIONAL)
    data: bytes = pb.FileDescriptorSet(file=[file]).SerializeToString()
    return data


@cache
def _protobuf_class(name: str) -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    files = descriptor_pb2.FileDescriptorSet.FromString(own_schema(name)).file
    pool = descriptor_pool.DescriptorPool()
    pool.Add(files[0])
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"stream_mmrnn.{name}"))


def _by_protobuf(name: str, data: bytes) -> Any:
    """A message in any layout that protobuf allows: another program may have written it."""
    from google.protobuf.message import DecodeError

    try:
        return _protobuf_class(name).FromString(data)
    except DecodeError as e:
        raise RecordingError(f"a message is no {name}: {e}") from e


JSON_KINDS = {
    topics.SESSION: wire.SessionMessage,
    topics.CHECKPOINT: wire.CheckpointMessage,
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
