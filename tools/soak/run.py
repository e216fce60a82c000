"""A session of hours in minutes: synthetic streams at many times real time through the real processes.

One long session with picture, sound and words, one that hears a word now and then, and short ones that come and go go
through the broker into the engine, and the long one into a recording. Every process is looked at twice a second. Its
time is the stamps' alone: what the processes do per event is what they do in a real session. Knows nothing about
bounds.
"""

from __future__ import annotations

import heapq
import itertools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stream_mmrnn.bus import Address, Publisher, Subscriber
from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core import processes as process_table
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import ProcessError
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.types import ModalitySpec
from stream_mmrnn.graph.runtime import Graph
from stream_mmrnn.live import nodes
from stream_mmrnn.live.managed_process import process_context
from stream_mmrnn.predict.contract import contract_of

LONG, SPARSE = "long", "sparse"
_CLOCK_NS, _RATES_HZ = 10_000_000, {"vision": 25.0, "audio": 50.0, "text": 0.2}
_SPARSE_HZ = 1 / 30
_SHORT_NS = 10_000_000_000
"""How long a session that comes and goes is there."""
_STEP_S = 0.002
_LAG_NS = 5_000_000_000
"""Of event time: when the engine is so far behind, event time waits. Messages that wait would be called growth."""
_SAMPLE_S = 0.5
_ROWS = 16
"""Different vectors of a stream: so that a recording of hours has the size of minutes."""


class Sample(NamedTuple):
    """What a process held at a moment."""

    at_s: float
    uss_mb: float
    fds: int
    threads: int


class Soak(NamedTuple):
    """What was seen of a run."""

    seconds: float
    speed: float
    """Times real time, as it was: less than what was asked for where the machine could not follow."""
    samples: dict[str, list[Sample]]
    """By process."""
    latencies_ms: list[tuple[float, float]]
    """(at, from the message that closed a tick to its prediction), at most 200 a second."""
    predictions: int
    missing: int
    """Ticks of the long session without a prediction."""
    lost: dict[str, int]
    """Messages, by where and why."""
    sessions: int
    """That were opened and closed."""


def look(pid: int, at_s: float) -> Sample:
    """USS (pages that no other process has), open files and threads; zeros of a process that is gone."""
    here = Path(f"/proc/{pid}")
    try:
        private = 0
        for line in (here / "smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                private += int(line.split()[1])
        return Sample(at_s, private / 1024, len(os.listdir(here / "fd")), len(os.listdir(here / "task")))  # noqa: PTH208
    except OSError:
        return Sample(at_s, 0.0, 0, 0)


class _Processes:
    """Broker, journal, engine and recorder, as the supervisor starts them."""

    def __init__(self, settings: Settings) -> None:
        self._context: Any = process_context()
        self.address = Address.create("ipc")
        self._settings = settings
        self._epoch = self._context.Value("q", 0)
        self.running: dict[str, Any] = {}
        self._stops: dict[str, Any] = {}
        self._ready: dict[str, Any] = {}

    def start(self, name: str, target: str | Callable[..., None]) -> None:
        ready, stop = nodes.Flag(self._context), nodes.Flag(self._context)
        context = nodes.Context(name, self._settings, self.address, ready, stop, self._epoch)
        process = self._context.Process(target=nodes.run, args=(target, context), daemon=True)
        process.start()
        self.running[name], self._stops[name], self._ready[name] = process, stop, ready

    def ready(self, name: str) -> bool:
        if self.running[name].exitcode is not None:
            raise ProcessError(f"the {name} did not start")
        return bool(self._ready[name].is_set())

    def stop(self) -> None:
        for name in ("recorder", "engine", "journal", "broker"):
            if name in self.running:
                self._stops[name].set()
                self.running[name].join(5)
                if self.running[name].is_alive():
                    self.running[name].kill()
                    self.running[name].join()
        self.address.remove()


class _Feed:
    """Publishes what is due at a moment of event time."""

    def __init__(self, publisher: Publisher, specs: tuple[ModalitySpec, ...], begin_ns: int) -> None:
        self._publisher = publisher
        self._specs = {s.name: s for s in specs}
        rng = np.random.default_rng(0)
        self._rows: dict[str, npt.NDArray[np.float32]] = {
            s.name: rng.standard_normal((_ROWS, s.size)).astype(np.float32) for s in specs
        }
        self._due: list[tuple[int, int, str, str, float]] = []
        self._number = itertools.count()
        self._begin_ns = self._clock_ns = begin_ns
        self._short: list[tuple[int, str]] = []
        self.sessions = 0
        self.sent = 0
        self._open(LONG, begin_ns, _RATES_HZ)
        self._open(SPARSE, begin_ns, {"text": _SPARSE_HZ})
        self._next_short_ns = begin_ns

    def _say(self, session: str, op: Any, at_ns: int, streams: tuple[str, ...] = ()) -> None:
        message = wire.pack(wire.SessionMessage(op, at_ns, streams))
        self._publisher.publish(topics.SESSION, session, at_ns, at_ns, message)

    def _open(self, session: str, at_ns: int, rates: dict[str, float]) -> None:
        self._say(session, "open", at_ns, tuple(rates))
        for modality, rate_hz in rates.items():
            heapq.heappush(self._due, (at_ns + 1, next(self._number), session, modality, 1e9 / rate_hz))

    def until(self, at_ns: int) -> None:
        """Everything up to `at_ns`, the clock between the streams."""
        while self._clock_ns < at_ns:
            self._clock_ns += _CLOCK_NS
            while self._short and self._short[0][0] <= self._clock_ns:
                end_ns, session = self._short.pop(0)
                self._due = [d for d in self._due if d[2] != session]
                heapq.heapify(self._due)
                self._say(session, "close", end_ns)
                self._publisher.end(session)
                self.sessions += 1
            if self._clock_ns >= self._next_short_ns:
                name = f"short{self.sessions + len(self._short)}"
                self._open(name, self._clock_ns, {"audio": 50.0})
                self._short.append((self._clock_ns + _SHORT_NS, name))
                self._next_short_ns = self._clock_ns + _SHORT_NS // 2
            while self._due and self._due[0][0] <= self._clock_ns:
                due_ns, number, session, modality, period_ns = heapq.heappop(self._due)
                row = self._rows[modality][number % _ROWS]
                origin = self._specs[modality].encoder
                self._publisher.publish(topics.feature(modality), session, due_ns, due_ns, row, origin)
                self.sent += 1
                following = due_ns + int(period_ns)
                heapq.heappush(self._due, (following, next(self._number), session, modality, period_ns))
            self._publisher.publish(topics.CLOCK, topics.EVERYONE, self._clock_ns, self._clock_ns, b"")

    def close(self) -> None:
        for session in (LONG, SPARSE, *(name for _, name in self._short)):
            self._say(session, "close", self._clock_ns)


class _Monitor:
    """Hears predictions and statuses."""

    def __init__(self, address: Address, queue: int) -> None:
        self.subscriber = Subscriber(address, [topics.PREDICTION, topics.STATUS], queue)
        self.statuses: dict[str, wire.StatusMessage] = {}
        self.predictions = self.missing = 0
        self.latencies_ms: list[tuple[float, float]] = []
        self.heard_ns = 0
        """Event time of the long session's newest prediction."""
        self._last = 0
        self._next_ns = 0

    def receive(self, at_s: float) -> None:
        while (envelope := self.subscriber.receive(0)) is not None:
            if envelope.topic.startswith(topics.STATUS):
                message = wire.unpack(envelope.payload, wire.StatusMessage)
                self.statuses[message.node] = message
                continue
            self.predictions += 1
            if envelope.session != LONG:
                continue
            p = wire.unpack(envelope.payload, wire.PredictionMessage)
            if self._last:
                self.missing += p.tick - self._last - 1
            self._last = p.tick
            self.heard_ns = envelope.event_ns
            if envelope.publish_ns >= self._next_ns:
                self._next_ns = envelope.publish_ns + 5_000_000
                took_ms = (envelope.publish_ns - p.closed.publish_ns) / 1e6
                self.latencies_ms.append((at_s, took_ms))


def settings_for(path: Path, speed: float) -> Settings:
    """Of the processes: what goes by the clock of the wall goes as much faster as the session does."""
    record = {"path": str(path), "chunk_ms": 250.0 / speed, "fsync_ms": 1000.0 / speed}
    return config.parse(
        {
            "session": {"name": LONG},
            "engine": {"slots": 8, "prewarm": False},
            "record": record,
            "state": {"journal_s": 30.0 / speed},
            "dashboard": {"enabled": False},
            "bus": {"queue": 200_000},
        }
    )


def _wait(what: Callable[[], Any], seconds: float, meanwhile: Callable[[], None]) -> bool:
    end_ns = now_ns() + int(seconds * 1e9)
    while now_ns() < end_ns:
        if what():
            return True
        meanwhile()
        time.sleep(0.005)
    return False


def soak(seconds: float, speed: float, folder: Path, say: Callable[[str], None]) -> Soak:
    """Run for `seconds` of the wall's time (moments in which the machine stood still do not count).

    Raises:
        ProcessError: a process did not start, or ended.

    """
    settings = settings_for(folder / "long.mcap", speed)
    specs = contract_of(Graph(config.find_model(settings.engine.model))).spec.modalities
    processes = _Processes(settings)
    try:
        processes.start("broker", process_table.by_name("broker").target)
        _wait(lambda: processes.ready("broker"), 20, lambda: None)
        publisher = Publisher(processes.address, settings.bus.queue)
        monitor = _Monitor(processes.address, settings.bus.queue)
        began_ns = event_ns = now_ns()

        def beat() -> None:
            monitor.receive(0.0)
            publisher.publish(topics.CLOCK, topics.EVERYONE, began_ns - 1, began_ns - 1, b"")

        others = ("journal", "recorder", "engine")
        for name in others:
            processes.start(name, process_table.by_name(name).target)
        if not _wait(lambda: all(map(processes.ready, others)), 60, beat):
            raise ProcessError("the processes were not ready within 60 s")
        publisher.wait_for_reader(topics.SESSION, 5.0)
        feed = _Feed(publisher, tuple(s for s in specs if s.name in _RATES_HZ), event_ns)
        samples: dict[str, list[Sample]] = {name: [] for name in processes.running}
        spent_s, next_s, told_s, last_ns = 0.0, 0.0, 0.0, now_ns()
        while spent_s < seconds:
            time.sleep(_STEP_S)
            at_ns = now_ns()
            passed_s = min((at_ns - last_ns) / 1e9, 0.05)
            last_ns, spent_s = at_ns, spent_s + passed_s
            if event_ns - max(monitor.heard_ns, began_ns) <= _LAG_NS:
                event_ns += int(passed_s * speed * 1e9)
                feed.until(event_ns)
            monitor.receive(spent_s)
            if spent_s >= next_s:
                next_s += _SAMPLE_S
                for name, process in processes.running.items():
                    if process.exitcode is not None:
                        raise ProcessError(f"the {name} ended in the middle of the soak")
                    samples[name].append(look(process.pid, spent_s))
            if spent_s >= told_s:
                told_s += 30.0
                say(f"{spent_s:.0f} s, {spent_s * speed / 3600:.2f} h: " + _now(samples))
        feed.close()
        engine_done = lambda: monitor.statuses["engine"].state == "closed"  # noqa: E731
        _wait(lambda: "engine" in monitor.statuses and engine_done(), 30, lambda: monitor.receive(spent_s))
        at_ns = now_ns()
        publisher.publish(topics.CONTROL, LONG, at_ns, at_ns, b"stop")
        recorder_done = lambda: monitor.statuses["recorder"].state == "closed"  # noqa: E731
        _wait(lambda: "recorder" in monitor.statuses and recorder_done(), 30, lambda: monitor.receive(spent_s))
        lost = dict(_lost(publisher, monitor, feed.sent))
        publisher.close(0)
        monitor.subscriber.close()
        reached = (event_ns - began_ns) / 1e9 / spent_s
        return Soak(
            spent_s, reached, samples, monitor.latencies_ms, monitor.predictions, monitor.missing, lost, feed.sessions
        )
    finally:
        processes.stop()


def _now(samples: dict[str, list[Sample]]) -> str:
    return ", ".join(f"{n} {s[-1].uss_mb:.2f} MB {s[-1].fds} files {s[-1].threads} threads" for n, s in samples.items())


def _lost(publisher: Publisher, monitor: _Monitor, sent: int) -> Iterator[tuple[str, int]]:
    """By where and why; what the engine says must add up to what was sent."""
    yield "publisher.refused", sum(publisher.refused.values())
    yield "monitor.lost", monitor.subscriber.gaps.lost.get(topics.PREDICTION, 0)
    yield "monitor.garbage", monitor.subscriber.garbage
    recorder, engine = monitor.statuses["recorder"].counts, monitor.statuses["engine"]
    yield "recorder.lost", recorder["lost"]
    yield "recorder.refused", recorder["refused"]
    yield "engine.refused", engine.counts["refused"]
    yield "engine.garbage", engine.counts["garbage"]
    arrived = used = 0
    for name, counts in engine.detail["streams"].items():
        arrived, used = arrived + counts["arrived"], used + counts["used"]
        for why in ("lost", "late", "duplicate", "quarantined"):
            yield f"engine.{name}.{why}", counts[why]
    yield "engine.not arrived", sent - arrived


def hour_slope(points: list[tuple[float, float]], speed: float) -> float:
    """Growth per hour of event time: the median of the slopes between points a good part of the time apart.

    One step of an allocator does not move it, a steady growth does (Theil and Sen).
    """
    if len(points) < 4:
        return 0.0
    x, y = np.array(points, np.float64).T
    far = (x[-1] - x[0]) / 3
    i, j = np.nonzero(x[None, :] - x[:, None] >= far)
    return float(np.median((y[j] - y[i]) / (x[j] - x[i]))) * 3600.0 / speed


def after_warm_up(found: Soak, warm_up_s: float) -> dict[str, list[Sample]]:
    """Samples once buffers have been filled for the first time."""
    return {name: [s for s in held if s.at_s >= warm_up_s] for name, held in found.samples.items()}


def least(points: list[tuple[float, float]], parts: int = 10) -> list[tuple[float, float]]:
    """The least of each part of the time: what comes and goes is left out, what stays is not."""
    size = max(1, len(points) // parts)
    return [min(points[at : at + size], key=lambda p: p[1]) for at in range(0, len(points), size)]


def step_slope(points: list[tuple[float, float]], speed: float, parts: int = 12) -> float:
    """Growth per hour of event time from each part of the time to the next, the median of them.

    A leak grows in each part; what a crowded moment left behind, in one.
    """
    low = least(points, parts)
    steps = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(low) if b[0] > a[0]]
    return float(np.median(steps)) * 3600.0 / speed if steps else 0.0


def medians(points: list[tuple[float, float]], seconds: float, parts: int = 20) -> list[tuple[float, float]]:
    """The median of each part of the time."""
    out = []
    for k in range(parts):
        inside = [y for x, y in points if k * seconds / parts <= x < (k + 1) * seconds / parts]
        if inside:
            out.append(((k + 0.5) * seconds / parts, float(np.median(inside))))
    return out
