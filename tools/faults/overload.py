"""Overload: twice as many sessions as an engine can step; are those it takes served in time, the rest told so?

An open loop: the times of ticks and of requests for a session are fixed beforehand, however long steps take. A refused
client asks again at the time that it was given. The work is one process's: what is due is stepped at once.
"""

from __future__ import annotations

import heapq
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stream_mmrnn.bench import models
from stream_mmrnn.bench.measure import sleep_until
from stream_mmrnn.bench.sessions import TICK_NS, phases
from stream_mmrnn.bench.step import tick_of
from stream_mmrnn.core.clock import now_ns, wall_offset_ns
from stream_mmrnn.core.errors import Busy
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.core.settings import AdmissionSettings, StateSettings
from stream_mmrnn.core.types import Tick
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.snapshots import StateStore
from stream_mmrnn.serve.sessions import Sessions
from tools.faults.promise import Figure, Say

TITLE = "Overload"
NOT_PROMISED = (
    "Time for sessions that were admitted, when other programs take the processor away from the engine.",
    "Time for the others, when one session sends ticks faster than the model's tick.",
)

HIDDEN = 1024
"""So wide that a step of many is felt: some hundred sessions are more than one core can do."""
STALL_NS = 500_000_000
"""A step or a sleep that lost so much of the processor says nothing about the engine: the machine stood still."""
ATTEMPTS = 3


class Stalled(Exception):  # noqa: N818 no error
    pass


class Crowd:
    """Who asks, who is in, and what came of it; unlike `tools.bench.load`, it steps in one call whoever is due."""

    def __init__(self, sessions: Sessions, most: int, ramp_s: float, duration_s: float) -> None:
        self.sessions, self.most = sessions, most
        self.ramp_ns, self.duration_ns = round(ramp_s * 1e9), round(duration_s * 1e9)
        self.latency, self.refusal = Histogram(), Histogram()
        self.seconds: list[list[int]] = [[] for _ in range(round(duration_s) + 1)]
        """Latencies of ticks that were due in this second after the ramp."""
        self.ramped = 0
        """How many were in when the ramp ended; of the others some get in when they ask again."""
        self._free_ns = 0
        """When the newest step ended."""
        self.due = self.said = self.refused = self.hintless = 0
        rng = np.random.default_rng(0)
        engine = sessions.engine
        assert isinstance(engine, StepEngine)
        self.kinds = [tick_of(engine, "", rng) for _ in range(32)]
        self.phase_ns = phases(most, "spread", 0)
        rng.shuffle(self.phase_ns)

    def run(self) -> None:
        """Ramp and go on; raises Stalled where the machine stood still meanwhile."""
        start_ns = now_ns() + 50_000_000
        counted_ns = start_ns + self.ramp_ns
        end_ns = counted_ns + self.duration_ns
        events = [(start_ns + self.ramp_ns * i // self.most, i, 0) for i in range(self.most)]
        """When, who, and the tick; tick 0: it asks for a session."""
        while events[0][0] < end_ns:
            sleep_until(events[0][0], now_ns)
            at_ns = now_ns()
            if at_ns - max(events[0][0], self._free_ns) > STALL_NS:
                raise Stalled
            batch: list[tuple[int, int, int]] = []
            while events[0][0] <= at_ns:
                due_ns, who, index = heapq.heappop(events)
                if index:
                    batch.append((due_ns, who, index))
                    heapq.heappush(events, (due_ns + TICK_NS, who, index + 1))
                else:
                    heapq.heappush(events, self._ask(who, start_ns))
            if batch:
                self._step(batch, counted_ns)
            if at_ns < counted_ns:
                self.ramped = len(self.sessions)

    def _ask(self, who: int, start_ns: int) -> tuple[int, int, int]:
        """The event that follows."""
        began_ns = now_ns()
        try:
            self.sessions.open(f"s{who}", now_ns=began_ns)
        except Busy as e:
            ended_ns = now_ns()
            self.refusal.add(ended_ns - began_ns)
            self.refused += 1
            self.hintless += e.retry_after_s <= 0
            return ended_ns + max(round(e.retry_after_s * 1e9), 1_000_000), who, 0
        # its first tick: the next time that its phase comes round
        ticks = -(-(now_ns() - start_ns - int(self.phase_ns[who])) // TICK_NS)
        return start_ns + int(self.phase_ns[who]) + ticks * TICK_NS, who, 1

    def _step(self, batch: list[tuple[int, int, int]], counted_ns: int) -> None:
        ticks = []
        for _, who, index in batch:
            of = self.kinds[who % len(self.kinds)]
            ticks.append(Tick(f"s{who}", index, 0, of.features, of.present, of.age_ns, of.closed))
        began_ns, cpu_ns = now_ns(), time.process_time_ns()
        said = self.sessions.step(ticks, now_ns=began_ns)
        self._free_ns = done_ns = now_ns()
        if (done_ns - began_ns) - (time.process_time_ns() - cpu_ns) > STALL_NS:
            raise Stalled
        self.due += len(ticks)
        self.said += len(said)
        for due_ns, _, _ in batch:
            if due_ns >= counted_ns:
                self.latency.add(done_ns - due_ns)
                # one who is late by more than a second meets ticks from after the end
                second = min((due_ns - counted_ns) // 1_000_000_000, len(self.seconds) - 1)
                self.seconds[second].append(done_ns - due_ns)

    def growth_ms_per_min(self) -> float:
        """The slope of the medians of each second, by least squares."""
        medians = [(i, float(np.median(took)) / 1e6) for i, took in enumerate(self.seconds) if took]
        seconds, value_ms = np.array(medians).T
        return float(np.polyfit(seconds, value_ms, 1)[0]) * 60 if len(medians) > 1 else 0.0


def run(quick: bool, say: Say) -> Iterator[Figure]:
    ramp_s, duration_s = (2.0, 5.0) if quick else (10.0, 60.0)
    with tempfile.TemporaryDirectory(prefix="stream-mmrnn-overload-") as folder:
        path = models.write(Path(folder), HIDDEN)
        store = StateStore(Path(folder) / "states", 3600)
        yield from _slots(path, store)
        whole = ""
        for attempt in range(1 if quick else ATTEMPTS):
            crowd, capacity = _crowd(path, store, ramp_s, duration_s)
            try:
                crowd.run()
                whole = ""
                break
            except Stalled:
                whole = "; cut short, for the machine stood still in every attempt"
                say(f"attempt {attempt + 1}: the machine stood still for more than {STALL_NS / 1e9:g} s")
        say(
            f"{crowd.most} sessions asked, {len(crowd.sessions)} are in, {crowd.ramped} after the ramp; "
            f"{crowd.refused} refusals; "
            f"p50 {crowd.latency.percentile(50) / 1e6:.1f} ms, p99 {crowd.latency.percentile(99) / 1e6:.1f} ms"
        )
    admitted = len(crowd.sessions)
    asked = f"{crowd.most} sessions over {ramp_s:g} s, twice what a core can step ({capacity})"
    yield Figure("overload_admitted_sessions", f"admitted of {asked}", admitted, "sessions", 1, ">=")
    yield Figure("overload_refused_sessions", f"never admitted of {asked}", crowd.most - admitted, "sessions", 1, ">=")
    yield Figure(
        "overload_hintless_refusals_count",
        f"of {crowd.refused} refusals, those that say no time to ask again",
        crowd.hintless,
        "",
        0,
        "==",
    )
    yield Figure(
        "overload_lost_ticks", f"of {crowd.due} ticks of admitted sessions", crowd.due - crowd.said, "ticks", 0, "=="
    )
    yield Figure(
        "overload_admitted_p99_ms",
        f"from the intended time to the prediction, p99 over {duration_s:g} s{whole}",
        crowd.latency.percentile(99) / 1e6,
        "ms",
        TICK_NS / 1e6,
        timed=True,
    )
    yield Figure(
        "overload_latency_growth_ms_per_min",
        f"slope of a second's median over {duration_s:g} s, {admitted - crowd.ramped} sessions more at the end{whole}",
        crowd.growth_ms_per_min(),
        "ms/min",
        1.0,
        timed=True,
    )
    yield Figure(
        "overload_refusal_p99_ms",
        f"until Busy is raised, p99 of {crowd.refusal.count}",
        crowd.refusal.percentile(99) / 1e6,
        "ms",
        10.0,
        timed=True,
    )


def _crowd(path: Path, store: StateStore, ramp_s: float, duration_s: float) -> tuple[Crowd, int]:
    """An engine with a slot for everybody, so that time is what there is too little of."""
    measured = Sessions(StepEngine(path, 64), store, StateSettings(), admission=AdmissionSettings())
    assert measured.admission is not None
    cost = measured.admission.settled
    assert cost is not None
    capacity = max(int(TICK_NS / cost.tick_ns), 1)
    engine = StepEngine(path, 2 * capacity)
    sessions = Sessions(engine, store, StateSettings(), admission=AdmissionSettings(), wall_offset_ns=wall_offset_ns())
    return Crowd(sessions, 2 * capacity, ramp_s, duration_s), capacity


def _slots(path: Path, store: StateStore) -> Iterator[Figure]:
    """Where there is time enough, slots are the limit."""
    slots = 4
    sessions = Sessions(StepEngine(path, slots), store, StateSettings())
    wrong = 0
    for i in range(2 * slots):
        try:
            sessions.open(f"s{i}", now_ns=now_ns())
            wrong += i >= slots
        except Busy as e:
            wrong += i < slots or e.retry_after_s <= 0
    what = f"of {2 * slots} that ask for {slots} slots, those admitted beyond them, or refused without a hint"
    yield Figure("overload_slots_wrong_count", what, wrong, "", 0, "==")
