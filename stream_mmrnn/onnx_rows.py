"""A one-step graph -> the same graph over rows of an arena: `state.X` is gathered by slot, `next.X` scattered back.

    state.X [batch, ...]  becomes  arena.state.X [slots, ...], read by Gather at `slots` [batch]
    next.X  [batch, ...]  becomes  stored.state.X [slots, ...], written by ScatterND at the same rows

A state whose batch is not its first axis is turned on the way; in the arena the slot always comes first.
Bound with one buffer as both, the state of all sessions stays where the graph runs and a run
touches the rows it was asked for. Names inside the graph stay as they are, so nothing but its edges is rewritten: the
file is edited as protobuf fields, and the weights are copied through unread. Field numbers are those of onnx.proto
(ONNX 1.x, github.com/onnx/onnx, Apache-2.0). Pure; knows nothing about onnxruntime, sessions or devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from stream_mmrnn.errors import ModelError

# field numbers of onnx.proto
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 1, 5, 11, 12
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP, _NODE_ATTRIBUTE = 1, 2, 3, 4, 5
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR = 1
_TENSOR_ELEMENT, _TENSOR_SHAPE = 1, 2
_SHAPE_DIM, _DIM_VALUE, _DIM_PARAM = 1, 1, 2
_INT64 = 7

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

SLOTS = "slots"
"""The input that says which rows a run is about, int64 [batch]."""


class Carried(NamedTuple):
    """A state input: the output that follows it, its shape without the batch axis, and where that axis is."""

    output: str
    shape: tuple[int, ...]
    batch_axis: int = 0


def arena_name(state: str) -> str:
    """The input that replaces `state.X` (or what a contract by names calls so)."""
    return f"arena.{state}"


def stored_name(state: str) -> str:
    """The output that replaces the one that follows `state.X`."""
    return f"stored.{state}"


def _read_varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ModelError("the model file is cut off or no ONNX graph; export it again")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def fields(data: memoryview) -> Iterator[tuple[int, memoryview, memoryview]]:
    """(number, the whole field with its tag, its content) of each field of a message; content is empty for numbers."""
    at = 0
    while at < len(data):
        start = at
        tag, at = _read_varint(data, at)
        kind = tag & 7
        begin = at
        if kind == _VARINT:
            _, at = _read_varint(data, at)
        elif kind == _BYTES:
            length, begin = _read_varint(data, at)
            at = begin + length
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ModelError("the model file holds what no ONNX graph holds; export it again")
        if at > len(data):
            raise ModelError("the model file is cut off; export it again")
        yield tag >> 3, data[start:at], data[begin:at] if kind == _BYTES else data[:0]


def _message(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def _string(number: int, text: str) -> bytes:
    return _message(number, text.encode())


def _int(number: int, value: int) -> bytes:
    return _varint(number << 3 | _VARINT) + _varint(value)


def _node(op: str, inputs: Sequence[str], outputs: Sequence[str], name: str, attribute: bytes = b"") -> bytes:
    body = b"".join(_string(_NODE_INPUT, i) for i in inputs) + b"".join(_string(_NODE_OUTPUT, o) for o in outputs)
    return _message(_GRAPH_NODE, body + _string(_NODE_NAME, name) + _string(_NODE_OP, op) + attribute)


def _transpose(source: str, target: str, axes: Sequence[int]) -> bytes:
    """AttributeProto: name 1, ints 8, type 20 (7 is INTS)."""
    perm = _string(1, "perm") + b"".join(_int(8, a) for a in axes) + _int(20, 7)
    return _node("Transpose", (source,), (target,), f"arena/turn.{target}", _message(_NODE_ATTRIBUTE, perm))


def _value(number: int, name: str, element: int, row: Sequence[int], rows: str = "held") -> bytes:
    """A ValueInfo of shape [rows, *row]."""
    dims = [_string(_DIM_PARAM, rows), *(_int(_DIM_VALUE, d) for d in row)]
    tensor = _int(_TENSOR_ELEMENT, element) + _message(_TENSOR_SHAPE, b"".join(_message(_SHAPE_DIM, d) for d in dims))
    return _message(number, _string(_VALUE_NAME, name) + _message(_VALUE_TYPE, _message(_TYPE_TENSOR, tensor)))


def _axis(name: str) -> bytes:
    """An initializer that holds the int64 [1] (TensorProto: dims 1, data_type 2, int64_data 7, name 8)."""
    return _message(_GRAPH_INITIALIZER, _int(1, 1) + _int(2, _INT64) + _int(7, 1) + _string(8, name))


def _name_of(message: memoryview, number: int = _VALUE_NAME) -> str:
    for n, _, content in fields(message):
        if n == number:
            return bytes(content).decode("utf-8", "replace")
    return ""


def _element_of(value: memoryview) -> int:
    """The element type of a ValueInfo; 1 (float) where it says none."""
    for number, _, kind in fields(value):
        if number == _VALUE_TYPE:
            for n, _, tensor in fields(kind):
                if n == _TYPE_TENSOR:
                    for m, whole, _ in fields(tensor):
                        if m == _TENSOR_ELEMENT:
                            return _read_varint(whole, 1)[0]
    return 1


def with_arena(model: bytes, states: Mapping[str, Carried]) -> bytes:
    """The graph of `model` with its states, by the name of the input, in an arena.

    Raises:
        ModelError: the bytes are no ONNX model, or a state is not among its inputs and outputs.

    """
    following = {state.output: name for name, state in states.items()}
    out, found = [], 0
    for number, whole, content in fields(memoryview(model)):
        if number != _MODEL_GRAPH:
            out.append(bytes(whole))
            continue
        found += 1
        out.append(_message(_MODEL_GRAPH, _graph(content, states, following)))
    if not found:
        raise ModelError("the model file holds no graph; export it again")
    return b"".join(out)


def _graph(graph: memoryview, states: Mapping[str, Carried], following: Mapping[str, str]) -> bytes:
    nodes: list[bytes] = []
    rest: list[bytes] = []
    seen: set[str] = set()
    for number, whole, content in fields(graph):
        name = _name_of(content) if number in (_GRAPH_INPUT, _GRAPH_OUTPUT) else ""
        if number == _GRAPH_NODE:
            nodes.append(bytes(whole))
        elif number == _GRAPH_INPUT and name in states:
            seen.add(name)
            rest.append(_value(number, arena_name(name), _element_of(content), states[name].shape))
        elif number == _GRAPH_OUTPUT and name in following:
            seen.add(name)
            before_it = following[name]
            rest.append(_value(number, stored_name(before_it), _element_of(content), states[before_it].shape))
        else:
            rest.append(bytes(whole))
    for wanted in (*states, *following):
        if wanted not in seen:
            raise ModelError(f"the graph has no `{wanted}` that could be kept in an arena; export it again")
    axis, rows = "arena/axis", "arena/rows"
    before = [_node("Unsqueeze", (SLOTS, axis), (rows,), rows)]
    after = []
    for name, state in states.items():
        taken, put, axis_at = name, state.output, state.batch_axis
        if axis_at:
            taken, put = f"arena/taken.{name}", f"arena/put.{name}"
            rest_axes = range(len(state.shape) + 1)
            there = [*rest_axes[1 : axis_at + 1], 0, *rest_axes[axis_at + 1 :]]
            back = [axis_at, *(a for a in rest_axes if a != axis_at)]
            after.append(_transpose(state.output, put, back))
        before.append(_node("Gather", (arena_name(name), SLOTS), (taken,), f"arena/gather.{name}"))
        if axis_at:
            before.append(_transpose(taken, name, there))
        after.append(_node("ScatterND", (arena_name(name), rows, put), (stored_name(name),), f"arena/scatter.{name}"))
    rest.append(_value(_GRAPH_INPUT, SLOTS, _INT64, (), "batch"))
    rest.append(_axis(axis))
    return b"".join((*before, *nodes, *after, *rest))
