"""Admission control from the measured cost of steps, with costs that are set and a clock that is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from toy_ticks import tick

from stream_mmrnn.core.block import Block, BlockPredictions
from stream_mmrnn.core.errors import Busy
from stream_mmrnn.core.settings import AdmissionSettings, StateSettings
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.snapshots import StateStore
from stream_mmrnn.serve.admission import FORGET_NS, LEAST, WINDOW, Admission, Cost, fit
from stream_mmrnn.serve.measure import measure
from stream_mmrnn.serve.sessions import Sessions

TICK_NS = 40_000_000
NOW = 10**15
S = 1_000_000_000
MS = 1_000_000


def fed(call_ns: float, tick_ns: float, counts: list[int], share: float = 1.0) -> Admission:
    admission = Admission(TICK_NS, share)
    for count in counts:
        admission.add(count, round(call_ns + count * tick_ns), NOW)
    return admission


@given(st.integers(0, 5_000_000), st.integers(1_000, 2_000_000), st.integers(2, 40))
@example(1_000_000, 2_000_000, 12)  # the bound is reached exactly
@example(500_000, 1_000_000, 12)
def test_a_line_is_found_and_the_capacity_is_its_inverse(call_ns: int, tick_ns: int, most: int) -> None:
    admission = fed(call_ns, tick_ns, [1 + i % most for i in range(200)])
    cost = admission.cost(NOW)
    assert cost is not None
    assert cost.call_ns == pytest.approx(call_ns, rel=1e-3, abs=50)
    assert cost.tick_ns == pytest.approx(tick_ns, rel=1e-3, abs=50)
    assert cost.jitter_ns < 100
    capacity = admission.capacity(NOW)
    assert capacity is not None
    assert capacity == pytest.approx(max((TICK_NS - 2 * call_ns) / tick_ns, 0), rel=0.01, abs=1)
    assert not admission.admits(capacity + 1, NOW)
    assert capacity == 0 or admission.admits(capacity, NOW)


def test_without_measurements_nothing_is_refused() -> None:
    admission = Admission(TICK_NS, 0.7)
    for _ in range(LEAST - 1):
        admission.add(1, 10**12, NOW)
    assert admission.admits(10**6, NOW)
    assert admission.capacity(NOW) is None
    admission.add(1, 10**12, NOW)
    assert not admission.admits(1, NOW)


def test_where_counts_do_not_differ_all_of_a_step_is_its_ticks() -> None:
    admission = fed(1_000_000, 100_000, [10] * 100)
    assert admission.cost(NOW) == Cost(0.0, 200_000.0, 0.0)
    assert admission.capacity(NOW) == 200


def test_a_single_outlier_does_not_count_and_frequent_ones_do() -> None:
    rng = np.random.default_rng(0)
    counts = [int(n) for n in rng.integers(1, 20, 400)]
    quiet = fed(500_000, 100_000, counts)
    once = fed(500_000, 100_000, counts)
    once.add(5, 60 * 10**9, NOW)
    often = fed(500_000, 100_000, counts)
    for _ in range(40):
        often.add(5, 30_000_000, NOW)
    assert once.capacity(NOW) == pytest.approx(quiet.capacity(NOW), abs=3)
    capacity = often.capacity(NOW)
    assert capacity is not None
    assert capacity < 200  # half of the time is gone: more sessions do not make stalls longer


def test_only_the_newest_steps_count() -> None:
    admission = fed(0, 10_000_000, [1, 2, 3] * 100)
    assert admission.capacity(NOW) == 4
    for i in range(WINDOW):
        admission.add(1 + i % 7, (1 + i % 7) * 100_000, NOW)
    assert admission.capacity(NOW) == 400


def test_the_share_is_of_the_tick() -> None:
    assert fed(0, 1_000_000, [1, 2, 3, 4] * 10, 0.5).capacity(NOW) == 20


def test_the_settled_cost_is_a_lower_bound() -> None:
    """Fast small steps do not admit more sessions than full steps allow."""
    admission = Admission(TICK_NS, 0.5)
    counts = np.array([1.0, 16.0, 64.0] * 20)
    admission.settle(fit(counts, MS + counts * 200_000), NOW)
    before = admission.capacity(NOW)
    for count in (1, 2, 3) * 300:
        admission.add(count, 100_000 + count * 100_000, NOW)
    assert admission.capacity(NOW) == before
    assert before is not None
    assert admission.admits(before, NOW)
    assert not admission.admits(before + 1, NOW)
    for count in (1, 16, 64) * 300:  # slower than ever: that counts at once
        admission.add(count, MS + count * 400_000, NOW)
    assert (admission.capacity(NOW) or 0) < before
    later_ns = NOW + FORGET_NS + 1
    assert admission.capacity(later_ns) == before, "what is long ago does not count"


@given(st.integers(50_000, 500_000), st.integers(1_000, 50_000), st.integers(0, 40), st.integers(0, 2**32 - 1))
def test_ticks_that_come_one_at_a_time_are_not_charged_a_call_each(
    call_ns: int, tick_ns: int, pairs: int, seed: int
) -> None:
    """Steps of one tick, some of two, with noise, say nothing about full steps: the dummy sessions' shape holds."""
    admission = Admission(TICK_NS, 0.5)
    counts = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0] * 16)
    admission.settle(fit(counts, call_ns + counts * tick_ns), NOW)
    alone = admission.capacity(NOW)
    assert alone is not None
    rng = np.random.default_rng(seed)
    for i in range(WINDOW):
        count = 2 if i < pairs else 1
        admission.add(count, round((call_ns + count * tick_ns) * rng.uniform(1.0, 1.2)), NOW)
    capacity = admission.capacity(NOW)
    assert capacity is not None
    assert 0.6 * alone <= capacity <= alone


def test_an_engine_with_little_to_do_admits_one_more_whatever_is_estimated() -> None:
    """The estimate says that two sessions are too many; ten send their ticks, and take a tenth of the time."""
    admission = Admission(TICK_NS, 0.5)
    admission.settle(Cost(15 * MS, 1000.0, 0.0), NOW)
    for i in range(10):  # in ten steps
        admission.add(1, 400_000, NOW + i * TICK_NS // 10)
    after_ns = NOW + TICK_NS
    assert admission.admits(11, after_ns)
    assert admission.admits(20, after_ns)
    assert not admission.admits(21, after_ns), "most of them would be silent"
    for i in range(10):
        admission.add(1, 2_000_000, NOW + TICK_NS + i * TICK_NS // 10)
    assert not admission.admits(11, NOW + 2 * TICK_NS), "it has more to do than a quarter of the time"


def test_stalls_do_not_take_all_sessions() -> None:
    """They are as long with one session as with a hundred."""
    admission = fed(100_000, 10_000, [1, 8, 64] * 100, 0.5)
    for _ in range(20):
        admission.add(8, 500 * MS, NOW)
    capacity = admission.capacity(NOW)
    assert capacity is not None
    assert capacity > 500


# ---- with an engine whose costs are set ------------------------------------------------------------------------------


class Clock:
    """What a step costs is what `slow` says; time passes with it."""

    def __init__(self, call_ns: int, tick_ns: int) -> None:
        self.now_ns, self.call_ns, self.tick_ns = NOW, call_ns, tick_ns
        self.slow: Callable[[int], float] = lambda step: 1.0
        self.steps = 0

    def cost_ns(self, count: int) -> int:
        self.steps += 1
        return round((self.call_ns + count * self.tick_ns) * self.slow(self.steps))


@pytest.fixture
def clock() -> Clock:
    return Clock(80_000, 8_000)


class TimedEngine(StepEngine):
    clock: Clock

    def step_block(self, block: Block) -> BlockPredictions:
        """As if it took what the clock says."""
        start_ns = self.clock.now_ns
        self.clock.now_ns += self.clock.cost_ns(len(block))
        heads = {h.name: np.zeros((len(block), h.size), np.float32) for h in self.spec.heads}
        ids = block.handles, block.indices, block.event_ns
        return BlockPredictions(*ids, heads, self.spec.sha256, start_ns, self.clock.now_ns)


def sessions_of(toy: Path, folder: Path, clock: Clock, slots: int = 1024) -> Sessions:
    engine = TimedEngine(toy, slots)
    engine.clock = clock
    state = StateSettings(snapshot_every=0)
    return Sessions(engine, StateStore(folder, 100), state, admission=AdmissionSettings(), now_ns=clock.now_ns)


def drive(sessions: Sessions, clock: Clock, duration_ns: int, together: int = 1) -> None:
    """Every session sends its ticks for a while, evenly spread: `together` in a step."""
    names = list(sessions._live)
    end_ns, at_ns = clock.now_ns + duration_ns, clock.now_ns
    while at_ns < end_ns:
        for start in range(0, len(names), together):
            clock.now_ns = max(clock.now_ns, at_ns + TICK_NS * start // len(names))
            ticks = [tick(name, sessions.next_index(name)) for name in names[start : start + together]]
            sessions.step(ticks, now_ns=clock.now_ns)
        at_ns += TICK_NS


def test_clients_of_one_tick_at_a_time_get_all_slots(toy: Path, tmp_path: Path, clock: Clock) -> None:
    """A call of 80 us for each tick would be too much from 240 sessions on; in time there are 2,400."""
    clock.slow = lambda step: 1.0 + (step % 7) / 20
    sessions = sessions_of(toy, tmp_path, clock)
    assert sessions.admission is not None
    assert (sessions.admission.capacity(clock.now_ns) or 0) > 1024
    for i in range(1024):
        sessions.open(f"s{i}", now_ns=clock.now_ns)
        if i % 64 == 63:
            drive(sessions, clock, 2 * TICK_NS, together=1 + i // 400)
    assert sessions.counts["busy"] == 0
    with pytest.raises(Busy, match="all 1024 slots"):
        sessions.open("more", now_ns=clock.now_ns)


def test_an_idle_machine_refuses_nobody_whatever_it_measured_before(toy: Path, tmp_path: Path, clock: Clock) -> None:
    """A busy machine at the start said that one session can be served; it is idle since."""
    clock.slow = lambda step: 1000.0
    sessions = sessions_of(toy, tmp_path, clock)
    admission = sessions.admission
    assert admission is not None
    assert not admission.admits(2, clock.now_ns)
    clock.slow = lambda step: 1.0
    clock.now_ns += 2 * S
    for i in range(200):
        sessions.open(f"s{i}", now_ns=clock.now_ns)  # nobody sends anything
    assert sessions.counts["busy"] == 0
    assert len(sessions.engine) == 200, "dummy sessions are closed"


def test_slow_steps_of_yesterday_refuse_nobody(toy: Path, tmp_path: Path, clock: Clock) -> None:
    sessions = sessions_of(toy, tmp_path, clock)
    for i in range(10):
        sessions.open(f"s{i}", now_ns=clock.now_ns)
    clock.slow = lambda step: 100.0
    drive(sessions, clock, S)
    with pytest.raises(Busy):
        sessions.open("more", now_ns=clock.now_ns)
    clock.slow = lambda step: 1.0
    clock.now_ns += 2 * S
    sessions.open("more", now_ns=clock.now_ns)


def test_an_engine_with_too_much_to_do_refuses_and_is_not_measured_for_it(
    toy: Path, tmp_path: Path, clock: Clock
) -> None:
    clock.call_ns, clock.tick_ns = 500_000, 500_000
    sessions = sessions_of(toy, tmp_path, clock)
    admitted = 0
    for i in range(100):
        clock.now_ns += TICK_NS
        try:
            sessions.open(f"s{i}", now_ns=clock.now_ns)
            admitted += 1
        except Busy:
            break
        drive(sessions, clock, 2 * TICK_NS, together=100)
    assert 30 <= admitted <= 38, "20 ms of 40 are for (2 + n) half milliseconds"
    drive(sessions, clock, 2 * S, together=100)
    steps = clock.steps
    for _ in range(50):
        with pytest.raises(Busy, match="could not be served in time"):
            sessions.open("more", now_ns=clock.now_ns)
    assert clock.steps == steps


def test_a_refused_crowd_is_measured_once_a_second(toy: Path, tmp_path: Path, clock: Clock) -> None:
    clock.call_ns = 15 * MS
    sessions = sessions_of(toy, tmp_path, clock)
    sessions.open("one", now_ns=clock.now_ns)
    steps = clock.steps
    for i in range(1000):
        with pytest.raises(Busy):
            sessions.open("two", now_ns=clock.now_ns + i * S // 100)
    assert 2 <= clock.steps - steps <= 11
    assert len(sessions.engine) == 1


@pytest.mark.parametrize(
    ("slow", "factor"),
    [
        (lambda step: 1.0, 1),
        (lambda step: 50.0 if step < 30 else 1.0, 1),  # only the first result is of a busy machine
        (lambda step: 50.0 if step < 300 else 1.0, 50),  # two agree that it is slow
        (lambda step: (9, 5, 3, 7, 2, 8, 4, 6)[max(step - 8, 0) // 112 % 8], 2),  # none agree: the fastest counts
    ],
)
def test_it_is_measured_until_two_results_agree(
    slow: Callable[[int], float], factor: float, toy: Path, clock: Clock
) -> None:
    clock.slow = slow
    engine = TimedEngine(toy, 64)
    engine.clock = clock
    admission = Admission(TICK_NS, 1.0)
    measure(engine, admission, NOW)
    settled = admission.settled
    assert settled is not None
    full_ns = settled.call_ns + 64 * settled.tick_ns
    assert full_ns == pytest.approx(factor * (80_000 + 64 * 8_000), rel=0.1)
    assert len(engine) == 0
