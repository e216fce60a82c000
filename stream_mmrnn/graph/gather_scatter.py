"""A one-step graph -> the same graph over rows of an arena: `state.X` is gathered by slot, `next.X` scattered back.

    state.X [batch, ...]  becomes  arena.state.X [slots, ...], read by Gather at `slots` [batch]
    next.X  [batch, ...]  becomes  stored.state.X [slots, ...], written at the same rows: by ScatterND, row by row,
                                   or by ScatterElements, element by element

A state whose batch is not its first axis is transposed; in the arena the slot axis comes first. Bound with one buffer
as both, the state of all sessions stays where the graph runs, and a run touches only the rows that it was asked for.
Names inside the graph stay, so only its inputs and outputs are rewritten: the file is edited as protobuf fields
(`model_file`), and the weights are copied unread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

from stream_mmrnn.core.errors import ModelError
from stream_mmrnn.graph import model_file as onnx_bytes
from stream_mmrnn.graph.model_file import node

SLOTS = "slots"
"""The input with the rows of a run, int64 [batch]."""


Scatter: TypeAlias = Literal["rows", "elements"]
"""How states are written back. `rows` suits a CPU, which copies a row at once. On CUDA onnxruntime's ScatterND uses one
thread per row (2 x 256 rows of 256 took 194 us of a step's 306 on an H100), ScatterElements one per number."""


class Carried(NamedTuple):
    """A state input: the output that follows it, its shape without the batch axis, and where that axis is."""

    output: str
    shape: tuple[int, ...]
    batch_axis: int = 0


def arena_name(state: str) -> str:
    """The input that replaces `state.X` (or the state's own name in a contract file)."""
    return f"arena.{state}"


def stored_name(state: str) -> str:
    """The output that replaces the one that follows `state.X`."""
    return f"stored.{state}"


def with_arena(model: bytes, states: Mapping[str, Carried], scatter: Scatter = "rows") -> bytes:
    """The graph of `model` with its states, by the name of the input, in an arena. Both scatters compute the same.

    Raises:
        ModelError: the bytes are no ONNX model, or a state is not among its inputs and outputs.

    """
    following = {state.output: name for name, state in states.items()}
    out, found = [], 0
    for number, whole, content in onnx_bytes.fields(memoryview(model)):
        if number != onnx_bytes.MODEL_GRAPH:
            out.append(bytes(whole))
            continue
        found += 1
        out.append(onnx_bytes.message(onnx_bytes.MODEL_GRAPH, _graph(content, states, following, scatter)))
    if not found:
        raise ModelError("the model file holds no graph; export it again")
    return b"".join(out)


def _transposed(source: str, target: str, axes: Sequence[int]) -> bytes:
    return node("Transpose", (source,), (target,), f"arena/turn.{target}", perm=axes)


def _held(number: int, name: str, was: memoryview, state: Carried) -> bytes:
    """The input or output over all slots, with its element type unchanged."""
    return onnx_bytes.value(number, name, onnx_bytes.element_of(was), state.shape, "held")


def _indices(shape: tuple[int, ...]) -> tuple[str, list[bytes], list[bytes]]:
    """The slot of each number in a batch of such states: its name, and the nodes and constants that compute it."""
    if not shape:
        return SLOTS, [], []
    label = "x".join(map(str, shape))
    axes, column, zeros, where = (f"arena/{part}.{label}" for part in ("axes", "column", "zeros", "where"))
    nodes = [node("Unsqueeze", (SLOTS, axes), (column,), column), node("Add", (column, zeros), (where,), where)]
    constants = [
        onnx_bytes.initializer(axes, np.arange(1, len(shape) + 1, dtype=np.int64)),
        onnx_bytes.initializer(zeros, np.zeros((1, *shape), np.int64)),
    ]
    return where, nodes, constants


def _graph(graph: memoryview, states: Mapping[str, Carried], following: Mapping[str, str], scatter: Scatter) -> bytes:
    nodes: list[bytes] = []
    rest: list[bytes] = []
    seen: set[str] = set()
    for number, whole, content in onnx_bytes.fields(graph):
        name = onnx_bytes.name_of(content) if number in (onnx_bytes.GRAPH_INPUT, onnx_bytes.GRAPH_OUTPUT) else ""
        if number == onnx_bytes.GRAPH_NODE:
            nodes.append(bytes(whole))
        elif number == onnx_bytes.GRAPH_INPUT and name in states:
            seen.add(name)
            rest.append(_held(number, arena_name(name), content, states[name]))
        elif number == onnx_bytes.GRAPH_OUTPUT and name in following:
            seen.add(name)
            before_it = following[name]
            rest.append(_held(number, stored_name(before_it), content, states[before_it]))
        else:
            rest.append(bytes(whole))
    for wanted in (*states, *following):
        if wanted not in seen:
            raise ModelError(f"the graph has no `{wanted}` that could be kept in an arena; export it again")
    axis, rows = "arena/axis", "arena/rows"
    before = [node("Unsqueeze", (SLOTS, axis), (rows,), rows)] if scatter == "rows" else []
    after = []
    where: dict[tuple[int, ...], str] = {}
    for name, state in states.items():
        if scatter == "elements" and state.shape not in where:
            where[state.shape], made, constants = _indices(state.shape)
            before += made
            rest += constants
        taken, put, axis_at = name, state.output, state.batch_axis
        if axis_at:
            taken, put = f"arena/taken.{name}", f"arena/put.{name}"
            rest_axes = range(len(state.shape) + 1)
            there = [*rest_axes[1 : axis_at + 1], 0, *rest_axes[axis_at + 1 :]]
            back = [axis_at, *(a for a in rest_axes if a != axis_at)]
            after.append(_transposed(state.output, put, back))
        before.append(node("Gather", (arena_name(name), SLOTS), (taken,), f"arena/gather.{name}"))
        if axis_at:
            before.append(_transposed(taken, name, there))
        arena, stored, title = arena_name(name), stored_name(name), f"arena/scatter.{name}"
        if scatter == "rows":
            after.append(node("ScatterND", (arena, rows, put), (stored,), title))
        else:
            after.append(node("ScatterElements", (arena, where[state.shape], put), (stored,), title, axis=0))
    rest.append(onnx_bytes.value(onnx_bytes.GRAPH_INPUT, SLOTS, onnx_bytes.INT64, (), "batch"))
    if scatter == "rows":
        rest.append(onnx_bytes.initializer(axis, np.array([1], np.int64)))
    return b"".join((*before, *nodes, *after, *rest))
