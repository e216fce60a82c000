from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from small_networks import network, recipe_of

from stream_mmrnn.core.types import Stamps, Tick
from stream_mmrnn.graph.runtime import Graph
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.training.export import export
from stream_mmrnn.training.quantise import bounded, in_columns

BOUNDED = {"rnn_tanh": True, "rnn_relu": False, "lstm": True, "gru": True, "min_gru": False, "rg_lru": False}
"""By cell: whether its output is always between -1 and 1."""


def ticks(engine: StepEngine, session: str, count: int, seed: int) -> list[Tick]:
    rng = np.random.default_rng(seed)
    names = [m.name for m in engine.spec.modalities]
    return [
        Tick(
            session,
            k,
            k,
            {m.name: rng.standard_normal(m.size).astype(np.float32) for m in engine.spec.modalities},
            {n: bool(rng.random() < 0.7) for n in names},
            dict.fromkeys(names, 0),
            Stamps(0, 0, 0, 0, ""),
        )
        for k in range(count)
    ]


@pytest.fixture
def exported(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    export(network(recipe_of(request.param, "concat", False)), tmp_path / "step.onnx", {}, int8=True)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(("exported", "is_bounded"), BOUNDED.items(), indirect=["exported"])
def test_bounded_tensors_are_bounded_for_any_input(exported: Path, is_bounded: bool) -> None:
    model = onnx.load(exported / "step.onnx")
    known = bounded(model)
    assert any(n.startswith("next.") for n in known) == is_bounded
    states = [i.name for i in model.graph.input if i.name.startswith("state.")]
    made = {o for n in model.graph.node for o in n.output}
    shown = sorted(known & made - {o.name for o in model.graph.output})
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in shown)
    onnx.save(model, exported / "shown.onnx")
    graph = Graph(exported / "shown.onnx")
    rng = np.random.default_rng(0)
    feed = {n: graph.zeros(n, tuple(k or 3 for k in spec.shape)) for n, spec in graph.inputs.items()}
    feed["active"][...] = True
    for k in range(30):
        for name, array in feed.items():
            if name.startswith("input."):
                array[...] = rng.standard_normal(array.shape) * 10.0 ** rng.integers(-3, 6)
        feed["present"][...] = rng.random(feed["present"].shape) < 0.7
        feed["reset"][...] = rng.random(3) < 0.1
        for name in states:
            if k == 0 and name in known:
                feed[name][...] = rng.choice([-1.0, 1.0], feed[name].shape)
        out = dict(zip(graph.outputs, graph.session.run(list(graph.outputs), feed), strict=True))
        for name in known & set(out):
            assert np.abs(out[name]).max() <= 1 + 1e-6, name
        feed |= {n: out["next." + n.removeprefix("state.")] for n in states}


@pytest.mark.slow
@pytest.mark.parametrize("exported", [c for c, is_bounded in BOUNDED.items() if is_bounded], indirect=True)
def test_8_bit_columns_are_close_and_equal_in_every_batch(exported: Path) -> None:
    full = StepEngine(exported / "step.onnx", 8)
    small = StepEngine(exported / "step.int8_batch.onnx", 8)
    alone = StepEngine(exported / "step.int8_batch.onnx")
    sessions = [str(i) for i in range(8)]
    for engine in (full, small):
        for session in sessions:
            engine.open(session)
    of = {s: ticks(small, s, 40, int(s)) for s in sessions}
    together: dict[str, list[bytes]] = {s: [] for s in sessions}
    worst = 0.0
    for k in range(40):
        some = [of[s][k] for s in sessions if (k + int(s)) % 3]
        exact = full.step(some)
        for p, e in zip(small.step(some), exact, strict=True):
            together[p.tick.session].append(b"".join(p.heads[h].tobytes() for h in p.heads))
            worst = max(worst, *(float(np.abs(p.heads[h] - e.heads[h]).max()) for h in p.heads))
    assert 0 < worst < 0.05
    for s in sessions:
        alone.open(s)
        said = [alone.step([of[s][k]])[0].heads for k in range(40) if (k + int(s)) % 3]
        alone.close(s)
        assert together[s] == [b"".join(h[n].tobytes() for n in h) for h in said]


@pytest.mark.slow
@pytest.mark.parametrize("exported", ["rnn_relu"], indirect=True)
def test_a_matrix_with_an_unbounded_factor_is_unchanged(exported: Path) -> None:
    """Only bounded factors (after tanh or sigmoid) get 8-bit products; an unbounded state keeps its matrix."""
    model = onnx.load(exported / "step.onnx")
    small = in_columns(model)
    kept = {n.input[1] for n in small.graph.node if n.op_type == "Gemm"}
    assert any("weight_hh" in name for name in kept)
    assert all(n.op_type != "QuantizeLinear" or n.input[0] in bounded(model) for n in small.graph.node)
