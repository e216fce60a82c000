"""The load generator of the benches: many sessions at 25 Hz in an open loop, over any transport; and their figures.

The due times of ticks are fixed beforehand and do not depend on answers; latency counts from the due time until the
answer can be read. A `Transport` sends; whoever reads the answers passes them to `OpenLoop.answered`.
"""

from __future__ import annotations

import heapq
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from stream_mmrnn.bench import models
from stream_mmrnn.bench.machine import Usage
from stream_mmrnn.bench.sessions import TICK_NS, phases
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import SessionError
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.core.types import FloatArray, Stamps, Tick
from stream_mmrnn.predict.engine import StepEngine

DRAIN_S = 15.0
"""Timeout of an answer."""
_RETRY_NS = 1_000_000
_VECTORS = np.random.default_rng(0).standard_normal((997, models.INPUT)).astype(np.float32) * np.float32(0.5)


def vector(who: int, tick: int) -> FloatArray:
    """The features of one session at a tick; every session has others."""
    features: FloatArray = _VECTORS[(31 * who + tick) % len(_VECTORS)]
    return features


class Turn(NamedTuple):
    """What one contender did in one turn."""

    requests: int
    latency_ns: list[int]
    """Of those that were answered, from the due time."""
    path_ns: list[int]
    """Of the same, from the beginning of the call: without what the client's own timer was late."""
    errors: Mapping[str, int]


class Figures:
    """What one contender did in all its turns with so many sessions."""

    def __init__(self) -> None:
        self.latency, self.path = Histogram(), Histogram()
        self.rounds: list[float] = []
        """Median latency of each round; nan where nothing was answered."""
        self.requests = self.late = 0
        self.errors: Counter[str] = Counter()
        self.rss_mb = 0.0
        """After the newest turn."""
        self._cpu_s = self._seconds = 0.0

    def add(self, turn: Turn, usage: Usage) -> None:
        self.requests += turn.requests
        self.rounds.append(statistics.median(turn.latency_ns) if turn.latency_ns else math.nan)
        for value_ns in turn.latency_ns:
            self.latency.add(value_ns)
            self.late += value_ns > TICK_NS
        for value_ns in turn.path_ns:
            self.path.add(value_ns)
        self.errors.update(turn.errors)
        self.rss_mb = sum(usage.rss_mb.values())
        self._cpu_s += sum(usage.cpu.values()) * usage.seconds
        self._seconds += usage.seconds

    @property
    def lost(self) -> int:
        return self.requests - self.latency.count

    @property
    def cpu_share(self) -> float | None:
        """Of all our processes in its turns: those of the others rest meanwhile."""
        return round(self._cpu_s / self._seconds, 3) if self._seconds else None

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "requests": self.requests,
            "answers": self.latency.count,
            "lost": self.lost,
            "late": self.late,
            "latency_ms": self.latency.row(),
            "cpu_share": self.cpu_share,
        }
        if self.path.count:
            row["path_ms"] = self.path.row()
        return {**row, "errors": dict(self.errors)} if self.errors else row


def times(these: Sequence[float], those: Sequence[float]) -> float | None:
    """Medians of rounds over those of another: the median of the ratios within a round; None where no round has both.

    A turn that was stopped leaves one of them a round longer.
    """
    found = [a / b for a, b in zip(these, those, strict=False) if a == a and b == b and b]
    return statistics.median(found) if found else None


class SessionRecord:
    """One session: by tick, when it was due and when it was sent, and its answers."""

    def __init__(self, name: str, who: int, phase_ns: int) -> None:
        self.name, self.who, self.phase_ns = name, who, phase_ns
        self.due_ns: list[int] = []
        self.sent_ns: list[int] = []
        self.answers: dict[int, list[tuple[int, bytes]]] = {}
        """Tick -> when each answer to it arrived, and its bytes."""
        self.errors: Counter[str] = Counter()

    @property
    def missing(self) -> int:
        return sum(tick not in self.answers for tick in range(len(self.due_ns)))

    @property
    def repeated(self) -> int:
        return sum(len(got) - 1 for got in self.answers.values())

    def latencies_ns(self) -> list[int]:
        return [got[0][0] - self.due_ns[tick] for tick, got in self.answers.items()]

    def gap_ns(self) -> int:
        """The longest time between two new answers."""
        came = sorted(got[0][0] for got in self.answers.values())
        return max((b - a for a, b in itertools.pairwise(came)), default=0)

    def differing(self, engine: StepEngine) -> int:
        """Answers that differ from those of an engine with this session alone."""
        wrong = 0
        engine.open("alone")
        for tick in range(len(self.due_ns)):
            features = {models.MODALITY: vector(self.who, tick)}
            present, age_ns = {models.MODALITY: True}, {models.MODALITY: 0}
            predictions = engine.step([Tick("alone", tick, 0, features, present, age_ns, Stamps(0, 0, 0, 0, ""))])
            expected = predictions[0].heads[models.HEAD].tobytes()
            wrong += any(bits != expected for _, bits in self.answers.get(tick, ()))
        engine.close("alone")
        return wrong


class Transport(Protocol):
    """Sends requests of open sessions. It is used by one thread."""

    def accepts(self, record: SessionRecord) -> bool:
        """Whether one more request of the session can be sent now."""
        return True

    def send(self, record: SessionRecord, tick: int, due_ns: int) -> None:
        """Send one request without waiting for its answer. A SessionError ends the session."""


class OpenLoop:
    """Sends the ticks of all sessions when they are due, and records what was sent and answered."""

    def __init__(
        self,
        names: Sequence[str],
        seed: int,
        duration_s: float,
        *,
        begin_ns: int = 0,
        extended: Callable[[], bool] = lambda: False,
        clock_ns: Callable[[], int] = now_ns,
    ) -> None:
        """`begin_ns`: soon, if it is not given; `extended`: as long as it is true, ticks go on after `duration_s`."""
        self.begin_ns = begin_ns or clock_ns() + 50_000_000
        self._end_ns = self.begin_ns + round(duration_s * 1e9)
        self._extended, self._clock_ns = extended, clock_ns
        offsets_ns = phases(len(names), "spread", seed).tolist()
        self.records = [SessionRecord(name, i, offsets_ns[i]) for i, name in enumerate(names)]
        self.unanswered: set[tuple[int, int]] = set()
        """Session's number and tick; another thread may call `answered`."""
        self.due = [(self.begin_ns + offset_ns, i) for i, offset_ns in enumerate(offsets_ns)]
        """A heap; empty when all is sent."""

    def play(self, transport: Transport) -> Iterator[float]:
        """Send what is due, and yield the seconds to wait for more; ends when all is answered or `DRAIN_S` are over."""
        while self.due:
            at_ns = self._clock_ns()
            while self.due and self.due[0][0] <= at_ns:
                self._send(transport, self.records[heapq.heappop(self.due)[1]])
            if self.due:
                yield max(self.due[0][0] - self._clock_ns(), 0) / 1e9
        deadline_ns = self._clock_ns() + round(DRAIN_S * 1e9)
        while self.unanswered and self._clock_ns() < deadline_ns:
            yield 0.01

    def _send(self, transport: Transport, record: SessionRecord) -> None:
        """Send the session's next tick, or try it again soon, and set when it is due again."""
        if not transport.accepts(record):
            heapq.heappush(self.due, (self._clock_ns() + _RETRY_NS, record.who))
            return
        tick = len(record.due_ns)
        due_ns = self.begin_ns + record.phase_ns + tick * TICK_NS
        record.due_ns.append(due_ns)
        record.sent_ns.append(self._clock_ns())
        self.unanswered.add((record.who, tick))
        try:
            transport.send(record, tick, due_ns)
        except SessionError as e:
            record.errors[type(e).__name__] += 1
            return
        if due_ns + TICK_NS < self._end_ns or self._extended():
            heapq.heappush(self.due, (due_ns + TICK_NS, record.who))

    def answered(self, record: SessionRecord, tick: int, content: bytes = b"") -> None:
        """An answer can be read now; one to a tick that was never sent is ignored."""
        if 0 <= tick < len(record.due_ns):
            record.answers.setdefault(tick, []).append((self._clock_ns(), content))
            self.unanswered.discard((record.who, tick))

    def turn(self, settle_s: float) -> Turn:
        """The figures of ticks that were due after the first `settle_s`."""
        first_ns = self.begin_ns + round(settle_s * 1e9)
        requests, latency_ns, path_ns = 0, [], []
        errors: Counter[str] = Counter()
        for record in self.records:
            errors.update(record.errors)
            for tick, (due_ns, sent_ns) in enumerate(zip(record.due_ns, record.sent_ns, strict=True)):
                if due_ns < first_ns:
                    continue
                requests += 1
                if got := record.answers.get(tick):
                    latency_ns.append(got[0][0] - due_ns)
                    path_ns.append(got[0][0] - sent_ns)
        return Turn(requests, latency_ns, path_ns, errors)
