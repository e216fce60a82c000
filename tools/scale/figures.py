"""What is measured, what is computed from our own formats, and what is assumed; each with where it comes from.

Knows nothing about what is made of them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stream_mmrnn.core import config
from stream_mmrnn.core.types import ModelSpec
from stream_mmrnn.predict.snapshots import Snapshot, to_bytes
from stream_mmrnn.serve import protocol

MEASURED = Path(__file__).parent / "measured.json"
"""One engine's steps and queue, by `python -m tools.scale --measure`."""


class Given(NamedTuple):
    value: float
    what: str
    source: str


GIVEN: dict[str, Given] = {
    "core_fp32": Given(3840, "sessions a core holds, fp32, nothing but the step", "docs/performance.md, Many sessions"),
    "core_int8": Given(5888, "the same with 8-bit weights for many sessions", "docs/performance.md, Many sessions"),
    "gpu_rows": Given(131_072, "sessions one H100 holds, by rows", "docs/gpu.md"),
    "gpu_engine": Given(14_336, "the same by `StepEngine.step`, with objects for each tick", "docs/gpu.md"),
    "found_s": Given(
        0.45, "an engine that is not heard for so long is taken for dead, s", "stream_mmrnn/cluster/node.py"
    ),
    "fetch_s": Given(
        0.0004, "to fetch one state from the store, s", "one request of JetStream, measured by hand, 0.36 ms"
    ),
    "cluster_core_ticks": Given(
        4400,
        "ticks a second a core of an engine takes from NATS and answers there",
        "by hand: 2,500 a second took 0.57 of one",
    ),
    "nats_core_ticks": Given(
        4600,
        "ticks a second a core of the NATS server logs, with their answers",
        "by hand: 2,500 a second took 0.54 of one",
    ),
    "price_vcpu_h": Given(0.04, "US$ a vCPU-hour", "assumed: the order of large clouds' list prices"),
    "price_gpu_h": Given(4.0, "US$ an H100-hour", "assumed: the order of large clouds' list prices"),
    "price_gb": Given(0.01, "US$ a GB between zones", "assumed: the order of large clouds' list prices"),
}


def sizes(spec: ModelSpec, states: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Bytes of a session's messages and state, by our own encoders; words are rare, and absent here."""
    said = [m for m in spec.modalities if "text" not in m.name]
    features = tuple(np.ones(m.size, "<f4").tobytes() if m in said else None for m in spec.modalities)
    ages = tuple(0 for _ in spec.modalities)
    now_ns = 1_800_000_000_000_000_000
    step = protocol.Step(session="s" * 16, tick=10_000, event_ns=now_ns, features=features, age_ns=ages)
    pred = protocol.Pred(
        session="s" * 16,
        tick=10_000,
        event_ns=now_ns,
        heads=tuple(np.ones(h.size, "<f4").tobytes() for h in spec.heads),
        present=tuple(m in said for m in spec.modalities),
        age_ns=ages,
        waited_ns=10_000,
        step_ns=100_000,
        model=spec.sha256,
    )
    kept = Snapshot(
        "s" * 16,
        spec.sha256,
        10_000,
        {name: np.ones(shape, np.float32) for name, shape in states.items()},
        {"token_sha256": "0" * 64, "seq": "1000000000", "opened": "1000000000", "owner": "0" * 12},
    )
    return {"step": len(protocol.encode(step)), "pred": len(protocol.encode(pred)), "state": len(to_bytes(kept))}


def of_model(name: str) -> dict[str, int]:
    """`sizes` of a model of the zoo."""
    from stream_mmrnn.graph.runtime import Graph
    from stream_mmrnn.predict.contract import contract_of

    spec = contract_of(Graph(config.find_model(name), "cpu")).spec
    return sizes(spec, {s.name: s.shape for s in spec.states})


def measure(hidden: int = 256, seed: int = 0) -> dict[str, Any]:
    """One engine on one core of this machine: what steps take, and its latencies at a few loads."""
    import tempfile

    from stream_mmrnn.bench import models
    from stream_mmrnn.bench.machine import Processes, machine
    from stream_mmrnn.bench.sessions import Load
    from stream_mmrnn.bench.step import tick_of
    from stream_mmrnn.core.types import Tick
    from stream_mmrnn.predict.engine import StepEngine

    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = models.write(Path(folder), hidden)
        engine = StepEngine(path, 256)
        of = tick_of(engine, "", rng)
        ticks = [Tick(f"s{i}", 0, 0, of.features, of.present, of.age_ns, of.closed) for i in range(256)]
        for tick in ticks:
            engine.open(tick.session)
        counts, took = [], []
        for _ in range(60):
            for count in (1, 2, 4, 8, 16, 32, 64, 128, 256):
                began = time.perf_counter()
                engine.step(ticks[:count])
                counts.append(count)
                took.append(time.perf_counter() - began)
        n, s = np.array(counts[90:], float), np.array(took[90:])
        runs = np.ceil(n / 64)
        # the quick half of each count is what a step takes; what comes on top is lateness
        usual = np.array([s[n == count] for count in sorted(set(counts))])
        medians = np.median(usual, axis=1)
        sizes_ = np.array(sorted(set(counts)), float)
        (call, tick_s), *_ = np.linalg.lstsq(np.stack([np.ceil(sizes_ / 64), sizes_], 1), medians, rcond=None)
        late = np.maximum(s - runs * call - n * tick_s, 0)
        watch = Processes()
        loads = []
        capacity = int(0.04 / tick_s)
        for share in (0.25, 0.5, 0.75, 0.9):
            sessions = int(capacity * share)
            load = Load(StepEngine(path, sessions), sessions, "spread", seed)
            load.run(3.5, lambda: True)
            found = load.latency
            loads.append(
                {"sessions": sessions, "p50_ms": found.percentile(50) / 1e6, "p99_ms": found.percentile(99) / 1e6}
            )
        other = watch.used().other_cpu
    sample = np.sort(late)[:: max(len(late) // 200, 1)]
    return {
        "machine": machine(),
        "hidden": hidden,
        "other_cpu": other,
        "call_s": float(f"{call:.4g}"),
        "tick_s": float(f"{tick_s:.4g}"),
        "late_s": [float(f"{v:.3g}") for v in sample],
        "loads": [{k: float(f"{v:.4g}") for k, v in load_.items()} for load_ in loads],
    }


def measured() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(MEASURED.read_text(encoding="utf-8"))
    return found
