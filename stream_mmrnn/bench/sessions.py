"""Sessions: how many an engine can step 25 times a second each before the p99 latency exceeds a tick.

Open loop: every session has its own phase, a tick's intended time is fixed beforehand, and all ticks that are due are
stepped in one call of the engine, as ticks and as a block; latency counts from the intended time. Also, hot: one
batched call against a loop of single calls over the same graph. Without the bus: this is the capacity of an engine's
process alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from stream_mmrnn.bench import models
from stream_mmrnn.bench.machine import Processes
from stream_mmrnn.bench.measure import ratios, sampled, sleep_until, turns
from stream_mmrnn.bench.peers import Servers
from stream_mmrnn.bench.plots import Curve, Pictures
from stream_mmrnn.bench.report import Document, Ratio, document, ratio
from stream_mmrnn.bench.step import bare, tick_of
from stream_mmrnn.bus.socket_dir import temporary_folder
from stream_mmrnn.core.block import Block
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.core.types import Tick
from stream_mmrnn.graph.runtime import Graph, Provider
from stream_mmrnn.predict.cpu_batches import HostRows
from stream_mmrnn.predict.engine import StepEngine, make_rows
from stream_mmrnn.predict.sharded_engine import ShardedEngine

TICK_NS = 40_000_000
BATCH = 256
"""Sessions of the hot comparison."""
SETTLE_S = 0.5
"""Not counted: the first steps allocate memory."""
BOUNDS = {"fp32": 2000, "int8": 5000}
KINDS: dict[str, models.Kind] = {"fp32": "fp32", "int8": "int8_batch"}

Engine = StepEngine | ShardedEngine
Arrivals: TypeAlias = Literal["spread", "together"]
"""`spread`: each session has its own phase; `together`: all are due at the same moment."""

Way: TypeAlias = Literal["step", "step_block"]
"""The engine's call: with a Tick object of each session, or with columns."""
WAYS: dict[Way, str] = {"step": "sessions_per_core", "step_block": "sessions_block"}
"""Call -> beginning of the name of the capacity with it."""


def phases(sessions: int, arrivals: Arrivals, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """When in its tick each session is due, in nanoseconds, sorted."""
    if arrivals == "together":
        return np.zeros(sessions, np.int64)
    return np.sort(np.random.default_rng(seed).integers(0, TICK_NS, sessions))


def block_of(engine: Engine, ticks: Sequence[Tick]) -> Block:
    """The ticks, which have something in every modality, as one block; of different sessions that are open."""
    names = [m.name for m in engine.spec.modalities]
    return Block(
        np.array([engine.handle(tick.session) for tick in ticks], np.int64),
        np.array([tick.index for tick in ticks], np.int64),
        np.array([tick.event_ns for tick in ticks], np.int64),
        np.ones((len(ticks), len(names)), np.bool_),
        np.array([[tick.age_ns[name] for name in names] for tick in ticks], np.int64),
        tuple(np.stack([tick.features[name] for tick in ticks]) for name in names),
    )


class Load:
    """Open sessions of one engine: all that are due are one call of it, and the latencies are measured."""

    def __init__(self, engine: Engine, sessions: int, arrivals: Arrivals, seed: int = 0, way: Way = "step") -> None:
        self.engine, self.sessions = engine, sessions
        rng = np.random.default_rng(seed)
        kinds = [tick_of(engine, "", rng) for _ in range(64)]  # type: ignore[arg-type]
        self.ticks: list[Tick] = []
        for i in range(sessions):
            name = f"bench-{i}"
            engine.open(name)
            of = kinds[i % 64]
            self.ticks.append(Tick(name, 1, 0, of.features, of.present, of.age_ns, of.closed))
        self._step = self._step_block if way == "step_block" else self._step_ticks
        self._block = block_of(engine, self.ticks) if way == "step_block" else None
        self.due_ns = phases(sessions, arrivals, seed)
        self.latency = Histogram()
        self.batches = Histogram()
        self.late = 0

    def _step_ticks(self, first: int, last: int) -> None:
        self.engine.step(self.ticks[first:last])

    def _step_block(self, first: int, last: int) -> None:
        whole, part = self._block, slice(first, last)
        assert whole is not None
        self.engine.step_block(
            Block(
                whole.handles[part],
                whole.indices[part],
                whole.event_ns[part],
                whole.present[part],
                whole.age_ns[part],
                tuple(vectors[part] for vectors in whole.features),
            )
        )

    def run(self, duration_s: float, alive: Callable[[], bool], hopeless_ns: int = 25 * TICK_NS) -> bool:
        """Step for `duration_s`; False if it gave up because a step ended more than `hopeless_ns` late."""
        due = self.due_ns
        start_ns = now_ns() + 5_000_000
        end_ns = start_ns + int(duration_s * 1e9)
        settled_ns = start_ns + int(SETTLE_S * 1e9)
        at, base_ns = 0, start_ns
        while alive():
            next_ns = base_ns + int(due[at])
            if next_ns >= end_ns:
                return True
            sleep_until(next_ns, now_ns)
            upto = int(np.searchsorted(due, now_ns() - base_ns, "right"))
            self._step(at, upto)
            done_ns = now_ns()
            if next_ns >= settled_ns:
                took = (done_ns - base_ns) - due[at:upto]
                for value_ns in took:
                    self.latency.add(int(value_ns))
                self.late += int((took > TICK_NS).sum())
                self.batches.add(upto - at)
            if done_ns - next_ns > hopeless_ns:
                return False
            at = upto
            if at == len(due):
                at, base_ns = 0, base_ns + TICK_NS
        return True


def run(
    *,
    model: Path | None = None,
    hidden: int = 256,
    duration_s: float = 3.0,
    arrivals: Arrivals = "spread",
    processes: int = 1,
    provider: Provider = "cpu",
    most: int = 16384,
    seed: int = 0,
    servers: Servers | None = None,
    say: Callable[[str], None] = lambda _: None,
    alive: Callable[[], bool] = lambda: True,
) -> tuple[Document, Pictures]:
    """The capacity with fp32 and with 8-bit weights, and the gain of batching; only of `model` if one is given.

    `servers` compares with model servers of others; it runs only without `model`.
    """
    rows: list[dict[str, Any]] = []
    found: dict[str, Ratio] = {}
    pictures = Pictures()
    with temporary_folder("stream-mmrnn-bench-") as folder:
        made = {"model": model} if model else {k: models.write(folder, hidden, v) for k, v in KINDS.items()}
        for kind, path in made.items():
            assert path is not None
            if not alive():
                break
            bound = BOUNDS.get(kind) if hidden == 256 and processes == 1 else None
            for way, name in WAYS.items():
                sessions, points, other_cpu = _capacity(
                    kind, way, path, rows, duration_s, arrivals, processes, provider, most, seed, say, alive
                )
                found[f"{name}_{kind}"] = ratio(
                    sessions / processes, bound if way == "step" else None, "more", other_cpu
                )
            if processes == 1 and provider == "cpu":
                alone_ns = _graph_alone(path)
                rows.append({"what": kind, "contender": "the graph alone", "us_a_row": round(alone_ns / 1e3, 2)})
                found[f"sessions_of_the_graph_alone_{kind}"] = ratio(TICK_NS / alone_ns, None, "more", other_cpu)
            points.sort()  # of blocks, which come last
            pictures.curves[kind] = Curve("sessions", "p99 from the intended time, ms", points, TICK_NS / 1e6)
        first = next(iter(made.values()))
        assert first is not None
        if alive() and not model:
            say(f"one call for {BATCH} sessions against {BATCH} calls")
            _batched(first, rows, found)
        if alive() and servers is not None and not model:
            say("servers of others, across processes")
            more, compared = servers(first, duration_s=duration_s, seed=seed, say=say, alive=alive)
            rows += more
            found |= compared
    settings = {
        "model": model.parent.name if model else f"gru {hidden}, 2 layers",
        "duration_s": duration_s,
        "arrivals": arrivals,
        "processes": processes,
        "provider": provider,
        "tick_ms": TICK_NS / 1e6,
        "seed": seed,
    }
    return document("sessions", settings, rows, found), pictures


def _capacity(
    kind: str,
    way: Way,
    path: Path,
    rows: list[dict[str, Any]],
    duration_s: float,
    arrivals: Arrivals,
    processes: int,
    provider: Provider,
    most: int,
    seed: int,
    say: Callable[[str], None],
    alive: Callable[[], bool],
) -> tuple[int, list[tuple[float, float]], float | None]:
    """Double until p99 is too late, then bisect: the most sessions, the curve, and the CPU share of other programs."""
    points: list[tuple[float, float]] = []
    holds, fails = 0, most + 1
    others: list[float | None] = []
    sessions = min(256, most)
    while alive() and sessions <= most and (not holds or fails - holds > max(holds // 12, 1)):
        row, good = _one(kind, way, path, sessions, duration_s, arrivals, processes, provider, seed, alive)
        say(f"{kind}, {way}, {sessions} sessions: p99 {row['latency_ms']['p99']:.1f} ms{'' if good else ', too late'}")
        rows.append(row)
        others.append(row["other_cpu"])
        points.append((float(sessions), row["latency_ms"]["p99"]))
        holds, fails = (max(holds, sessions), fails) if good else (holds, min(fails, sessions))
        growing = most if holds * 2 > most > holds else holds * 2
        sessions = growing if fails > most else max((holds + fails) // 2, 1)
    known = [o for o in others if o is not None]
    return holds, points, max(known) if len(known) == len(others) and known else None


def _one(
    kind: str,
    way: Way,
    path: Path,
    sessions: int,
    duration_s: float,
    arrivals: Arrivals,
    processes: int,
    provider: Provider,
    seed: int,
    alive: Callable[[], bool],
) -> tuple[dict[str, Any], bool]:
    engine: Engine
    if processes > 1:
        engine = ShardedEngine(path, sessions, provider, processes)
    else:
        engine = StepEngine(path, sessions, provider)
    try:
        load = Load(engine, sessions, arrivals, seed, way)
        engine.prewarm()
        watch = Processes()
        began = time.monotonic()
        kept_up = load.run(duration_s + SETTLE_S, alive)
        seconds = time.monotonic() - began
        usage = watch.used()
    finally:
        engine.stop()
    good = kept_up and load.latency.percentile(99) <= TICK_NS
    row = {
        "what": kind,
        "contender": way,
        "sessions": sessions,
        "latency_ms": load.latency.row(),
        "holds": good,
        "late": load.late,
        "steps_per_s": round(load.latency.count / max(seconds - SETTLE_S, 1e-3)),
        "batch_p50": load.batches.percentile(50),
        "cpu_share": round(sum(usage.cpu.values()), 3),
        "other_cpu": usage.other_cpu,
        "busiest": usage.busiest_other,
    }
    return row, good


def _graph_alone(path: Path) -> float:
    """Nanoseconds per row of the model's graph alone, in the engine's largest batch."""
    _, rows = make_rows(Graph(path), BATCH)
    assert isinstance(rows, HostRows)
    timing = turns({"graph": sampled(rows.bucket(rows.batch).binding.run)}, 9, 20)["graph"]
    return statistics.median(timing.rounds) / rows.batch


def _batched(path: Path, rows: list[dict[str, Any]], found: dict[str, Ratio]) -> None:
    engine = StepEngine(path, BATCH)
    rng = np.random.default_rng(0)
    ticks = []
    for i in range(BATCH):
        engine.open(str(i))
        ticks.append(tick_of(engine, str(i), rng))
    graph = Graph(path)  # one graph: all sessions share its weights
    each = [bare(graph) for _ in range(BATCH)]

    def loop() -> None:
        for call in each:
            call()

    block = block_of(engine, ticks)
    watch = Processes()
    calls = {
        "loop over sessions": sampled(loop),
        "one call": sampled(lambda: engine.step(ticks)),
        "one block": sampled(lambda: engine.step_block(block)),
    }
    timings = turns(calls, 9, 6)
    usage = watch.used()
    for name, timing in timings.items():
        row = {"what": "batching", "sessions": BATCH, "contender": name, **timing.row()}
        rows.append({**row, "other_cpu": usage.other_cpu, "busiest": usage.busiest_other})
    value = ratios(timings, "one call")["loop over sessions"]
    found["loop_over_batched"] = ratio(value, 4.5, "more", usage.other_cpu)
    found["step_over_step_block"] = ratio(ratios(timings, "one block")["one call"], None, "more", usage.other_cpu)
    us = statistics.median(timings["one block"].rounds) / 1e3
    found["step_block_us"] = ratio(us, None, "less", usage.other_cpu)
