"""The models to measure: valid ONNX by its own checker, computing a GRU, the same bits in every batch size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from stream_mmrnn.bench import models
from stream_mmrnn.graph import model_file as onnx_bytes
from stream_mmrnn.graph.runtime import Graph
from stream_mmrnn.predict.contract import contract_of
from stream_mmrnn.predict.cpu_batches import HostRows, sizes_for
from stream_mmrnn.predict.device_batches import DeviceRows
from stream_mmrnn.predict.engine import StepEngine

HOUR_NS = 3_600_000_000_000
Array = np.ndarray


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "gru.onnx"
    path.write_bytes(models.gru_step(64))
    return path


def reference(w: models.Weights, x: Array, present: Array, age: Array, state: list[Array]) -> tuple[Array, list[Array]]:
    """One step in float64, written from the formulas of the GRU."""
    w = {name: array.astype(np.float64) for name, array in w.items()}
    x = x * present + np.concatenate([present, age], 1) @ w["about.weight"].T + w["about.bias"]
    following = []
    for layer, h in enumerate(state):
        gx = x @ w[f"{layer}.input.weight"].T + w[f"{layer}.input.bias"]
        gh = h @ w[f"{layer}.state.weight"].T + w[f"{layer}.state.bias"]
        (rx, zx, nx), (rh, zh, nh) = np.split(gx, 3, 1), np.split(gh, 3, 1)
        r, z = 1 / (1 + np.exp(-rx - rh)), 1 / (1 + np.exp(-zx - zh))
        n = np.tanh(nx + r * nh)
        x = (1 - z) * n + z * h
        following.append(x)
    logits = x @ w["head.weight"].T + w["head.bias"]
    said = np.exp(logits - logits.max(1, keepdims=True))
    return said / said.sum(1, keepdims=True), following


def test_the_file_is_onnx(path: Path) -> None:
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    assert not {n.op_type for n in model.graph.node} & {"GRU", "LSTM", "RNN", "Loop", "Scan"}
    assert [i.name for i in model.graph.input][:5] == ["input.signal", "present", "age", "active", "reset"]
    spec = StepEngine(path).spec
    assert [(s.name, s.shape) for s in spec.states] == [("cell.0.h", (64,)), ("cell.1.h", (64,))]
    assert spec.heads[0].size == 8


def test_the_same_seed_makes_the_same_file_and_another_one_does_not() -> None:
    assert models.gru_step(16) == models.gru_step(16)
    assert models.gru_step(16) != models.gru_step(16, seed=1)


def test_it_computes_a_gru(path: Path) -> None:
    rows, w, rng = 5, models.weights(64), np.random.default_rng(0)
    graph = Graph(path)
    names = models.state_names()
    state = [np.zeros((rows, 64)) for _ in names]
    served = {f"state.{name}": np.zeros((rows, 64), np.float32) for name in names}
    outputs = ["head.next", *(f"next.{name}" for name in names)]
    for _ in range(50):
        x = rng.standard_normal((rows, 256)).astype(np.float32)
        present = rng.integers(0, 2, (rows, 1)).astype(np.float32)
        age = rng.uniform(0, 10, (rows, 1)).astype(np.float32)
        active, reset = rng.random(rows) < 0.7, rng.random(rows) < 0.2
        feed = {"input.signal": x, "present": present, "age": age, "active": active, "reset": reset, **served}
        said, *following = graph.session.run(outputs, feed)
        begun = [np.where(reset[:, None], 0, h) for h in state]
        right, new = reference(w, x, present, age, begun)
        state = [np.where(active[:, None], n, h) for n, h in zip(new, state, strict=True)]
        np.testing.assert_allclose(said, right, atol=1e-5)
        for name, got, h in zip(names, following, state, strict=True):
            np.testing.assert_allclose(got, h, atol=1e-5)
            assert got[~active].tobytes() == served[f"state.{name}"][~active].tobytes()
            served[f"state.{name}"] = got


def test_presence_and_age_count() -> None:
    w = models.weights(64)
    x, state = np.ones((1, 256)), [np.zeros((1, 64))] * 2
    one, zero = np.ones((1, 1)), np.zeros((1, 1))
    said = [reference(w, x, p, a, state)[0] for p, a in ((one, zero), (zero, zero), (one, one * 10))]
    assert all(np.abs(said[0] - other).max() > 1e-3 for other in said[1:])


@pytest.mark.parametrize("hidden", [64, 256])
def test_rows_have_the_same_bits_in_every_bucket(hidden: int, tmp_path: Path) -> None:
    path = tmp_path / "gru.onnx"
    path.write_bytes(models.gru_step(hidden))
    graph = Graph(path)
    contract = contract_of(graph)
    # HostRows itself leaves out a bucket whose bits are not those of the largest
    rows = HostRows(graph, contract, 64, 64, HOUR_NS)
    assert [b.size for b in rows.buckets] == sizes_for(64)
    device = DeviceRows(graph, contract, 64, 64)
    rng = np.random.default_rng(3)
    features = rng.standard_normal((64, 256)).astype(np.float32)
    said = set()
    for some, count in ((rows, 1), (rows, 10), (rows, 64), (device, 10)):
        bucket = some.bucket(count)
        bucket.inputs["input.signal"][:count] = features[:count]
        bucket.inputs["present"][:count] = 1
        bucket.run(np.arange(count), np.ones(count, np.bool_), count)
        said.add(bucket.outputs["head.next"][0].tobytes())
    assert len(said) == 1


def test_weights_are_written_as_they_are() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    body = onnx_bytes.initializer("w", array)
    (_, _, content), *rest = onnx_bytes.fields(memoryview(body))
    read = onnx.TensorProto.FromString(bytes(content))
    assert not rest
    assert read.name == "w"
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(read), array)
