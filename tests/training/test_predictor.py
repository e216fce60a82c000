"""The whole network: sequence equals step, absent modalities have no effect, the export gate refuses differences."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from small_networks import network, recipe_of

from stream_mmrnn.core.errors import ConfigError, ModelError
from stream_mmrnn.core.types import Stamps, Tick
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.training import fusion, heads
from stream_mmrnn.training import recipe as recipes
from stream_mmrnn.training.export import TOLERANCE, export, gate
from stream_mmrnn.training.predictor import PredictorNetwork

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru", "min_gru", "rg_lru")


def inputs(
    batch: int, length: int, seed: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    present = (torch.rand((batch, length, 3), generator=g) < 0.6).float()
    features = {
        m: torch.randn((batch, length, n), generator=g) * present[..., i : i + 1]
        for i, (m, n) in enumerate((("vision", 6), ("audio", 4), ("text", 3)))
    }
    age = torch.rand((batch, length, 3), generator=g) * 10
    reset = torch.rand((batch, length), generator=g) < 0.2
    return features, present, age, reset


@pytest.mark.slow
@pytest.mark.parametrize("rare", [False, True])
@pytest.mark.parametrize("kind", recipes.FUSIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_splits_of_a_sequence_and_single_steps_give_the_same_result(cell: str, kind: str, rare: bool) -> None:
    p = network(recipe_of(cell, kind, rare))
    features, present, age, reset = inputs(3, 17, 1)
    if rare:
        present[0, 9:, [0, 2]] = 0  # no events for a while, across a split and a reset
        present[1, :, [0, 2]] = 0
    with torch.no_grad():
        whole, last = p(features, present, age, None, reset)
        state = p.initial(3)
        assert {k: tuple(v.shape[1:]) for k, v in state.items()} == p.states
        pieces = []
        for a, b in ((0, 1), (1, 8), (8, 17)):
            cut = {m: x[:, a:b] for m, x in features.items()}
            raw, state = p(cut, present[:, a:b], age[:, a:b], state, reset[:, a:b])
            pieces.append(raw)
        stepped, following = [], p.initial(3)
        initial = p.initial(3)
        for t in range(17):
            following = {
                k: torch.where(reset[:, t].view(-1, *[1] * (v.dim() - 1)), initial[k], v) for k, v in following.items()
            }
            raw, following = p.step({m: x[:, t] for m, x in features.items()}, present[:, t], age[:, t], following)
            stepped.append(raw)
    for name, expected in whole.items():
        torch.testing.assert_close(torch.cat([r[name] for r in pieces], 1), expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(torch.stack([r[name] for r in stepped], 1), expected, atol=2e-6, rtol=1e-5)
    for name, expected in last.items():
        torch.testing.assert_close(state[name], expected, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(following[name], expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("rare", [False, True])
@pytest.mark.parametrize("kind", recipes.FUSIONS)
def test_the_features_of_an_absent_modality_have_no_effect(kind: str, rare: bool) -> None:
    p = network(recipe_of("gru", kind, rare))
    features, present, age, reset = inputs(2, 9, 3)
    garbage = {
        m: torch.where(present[..., i : i + 1] > 0, x, torch.full_like(x, 1e3))
        for i, (m, x) in enumerate(features.items())
    }
    with torch.no_grad():
        one, _ = p(features, present, age, None, reset)
        other, _ = p(garbage, present, age, None, reset)
        nothing, _ = p(features, torch.zeros_like(present), age, None, reset)
    for name in one:
        assert torch.equal(one[name], other[name])
        assert torch.isfinite(nothing[name]).all()


# an export takes seconds: every fusion and every cell once, two of them with rare events as well
PAIRS = [(CELLS[i % len(CELLS)], kind, False) for i, kind in enumerate(recipes.FUSIONS)]
PAIRS += [("rg_lru", "memory", True), ("gru", "attention_state", True)]


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "kind", "rare"), PAIRS)
def test_the_exported_step_computes_what_was_trained(tmp_path: Path, cell: str, kind: str, rare: bool) -> None:
    options: dict[str, object] = {"norm": "rms", "residual": True, "learned_initial": True} if cell == "min_gru" else {}
    p = network(recipe_of(cell, kind, rare, **options))
    differences = export(p, tmp_path / "step.onnx", {"audio": "mel@1"})
    assert max(differences.values()) <= TOLERANCE
    engine = StepEngine(tmp_path / "step.onnx", 2)
    assert {m.name: m.encoder for m in engine.spec.modalities} == {"vision": "", "audio": "mel@1", "text": ""}
    assert [h.name for h in engine.spec.heads] == ["now", "vap", "next", "event"]
    assert engine.spec.heads[1].horizons_s == ((0.0, 0.2), (0.2, 0.6))
    assert b"/site-packages/" not in (tmp_path / "step.onnx").read_bytes()
    assert str(ROOT).encode() not in (tmp_path / "step.onnx").read_bytes()


@pytest.mark.slow
def test_closed_gates_stay_closed_in_the_exported_step(tmp_path: Path) -> None:
    """Training closes gates far below -18, where onnxruntime's Sigmoid always returns 1e-8."""
    p = network(recipe_of("rg_lru", "concat", False))
    cell = p.cells.layers[-1]
    with torch.no_grad():
        cell.rate.fill_(9.0)
        cell.input.bias[: len(cell.rate)] = torch.linspace(-40.0, 5.0, len(cell.rate))
    assert max(export(p, tmp_path / "step.onnx", {}).values()) <= TOLERANCE


def tick(session: str, index: int) -> Tick:
    rng = np.random.default_rng([ord(session), index])
    features = {m: rng.standard_normal(n).astype(np.float32) for m, n in (("vision", 6), ("audio", 4), ("text", 3))}
    present = {m: bool(rng.integers(2)) for m in features}
    features = {m: x if present[m] else np.zeros_like(x) for m, x in features.items()}
    age = {m: int(rng.integers(0, 5 * 10**9)) for m in features}
    return Tick(session, index, index * 40_000_000, features, present, age, Stamps(0, 0, 0, 0, ""))


@pytest.fixture(scope="module", params=["concat", "attention", "cross", "memory"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "step.onnx"
    export(network(recipe_of("gru", request.param)), path, {})
    return path


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=5, unique=True), min_size=1, max_size=8))
def test_a_session_does_not_depend_on_other_sessions(exported: Path, batches: list[list[str]]) -> None:
    engine = StepEngine(exported, 5)
    for name in "edcba":
        engine.open(name)
    at = dict.fromkeys("abcde", 0)
    got: dict[str, list[bytes]] = {n: [] for n in "abcde"}
    for batch in batches:
        ticks = [tick(n, at[n]) for n in batch]
        for p in engine.step(ticks):
            got[p.tick.session].append(b"".join(x.tobytes() for x in p.heads.values()))
            at[p.tick.session] += 1
    for name, expected in got.items():
        one = StepEngine(exported, 5)
        one.open(name)
        alone = [one.step([tick(name, k)])[0] for k in range(at[name])]
        assert [b"".join(x.tobytes() for x in p.heads.values()) for p in alone] == expected


@pytest.mark.slow
def test_the_gate_catches_a_broken_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = network(recipe_of())
    path = tmp_path / "step.onnx"
    export(p, path, {})
    before = path.read_bytes()
    gate(p, path)
    other = network(recipe_of(), seed=1)
    with pytest.raises(ModelError, match=r"the export was refused: .* differs"):
        gate(other, path)
    # a step that loses half of its state
    right = PredictorNetwork.step

    def wrong(self: PredictorNetwork, *args: object) -> object:
        raw, state = right(self, *args)
        return raw, {k: v * 0.5 for k, v in state.items()}

    monkeypatch.setattr(PredictorNetwork, "step", wrong)
    with pytest.raises(ModelError, match="the export was refused"):
        export(p, path, {})
    assert path.read_bytes() == before, "a refused export must not change existing files"


@pytest.mark.slow
def test_int8_is_close(tmp_path: Path) -> None:
    table = recipes.parse(
        {
            "name": "wide",
            "modalities": {"audio": {"size": 64}},
            "heads": [{"name": "now", "kind": "classification", "size": 3}],
            "fusion": {"width": 128},
            "cell": {"hidden": 128},
            "data": {"kind": "none"},
        }
    )
    torch.manual_seed(0)
    export(PredictorNetwork(table).eval(), tmp_path / "step.onnx", {}, int8=True)
    full, small = StepEngine(tmp_path / "step.onnx"), StepEngine(tmp_path / "step.int8.onnx")
    for e in (full, small):
        e.open("a")
    rng = np.random.default_rng(0)
    worst = 0.0
    for k in range(100):
        t = Tick(
            "a",
            k,
            k,
            {"audio": rng.standard_normal(64).astype(np.float32)},
            {"audio": True},
            {"audio": 0},
            Stamps(0, 0, 0, 0, ""),
        )
        worst = max(worst, np.abs(full.step([t])[0].heads["now"] - small.step([t])[0].heads["now"]).max())
    assert 0 < worst < 0.02
    assert (tmp_path / "step.int8.onnx").stat().st_size < 0.5 * (tmp_path / "step.onnx").stat().st_size


def test_hazard_loss_is_the_likelihood() -> None:
    head = recipes.HeadRecipe(name="e", kind="hazard", size=3)
    raw = torch.tensor([[0.3, -0.2, 0.5]]).repeat(4, 1)
    h = torch.sigmoid(raw[0])
    expected = -torch.log(torch.stack([h[0], (1 - h[0]) * h[1], (1 - h[0]) * (1 - h[1]) * h[2], (1 - h).prod()]))
    for came in range(4):
        got = heads.loss(head, raw[came : came + 1], torch.tensor([came]), torch.ones(1))
        torch.testing.assert_close(got, expected[came])


def test_unknown_names_are_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"no fusion 'sum'; use one of add, concat"):
        fusion.create("sum", 2, 4, 4)
    with pytest.raises(ConfigError, match=r"multiple of fusion\.heads"):
        fusion.create("cross", 2, 6, 4, heads=4)
