"""Graphs of other programs, with a contract file: a time axis of one, states of any type, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h

from stream_mmrnn.core.errors import ModelError
from stream_mmrnn.core.printable import one_line
from stream_mmrnn.core.types import FloatArray, Stamps, Tick
from stream_mmrnn.graph.gather_scatter import Scatter
from stream_mmrnn.graph.runtime import Graph
from stream_mmrnn.predict import snapshots
from stream_mmrnn.predict.contract import beside, contract_of
from stream_mmrnn.predict.cpu_batches import HostRows, Rows
from stream_mmrnn.predict.device_batches import DeviceRows
from stream_mmrnn.predict.engine import StepEngine, check_model
from stream_mmrnn.predict.sharded_engine import ShardedEngine

NOWHERE = Stamps(0, 0, 0, 0, "")
SIZE = 3
CONTRACT = """
name = "counting"
tick_ms = 40.0
modalities = [{ name = "signal", size = 3, input = "x" }]
heads = [{ name = "y", kind = "regression", size = 3, output = "y" }]
states = [{ input = "m", output = "m_out" }, { input = "n", output = "n_out" }]
"""

Shape = list[str | int]


def make(
    path: Path,
    *,
    timed: bool = False,
    x: tuple[int, Shape] | None = None,
    y: int = T.FLOAT,
    m: tuple[int, Shape] = (T.FLOAT, ["batch", SIZE]),
    m_out: int | None = None,
    n: tuple[int, Shape] = (T.INT64, ["batch"]),
) -> Path:
    """m' = m / 2 + x, n' = n + 1, y = m' + n'; and its contract file."""
    time: Shape = [1] if timed else []
    x = x or (T.FLOAT, ["batch", *time, SIZE])
    computed = T.FLOAT16 if m[0] == T.FLOAT16 else T.FLOAT
    one = onnx.numpy_helper.from_array(np.array([1], np.int64), "one")
    nodes = [
        h.make_node("ReduceMax", ["x"], ["x2"], axes=[1], keepdims=0)
        if timed
        else h.make_node("Identity", ["x"], ["x2"]),
        h.make_node("Cast", ["x2"], ["x_cast"], to=computed),
        h.make_node("Cast", ["m"], ["m_cast"], to=computed),
        h.make_node("Mul", ["m_cast", "half"], ["m_half"]),
        h.make_node("Add", ["m_half", "x_cast"], ["m_new"]),
        h.make_node("Cast", ["m_new"], ["m_out"], to=m_out or m[0]),
        h.make_node("Cast", ["n"], ["n64"], to=T.INT64),
        h.make_node("Add", ["n64", "one"], ["n_new"]),
        h.make_node("Cast", ["n_new"], ["n_out"], to=n[0]),
        h.make_node("Cast", ["m_out"], ["m32"], to=T.FLOAT),
        h.make_node("Cast", ["n_out"], ["n32"], to=T.FLOAT),
        h.make_node("Unsqueeze", ["n32", "one"], ["column"]),
        h.make_node("Add", ["m32", "column"], ["sum"]),
        h.make_node("Cast", ["sum"], ["cast"], to=y),
        h.make_node("Unsqueeze", ["cast", "one"], ["y"]) if timed else h.make_node("Identity", ["cast"], ["y"]),
    ]
    graph = h.make_graph(
        nodes,
        "counting",
        [h.make_tensor_value_info(name, *kind) for name, kind in (("x", x), ("m", m), ("n", n))],
        [
            h.make_tensor_value_info("y", y, ["batch", *time, SIZE]),
            h.make_tensor_value_info("m_out", m_out or m[0], m[1]),
            h.make_tensor_value_info("n_out", *n),
        ],
        [one, onnx.numpy_helper.from_array(np.array([0.5], h.tensor_dtype_to_np_dtype(computed)), "half")],
    )
    onnx.save(h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=9), str(path))
    beside(path).write_text(CONTRACT, encoding="utf-8")
    return path


def expected(x: FloatArray) -> FloatArray:
    """The outputs for one session, in numpy."""
    m = np.zeros(SIZE, np.float32)
    out = np.zeros_like(x)
    for k, row in enumerate(x):
        m = m * np.float32(0.5) + row
        out[k] = m + (k + 1)
    return out


def ticks(k: int, x: FloatArray) -> list[Tick]:
    """Tick `k` of every session of `x` [sessions, ticks, size]."""
    return [
        Tick(str(i), k, k, {"signal": rows[k]}, {"signal": True}, {"signal": 0}, NOWHERE) for i, rows in enumerate(x)
    ]


def sequences(sessions: int, count: int) -> FloatArray:
    return np.random.default_rng(0).standard_normal((sessions, count, SIZE)).astype(np.float32)


HALF = 4e-3
"""Tolerance of float16 for numbers below 4. onnxruntime skips some of its roundings on the CPU."""


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize(
    ("element", "memory", "tolerance"),
    [(T.FLOAT, T.FLOAT, 0), (T.DOUBLE, T.FLOAT, 0), (T.FLOAT16, T.FLOAT, HALF), (T.FLOAT, T.FLOAT16, HALF)],
)
def test_steps_equal_a_reference_in_numpy(
    tmp_path: Path, timed: bool, element: int, memory: int, tolerance: float
) -> None:
    shape: Shape = ["batch", 1, SIZE] if timed else ["batch", SIZE]
    path = make(tmp_path / "m.onnx", timed=timed, x=(element, shape), m=(memory, ["batch", SIZE]))
    engine = StepEngine(path, 5)
    x = sequences(5, 12)
    for i in range(5):
        engine.open(str(i))
    for k in range(12):
        batch = ticks(k, x)
        # one session at a time, some of them, all of them
        parts = ([t] for t in batch) if k % 3 == 0 else (batch[:2], batch[2:]) if k % 3 == 1 else (batch,)
        for part in parts:
            for p in engine.step(part):
                assert p.heads["y"].shape == (SIZE,)
                reference = expected(x[int(p.tick.session)])[k]
                np.testing.assert_allclose(p.heads["y"], reference, rtol=0, atol=tolerance)
    engine.prewarm()
    state = engine.snapshot("4")
    assert (state["m"].dtype, state["n"].dtype) == (h.tensor_dtype_to_np_dtype(memory), np.int64)
    assert state["n"] == 12


def test_snapshots_keep_the_types_of_states(tmp_path: Path) -> None:
    path = make(tmp_path / "m.onnx", m=(T.FLOAT16, ["batch", SIZE]))
    x = sequences(1, 8)
    first, second, whole = StepEngine(path), StepEngine(path), StepEngine(path)
    for engine in (first, second, whole):
        engine.open("0")
    expected = [whole.step(ticks(k, x))[0].heads["y"].tobytes() for k in range(8)]
    for k in range(5):
        first.step(ticks(k, x))
    raw = snapshots.to_bytes(snapshots.Snapshot("0", first.spec.sha256, 4, first.snapshot("0")))
    state = snapshots.from_bytes(raw).state
    assert (state["m"].dtype, state["n"].dtype, state["n"].shape) == (np.float16, np.int64, ())
    second.restore("0", state)
    for k in range(5, 8):
        assert second.step(ticks(k, x))[0].heads["y"].tobytes() == expected[k]


@pytest.mark.parametrize("scatter", ["rows", "elements"])
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize(("memory", "tolerance"), [(T.FLOAT, 0), (T.FLOAT16, HALF)])
def test_the_rows_of_a_device_equal_the_host_rows(
    tmp_path: Path, timed: bool, scatter: Scatter, memory: int, tolerance: float
) -> None:
    graph = Graph(make(tmp_path / "m.onnx", timed=timed, m=(memory, ["batch", SIZE])))
    host = HostRows(graph, contract_of(graph), 6, 6, 10**12)
    device = DeviceRows(graph, contract_of(graph), 6, 6, scatter=scatter)
    rng = np.random.default_rng(2)

    def stepped(rows: Rows, slots: list[int], fresh: list[bool], x: FloatArray) -> FloatArray:
        bucket = rows.bucket(len(slots))
        bucket.inputs["x"][: len(slots)] = x
        bucket.run(np.array(slots), np.array(fresh), len(slots))
        assert bucket.outputs["y"].shape[1:] == (SIZE,)
        return bucket.outputs["y"][: len(slots)].copy()

    begun: set[int] = set()
    for _ in range(20):
        slots = [int(s) for s in rng.permutation(6)[: rng.integers(1, 7)]]
        fresh = [s not in begun for s in slots]
        begun |= set(slots)
        x = rng.standard_normal((len(slots), SIZE)).astype(np.float32)
        np.testing.assert_allclose(
            stepped(host, slots, fresh, x), stepped(device, slots, fresh, x), rtol=0, atol=tolerance
        )
    assert all(host.read(s)["n"] == device.read(s)["n"] for s in begun)
    assert host.shapes == device.shapes


@pytest.mark.process
@pytest.mark.slow
def test_a_sharded_engine_serves_them(tmp_path: Path) -> None:
    engine = ShardedEngine(make(tmp_path / "m.onnx", timed=True), 4)
    try:
        x = sequences(4, 5)
        for i in range(4):
            engine.open(str(i))
        for k in range(5):
            for p in engine.step(ticks(k, x)):
                np.testing.assert_array_equal(p.heads["y"], expected(x[int(p.tick.session)])[k])
        assert engine.snapshot("3")["n"].dtype == np.int64
    finally:
        engine.stop()


@pytest.mark.parametrize("element", [T.FLOAT, T.DOUBLE, T.INT8, T.INT16, T.INT32, T.UINT8, T.UINT64, T.BOOL])
def test_states_have_any_type_of_numpy(tmp_path: Path, element: int) -> None:
    engine = StepEngine(make(tmp_path / "m.onnx", n=(element, ["batch"])), 2)
    engine.open("0")
    engine.step(ticks(0, sequences(1, 1)))
    assert engine.snapshot("0")["n"].dtype == h.tensor_dtype_to_np_dtype(element)
    assert engine.snapshot("0")["n"] == 1


def test_an_open_time_axis_is_given_one_step(tmp_path: Path) -> None:
    engine = StepEngine(make(tmp_path / "m.onnx", timed=True, x=(T.FLOAT, ["batch", "time", SIZE])))
    engine.open("0")
    x = sequences(1, 1)
    np.testing.assert_array_equal(engine.step(ticks(0, x))[0].heads["y"], expected(x[0])[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"x": (T.FLOAT, [1, SIZE])}, r"the batch axis of input `x` \(axis 0\) is fixed to 1, expected an open one; "),
        ({"timed": True, "x": (T.FLOAT, [1, 1, SIZE])}, r"the batch axis of input `x` \(axis 0\) is fixed to 1"),
        ({"m": (T.FLOAT, [2, SIZE])}, r"the batch axis of input `m` \(axis 0\) is fixed to 2"),
        ({"timed": True, "x": (T.FLOAT, ["batch", 5, SIZE])}, "its time axis must be 1: export one step"),
        ({"timed": True, "x": (T.FLOAT, [1, "batch", SIZE])}, "expected the batch axis before the time axis"),
        ({"m": (T.FLOAT, [SIZE, "batch"])}, "its open axis is 1: say `batch_axis = 1`"),
        ({"x": (T.INT64, ["batch", SIZE])}, "input `x` is int64, the engine gives it float32; cast it inside"),
        ({"x": (T.BFLOAT16, ["batch", SIZE])}, "input `x` is bfloat16, the engine gives it float32"),
        ({"y": T.FLOAT16}, "output `y` is float16, expected float32; cast it inside the graph"),
        ({"m": (T.BFLOAT16, ["batch", SIZE])}, "the state `m` is bfloat16, expected a float of 16, 32 or 64 bits"),
        ({"m_out": T.FLOAT16}, "the state `m` is float32 and `m_out`, which follows it, is float16"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(tmp_path: Path, options: dict[str, object], words: str) -> None:
    path = make(tmp_path / "m.onnx", **options)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=words) as e:
        check_model(path, "cpu")
    assert "\n" not in str(e.value)


def test_the_refusal_of_a_fixed_batch_says_how_to_export(tmp_path: Path) -> None:
    path = make(tmp_path / "m.onnx", x=(T.FLOAT, [1, SIZE]))
    with pytest.raises(ModelError) as e:
        StepEngine(path)
    assert str(e.value).removeprefix(f"{path}: ") == (
        "the batch axis of input `x` (axis 0) is fixed to 1, expected an open one; export it as a dynamic axis: in "
        'torch with dynamic_shapes {0: "batch"} for this input, in Keras with None in the input signature'
    )


def test_external_weights_are_refused_with_the_option_that_avoids_them(tmp_path: Path) -> None:
    path = make(tmp_path / "m.onnx")
    onnx.save(onnx.load(str(path)), str(path), save_as_external_data=True, size_threshold=0)
    with pytest.raises(ModelError, match=r"keeps weights in another file, .*external_data=False"):
        check_model(path, "cpu")
    onnx.save(onnx.load(str(path)), str(path))
    check_model(path, "cpu")


def fixed_inside(model: onnx.ModelProto) -> None:
    """Ask for one row with a Reshape, which the declared shapes do not tell."""
    shape = onnx.numpy_helper.from_array(np.array([1, SIZE], np.int64), "a_long_name_" * 20)
    model.graph.initializer.append(shape)
    model.graph.node[0].CopyFrom(h.make_node("Reshape", ["x", shape.name], ["x2"], name="the_node_" * 20))


def not_a_shape(model: onnx.ModelProto) -> None:
    model.graph.node[3].CopyFrom(h.make_node("MatMul", ["m_cast", "x_cast"], ["m_half"], name="the_node_" * 30))
    del model.graph.value_info[:]


@pytest.mark.parametrize("change", [fixed_inside, not_a_shape])
def test_what_onnxruntime_says_is_not_cut(tmp_path: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    path = make(tmp_path / "m.onnx")
    model = onnx.load(str(path))
    change(model)
    onnx.save(model, str(path))
    with pytest.raises(ModelError, match=r"cannot be run|can load") as e:
        StepEngine(path, 3)
    assert "the_node_" * 20 in str(e.value)
    assert "\n" not in str(e.value)
    assert "[ONNXRuntimeError]" not in str(e.value)


def test_a_long_reason_ends_after_a_word() -> None:
    assert one_line("a\nb\x1b c") == "a b c"
    assert one_line("word " * 1000, 23) == "word word word word ..."
