"""The contract between a graph and the engine: which tensor is which modality, state and head.

A graph exported by this program states it itself: inputs `input.MODALITY`, `present`, `age`, `active`, `reset`, pairs
`state.X` and `next.X`, outputs `head.NAME`, and the rest as JSON in the file's metadata under `stream_mmrnn`. Any other
stateful graph gets one by names, in a file beside it (`x.onnx`, `x.contract.toml`). An error is one sentence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from stream_mmrnn.core import strict_toml
from stream_mmrnn.core.errors import ConfigError, ModelError
from stream_mmrnn.core.topics import FEATURE, stream_of
from stream_mmrnn.core.types import HeadSpec, ModalitySpec, ModelSpec, StateSpec
from stream_mmrnn.graph.runtime import Graph, TensorSpec

METADATA_KEY = "stream_mmrnn"
_MAX_TICK_NS = 366 * 86_400_000_000_000
"""A year; times are 64 bits of nanoseconds."""
_MAX_NUMBERS = 2**22
"""Most numbers in one row of an input, a state or a head."""
_MAX_PARTS = 256
STATE, NEXT = "state.", "next."
_TURN_OVER = "turn_over"
_TIMED_RANK = 3
"""Axes of an input or output with a time axis: batch, time, size."""


class StateWires(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The graph's input and output for one state."""

    input: str
    output: str
    batch_axis: int = 0


class Wiring(msgspec.Struct, frozen=True):
    """The graph's names for its inputs, states and heads; "" if it has no such input."""

    inputs: dict[str, str]
    """By modality."""
    heads: dict[str, str]
    states: dict[str, StateWires]
    active: str = "active"
    reset: str = "reset"
    present: str = "present"
    age: str = "age"
    constants: dict[str, float] = {}
    """Inputs with a constant value (a sample rate, for example)."""
    timed: frozenset[str] = frozenset()
    """Inputs of modalities and outputs of heads with a time axis, [B, 1, size]; a step is one time step."""


class Contract(msgspec.Struct, frozen=True):
    spec: ModelSpec
    wiring: Wiring


class _MetadataContract(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contract in the metadata of a graph that this program exported."""

    name: str
    tick_ns: int
    modalities: tuple[ModalitySpec, ...]
    heads: tuple[HeadSpec, ...]


class _NamedModality(ModalitySpec, frozen=True, forbid_unknown_fields=True, kw_only=True):
    input: str


class _NamedHead(HeadSpec, frozen=True, forbid_unknown_fields=True, kw_only=True):
    output: str


class _ContractFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The contract file (TOML) beside a graph without such metadata."""

    name: str
    tick_ms: Annotated[float, msgspec.Meta(ge=-1e9, le=1e9)]
    modalities: tuple[_NamedModality, ...]
    heads: tuple[_NamedHead, ...]
    states: tuple[StateWires, ...]
    active: str = ""
    reset: str = ""
    present: str = ""
    age: str = ""
    constants: dict[str, float] = {}


def write_contract(name: str, tick_ns: int, modalities: Sequence[ModalitySpec], heads: Sequence[HeadSpec]) -> str:
    """The metadata value that an exporter writes and `contract_of` reads."""
    return msgspec.json.encode(_MetadataContract(name, tick_ns, tuple(modalities), tuple(heads))).decode()


def beside(path: Path) -> Path:
    """The path of the contract file of a graph."""
    return path.with_name(f"{path.stem}.contract.toml")


def read_contract(graph: Graph) -> ModelSpec:
    """The model spec of a graph; raises ModelError as `contract_of` does."""
    return contract_of(graph).spec


def contract_of(graph: Graph) -> Contract:
    """The contract of a graph.

    Raises:
        ModelError: it has no contract, or its inputs and outputs do not match it.

    """
    if METADATA_KEY in graph.metadata:
        contract = _stated(graph)
    elif beside(graph.path).is_file():
        contract = _named(graph, beside(graph.path))
    else:
        raise ModelError(
            f"{graph.path} has no `{METADATA_KEY}` metadata, so its contract is unknown; export it again, or write"
            f" {beside(graph.path).name} beside it"
        )
    _check(graph, contract)
    return contract


def _stated(graph: Graph) -> Contract:
    where = graph.path
    try:
        stated = msgspec.json.decode(graph.metadata[METADATA_KEY], type=_MetadataContract)
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        raise ModelError(f"{where} has a contract that cannot be read: {e}") from e
    states = {}
    for name in graph.inputs:
        if name.startswith(STATE):
            following = NEXT + name.removeprefix(STATE)
            if following not in graph.outputs:
                raise ModelError(f"{where} has the input `{name}` but no output `{following}` that carries it on")
            states[name.removeprefix(STATE)] = StateWires(name, following)
    wiring = Wiring(
        {m.name: f"input.{m.name}" for m in stated.modalities},
        {h.name: f"head.{h.name}" for h in stated.heads},
        states,
    )
    return _contract(graph, stated.name, stated.tick_ns, stated.modalities, stated.heads, wiring)


def _named(graph: Graph, file: Path) -> Contract:
    try:
        table = strict_toml.read_toml(file)
        named = strict_toml.convert(table, _ContractFile)
    except (OSError, ValueError, RecursionError, ConfigError) as e:
        raise ModelError(f"the contract {file} cannot be read: {e}") from e
    for state in named.states:
        for name, there in ((state.input, graph.inputs), (state.output, graph.outputs)):
            if name not in there:
                raise ModelError(f"{graph.path} has no `{name}`, which {file.name} names; it has {', '.join(there)}")
    wiring = Wiring(
        {m.name: m.input for m in named.modalities},
        {h.name: h.output for h in named.heads},
        {s.input: s for s in named.states},
        named.active,
        named.reset,
        named.present,
        named.age,
        named.constants,
    )
    modalities = tuple(ModalitySpec(m.name, m.size, m.encoder, m.reduction, m.stack) for m in named.modalities)
    heads = tuple(
        HeadSpec(h.name, h.kind, h.size, h.labels, h.horizons_s, h.unit, h.threshold, h.readable) for h in named.heads
    )
    return _contract(graph, named.name, round(named.tick_ms * 1e6), modalities, heads, wiring)


def _contract(
    graph: Graph,
    name: str,
    tick_ns: int,
    modalities: tuple[ModalitySpec, ...],
    heads: tuple[HeadSpec, ...],
    wiring: Wiring,
) -> Contract:
    states = []
    for state, wires in wiring.states.items():
        if wires.batch_axis < 0:
            raise ModelError(f"{graph.path}: the batch axis of the state `{wires.input}` is counted from 0")
        shape = graph.inputs[wires.input].shape
        rest = (*shape[: wires.batch_axis], *shape[wires.batch_axis + 1 :])
        after = _without_batch(graph.outputs[wires.output], wires.batch_axis)
        if len(shape) <= wires.batch_axis or None in rest or not _fits(after, rest):
            axis = shape.index(None) if shape.count(None) == 1 else wires.batch_axis
            hint = f"; its open axis is {axis}: say `batch_axis = {axis}`" if axis != wires.batch_axis else ""
            raise ModelError(
                f"{graph.path}: `{wires.input}` {shape} and `{wires.output}` must have one fixed shape per row{hint}"
            )
        _check_open(graph.path, graph.inputs[wires.input], wires.batch_axis)
        _check_state_types(graph.path, graph.inputs[wires.input], graph.outputs[wires.output])
        states.append(StateSpec(state, tuple(n or 0 for n in rest)))
    timed = {n for n in wiring.inputs.values() if n in graph.inputs and len(graph.inputs[n].shape) == _TIMED_RANK}
    timed |= {n for n in wiring.heads.values() if n in graph.outputs and len(graph.outputs[n].shape) == _TIMED_RANK}
    wiring = msgspec.structs.replace(wiring, timed=frozenset(timed))
    return Contract(ModelSpec(name, graph.sha256, tick_ns, modalities, _readable(heads), tuple(states)), wiring)


def _readable(heads: tuple[HeadSpec, ...]) -> tuple[HeadSpec, ...]:
    """Files older than `readable` do not say that the end of a turn may be read in a silence only."""
    if not any(h.kind == "activity_projection" for h in heads):
        return heads
    return tuple(msgspec.structs.replace(h, readable="silence") if h.name == _TURN_OVER else h for h in heads)


def _without_batch(tensor: TensorSpec, axis: int) -> tuple[int | None, ...]:
    return (*tensor.shape[:axis], *tensor.shape[axis + 1 :])


def _fits(shape: tuple[int | None, ...], wanted: tuple[int | None, ...]) -> bool:
    """Whether a shape matches; None is a dimension that the file leaves open."""
    return len(shape) == len(wanted) and all(a is None or a == b for a, b in zip(shape, wanted, strict=True))


def _type(tensor: TensorSpec) -> str:
    """`float16`, `int64`, or onnxruntime's own name of a type that numpy does not have."""
    return tensor.type.removeprefix("tensor(").removesuffix(")") if tensor.dtype == object else tensor.dtype.name


def _check_open(where: Path, tensor: TensorSpec, axis: int = 0) -> None:
    """Refuse an input that takes a fixed number of rows."""
    if (rows := tensor.shape[axis]) is not None:
        raise ModelError(
            f"{where}: the batch axis of input `{tensor.name}` (axis {axis}) is fixed to {rows}, expected an open one; "
            f'export it as a dynamic axis: in torch with dynamic_shapes {{{axis}: "batch"}} for this input, in Keras '
            "with None in the input signature"
        )


def _check_state_types(where: Path, before: TensorSpec, after: TensorSpec) -> None:
    if before.dtype == object:
        raise ModelError(
            f"{where}: the state `{before.name}` is {_type(before)}, expected a float of 16, 32 or 64 bits, an integer "
            "or bool; cast it inside the graph"
        )
    if before.type != after.type:
        raise ModelError(
            f"{where}: the state `{before.name}` is {_type(before)} and `{after.name}`, which follows it, is "
            f"{_type(after)}, expected one type; cast it inside the graph"
        )


def _check_input(where: Path, tensor: TensorSpec, row: tuple[int, ...], timed: bool) -> None:
    """The shape of an input with one row per session; `timed`: it has a time axis after the batch axis."""
    name, got, steps = tensor.name, tensor.shape, (1,) if timed else ()
    if not _fits(got[1:], (*steps, *row)) or not got:
        hint = "; its time axis must be 1: export one step of the sequence" if timed and _fits(got[2:], row) else ""
        raise ModelError(f"{where}: input `{name}` has shape {got}, the contract says {(None, *row)}{hint}")
    if timed and got[0] == 1 and got[1] is None:
        raise ModelError(
            f"{where}: input `{name}` has shape {got}, expected the batch axis before the time axis; "
            "export it with batch_first=True (torch)"
        )
    _check_open(where, tensor)


def _check_input_type(where: Path, tensor: TensorSpec, float_only: bool) -> None:
    if tensor.dtype == object or (float_only and tensor.dtype.kind != "f"):
        wanted = "float32" if float_only else "float32 or bool"
        raise ModelError(
            f"{where}: input `{tensor.name}` is {_type(tensor)}, the engine gives it {wanted}; cast it inside the graph"
        )


def _check_sizes(where: Path, contract: Contract) -> None:
    """Reject empty rows, and rows so long that a malicious file would exhaust memory."""
    spec = contract.spec
    if not 0 < spec.tick_ns <= _MAX_TICK_NS:
        raise ModelError(f"{where} has a tick of {spec.tick_ns} ns; expected more than 0 and at most {_MAX_TICK_NS}")
    sizes = {m.name: m.size for m in spec.modalities} | {h.name: h.size for h in spec.heads}
    sizes |= {s.name: math.prod(s.shape) for s in spec.states}
    for name, size in sizes.items():
        if not 0 < size <= _MAX_NUMBERS:
            raise ModelError(f"{where}: {name[:64]!r} has {size} numbers a row; expected 1 to {_MAX_NUMBERS}")
    for kind, names in (("modality", [m.name for m in spec.modalities]), ("head", [h.name for h in spec.heads])):
        if not names or len(set(names)) < len(names) or len(names) > _MAX_PARTS:
            raise ModelError(f"{where} must name each {kind} once; expected 1 to {_MAX_PARTS} of them")


def _check(graph: Graph, contract: Contract) -> None:
    where, spec, wiring = graph.path, contract.spec, contract.wiring
    _check_sizes(where, contract)
    count = len(spec.modalities)
    sized = {wiring.present: (count,), wiring.age: (count,), wiring.active: (), wiring.reset: ()}
    expected: dict[str, tuple[int, ...]] = {name: shape for name, shape in sized.items() if name}
    for modality in spec.modalities:
        if not stream_of(FEATURE + modality.name):
            raise ModelError(
                f"{where} has a modality {modality.name[:64]!r}; a name is that of a stream (1 to 32 letters, digits, "
                "`_` or `-`), or NAME.ENCODER"
            )
        if modality.stack < 1 or modality.size % modality.stack:
            raise ModelError(f"{where}: the size {modality.size} of {modality.name} is not {modality.stack} samples")
        expected[wiring.inputs[modality.name]] = (modality.size,)
    for name, row in expected.items():
        if name not in graph.inputs:
            raise ModelError(f"{where} has no input `{name}`, which its contract needs")
        _check_input(where, graph.inputs[name], row, name in wiring.timed)
        _check_input_type(where, graph.inputs[name], name == wiring.age or name in wiring.inputs.values())
    carried = {s.input for s in wiring.states.values()}
    for name in wiring.constants:
        if name not in graph.inputs or None in graph.inputs[name].shape:
            raise ModelError(f"{where} has no input `{name}` of a fixed shape, which its contract makes a constant")
    for name in graph.inputs:
        if name not in expected and name not in carried and name not in wiring.constants:
            raise ModelError(f"{where} has the input `{name}`, which is neither state nor in its contract")
    for head in spec.heads:
        output = graph.outputs.get(wiring.heads[head.name])
        row = (1, head.size) if wiring.heads[head.name] in wiring.timed else (head.size,)
        if output is None or not _fits(output.shape[1:], row):
            raise ModelError(f"{where} has no output `{wiring.heads[head.name]}` of {head.size} numbers a row")
        if output.dtype != np.float32:
            raise ModelError(
                f"{where}: output `{output.name}` is {_type(output)}, expected float32; cast it inside the graph"
            )
