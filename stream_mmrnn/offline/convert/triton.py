"""Write a stateful model as a model repository for NVIDIA's Triton: `export --triton DIR`.

    DIR/NAME/config.pbtxt     sequence batching with implicit state: Triton stores the contract's state tensors
    DIR/NAME/1/model.onnx     the graph; its first nodes reshape Triton's controls from [batch, 1] to [batch]

Needs the contract only, no torch. The keys of the configuration are those of Triton's model_config.proto.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stream_mmrnn.core.errors import FileError, ModelError
from stream_mmrnn.core.settings import StateSettings
from stream_mmrnn.graph import model_file as onnx_bytes
from stream_mmrnn.graph.model_file import node
from stream_mmrnn.graph.runtime import Graph
from stream_mmrnn.predict.contract import Contract, contract_of

READY, START = "READY", "START"
"""Triton's controls for `active` and `reset`."""
_TYPES = {
    "tensor(float)": "TYPE_FP32",
    "tensor(float16)": "TYPE_FP16",
    "tensor(double)": "TYPE_FP64",
    "tensor(bool)": "TYPE_BOOL",
    "tensor(int64)": "TYPE_INT64",
    "tensor(int32)": "TYPE_INT32",
    "tensor(int8)": "TYPE_INT8",
    "tensor(uint8)": "TYPE_UINT8",
}
_ROWS = "triton/rows"


class Enum(NamedTuple):
    """A value of an enumeration, which is written without quotes."""

    text: str


Value = str | int | bool | Enum | Mapping[str, Any] | Sequence[Any]


def _lines(key: str, value: Value, indent: str) -> Iterable[str]:
    if isinstance(value, Enum):
        yield f"{indent}{key}: {value.text}"
    elif isinstance(value, Mapping):
        yield f"{indent}{key} {{"
        for name, inner in value.items():
            yield from _lines(name, inner, indent + "  ")
        yield f"{indent}}}"
    elif isinstance(value, bool | int):
        yield f"{indent}{key}: {str(value).lower()}"
    elif isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        yield f'{indent}{key}: "{escaped}"'
    elif all(isinstance(inner, int) for inner in value):
        yield f"{indent}{key}: [ {', '.join(str(int(inner)) for inner in value)} ]"
    else:
        for inner in value:
            yield from _lines(key, inner, indent)


def text_of(table: Mapping[str, Value]) -> str:
    """A protobuf message in text format; a list of messages repeats its key."""
    return "\n".join(line for key, value in table.items() for line in _lines(key, value, "")) + "\n"


def _tensor(name: str, kind: str, shape: Sequence[int | None], where: Path) -> dict[str, Any]:
    """Name, type and the axes after the batch axis."""
    if kind not in _TYPES:
        raise ModelError(f"{where}: Triton does not know the type {kind} of `{name}`")
    return {"name": name, "data_type": Enum(_TYPES[kind]), "dims": [-1 if n is None else n for n in shape]}


def configuration(name: str, graph: Graph, contract: Contract, sessions: int, idle_s: float) -> dict[str, Any]:
    """config.pbtxt as a table, for up to `sessions` at once; one that is idle for `idle_s` loses its state.

    Raises:
        ModelError: Triton cannot serve the graph; the message has the reason.

    """
    where, wiring = graph.path, contract.wiring
    if wiring.constants:
        raise ModelError(
            f"{where} has inputs that are constant in every run ({', '.join(wiring.constants)}), which Triton's "
            "sequences do not support: make them constants of the graph"
        )
    transposed = [name for name, wires in wiring.states.items() if wires.batch_axis]
    if transposed:
        raise ModelError(f"{where}: the batch axis of the state `{transposed[0]}` is not the first, as Triton needs it")
    if not wiring.reset:
        raise ModelError(f"{where} has no input that resets a session's state, which Triton's sequences need")
    rows = [*wiring.inputs.values(), *(n for n in (wiring.present, wiring.age) if n)]
    controls = []
    for control, input_name, kind in (
        (READY, wiring.active, "CONTROL_SEQUENCE_READY"),
        (START, wiring.reset, "CONTROL_SEQUENCE_START"),
    ):
        if input_name:
            # the control has the type of the graph's input
            values = {"tensor(bool)": "bool_false_true", "tensor(float)": "fp32_false_true"}.get(
                graph.inputs[input_name].type, "int32_false_true"
            )
            controls.append({"name": control, "control": [{"kind": Enum(kind), values: [0, 1]}]})
    states = []
    for wires in wiring.states.values():
        spec = graph.inputs[wires.input]
        tensor = _tensor(wires.input, spec.type, spec.shape[1:], where)
        states.append(
            {
                "input_name": wires.input,
                "output_name": wires.output,
                "data_type": tensor["data_type"],
                "dims": tensor["dims"],
                # else a slot would begin with another session's state, and 0 times its values could be NaN
                "initial_state": [
                    {"name": "zeros", **{k: tensor[k] for k in ("data_type", "dims")}, "zero_data": True}
                ],
            }
        )
    return {
        "name": name,
        "backend": "onnxruntime",
        "max_batch_size": min(sessions, 64),
        "input": [_tensor(n, graph.inputs[n].type, graph.inputs[n].shape[1:], where) for n in rows],
        "output": [_tensor(n, graph.outputs[n].type, graph.outputs[n].shape[1:], where) for n in wiring.heads.values()],
        "sequence_batching": {
            "max_sequence_idle_microseconds": round(idle_s * 1e6),
            "control_input": controls,
            "state": states,
            # `direct` would reserve a batch row for each session, and run the empty rows, too
            "oldest": {"max_candidate_sequences": sessions, "max_queue_delay_microseconds": 0},
        },
        "instance_group": [{"kind": Enum("KIND_AUTO"), "count": 1}],
    }


def with_controls(model: bytes, wiring_names: Mapping[str, str]) -> bytes:
    """The graph with renamed inputs `[batch, 1]` in place of `[batch]`; `wiring_names`: old name by new name."""
    old = {was: control for control, was in wiring_names.items() if was}
    out = []
    for number, whole, content in onnx_bytes.fields(memoryview(model)):
        if number != onnx_bytes.MODEL_GRAPH:
            out.append(bytes(whole))
            continue
        before = [onnx_bytes.initializer(_ROWS, np.array([-1], np.int64))]
        rest = []
        for inner, part, value in onnx_bytes.fields(content):
            name = onnx_bytes.name_of(value) if inner == onnx_bytes.GRAPH_INPUT else ""
            if name in old:
                element = onnx_bytes.element_of(value)
                rest.append(onnx_bytes.value(onnx_bytes.GRAPH_INPUT, old[name], element, (1,), "batch"))
                before.append(node("Reshape", (old[name], _ROWS), (name,), f"triton/{name}"))
            else:
                rest.append(bytes(part))
        out.append(onnx_bytes.message(onnx_bytes.MODEL_GRAPH, b"".join((*before, *rest))))
    return b"".join(out)


def write(model: Path, folder: Path, sessions: int = 1024, idle_s: float | None = None) -> dict[str, Any]:
    """Write an ONNX file as a model repository into `folder`; returns what was written.

    Raises:
        ModelError: it is not a stateful model with a contract, or Triton cannot serve it.
        FileError: the folder has a model of that name, or cannot be written.

    """
    graph = Graph(model, "cpu")
    contract = contract_of(graph)
    name = contract.spec.name
    place = folder / name
    table = configuration(name, graph, contract, sessions, StateSettings().idle_s if idle_s is None else idle_s)
    content = with_controls(model.read_bytes(), {READY: contract.wiring.active, START: contract.wiring.reset})
    if place.exists():
        raise FileError(f"{place} is there already; remove it, or name another folder")
    try:
        (place / "1").mkdir(parents=True)
        (place / "1" / "model.onnx").write_bytes(content)
        (place / "config.pbtxt").write_text(text_of(table), encoding="utf-8")
    except OSError as e:
        shutil.rmtree(place, ignore_errors=True)
        raise FileError(f"the repository cannot be written to {folder}: {e.strerror}") from e
    return {
        "repository": str(folder),
        "model": name,
        "files": [str(place / "config.pbtxt"), str(place / "1" / "model.onnx")],
        "inputs": [i["name"] for i in table["input"]],
        "outputs": [o["name"] for o in table["output"]],
        "states": [s["input_name"] for s in table["sequence_batching"]["state"]],
        "sessions": sessions,
    }
