"""Step: one step of one session, hot and at its real rate, against the same graph bound by hand, in the same run.

Contenders take turns. The recurrent core is always the same: two layers of a GRU, 256 inputs, fp32 or 8-bit weights.
Contenders that need other packages are passed in as `Peers`.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from stream_mmrnn.bench import models
from stream_mmrnn.bench.machine import Processes
from stream_mmrnn.bench.measure import Arrivals, Sampler, Timing, paced, ratios, sampled, turns
from stream_mmrnn.bench.peers import StepPeers
from stream_mmrnn.bench.plots import Pictures
from stream_mmrnn.bench.report import Document, Ratio, document, ratio
from stream_mmrnn.bench.roofline import read_again_bytes_per_s, roofline
from stream_mmrnn.bus.socket_dir import temporary_folder
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import ProcessError
from stream_mmrnn.core.types import Stamps, Tick
from stream_mmrnn.graph.runtime import Graph
from stream_mmrnn.predict.contract import contract_of
from stream_mmrnn.predict.cpu_batches import HostRows
from stream_mmrnn.predict.device_batches import DeviceRows
from stream_mmrnn.predict.engine import StepEngine

KINDS: tuple[models.Kind, ...] = ("fp32", "int8", "int8_batch")
PEER_KINDS = {"torch nn.GRU": "torch_gru", "torch GRUCell": "torch_cells", "numpy": "numpy"}
"""Name in the document -> name of the peer and in the ratios."""
MANY = 16384
DRIFT_STEPS = 10_000
NO_STAMPS = Stamps(0, 0, 0, 0, "")
NO_PEERS = "left out: they need a checkout, where `python -m tools.bench step` runs them"


def tick_of(engine: StepEngine, session: str, rng: np.random.Generator) -> Tick:
    """A tick with something in every modality."""
    names = [m.name for m in engine.spec.modalities]
    vectors = {m.name: rng.standard_normal(m.size).astype(np.float32) * 0.5 for m in engine.spec.modalities}
    return Tick(session, 1, 0, vectors, dict.fromkeys(names, True), dict.fromkeys(names, 0), NO_STAMPS)


def stepper(path: Path, slots: int = 1) -> tuple[StepEngine, Callable[[], object]]:
    """An engine with all slots taken, and a call that steps the session in the last one."""
    engine = StepEngine(path, slots)
    for i in range(slots):
        engine.open(str(i))
    ticks = [tick_of(engine, str(slots - 1), np.random.default_rng(0))]
    return engine, lambda: engine.step(ticks)


def bare(graph: Graph) -> Callable[[], object]:
    """What one would write by hand and well: inputs bound once, state in place, the newest features copied in.

    Each call makes a session of its own over the same graph.
    """
    contract = contract_of(graph)
    spec, wiring = contract.spec, contract.wiring
    count = len(spec.modalities)
    sizes = {wiring.inputs[m.name]: (1, m.size) for m in spec.modalities}
    binding = graph.bind(
        {**sizes, "present": (1, count), "age": (1, count), "active": (1,), "reset": (1,)},
        {wiring.heads[h.name]: (1, h.size) for h in spec.heads},
        {w.input: (w.output, (1, *s.shape)) for s in spec.states for w in (wiring.states[s.name],)},
    )
    binding.inputs["active"][...] = True
    binding.inputs["present"][...] = 1
    rng = np.random.default_rng(0)
    copies = [(binding.inputs[n], rng.standard_normal(shape).astype(np.float32)) for n, shape in sizes.items()]

    documented = binding.documented_run

    def step() -> None:
        for into, x in copies:
            into[...] = x
        documented()

    return step


def plain_run(path: Path) -> Callable[[], object]:
    """`session.run` with the state as numpy arrays that go out and in again."""
    graph = Graph(path)
    feed = {n: graph.zeros(n, tuple(k or 1 for k in spec.shape)) for n, spec in graph.inputs.items()}
    feed["active"][...] = True
    feed["present"][...] = 1
    names = list(graph.outputs)
    following = [(i, "state." + n.removeprefix("next.")) for i, n in enumerate(names) if n.startswith("next.")]

    def step() -> None:
        out = graph.session.run(names, feed)
        for i, name in following:
            feed[name] = out[i]

    return step


class Bench:
    """Rows and ratios as they come."""

    def __init__(self, rounds: int, calls: int, say: Callable[[str], None], alive: Callable[[], bool]) -> None:
        self.rounds, self.calls = rounds, calls
        self.say, self.alive = say, alive
        self.rows: list[dict[str, Any]] = []
        self.ratios: dict[str, Ratio] = {}
        self.notes: list[str] = []
        self.pictures = Pictures()
        self.other_cpu: float | None = 0.0

    def hot(self, what: str, samplers: dict[str, Sampler], calls: int = 0, **more: Any) -> dict[str, Timing]:
        """Measure in turn; a row each."""
        self.say(f"{what}: hot")
        processes = Processes()
        timings = turns(samplers, self.rounds, calls or self.calls)
        self.add(what, "hot", timings, processes, **more)
        return timings

    def add(self, what: str, mode: str, timings: dict[str, Timing], processes: Processes, **more: Any) -> None:
        usage = processes.used()
        self.other_cpu = usage.other_cpu
        for name, timing in timings.items():
            row = {"what": what, "contender": name, "mode": mode, "latency_ms": timing.latency.row()}
            if mode == "paced":
                row["service_ms"] = timing.service.row()
            self.rows.append({**row, **more, "other_cpu": usage.other_cpu, "busiest": usage.busiest_other})
        self.pictures.histograms[f"{what}_{mode}"] = {n: t.latency for n, t in timings.items()}

    def bound(self, name: str, value: float | None, bound: float | None, *, more: bool = False, why: str = "") -> None:
        self.ratios[name] = ratio(value, bound, "more" if more else "less", self.other_cpu, why)


def run(
    *,
    duration_s: float = 8.0,
    rounds: int = 21,
    calls: int = 200,
    sizes: Sequence[int] = (256, 512, 1024),
    arrivals: Arrivals = "constant",
    peers: StepPeers | None = None,
    say: Callable[[str], None] = lambda _: None,
    alive: Callable[[], bool] = lambda: True,
) -> tuple[Document, Pictures]:
    """All parts: hot, paced, many slots, where rows are gathered, 8-bit weights and their drift, the engine's start.

    `duration_s` and `arrivals` belong to the paced part of each contender.
    """
    bench = Bench(rounds, calls, say, alive)
    with temporary_folder("stream-mmrnn-bench-") as folder:
        made = {(h, k): models.write(folder, h, k) for h in sizes for k in KINDS}
        for hidden in sizes:
            if alive():
                _hot(bench, hidden, made[hidden, "fp32"], peers)
        for hidden in sizes:
            if alive():
                _int8(bench, hidden, *(made[hidden, k] for k in KINDS))
        if alive():
            _gathering(bench, made[sizes[0], "fp32"])
        if alive():
            _paced(bench, made[sizes[0], "fp32"], sizes[0], duration_s, arrivals)
        if alive():
            _start(bench, made[sizes[0], "fp32"])
    if alive() and peers is not None:
        peers.measure_more(bench)
    settings = {"rounds": rounds, "calls": calls, "duration_s": duration_s, "hidden": list(sizes), "layers": 2}
    return document("step", settings, bench.rows, bench.ratios, notes=bench.notes), bench.pictures


def _hot(bench: Bench, hidden: int, path: Path, peers: StepPeers | None) -> None:
    engine, one = stepper(path)
    _, few = stepper(path, 64)
    _, many = stepper(path, MANY)
    samplers = {
        # over the engine's own graph: where the weights of another copy come to lie moves a step by several percent
        "bare": sampled(bare(engine.graph)),
        "engine": sampled(one),
        "engine, 64 slots": sampled(few),
        f"engine, {MANY:,} slots": sampled(many),
        "session.run": sampled(plain_run(path)),
    }
    with contextlib.ExitStack() as stack:
        why = peers.missing("torch") if peers is not None else NO_PEERS
        if peers is not None and not why:
            for name, kind in PEER_KINDS.items():
                peer = peers.start(kind, str(hidden))
                stack.callback(peer.close)
                samplers[name] = peer.sample
        # the weights are used once a step: from memory it cannot take less, from a cache it may
        weights = models.weight_count(hidden)
        floor_ns = roofline().floor_ns(4 * weights, 2 * weights)
        calls = bench.calls if hidden < 1024 else max(bench.calls // 8, 5)
        timings = bench.hot(f"gru {hidden}", samplers, calls, floor_ms=round(floor_ns / 1e6, 4))
    against = ratios(timings, "bare")
    bench.bound(f"engine_over_bare_{hidden}", against["engine"], {256: 1.10, 512: 1.03}.get(hidden))
    of_slots = ratios(timings, "engine, 64 slots")[f"engine, {MANY:,} slots"]
    bench.bound(f"slots_{MANY}_over_64_{hidden}", of_slots, 1.05 if hidden == 256 else None)
    bench.bound(f"session_run_over_engine_{hidden}", 1 / ratios(timings, "session.run")["engine"], None, more=True)
    for name, key in PEER_KINDS.items():
        value = ratios(timings, "engine").get(name)
        bound = 2.2 if (key, hidden) == ("torch_gru", 256) else None
        bench.bound(f"{key}_over_engine_{hidden}", value, bound, more=True, why=why)
    # the ratio that an engine without any cost would have
    bench.bound(f"torch_gru_over_bare_{hidden}", against.get("torch nn.GRU"), None, more=True, why=why)
    median_ns = sorted(timings["engine"].rounds)[len(timings["engine"].rounds) // 2]
    bench.bound(f"engine_over_memory_roofline_{hidden}", median_ns / floor_ns, None)


def _int8(bench: Bench, hidden: int, path: Path, small: Path, batched: Path) -> None:
    engine, full = stepper(path)
    engine8, eight = stepper(small)
    engine8_batch, eight_batch = stepper(batched)
    calls = bench.calls if hidden < 1024 else max(bench.calls // 8, 5)
    samplers = {"fp32": sampled(full), "int8": sampled(eight), "int8_batch": sampled(eight_batch)}
    samplers |= {"fp32, bare": sampled(bare(engine.graph)), "int8, bare": sampled(bare(engine8.graph))}
    timings = bench.hot(f"int8 {hidden}", samplers, calls)
    alone = ratios(timings, "fp32, bare")["int8, bare"]
    bench.bound(f"int8_bare_over_fp32_bare_{hidden}", alone, None)
    # the weights have to come from somewhere: as fast as an array of their size is read again and again
    weights = models.weight_count(hidden)
    read_s = weights / read_again_bytes_per_s(weights) / (4 * weights / read_again_bytes_per_s(4 * weights))
    bench.bound(f"int8_reading_over_fp32_reading_{hidden}", read_s, None)
    bound = {512: 0.40, 1024: 0.12}.get(hidden)
    bench.bound(f"int8_over_fp32_{hidden}", ratios(timings, "fp32")["int8"], bound)
    bench.bound(f"int8_batch_over_fp32_{hidden}", ratios(timings, "fp32")["int8_batch"], None)
    if hidden > 512:
        return  # ten thousand steps of a larger model take minutes and show the same
    bench.say(f"int8 {hidden}: drift over {DRIFT_STEPS:,} steps")
    for kind, quantised in (("int8", engine8), ("int8_batch", engine8_batch)):
        drift, last = drift_of(engine, quantised, DRIFT_STEPS, bench.alive)
        bench.rows.append(
            {"what": f"{kind} {hidden}", "contender": "drift", "mode": "closed loop", "rms": drift, "end": last}
        )
        bench.bound(f"{kind}_drift_rms_{hidden}", drift, 0.02)
        bench.bound(f"{kind}_drift_rms_last_tenth_{hidden}", last, 0.02)


def drift_of(
    full: StepEngine, small: StepEngine, steps: int, alive: Callable[[], bool] = lambda: True
) -> tuple[float, float]:
    """RMS of the states' difference over that of the states, in a closed loop: of all steps, of the last tenth."""
    rng = np.random.default_rng(1)
    wrong, size, every = np.zeros(steps), np.zeros(steps), max(steps // 1000, 1)
    for engine in (full, small):
        engine.reset("0")
    for k in range(steps):
        if not alive():
            return float("nan"), float("nan")
        tick = tick_of(full, "0", rng)
        full.step([tick])
        small.step([tick])
        if k % every == 0:
            a, b = full.arena.snapshot("0"), small.arena.snapshot("0")
            wrong[k] = sum(float(((a[n] - b[n]) ** 2).sum()) for n in a)
            size[k] = sum(float((a[n] ** 2).sum()) for n in a)
    tail = slice(steps - steps // 10, None)
    return (
        float(np.sqrt(wrong.sum() / size.sum())),
        float(np.sqrt(wrong[tail].sum() / size[tail].sum())),
    )


def _gathering(bench: Bench, path: Path) -> None:
    """Rows of a large arena copied beside it and back by numpy, or gathered and scattered inside the graph."""
    graph = Graph(path)
    contract = contract_of(graph)
    slots = 1024
    host, inside = HostRows(graph, contract, slots, 64, 10**12), DeviceRows(graph, contract, slots, 64)
    for count in (1, 8, 64):
        some = np.random.default_rng(0).permutation(slots)[:count].astype(np.int64)
        old = np.zeros(count, np.bool_)
        samplers = {
            name: sampled(partial(rows.bucket(count).run, some, old, count))
            for name, rows in (("copied beside", host), ("in the graph", inside))
        }
        timings = bench.hot(f"{count} of {slots} rows", samplers, max(bench.calls // count, 5))
        bench.bound(f"in_graph_over_copied_{count}", ratios(timings, "copied beside")["in the graph"], None)


def _paced(bench: Bench, path: Path, hidden: int, duration_s: float, arrivals: Arrivals) -> None:
    """25 times a second, from the intended time: the caches are cold, unless a prewarm ran a moment before."""
    bench.say(f"gru {hidden}: paced at 25 Hz, {2 * duration_s:g} s")
    _, cold = stepper(path)
    engine, warm = stepper(path)
    processes = Processes()
    timings = paced(
        {"engine, cold": cold, "engine, prewarmed": warm},
        25.0,
        duration_s,
        before={"engine, prewarmed": engine.prewarm},
        arrivals=arrivals,
        alive=bench.alive,
    )
    if not timings["engine, cold"].rounds:
        return
    bench.add(f"gru {hidden}", "paced", timings, processes)
    of = ratios(timings, "engine, cold", service=True)
    bench.bound(f"paced_prewarmed_over_cold_{hidden}", of["engine, prewarmed"], 0.40)


def _start(bench: Bench, path: Path) -> None:
    """From an engine's start to its first prediction, in fresh processes."""
    bench.say("start of the engine")
    load_s_each, whole_s_each, rss_mb_each = [], [], []
    for _ in range(5):
        began_ns = now_ns()
        done = subprocess.run(  # noqa: S603 our own code
            [sys.executable, "-c", _ENGINE_ALONE, str(path)], capture_output=True, text=True
        )
        if done.returncode:
            raise ProcessError(f"an engine did not start: {done.stderr.strip().rpartition(chr(10))[2]}")
        load_s, at_ns, kib = done.stdout.split()
        load_s_each.append(float(load_s))
        whole_s_each.append((int(at_ns) - began_ns) / 1e9)
        rss_mb_each.append(int(kib) / 1024)
    middle = len(load_s_each) // 2
    whole_s, rss_mb = sorted(whole_s_each)[middle], sorted(rss_mb_each)[middle]
    bench.notes.append(
        f"an engine's process takes {whole_s:.2f} s to its first prediction, {sorted(load_s_each)[middle]:.2f} s of it"
        f" imports, model and step; {rss_mb:.0f} MB resident"
    )
    bench.bound("cold_start_s", whole_s, 0.3)
    bench.bound("engine_rss_mb", rss_mb if rss_mb else None, 90.0, why="this system does not report it")


_ENGINE_ALONE = """
import sys, time
from pathlib import Path
began = time.perf_counter()
import numpy as np
from stream_mmrnn.core.types import Stamps, Tick
from stream_mmrnn.predict.engine import StepEngine
engine = StepEngine(Path(sys.argv[1]))
engine.open("x")
features = {m.name: np.zeros(m.size, np.float32) for m in engine.spec.modalities}
names = list(features)
engine.step([Tick("x", 1, 0, features, dict.fromkeys(names, True), dict.fromkeys(names, 0), Stamps(0, 0, 0, 0, ""))])
at = time.monotonic_ns()
rss = [l for l in open("/proc/self/status") if l.startswith("VmRSS")] if sys.platform == "linux" else ["VmRSS: 0"]
print(time.perf_counter() - began, at, rss[0].split()[1])
"""
