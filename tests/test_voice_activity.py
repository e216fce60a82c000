from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_mmrnn import encoders
from stream_mmrnn.config import find_model
from stream_mmrnn.engine import StepEngine
from stream_mmrnn.types import Prediction, Stamps, Tick

STAMPS = Stamps(0, 0, 0, 0, "clock")
SIZES = {"vision": 1280, "audio": 81, "text": 256}
PATH = find_model("voice_activity")


def tick(session: str, index: int, seed: int) -> Tick:
    """A tick as an aligner makes it: some modalities missing, some never there."""
    rng = np.random.default_rng((seed, index))
    features, present, age = {}, {}, {}
    for name, size in SIZES.items():
        there = bool(rng.random() < 0.7)
        present[name] = there
        scale = 0.3 if name != "text" else 1.0
        features[name] = (rng.standard_normal(size) * scale * there).astype(np.float32)
        age[name] = 0 if there else int(rng.integers(-1, 20_000_000_000))
    return Tick(session, index, index * 40_000_000, features, present, age, STAMPS)


def same(a: list[Prediction], b: list[Prediction]) -> bool:
    def raw(p: Prediction) -> dict[str, bytes]:
        return {name: head.tobytes() for name, head in p.heads.items()}

    return len(a) == len(b) and all(raw(x) == raw(y) for x, y in zip(a, b, strict=True))


def alone(slots: int, session: str, count: int, seed: int) -> list[Prediction]:
    engine = StepEngine(PATH, slots)
    engine.open(session)
    return [p for k in range(count) for p in engine.step([tick(session, k, seed)])]


def test_its_contract_is_the_runtimes() -> None:
    engine = StepEngine(PATH)
    spec = engine.spec
    assert (spec.name, spec.tick_ns) == ("voice_activity", 40_000_000)
    assert {m.name: m.size for m in spec.modalities} == SIZES
    assert [(h.name, h.kind, h.size) for h in spec.heads] == [
        ("vap", "activity_projection", 4),
        ("speech", "classification", 1),
    ]
    assert spec.heads[0].horizons_s == ((0.0, 0.2), (0.2, 0.6), (0.6, 1.2), (1.2, 2.0))
    assert PATH.stat().st_size < 2_000_000


def test_it_was_trained_with_the_encoders_that_serve_it() -> None:
    for modality in StepEngine(PATH).spec.modalities:
        assert encoders.create(modality.name).origin == modality.encoder


def test_an_inactive_row_keeps_its_state_bit_for_bit() -> None:
    engine = StepEngine(PATH, slots=3)
    for name in ("a", "b"):
        engine.open(name)
    engine.step([tick("a", 0, 1), tick("b", 0, 2)])
    before = engine.arena.snapshot("b")["state.gru"].tobytes()
    moved = engine.arena.snapshot("a")["state.gru"].tobytes()
    for k in range(1, 20):
        engine.step([tick("a", k, 1)])
    assert engine.arena.snapshot("b")["state.gru"].tobytes() == before
    assert engine.arena.snapshot("a")["state.gru"].tobytes() != moved


def test_reset_equals_fresh() -> None:
    engine = StepEngine(PATH, slots=2)
    engine.open("a")
    first = [p for k in range(10) for p in engine.step([tick("a", k, 3)])]
    engine.arena.reset("a")
    second = [p for k in range(10) for p in engine.step([tick("a", k, 3)])]
    engine.close("a")
    engine.open("b")
    third = [p for k in range(10) for p in engine.step([tick("b", k, 3)])]
    assert same(first, second)
    assert same(first, third)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=25))
def test_any_interleaving_of_two_sessions_equals_each_alone(order: list[str]) -> None:
    engine = StepEngine(PATH, slots=2)
    engine.open("a")
    engine.open("b")
    seeds = {"a": 5, "b": 6}
    done = {"a": 0, "b": 0}
    got: dict[str, list[Prediction]] = {"a": [], "b": []}
    for step in order:
        for p in engine.step([tick(s, done[s], seeds[s]) for s in step]):
            got[p.tick.session].append(p)
        for s in step:
            done[s] += 1
    for s in "ab":
        assert same(got[s], alone(2, s, done[s], seeds[s]))


def test_what_is_not_a_number_harms_nobody() -> None:
    engine = StepEngine(PATH, slots=2)
    engine.open("a")
    engine.open("b")
    for k in range(3):
        bad = tick("b", k, 8)
        for name in SIZES:
            bad.features[name][:] = (np.nan, np.inf, -np.inf)[k]
        p, q = engine.step([tick("a", k, 7), bad])
        assert all(np.isfinite(h).all() for h in (*p.heads.values(), *q.heads.values()))
    assert np.isfinite(engine.arena.snapshot("b")["state.gru"]).all()
    after = [p for k in range(3) for p in engine.step([tick("a", 3 + k, 7)])]
    assert same(after, alone(2, "a", 6, 7)[3:])


@pytest.mark.parametrize("missing", [(), ("vision",), ("vision", "text"), ("audio",), ("vision", "audio", "text")])
def test_heads_are_probabilities_whatever_is_missing(missing: tuple[str, ...]) -> None:
    engine = StepEngine(PATH)
    engine.open("a")
    for k in range(50):
        t = tick("a", k, 9)
        for name in missing:
            t.present[name], t.age_ns[name] = False, -1
            t.features[name][:] = 0
        (p,) = engine.step([t])
        for head in p.heads.values():
            assert ((head >= 0) & (head <= 1)).all()


def test_speech_now_follows_the_detector_in_the_features() -> None:
    """A voice as a source gives it: the model hears it, and hears when it stops."""
    from stream_mmrnn.config import Synthetic as SyntheticSettings
    from stream_mmrnn.sources.synthetic import Synthetic
    from stream_mmrnn.sources.talker import turns

    engine = StepEngine(PATH)
    engine.open("a")
    encoder = encoders.create("audio")
    vectors: list[np.ndarray] = []
    said: list[float] = []
    silence = {"vision": np.zeros(1280, np.float32), "text": np.zeros(256, np.float32)}
    for sample in Synthetic("audio", SyntheticSettings(seed=0), paced=False).samples(lambda: True, 0):
        vectors += [s.data for s in encoder.encode(sample)]
        if len(vectors) == 2:
            k = len(said) + 1
            features = {**silence, "audio": np.mean(vectors, 0, dtype=np.float32)}
            present = {"vision": False, "audio": True, "text": False}
            age = {"vision": -1, "audio": 0, "text": -1}
            (p,) = engine.step([Tick("a", k, k * 40_000_000, features, present, age, STAMPS)])
            said.append(float(p.heads["speech"][0]))
            vectors = []
        if len(said) == 500:
            break
    times = np.arange(1, 501) * 0.04
    talking = np.zeros(500, np.bool_)
    quiet = np.ones(500, np.bool_)
    for turn in turns(0):
        if turn.start_s > 20:
            break
        talking |= (times > turn.start_s + 0.2) & (times < turn.end_s - 0.1)
        quiet &= (times < turn.start_s) | (times > turn.end_s + 0.3)
    assert np.mean(np.array(said)[talking] > 0.5) > 0.8
    assert np.mean(np.array(said)[quiet] > 0.5) < 0.2
