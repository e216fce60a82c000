"""The default model of `live`: it serves what it was trained for, and keeps sessions apart."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_mmrnn.capture import encoders
from stream_mmrnn.capture.encoders.audio import SPEECH
from stream_mmrnn.capture.encoders.face import MOVEMENT, PRESENT
from stream_mmrnn.capture.encoders.speech_detector import VOICE
from stream_mmrnn.capture.sources.synthetic import Synthetic
from stream_mmrnn.core.config import find_model
from stream_mmrnn.core.settings import EngineSettings, SyntheticSettings
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.core.types import Prediction, Stamps, Tick
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.training import metrics

STAMPS = Stamps(0, 0, 0, 0, "clock")
SIZES = {
    "vision": 99,
    "audio": 81,
    "text": 256,
    "text.tokens": 16,
    "turn_end": 1,
    "other_audio": 81,
    "other_text": 256,
    "other_text.tokens": 16,
    "other_turn_end": 1,
}
PATH = find_model(EngineSettings().model)


def tick(session: str, index: int, seed: int) -> Tick:
    """A tick as an aligner makes it: some modalities missing, some never there."""
    rng = np.random.default_rng((seed, index))
    features, present, age = {}, {}, {}
    for name, size in SIZES.items():
        there = bool(rng.random() < 0.7)
        present[name] = there
        scale = 0.3 if name != "text" else 1.0
        values = rng.integers(32_001, size=size) if name.endswith("tokens") else rng.standard_normal(size) * scale
        features[name] = (values * there).astype(np.float32)
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


def state(engine: StepEngine, session: str) -> bytes:
    return b"".join(x.tobytes() for _, x in sorted(engine.arena.snapshot(session).items()))


def test_its_contract_is_the_runtimes() -> None:
    spec = StepEngine(PATH).spec
    assert (spec.name, spec.tick_ns) == ("turn_taking", 40_000_000)
    assert {m.name: m.size for m in spec.modalities} == SIZES
    activity, over = spec.heads
    assert (activity.name, activity.kind, activity.size) == ("activity", "activity_projection", 8)
    assert activity.horizons_s == ((0.0, 0.2), (0.2, 0.6), (0.6, 1.2), (1.2, 2.0)) * 2
    assert (over.name, over.kind, over.size) == ("turn_over", "classification", 1)
    assert 0 < over.threshold < 1
    assert over.threshold != 0.5
    assert PATH.stat().st_size < 8_000_000


@pytest.mark.slow
def test_it_was_trained_with_the_encoders_that_serve_it() -> None:
    for modality in StepEngine(PATH).spec.modalities:
        name = modality.name.partition(".")[2] or modality.name.replace("other_turn_end", "turn_end")
        assert encoders.create_encoder("face" if name == "vision" else name).origin == modality.encoder


def test_a_moving_mouth_tells_that_speech_begins_soon() -> None:
    """While `self` is silent, and a face is there; it changes nothing else, and nothing afterwards."""
    blind, still, moving = (StepEngine(PATH) for _ in range(3))
    for engine in (blind, still, moving):
        engine.open("a")
    for k in range(30):
        voice = 0.9 if 10 <= k < 20 else 0.1
        face = 0.0 if k >= 25 else 1.0
        made: dict[str, Prediction] = {}
        for name, engine, movement in (("blind", blind, 0.0), ("still", still, -5.5), ("moving", moving, -3.0)):
            t = tick("a", k, 4)
            t.present["vision"], t.present["audio"] = name != "blind", True
            t.features["audio"][SPEECH] = voice
            t.features["vision"][:] = 0
            t.features["vision"][MOVEMENT], t.features["vision"][PRESENT] = movement, face
            (made[name],) = engine.step([t])
        soon = {name: p.heads["activity"][:2] for name, p in made.items()}
        if voice > VOICE or not face:
            assert all(same([made["blind"]], [p]) for p in made.values())
        else:
            assert (soon["moving"] > soon["still"] + 0.02).all()
            assert (soon["moving"] > soon["blind"]).all()
            for p in made.values():
                assert p.heads["turn_over"].tobytes() == made["blind"].heads["turn_over"].tobytes()
                assert p.heads["activity"][2:].tobytes() == made["blind"].heads["activity"][2:].tobytes()


@pytest.mark.parametrize("whose", ["turn_end", "other_turn_end"])
def test_the_end_of_a_turn_is_evidence_until_somebody_speaks(whose: str) -> None:
    """It moves the log-odds of `turn_over` by its own, and nothing else."""
    plain, told = StepEngine(PATH), StepEngine(PATH)
    for engine in (plain, told):
        engine.open("a")
    for k in range(20):
        one, other = tick("a", k, 4), tick("a", k, 4)
        for t in (one, other):
            for name in ("turn_end", "other_turn_end"):
                t.present[name], t.features[name][:] = False, 0
            for voice in ("audio", "other_audio"):
                t.present[voice] = True
                t.features[voice][SPEECH] = 0.9 if k < 5 or k >= 15 else 0.1
        if k == 8:
            other.present[whose], other.features[whose][:] = True, 3.0
        (without,), (with_it,) = plain.step([one]), told.step([other])
        p, q = (float(x.heads["turn_over"][0]) for x in (without, with_it))
        moved = np.log(q / (1 - q)) - np.log(p / (1 - p))
        assert moved == pytest.approx(3.0 if 8 <= k < 15 else 0.0, abs=1e-4)
        assert without.heads["activity"].tobytes() == with_it.heads["activity"].tobytes()


def test_an_inactive_row_keeps_its_state_bit_for_bit() -> None:
    engine = StepEngine(PATH, slots=3)
    for name in ("a", "b"):
        engine.open(name)
    engine.step([tick("a", 0, 1), tick("b", 0, 2)])
    before = state(engine, "b")
    moved = state(engine, "a")
    for k in range(1, 20):
        engine.step([tick("a", k, 1)])
    assert state(engine, "b") == before
    assert state(engine, "a") != moved


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


@pytest.mark.slow
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


def test_what_is_not_a_number_stays_in_its_session() -> None:
    engine = StepEngine(PATH, slots=2)
    engine.open("a")
    engine.open("b")
    got: list[Prediction] = []
    for k in range(6):
        bad = tick("b", k, 8)
        for name in SIZES:
            bad.features[name][:] = (np.nan, np.inf, -np.inf)[k % 3]
        got.append(engine.step([tick("a", k, 7), bad])[0])
    assert same(got, alone(2, "a", 6, 7))


@pytest.mark.parametrize(
    "missing", [(), ("vision",), ("other_audio", "other_text"), ("text", "other_text"), ("audio",), tuple(SIZES)]
)
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


def dialogue() -> tuple[list[Tick], np.ndarray, np.ndarray]:
    """The synthetic people for 60 s through the runtime's encoders, without words; when each of them talks."""
    count = 1500
    speech = np.zeros((2, count), np.float32)
    vectors = {}
    for i, modality in enumerate(("audio", "other_audio")):
        encoder = encoders.create_encoder(modality)
        found: list[np.ndarray] = []
        source = Synthetic(Stream.of(modality), SyntheticSettings(seed=0), paced=False)
        for sample in source.samples(lambda: True, 0):
            found += [s.data for s in encoder.encode(sample)]
            if len(found) >= 2 * count:
                break
        pairs = np.stack(found[: 2 * count]).reshape(count, 2, -1)
        vectors[modality] = pairs.mean(1, dtype=np.float32)
        speech[i] = vectors[modality][:, SPEECH]
    nothing = {name: np.zeros(size, np.float32) for name, size in SIZES.items()}
    present = {name: name in vectors for name in SIZES}
    age = {name: 0 if name in vectors else -1 for name in SIZES}
    made = [
        Tick("a", k, k * 40_000_000, nothing | {m: v[k] for m, v in vectors.items()}, present, age, STAMPS)
        for k in range(count)
    ]
    return made, speech[0], speech[1]


@pytest.mark.slow
def test_voices_through_the_encoders_are_heard_for_what_they_are() -> None:
    """Trained on word times alone, it must make sense of what the detector says of real sound."""
    made, self_speech, other_speech = dialogue()
    engine = StepEngine(PATH)
    engine.open("a")
    said = np.array([engine.step([t])[0].heads["activity"] for t in made])
    for own, column in ((self_speech, 0), (other_speech, 4)):
        soon = np.array([own[k + 1 : k + 6].mean() for k in range(len(own) - 5)]) >= 0.5
        assert metrics.auc(said[: len(soon), column], soon) > 0.9
