"""Models to measure: a step of two GRU layers of any width, written as bytes, without torch and without onnx.

Seeded weights of the size that training begins with; the graph is what the exporter makes: plain operations, masks and
the contract inside. `weights` gives the same numbers to whoever computes the step another way. Knows nothing about who
runs it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.types import HeadSpec, ModalitySpec
from stream_mmrnn.graph import model_file as onnx_bytes
from stream_mmrnn.graph.int8 import STATE_SCALE, STATE_ZERO, integer_columns
from stream_mmrnn.graph.model_file import initializer, node
from stream_mmrnn.predict.contract import METADATA_KEY, NEXT, STATE, write_contract

INPUT, CLASSES, LAYERS = 256, 8, 2
MODALITY, HEAD = "signal", "next"
TICK_NS = 40_000_000
_OPSET, _IR = 17, 8
_BATCH = "batch"
_MICROSOFT, _BLOCK = "com.microsoft", 128

Kind: TypeAlias = Literal["fp32", "int8", "int8_batch"]
"""Of the cells' matrices: as they are; 8 bits with a scale for each 128 numbers (MatMulNBits, integer arithmetic:
accuracy level 4), the fastest for one row; or `integer_columns`, where the other side is a state: it lies between -1
and 1, so it is 8 bits by a fixed scale, the product is exact in integers, and rows neither get in each other's way nor
differ in their bits with the size of the batch."""

Weights: TypeAlias = dict[str, npt.NDArray[np.float32]]


def state_names() -> tuple[str, ...]:
    return tuple(f"cell.{layer}.h" for layer in range(LAYERS))


def weights(hidden: int, seed: int = 0) -> Weights:
    """By name, rows are outputs. Of a layer's matrices the rows are reset gate, update gate, candidate, as in torch."""
    rng = np.random.default_rng(seed)

    def uniform(bound: float, *shape: int) -> npt.NDArray[np.float32]:
        return rng.uniform(-bound, bound, shape).astype(np.float32)

    # present and age count little beside the signal: an age is up to 10
    found: Weights = {"about.weight": uniform(0.05, INPUT, 2), "about.bias": uniform(0.05, INPUT)}
    for layer in range(LAYERS):
        bound = hidden**-0.5
        found[f"{layer}.input.weight"] = uniform(bound, 3 * hidden, hidden if layer else INPUT)
        found[f"{layer}.input.bias"] = uniform(bound, 3 * hidden)
        found[f"{layer}.state.weight"] = uniform(bound, 3 * hidden, hidden)
        found[f"{layer}.state.bias"] = uniform(bound, 3 * hidden)
    found["head.weight"] = uniform(4 * hidden**-0.5, CLASSES, hidden)
    found["head.bias"] = uniform(hidden**-0.5, CLASSES)
    return found


def write(folder: Path, hidden: int, kind: Kind = "fp32") -> Path:
    """`gru_step` as a file in `folder`."""
    path = folder / f"gru_{hidden}.{kind}.onnx"
    path.write_bytes(gru_step(hidden, kind=kind))
    return path


def weight_count(hidden: int) -> int:
    """Numbers that a step reads of its weights."""
    return sum(array.size for array in weights(hidden).values())


def gru_step(hidden: int, seed: int = 0, *, kind: Kind = "fp32") -> bytes:
    """The ONNX file; `hidden` should be a multiple of 8, as every width that is served."""
    held = weights(hidden, seed)
    small = [n for n in held if kind != "fp32" and n.endswith((".input.weight", ".state.weight"))]
    if kind == "int8_batch":
        small.remove("0.input.weight")  # the input may be anything
    parts = [
        node("Unsqueeze", ("reset", "column"), ("reset.column",), "reset"),
        node("Unsqueeze", ("active", "column"), ("active.column",), "active"),
        node("Mul", (f"input.{MODALITY}", "present"), ("seen",), "seen"),
        node("Concat", ("present", "age"), ("about",), "about", axis=1),
        _product("about", "about", "about.said"),
        node("Add", ("seen", "about.said"), ("layer.0",), "fused"),
    ]
    for layer, name in enumerate(state_names()):
        parts += _layer(layer, name, kind, {n: held[n].shape for n in small})
    parts += [
        _product(f"layer.{LAYERS}", "head", "logits"),
        node("Softmax", ("logits",), (f"head.{HEAD}",), "softmax", axis=1),
        *(initializer(name, array) for name, array in held.items() if name not in small),
        *(part for name in small for part in _QUANTISED[kind](name, held[name])),
        initializer("state.scale", np.array(STATE_SCALE, np.float32)),
        initializer("state.zero", np.array(STATE_ZERO, np.uint8)),
        initializer("column", np.array([1], np.int64)),
        initializer("nothing", np.zeros(1, np.float32)),
        initializer("gates", np.array([2 * hidden, hidden], np.int64)),
        *_edges(hidden),
    ]
    said = write_contract(
        f"gru_{hidden}",
        TICK_NS,
        (ModalitySpec(MODALITY, INPUT),),
        (HeadSpec(HEAD, "classification", CLASSES, tuple(f"class {k}" for k in range(CLASSES))),),
    )
    domains = {} if kind == "fp32" else {_MICROSOFT: 1}
    return onnx_bytes.model(f"gru_{hidden}", parts, {METADATA_KEY: said}, _OPSET, _IR, domains)


def _product(source: str, layer: str, target: str) -> bytes:
    return node("Gemm", (source, f"{layer}.weight", f"{layer}.bias"), (target,), target, transB=1)


def _in_blocks(name: str, array: npt.NDArray[np.float32]) -> list[bytes]:
    """A matrix [N, K] as MatMulNBits reads it: bytes around 128 [N, blocks, 128], and a scale a block."""
    rows, columns = array.shape
    blocks = -(-columns // _BLOCK)
    padded = np.zeros((rows, blocks * _BLOCK), np.float32)
    padded[:, :columns] = array
    cut = padded.reshape(rows, blocks, _BLOCK)
    scale = np.maximum(np.abs(cut).max(-1), 1e-12) / np.float32(127)
    held = np.clip(np.rint(cut / scale[..., None]) + 128, 0, 255).astype(np.uint8)
    return [initializer(f"{name}.bits", held), initializer(f"{name}.scale", scale.reshape(-1).astype(np.float32))]


def _in_columns(name: str, array: npt.NDArray[np.float32]) -> list[bytes]:
    """A matrix [N, K] as MatMulIntegerToFloat reads it: int8 [K, N], and a scale a column."""
    held, scale, zero = integer_columns(array.T)
    return [
        initializer(f"{name}.bits", held),
        initializer(f"{name}.scale", scale),
        initializer(f"{name}.zero", zero),
    ]


_QUANTISED = {"int8": _in_blocks, "int8_batch": _in_columns}


def _exact_product(source: str, layer: str, target: str) -> list[bytes]:
    bits, weight = f"{target}.bits", f"{layer}.weight"
    inputs = (bits, f"{weight}.bits", "state.scale", f"{weight}.scale", "state.zero", f"{weight}.zero", f"{layer}.bias")
    return [
        node("QuantizeLinear", (source, "state.scale", "state.zero"), (bits,), bits),
        node("MatMulIntegerToFloat", inputs, (target,), target, domain=_MICROSOFT),
    ]


def _small_product(source: str, layer: str, target: str, shape: tuple[int, ...]) -> list[bytes]:
    rows, columns = shape
    inputs = (source, f"{layer}.weight.bits", f"{layer}.weight.scale")
    product = node(
        "MatMulNBits",
        inputs,
        (f"{target}.product",),
        f"{target}.product",
        domain=_MICROSOFT,
        N=rows,
        K=columns,
        bits=8,
        block_size=_BLOCK,
        accuracy_level=4,
    )
    return [product, node("Add", (f"{target}.product", f"{layer}.bias"), (target,), target)]


def _layer(layer: int, state: str, kind: Kind, small: dict[str, tuple[int, ...]]) -> list[bytes]:
    """`layer.N` -> `layer.N+1`, `state.X` -> `next.X`: h' = n + z (h - n), n = tanh(W x + r U h)."""
    at = f"layer.{layer}."

    def op(kind: str, inputs: tuple[str, ...], *outputs: str) -> bytes:
        if kind == "Split":  # a row's gates, side by side
            return node(kind, inputs, outputs, outputs[0], axis=1)
        return node(kind, inputs, outputs, outputs[0])

    def product(source: str, of: str, target: str) -> list[bytes]:
        shape = small.get(f"{of}.weight")
        if shape is None:
            return [_product(source, of, target)]
        if kind == "int8_batch":
            return _exact_product(source, of, target)
        return _small_product(source, of, target, shape)

    begun, new = at + "begun", f"layer.{layer + 1}"
    return [
        op("Where", ("reset.column", "nothing", STATE + state), begun),
        *product(f"layer.{layer}", f"{layer}.input", at + "x"),
        *product(begun, f"{layer}.state", at + "h"),
        op("Split", (at + "x", "gates"), at + "x.rz", at + "x.n"),
        op("Split", (at + "h", "gates"), at + "h.rz", at + "h.n"),
        op("Add", (at + "x.rz", at + "h.rz"), at + "rz"),
        op("Sigmoid", (at + "rz",), at + "open"),
        op("Split", (at + "open",), at + "r", at + "z"),
        op("Mul", (at + "r", at + "h.n"), at + "kept"),
        op("Add", (at + "x.n", at + "kept"), at + "candidate"),
        op("Tanh", (at + "candidate",), at + "n"),
        op("Sub", (begun, at + "n"), at + "apart"),
        op("Mul", (at + "z", at + "apart"), at + "stays"),
        op("Add", (at + "n", at + "stays"), new),
        op("Where", ("active.column", new, STATE + state), NEXT + state),
    ]


def _edges(hidden: int) -> list[bytes]:
    inputs: dict[str, tuple[int, tuple[int, ...]]] = {
        f"input.{MODALITY}": (onnx_bytes.FLOAT, (INPUT,)),
        "present": (onnx_bytes.FLOAT, (1,)),
        "age": (onnx_bytes.FLOAT, (1,)),
        "active": (onnx_bytes.BOOL, ()),
        "reset": (onnx_bytes.BOOL, ()),
        **{STATE + name: (onnx_bytes.FLOAT, (hidden,)) for name in state_names()},
    }
    outputs = {f"head.{HEAD}": CLASSES, **{NEXT + name: hidden for name in state_names()}}
    return [
        *(onnx_bytes.value(onnx_bytes.GRAPH_INPUT, n, element, row, _BATCH) for n, (element, row) in inputs.items()),
        *(onnx_bytes.value(onnx_bytes.GRAPH_OUTPUT, n, onnx_bytes.FLOAT, (k,), _BATCH) for n, k in outputs.items()),
    ]
