"""8-bit weights: a step graph -> the same graph with quantised matrices. Its outputs are close, not equal. No torch.

`in_blocks` has one scale per 128 weights and is the fastest for one row. For several rows onnxruntime uses another
kernel, so bits depend on the batch size. `in_columns` uses integer products where the other factor is known to lie
between -1 and 1 (a state, the output of a tanh). Such a product is exact, so a row has the same bits in every batch,
and many rows take about half the time on a CPU with VNNI.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

from stream_mmrnn.graph.int8 import STATE_SCALE, STATE_ZERO, integer_columns

_MICROSOFT = "com.microsoft"
_PASSED_ON = (
    "Identity",
    "Reshape",
    "Unsqueeze",
    "Squeeze",
    "Transpose",
    "Slice",
    "Split",
    "Gather",
    "GatherND",
    "Expand",
)
"""Operations whose outputs contain only values of their first input."""


@contextlib.contextmanager
def _logging_as_it_is() -> Iterator[None]:
    """Import the quantizer quietly: it configures logging for the whole process and logs every node."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level
    logging.getLogger("onnxruntime.quantization").setLevel(logging.WARNING)


def in_blocks(model: onnx.ModelProto) -> onnx.ModelProto:
    """The matrices as MatMulNBits: blocks of 128, integer arithmetic (accuracy level 4)."""
    with _logging_as_it_is():
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            MatMulNBitsQuantizer,
        )

    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    _split_gemm(plain)
    settings = DefaultWeightOnlyQuantConfig(block_size=128, is_symmetric=True, accuracy_level=4, bits=8)
    quantizer = MatMulNBitsQuantizer(plain, algo_config=settings)
    quantizer.process()
    small: onnx.ModelProto = quantizer.model.model
    return small


def _split_gemm(model: onnx.ModelProto) -> None:
    """Gemm with a constant weight -> MatMul and Add, which the quantizer supports."""
    graph = model.graph
    weights = {i.name: i for i in graph.initializer}
    nodes = []
    for node in graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = node.op_type == "Gemm" and attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
        if not plain or attributes.get("transA", 0) or node.input[1] not in weights:
            nodes.append(node)
            continue
        name = node.input[1]
        if attributes.get("transB", 0):
            turned = numpy_helper.to_array(weights[name]).T.copy()
            name = f"{name}.T"
            if name not in weights:
                weights[name] = numpy_helper.from_array(turned, name)
                graph.initializer.append(weights[name])
        product = f"{node.output[0]}.product"
        nodes.append(helper.make_node("MatMul", [node.input[0], name], [product]))
        nodes.append(helper.make_node("Add", [product, node.input[2]], [node.output[0]]))
    del graph.node[:]
    graph.node.extend(nodes)
    used = {i for n in graph.node for i in n.input}
    kept = [i for i in graph.initializer if i.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def bounded(model: onnx.ModelProto) -> set[str]:
    """The tensors that always lie between -1 and 1, for any input.

    By induction over the steps: a state's input counts as bounded if, under this assumption, its output is bounded.
    """
    graph = model.graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    states = {o.name.removeprefix("next.") for o in graph.output if o.name.startswith("next.")}
    while True:
        known = {n for n, a in constants.items() if a.dtype.kind == "f" and a.size and np.abs(a).max() <= 1}
        known |= {f"state.{s}" for s in states} | {"present"}
        _follow(graph, known)
        open_ended = {s for s in states if f"next.{s}" not in known}
        if not open_ended:
            return known - set(constants)
        states -= open_ended


def _follow(graph: onnx.GraphProto, known: set[str]) -> None:
    """Add the bounded outputs of the graph's operations to `known`; nodes are in execution order."""
    made = {out: node for node in graph.node for out in node.output}
    for node in graph.node:
        inputs = list(node.input)
        kind = node.op_type
        if (
            kind in ("Tanh", "Sigmoid", "Softmax")
            or (kind == "ConstantOfShape" and _value(node) <= 1)
            or (kind in _PASSED_ON and inputs[0] in known)
            or (kind in ("Concat", "Mul", "Min", "Max") and all(i in known for i in inputs))
            or (kind == "Where" and all(i in known for i in inputs[1:]))
            or (kind == "Add" and _between(inputs, made, known))
        ):
            known.update(node.output)


def _value(node: onnx.NodeProto) -> float:
    values = [numpy_helper.to_array(a.t) for a in node.attribute if a.name == "value"]
    return float(np.abs(values[0]).max()) if values else 0.0


def _between(inputs: list[str], made: dict[str, onnx.NodeProto], known: set[str]) -> bool:
    """The value n + z (h - n), with z from a sigmoid, lies between n and h."""
    for n, step in (inputs, inputs[::-1]):
        product = made.get(step)
        if n not in known or product is None or product.op_type != "Mul":
            continue
        for z, apart in (list(product.input), list(product.input)[::-1]):
            gate, difference = made.get(z), made.get(apart)
            while gate is not None and gate.op_type in _PASSED_ON:
                gate = made.get(gate.input[0])
            if gate is None or difference is None or (gate.op_type, difference.op_type) != ("Sigmoid", "Sub"):
                continue
            h, other = difference.input
            if other == n and h in known:
                return True
    return False


def in_columns(model: onnx.ModelProto) -> onnx.ModelProto:
    """Matrices with a bounded other factor as MatMulIntegerToFloat: one scale per column, one for the other factor."""
    small = onnx.ModelProto()
    small.CopyFrom(model)
    graph = small.graph
    weights = {i.name: i for i in graph.initializer}
    known = bounded(small)
    nodes, done = [], {}
    scale, zero = "bounded.scale", "bounded.zero"
    for node in graph.node:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        whole = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA", 0)
        source, name = node.input[0], node.input[1] if len(node.input) == 3 else ""
        if node.op_type != "Gemm" or not whole or source not in known or name not in weights:
            nodes.append(node)
            continue
        if source not in done:
            done[source] = f"{source}.bits"
            nodes.append(helper.make_node("QuantizeLinear", [source, scale, zero], [done[source]]))
        array = numpy_helper.to_array(weights[name])
        columns = array.T if attributes.get("transB", 0) else array
        for suffix, value in zip(("bits", "scale", "zero"), integer_columns(columns), strict=True):
            if f"{name}.{suffix}" not in weights:
                weights[f"{name}.{suffix}"] = numpy_helper.from_array(value, f"{name}.{suffix}")
        inputs = [done[source], f"{name}.bits", scale, f"{name}.scale", zero, f"{name}.zero", node.input[2]]
        nodes.append(helper.make_node("MatMulIntegerToFloat", inputs, list(node.output), domain=_MICROSOFT))
    weights[scale] = numpy_helper.from_array(np.array(STATE_SCALE, np.float32), scale)
    weights[zero] = numpy_helper.from_array(np.array(STATE_ZERO, np.uint8), zero)
    used = {i for n in nodes for i in n.input}
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.initializer[:]
    graph.initializer.extend(i for name, i in weights.items() if name in used)
    if all(o.domain != _MICROSOFT for o in small.opset_import):
        small.opset_import.append(helper.make_opsetid(_MICROSOFT, 1))
    return small
