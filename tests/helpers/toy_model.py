"""A small stateful model with the contract that the engine asks for, written with onnx alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper as h

from stream_mmrnn.core.types import HeadSpec, ModalitySpec
from stream_mmrnn.predict.contract import METADATA_KEY, write_contract

TICK_NS = 40_000_000
MODALITIES = (ModalitySpec("vision", 5), ModalitySpec("audio", 3), ModalitySpec("text", 2))
HEADS = (HeadSpec("next", "classification", 2, ("yes", "no")),)
HIDDEN = 7


def make(
    path: Path,
    modalities: tuple[ModalitySpec, ...] = MODALITIES,
    *,
    leave_out: str = "",
    metadata: str | None = None,
    tick_ns: int = TICK_NS,
    seed: int = 0,
    endless_above: float = 0.0,
) -> Path:
    """Write the model; `leave_out` names an output to forget, `metadata` replaces the contract. With `endless_above` a
    larger value of the first modality puts a step into a loop without end.
    """
    rng = np.random.default_rng(seed)
    width = sum(m.size for m in modalities) + 2 * len(modalities) + HIDDEN
    weights = {
        "W": rng.standard_normal((width, HIDDEN)).astype(np.float32) * 0.5,
        "b": rng.standard_normal(HIDDEN).astype(np.float32),
        "V": rng.standard_normal((HIDDEN, 2)).astype(np.float32),
        "c": np.zeros(2, np.float32),
        "zero": np.zeros(1, np.float32),
        "column": np.array([1], np.int64),
    }
    features = [f"input.{m.name}" for m in modalities]
    endless = []
    if endless_above:
        weights["bound"] = np.array(endless_above, np.float32)
        endless, features[0] = _endless_loop(features[0]), "looped"
    nodes = [
        *endless,
        h.make_node("Unsqueeze", ["reset", "column"], ["r"]),
        h.make_node("Unsqueeze", ["active", "column"], ["a"]),
        h.make_node("Where", ["r", "zero", "state.h"], ["begun"]),
        h.make_node("Concat", [*features, "present", "age", "begun"], ["x"], axis=1),
        h.make_node("Gemm", ["x", "W", "b"], ["z"]),
        h.make_node("Tanh", ["z"], ["new"]),
        h.make_node("Where", ["a", "new", "state.h"], ["next.h"]),
        h.make_node("Gemm", ["new", "V", "c"], ["logits"]),
        h.make_node("Sigmoid", ["logits"], ["head.next"]),
    ]
    inputs = [h.make_tensor_value_info(f"input.{m.name}", T.FLOAT, ["batch", m.size]) for m in modalities]
    count = len(modalities)
    inputs += [
        h.make_tensor_value_info("present", T.FLOAT, ["batch", count]),
        h.make_tensor_value_info("age", T.FLOAT, ["batch", count]),
        h.make_tensor_value_info("active", T.BOOL, ["batch"]),
        h.make_tensor_value_info("reset", T.BOOL, ["batch"]),
        h.make_tensor_value_info("state.h", T.FLOAT, ["batch", HIDDEN]),
    ]
    outputs = [
        h.make_tensor_value_info("head.next", T.FLOAT, ["batch", 2]),
        h.make_tensor_value_info("next.h", T.FLOAT, ["batch", HIDDEN]),
    ]
    graph = h.make_graph(
        nodes,
        "toy",
        inputs,
        [o for o in outputs if o.name != leave_out],
        [onnx.numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9)
    if metadata is None:
        metadata = write_contract("toy", tick_ns, modalities, HEADS)
    if metadata:
        h.set_model_props(model, {METADATA_KEY: metadata})
    onnx.save(model, str(path))
    return path


def _endless_loop(name: str) -> list[onnx.NodeProto]:
    """Nodes that make `looped` of an input, and never end where a number of it is above `bound`."""
    body = h.make_graph(
        [h.make_node("Identity", ["go"], ["go_on"]), h.make_node("Identity", ["x_in"], ["x_out"])],
        "body",
        [
            h.make_tensor_value_info("number", T.INT64, []),
            h.make_tensor_value_info("go", T.BOOL, []),
            h.make_tensor_value_info("x_in", T.FLOAT, None),
        ],
        [h.make_tensor_value_info("go_on", T.BOOL, []), h.make_tensor_value_info("x_out", T.FLOAT, None)],
    )
    return [
        h.make_node("ReduceMax", [name], ["largest"], keepdims=0),
        h.make_node("Greater", ["largest", "bound"], ["above"]),
        h.make_node("Loop", ["", "above", name], ["looped"], body=body),
    ]


def weights(seed: int = 0, modalities: tuple[ModalitySpec, ...] = MODALITIES) -> tuple[np.ndarray, ...]:
    """The same numbers, for a reference in numpy."""
    rng = np.random.default_rng(seed)
    width = sum(m.size for m in modalities) + 2 * len(modalities) + HIDDEN
    w = rng.standard_normal((width, HIDDEN)).astype(np.float32) * 0.5
    b = rng.standard_normal(HIDDEN).astype(np.float32)
    return w, b, rng.standard_normal((HIDDEN, 2)).astype(np.float32)
