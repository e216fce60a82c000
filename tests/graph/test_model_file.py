"""Bytes that are no model, or that refer to other files, are refused before native code parses them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from stream_mmrnn.core.errors import ModelError
from stream_mmrnn.graph import model_file

Step = tuple[str, str]
"""A message of the schema, and one of its fields."""
_MAX_REPEATS = 2
"""How often a message may stand on a path: once more than needed to nest it."""


def children(message: Any) -> list[Any]:
    """The fields of a message of onnx's own schema that are messages themselves."""
    return [field for field in message.fields if field.message_type is not None]


def may_hold_tensors(message: Any, seen: frozenset[str] = frozenset()) -> bool:
    if message.name == "TensorProto":
        return True
    if message.name in seen:
        return False
    return any(may_hold_tensors(field.message_type, seen | {message.name}) for field in children(message))


def paths(message: Any, before: tuple[Step, ...] = ()) -> Iterator[tuple[Step, ...]]:
    """Every way from a message to a tensor."""
    if message.name == "TensorProto":
        yield before
        return
    if sum(name == message.name for name, _ in before) >= _MAX_REPEATS:
        return
    for field in children(message):
        if may_hold_tensors(field.message_type):
            yield from paths(field.message_type, (*before, (message.name, field.name)))


PATHS = list(paths(onnx.ModelProto.DESCRIPTOR))


def whole_model() -> Any:
    """A valid model of one node."""
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", value[:1], value[1:])
    return helper.make_model(graph)


def with_tensor_at(path: tuple[Step, ...], tensor: Any) -> bytes:
    model = whole_model()
    at = model
    for _, name in path:
        field = getattr(at, name)
        at = field.add() if hasattr(field, "add") else field
    at.CopyFrom(tensor)
    return bytes(model.SerializeToString())


def external(location: bool) -> Any:
    tensor = TensorProto(name="t", data_type=TensorProto.FLOAT, dims=[1])
    tensor.external_data.add(key="location", value="secret.txt")
    if location:
        tensor.data_location = TensorProto.EXTERNAL
    return tensor


def test_the_table_of_tensors_is_that_of_onnx() -> None:
    """A new field of the format that may hold tensors fails here."""
    found: dict[str, dict[int, str]] = {}
    for path in PATHS:
        at = onnx.ModelProto.DESCRIPTOR
        for name, field_name in path:
            assert at.name == name
            field = at.fields_by_name[field_name]
            found.setdefault(name, {})[field.number] = field.message_type.name
            at = field.message_type
    assert found == model_file.TENSORS_IN


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ".".join(name for _, name in path))
def test_external_data_is_refused_wherever_a_tensor_can_stand(path: tuple[Step, ...]) -> None:
    inside = helper.make_tensor("t", TensorProto.FLOAT, [1], [1.0])
    model_file.check(with_tensor_at(path, inside))
    for location in (True, False):
        with pytest.raises(ModelError, match="keeps weights in another file"):
            model_file.check(with_tensor_at(path, external(location)))
    only_location = TensorProto(name="t", data_location=TensorProto.EXTERNAL)
    with pytest.raises(ModelError, match="keeps weights in another file"):
        model_file.check(with_tensor_at(path, only_location))


def test_a_sparse_constant_does_not_read_a_file() -> None:
    """As it was found: `Constant(sparse_value)` passed, and the first answer held bytes of a file."""
    model = whole_model()
    sparse = onnx.SparseTensorProto(values=external(True), dims=[4])
    sparse.indices.CopyFrom(helper.make_tensor("i", TensorProto.INT64, [1], [0]))
    node = helper.make_node("Constant", [], ["c"], sparse_value=sparse)
    model.graph.node.append(node)
    with pytest.raises(ModelError, match="keeps weights in another file"):
        model_file.check(model.SerializeToString())


def test_graphs_that_nest_without_end_are_refused() -> None:
    graph = helper.make_graph([], "inner", [], [])
    for _ in range(12):
        graph = helper.make_graph([helper.make_node("If", [], [], then_branch=graph)], "g", [], [])
    with pytest.raises(ModelError, match="nests graphs more than 8 deep"):
        model_file.check(helper.make_model(graph).SerializeToString())
