from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import helper, numpy_helper

from stream_mmrnn.graph.int8 import LARGEST, STATE_SCALE, STATE_ZERO, integer_columns
from stream_mmrnn.graph.runtime import Graph


def product(path: Path, bits: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> Graph:
    """x [batch, K], already bytes -> what the CPU makes of x times the matrix."""
    constants = {
        "x.scale": np.array(STATE_SCALE, np.float32),
        "x.zero": np.array(STATE_ZERO, np.uint8),
        "w": bits,
        "w.scale": scale,
        "w.zero": zero,
    }
    node = helper.make_node(
        "MatMulIntegerToFloat", ["x", "w", "x.scale", "w.scale", "x.zero", "w.zero"], ["y"], domain="com.microsoft"
    )
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, ["batch", bits.shape[0]])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", bits.shape[1]])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return Graph(path)


@pytest.mark.parametrize("rows", [1, 2, 5, 64])
@pytest.mark.parametrize("inner", [1, 3, 64, 257])
def test_products_of_the_largest_numbers_are_exact_on_this_cpu(tmp_path: Path, rows: int, inner: int) -> None:
    """The largest bytes meet the largest weights of one sign: where pairs are added in 16 bits, they must fit."""
    rng = np.random.default_rng(inner)
    array = rng.uniform(-1, 1, (inner, 96)).astype(np.float32)
    array[:, :32], array[:, 32:64] = 1.0, -1.0
    bits, scale, zero = integer_columns(array)
    assert np.abs(bits).max() == LARGEST
    x = rng.integers(1, 256, (rows, inner)).astype(np.uint8)
    x[0] = 255
    y = product(tmp_path / "product.onnx", bits, scale, zero).session.run(["y"], {"x": x})[0]
    exact = (x.astype(np.int64) - STATE_ZERO) @ bits.astype(np.int64)
    assert np.array_equal(np.rint(y / (np.float32(STATE_SCALE) * scale)).astype(np.int64), exact)


@settings(max_examples=50, deadline=None)
@given(arrays.arrays(np.float32, (5, 3), elements=st.floats(-(2.0**20), 2.0**20, width=32)))
def test_a_weight_is_at_most_half_a_step_off(array: np.ndarray) -> None:
    bits, scale, zero = integer_columns(array)
    assert bits.dtype == np.int8
    assert not zero.any()
    assert np.abs(bits.astype(int)).max() <= LARGEST
    assert (np.abs(bits * scale - array) <= scale * 0.5001 + 1e-12).all()
