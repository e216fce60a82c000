from __future__ import annotations

import gc
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import toy_model
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from toy_ticks import alone, tick

from stream_mmrnn.core.errors import Busy, DuplicateSession, ModelError, ProviderError, SessionError, UnknownSession
from stream_mmrnn.core.types import HeadSpec, ModalitySpec, Tick
from stream_mmrnn.predict.columns import MAX_AGE_S
from stream_mmrnn.predict.engine import StepEngine, check_model


def test_step_equals_a_reference_in_numpy(toy: Path) -> None:
    engine = StepEngine(toy, 3)
    engine.open("a")
    w, b, v = toy_model.weights()
    h = np.zeros(toy_model.HIDDEN, np.float32)
    for k in range(50):
        t = tick("a", k)
        age = [MAX_AGE_S if a < 0 else min(a / 1e9, MAX_AGE_S) for a in t.age_ns.values()]
        x = np.concatenate([*t.features.values(), np.float32(list(t.present.values())), np.float32(age), h])
        h = np.tanh(x @ w + b)
        expected = 1 / (1 + np.exp(-(h @ v)))
        got = engine.step([t])[0]
        np.testing.assert_allclose(got.heads["next"], expected, atol=1e-5)
        assert got.model == engine.spec.sha256
        assert got.step_end_ns >= got.step_start_ns


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=5), min_size=1, max_size=12))
def test_any_interleaving_is_bit_identical_to_single_sessions(toy: Path, batches: list[list[str]]) -> None:
    slots = 3
    engine = StepEngine(toy, slots)
    for name in "cab":
        engine.open(name)
    at = dict.fromkeys("abc", 0)
    got: dict[str, list[bytes]] = {n: [] for n in "abc"}
    for batch in batches:
        ticks = []
        for name in batch:
            ticks.append(tick(name, at[name], ord(name)))
            at[name] += 1
        for t, p in zip(ticks, engine.step(ticks), strict=True):
            assert p.tick is t
            got[t.session].append(p.heads["next"].tobytes())
    for name in "abc":
        assert got[name] == alone(toy, slots, ord(name), at[name])


def test_a_reused_slot_starts_from_the_initial_state(toy: Path) -> None:
    engine = StepEngine(toy, 1)
    engine.open("old")
    for k in range(10):
        engine.step([tick("old", k, 1)])
    engine.close("old")
    engine.open("x")
    assert [engine.step([tick("x", k, 7)])[0].heads["next"].tobytes() for k in range(5)] == alone(toy, 1, 7, 5)
    engine.arena.reset("x")
    assert engine.step([tick("x", 0, 7)])[0].heads["next"].tobytes() == alone(toy, 1, 7, 1)[0]


def test_restored_snapshots_continue_bit_for_bit(toy: Path) -> None:
    first, second = StepEngine(toy, 2), StepEngine(toy, 2)
    first.open("x")
    second.open("other")
    second.open("x")
    assert first.arena.snapshot("x") == {}
    before = [first.step([tick("x", k)])[0].heads["next"].tobytes() for k in range(5)]
    second.arena.restore("x", first.arena.snapshot("x"))
    after = [second.step([tick("x", k)])[0].heads["next"].tobytes() for k in range(5, 10)]
    assert before + after == alone(toy, 2, 0, 10)
    with pytest.raises(SessionError, match="does not fit"):
        second.arena.restore("x", {"state.h": np.zeros(3, np.float32)})


class Sessions(RuleBasedStateMachine):
    """Sessions that open, step, wait, reset and close, in batches of any size: each equals an engine of its own."""

    path: Path
    slots = 5

    def __init__(self) -> None:
        super().__init__()
        self.engine = StepEngine(self.path, self.slots, batch=3)  # a step then takes several runs
        self.alone = StepEngine(self.path)
        self.states: dict[str, dict[str, np.ndarray]] = {}
        """Snapshots of the single-slot engine, by open session."""
        self.seeds: dict[str, int] = {}
        self.opened = 0

    @rule(name=st.sampled_from("abcdefg"))
    def open(self, name: str) -> None:
        if name in self.states:
            with pytest.raises(DuplicateSession):
                self.engine.open(name)
        elif len(self.states) == self.slots:
            with pytest.raises(Busy):
                self.engine.open(name)
        else:
            self.engine.open(name)
            self.states[name] = {}
            self.opened += 1
            self.seeds[name] = self.opened

    @precondition(lambda self: self.states)
    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.states)), min_size=1, max_size=9))
        ticks = [tick(name, k, self.seeds[name]) for k, name in enumerate(names)]
        for t, p in zip(ticks, self.engine.step(ticks), strict=True):
            assert p.tick is t
            assert p.heads["next"].tobytes() == self.by_itself(t)

    def by_itself(self, t: Tick) -> bytes:
        self.alone.open(t.session)
        self.alone.arena.restore(t.session, self.states[t.session])
        said = self.alone.step([t])[0].heads["next"].tobytes()
        self.states[t.session] = self.alone.arena.snapshot(t.session)
        self.alone.close(t.session)
        return said

    @precondition(lambda self: self.states)
    @rule(data=st.data())
    def reset(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.states)))
        self.engine.reset(name)
        self.states[name] = {}

    @precondition(lambda self: self.states)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.states)))
        self.engine.close(name)
        del self.states[name]
        with pytest.raises(UnknownSession):
            self.engine.step([tick(name, 0)])

    @rule()
    def prewarm(self) -> None:
        self.engine.prewarm()

    @invariant()
    def every_state_is_what_it_would_be_alone(self) -> None:
        assert len(self.engine) == len(self.states)
        for name, state in self.states.items():
            held = self.engine.arena.snapshot(name)
            assert {k: v.tobytes() for k, v in held.items()} == {k: v.tobytes() for k, v in state.items()}


def test_batched_sessions_equal_single_ones(toy: Path) -> None:
    machine = type("OfToy", (Sessions,), {"path": toy})
    run_state_machine_as_test(machine, settings=settings(max_examples=25, stateful_step_count=40, deadline=None))


@pytest.mark.slow
def test_a_step_allocates_only_its_predictions(toy: Path) -> None:
    engine = StepEngine(toy, 40)
    for i in range(40):
        engine.open(str(i))
    rounds = [[tick(str(i), k, i) for i in range(n)] for k, n in enumerate((1, 3, 40, 17, 1, 40))]
    for ticks in rounds:
        engine.step(ticks)
    gc.collect()
    tracemalloc.start()
    try:
        for ticks in rounds:
            engine.step(ticks)
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(200):
            for ticks in rounds:
                engine.step(ticks)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        engine.step(rounds[0])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    print(f"1,200 steps: {after - before} bytes more; one step of one session holds {peak - after} bytes at most")
    assert after - before < 2048  # no growth, except a few bytes of the interpreter's caches
    assert peak - after < 2048  # a prediction: its heads, and nothing of the size of a state or an input


def test_errors_are_typed_and_immediate(toy: Path) -> None:
    engine = StepEngine(toy, 1)
    engine.open("a")
    began = time.monotonic()
    with pytest.raises(Busy, match="all 1 slots"):
        engine.open("b")
    assert time.monotonic() - began < 0.5  # DESIGN's bound is 10 ms; this checks only that it does not block
    with pytest.raises(DuplicateSession):
        engine.open("a")
    with pytest.raises(UnknownSession):
        engine.step([tick("a", 0), tick("b", 0)])
    with pytest.raises(UnknownSession):
        engine.close("b")
    # the refused step changed no state
    assert engine.step([tick("a", 0)])[0].heads["next"].tobytes() == alone(toy, 1, 0, 1)[0]


def test_cuda_is_never_replaced_silently(toy: Path) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is an NVIDIA GPU here")
    with pytest.raises(ProviderError, match="`cuda` was asked for"):
        StepEngine(toy, 1, "cuda")
    assert StepEngine(toy, 1, "auto").provider == "cpu"


def test_a_file_that_is_not_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        check_model(tmp_path / "no.onnx", "cpu")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ModelError, match="not an ONNX graph"):
        check_model(tmp_path / "text.onnx", "cpu")


def contract(**change: object) -> str:
    import json

    from stream_mmrnn.predict.contract import write_contract

    table = json.loads(write_contract("toy", toy_model.TICK_NS, toy_model.MODALITIES, toy_model.HEADS))
    return json.dumps({**table, **change})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metadata": ""}, "has no `stream_mmrnn` metadata"),
        ({"metadata": "{"}, "contract that cannot be read"),
        ({"metadata": contract(tick_ns=0)}, "tick of 0 ns"),
        ({"metadata": contract(surprise=1)}, "unknown field `surprise`"),
        ({"leave_out": "next.h"}, "no output `next.h`"),
        ({"leave_out": "head.next"}, "no output `head.next`"),
        ({"metadata": contract(heads=[{"name": "next", "kind": "classification", "size": 3}])}, "of 3 numbers"),
        ({"metadata": contract(modalities=[{"name": "no name", "size": 2}])}, "a modality 'no name'"),
        (
            {"metadata": contract(modalities=[{"name": m.name, "size": m.size + 1} for m in toy_model.MODALITIES])},
            "input `input.vision` has shape",
        ),
        (
            {"metadata": contract(modalities=[{"name": "audio", "size": 3, "stack": 2}])},
            "is not 2 samples",
        ),
        ({"metadata": contract(modalities=[{"name": "vision", "size": 5}])}, "input `present` has shape"),
    ],
)
def test_a_broken_contract_is_reported_in_one_sentence(tmp_path: Path, options: dict[str, str], words: str) -> None:
    path = toy_model.make(tmp_path / "m.onnx", **options)
    with pytest.raises(ModelError, match=words) as e:
        check_model(path, "cpu")
    assert "\n" not in str(e.value)


def test_the_contract_reads_back(toy: Path) -> None:
    spec = check_model(toy, "cpu")
    assert spec.modalities == toy_model.MODALITIES
    assert spec.heads == (HeadSpec("next", "classification", 2, ("yes", "no")),)
    assert spec.states[0].shape == (toy_model.HIDDEN,)
    assert ModalitySpec("audio", 3) in spec.modalities
