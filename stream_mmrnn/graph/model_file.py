"""ONNX files as bytes: read the fields of a message, write nodes, values, weights and whole models.

A file is protobuf, a sequence of numbered fields; the numbers here are those of onnx.proto (ONNX 1.x,
github.com/onnx/onnx, Apache-2.0). So graphs can be edited, and small ones written, without the onnx package. Whether a
graph is valid is checked only as far as `check` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.errors import ModelError

MODEL_GRAPH = 7
_MODEL_IR, _MODEL_PRODUCER, _MODEL_OPSET, _MODEL_METADATA = 1, 2, 8, 14
_KEY, _VALUE = 1, 2
_OPSET_DOMAIN, _OPSET_VERSION = 1, 2
GRAPH_NODE, GRAPH_INITIALIZER, GRAPH_INPUT, GRAPH_OUTPUT, GRAPH_SPARSE = 1, 5, 11, 12, 15
_GRAPH_NAME = 2
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OP, NODE_ATTRIBUTE = 1, 2, 3, 4, 5
_NODE_DOMAIN = 7
_ATTRIBUTE_NAME, _ATTRIBUTE_I, _ATTRIBUTE_INTS, _ATTRIBUTE_TYPE = 1, 3, 8, 20
_TYPE_IS_INT, _TYPE_IS_INTS = 2, 7
VALUE_NAME, VALUE_TYPE = 1, 2
TYPE_TENSOR = 1
TENSOR_ELEMENT, TENSOR_SHAPE = 1, 2
_SHAPE_DIM, _DIM_VALUE, _DIM_PARAM = 1, 1, 2
_WEIGHT_DIMS, _WEIGHT_ELEMENT, _WEIGHT_NAME, _WEIGHT_RAW, _WEIGHT_EXTERNAL, _WEIGHT_LOCATION = 1, 2, 8, 9, 13, 14
_MAX_DEPTH = 8
TENSORS_IN: dict[str, dict[int, str]] = {
    "ModelProto": {MODEL_GRAPH: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {GRAPH_NODE: "NodeProto", GRAPH_INITIALIZER: "TensorProto", GRAPH_SPARSE: "SparseTensorProto"},
    "NodeProto": {NODE_ATTRIBUTE: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
}
"""The fields of each message that hold tensors, at any depth, and the message that each is."""
_DOMAINS = ("", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc")

FLOAT, UINT8, INT8, INT64, BOOL = 1, 2, 3, 7, 9
"""Element types."""
_ELEMENTS = {
    np.dtype(np.float32): FLOAT,
    np.dtype(np.uint8): UINT8,
    np.dtype(np.int8): INT8,
    np.dtype(np.int64): INT64,
    np.dtype(np.bool_): BOOL,
}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_varint(data: memoryview, at: int) -> tuple[int, int]:
    """The varint at `at`, and the position after it.

    Raises:
        ModelError: there is none.

    """
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


def varint(value: int) -> bytes:
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
        tag, at = read_varint(data, at)
        kind = tag & 7
        begin = at
        if kind == _VARINT:
            _, at = read_varint(data, at)
        elif kind == _BYTES:
            length, begin = read_varint(data, at)
            at = begin + length
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ModelError("the model file holds what no ONNX graph holds; export it again")
        if at > len(data):
            raise ModelError("the model file is cut off; export it again")
        yield tag >> 3, data[start:at], data[begin:at] if kind == _BYTES else data[:0]


def message(number: int, content: bytes) -> bytes:
    return varint(number << 3 | _BYTES) + varint(len(content)) + content


def string(number: int, text: str) -> bytes:
    return message(number, text.encode())


def integer(number: int, value: int) -> bytes:
    return varint(number << 3 | _VARINT) + varint(value)


def node(
    op: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    name: str,
    *,
    domain: str = "",
    **attributes: int | Sequence[int],
) -> bytes:
    """A node of a graph; attributes are integers from 0, or lists of them."""
    body = b"".join(string(NODE_INPUT, i) for i in inputs) + b"".join(string(NODE_OUTPUT, o) for o in outputs)
    encoded = b"".join(message(NODE_ATTRIBUTE, _attribute(key, value)) for key, value in attributes.items())
    of_domain = string(_NODE_DOMAIN, domain) if domain else b""
    return message(GRAPH_NODE, body + string(NODE_NAME, name) + string(NODE_OP, op) + encoded + of_domain)


def _attribute(name: str, value: int | Sequence[int]) -> bytes:
    if isinstance(value, int):
        body, kind = integer(_ATTRIBUTE_I, value), _TYPE_IS_INT
    else:
        body, kind = b"".join(integer(_ATTRIBUTE_INTS, v) for v in value), _TYPE_IS_INTS
    return string(_ATTRIBUTE_NAME, name) + body + integer(_ATTRIBUTE_TYPE, kind)


def value(number: int, name: str, element: int, row: Sequence[int], rows: str) -> bytes:
    """An input or output (`number`) of shape [rows, *row]; `rows` names the axis that stays open."""
    dims = [string(_DIM_PARAM, rows), *(integer(_DIM_VALUE, d) for d in row)]
    tensor = integer(TENSOR_ELEMENT, element) + message(TENSOR_SHAPE, b"".join(message(_SHAPE_DIM, d) for d in dims))
    return message(number, string(VALUE_NAME, name) + message(VALUE_TYPE, message(TYPE_TENSOR, tensor)))


def initializer(name: str, array: npt.NDArray[Any]) -> bytes:
    """A constant or weight of a graph: float32, uint8, int8, int64 or bool."""
    element = _ELEMENTS[array.dtype]
    raw = np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
    dims = b"".join(integer(_WEIGHT_DIMS, d) for d in array.shape)
    body = dims + integer(_WEIGHT_ELEMENT, element) + string(_WEIGHT_NAME, name) + message(_WEIGHT_RAW, raw)
    return message(GRAPH_INITIALIZER, body)


def model(
    name: str,
    parts: Sequence[bytes],
    metadata: Mapping[str, str],
    opset: int,
    ir_version: int,
    domains: Mapping[str, int] = {},
) -> bytes:
    """A whole file: `parts` are nodes in order, weights, inputs and outputs; `domains` are the versions of other
    operator sets.
    """
    graph = b"".join(parts) + string(_GRAPH_NAME, name)
    entries = b"".join(message(_MODEL_METADATA, string(_KEY, k) + string(_VALUE, v)) for k, v in metadata.items())
    head = integer(_MODEL_IR, ir_version) + string(_MODEL_PRODUCER, "stream_mmrnn")
    sets = message(_MODEL_OPSET, integer(_OPSET_VERSION, opset)) + b"".join(
        message(_MODEL_OPSET, string(_OPSET_DOMAIN, d) + integer(_OPSET_VERSION, v)) for d, v in domains.items()
    )
    return head + message(MODEL_GRAPH, graph) + sets + entries


def check(data: bytes) -> None:
    """Refuse bytes that are no supported model, or that refer to other files, before native code parses them.

    Raises:
        ModelError: a message is truncated or nested too deep, a name is no UTF-8, weights are in another file, or an
            operator needs a library that would have to be loaded.

    """
    graphs = 0
    for number, _, content in fields(memoryview(data)):
        graphs += number == MODEL_GRAPH
        if number in (_MODEL_METADATA, _MODEL_OPSET):
            for _, _, field in fields(content):
                _text(field)
    if graphs != 1:
        raise ModelError(f"the model file holds {graphs} graphs, expected one; export it again")
    _check_message("ModelProto", memoryview(data), 0)


def _check_message(kind: str, content: memoryview, depth: int) -> None:
    """Check a message, and all messages in it that may hold tensors."""
    if kind == "TensorProto":
        _check_tensor(content)
        return
    depth += kind == "GraphProto"
    if depth > _MAX_DEPTH:
        raise ModelError(f"the model file nests graphs more than {_MAX_DEPTH} deep")
    inside = TENSORS_IN[kind]
    for number, _, part in fields(content):
        if number in inside:
            _check_message(inside[number], part, depth)
        elif kind == "NodeProto":
            _check_node_field(number, part)
        elif kind == "GraphProto" and number in (GRAPH_INPUT, GRAPH_OUTPUT):
            element_of(part)
            _text_of(part, VALUE_NAME)


def _check_node_field(number: int, part: memoryview) -> None:
    if number in (NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_OP):
        _text(part)
    elif number == _NODE_DOMAIN and _text(part) not in _DOMAINS:
        raise ModelError(f"the model uses operators of {_text(part)[:64]!r}, expected ONNX's own and onnxruntime's")


def _check_tensor(content: memoryview) -> None:
    for number, whole, field in fields(content):
        if number == _WEIGHT_EXTERNAL or (number == _WEIGHT_LOCATION and read_varint(whole, 1)[0]):
            raise ModelError(
                "the model keeps weights in another file, expected all of them in this one: export it with "
                "external_data=False (torch), or load it with onnx.load and save it again with onnx.save"
            )
        if number == _WEIGHT_NAME:
            _text(field)


def _text_of(content: memoryview, wanted: int) -> None:
    for number, _, field in fields(content):
        if number == wanted:
            _text(field)


def _text(field: memoryview) -> str:
    try:
        return bytes(field).decode()
    except UnicodeDecodeError as e:
        raise ModelError("the model file holds a name that is no text; export it again") from e


def name_of(content: memoryview, number: int = VALUE_NAME) -> str:
    for n, _, field in fields(content):
        if n == number:
            return bytes(field).decode("utf-8", "replace")
    return ""


def element_of(content: memoryview) -> int:
    """The element type of an input or output; 1 (float) if it has none."""
    for number, _, kind in fields(content):
        if number == VALUE_TYPE:
            for n, _, tensor in fields(kind):
                if n == TYPE_TENSOR:
                    for m, whole, _ in fields(tensor):
                        if m == TENSOR_ELEMENT:
                            return read_varint(whole, 1)[0]
    return 1
