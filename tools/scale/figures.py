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
from stream_mmrnn.core.block import StateBlock
from stream_mmrnn.core.types import ModelSpec
from stream_mmrnn.serve.cluster import pieces
from stream_mmrnn.serve.cluster.frames import Answers, Columns, Round, write_answers, write_frame
from stream_mmrnn.serve.cluster.pieces import SessionRow
from stream_mmrnn.serve.cluster.stepped import Stepped

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
        0.45, "an engine that is not heard for so long is taken for dead, s", "stream_mmrnn/serve/cluster/membership.py"
    ),
    "fetch_s": Given(
        0.0004, "to fetch one state from the store, s", "one request of JetStream, measured by hand, 0.36 ms"
    ),
    "cluster_core_ticks": Given(
        26_000,
        "ticks a second a core of an engine takes from NATS, steps (`turn_taking`) and answers there",
        "python -m tools.bench.cluster_groups: 38 us of CPU a tick",
    ),
    "nats_core_ticks": Given(
        135_000,
        "ticks a second a core of the NATS server logs and delivers, with their answers",
        "python -m tools.bench.cluster_groups --model 64: 7.4 us of CPU a tick",
    ),
    "price_vcpu_h": Given(0.04, "US$ a vCPU-hour", "assumed: the order of large clouds' list prices"),
    "price_gpu_h": Given(4.0, "US$ an H100-hour", "assumed: the order of large clouds' list prices"),
    "price_gb": Given(0.01, "US$ a GB between zones", "assumed: the order of large clouds' list prices"),
}


_ROWS = 64
"""Ticks of a frame."""


def sizes(spec: ModelSpec, states: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Bytes of a tick, answer and state in a cluster, by our own encoders; words are rare, and absent here."""
    names = [f"{'s' * 12}{i:04d}" for i in range(_ROWS)]
    numbers = np.full(_ROWS, 10_000).tobytes()
    present = np.tile([m.name in _said(spec) for m in spec.modalities], (_ROWS, 1)).astype(np.uint8)
    ages = np.zeros(present.shape, np.int64)
    features = tuple(
        np.ones((_ROWS if m.name in _said(spec) else 0, m.size), np.float16).tobytes() for m in spec.modalities
    )
    columns = Columns(
        names, numbers, numbers, numbers, numbers, present.tobytes(), ages.tobytes(), half=True, features=features
    )
    step = write_frame("u" * 25, [Round((), columns)], [b"token"] * _ROWS)
    heads = [np.ones((_ROWS, h.size), np.float32) for h in spec.heads]
    stepped = Stepped(np.full(_ROWS, 10_000), present, ages, heads, 10_000, 100_000)
    preds = stepped.columns(names, np.full(_ROWS, 10_000), 0, _ROWS)
    rows = tuple(SessionRow(name, 10**9, "u" * 25, 1, {}, 10_000, 0, (stepped.row(10_000, 0),)) for name in names)
    block = StateBlock(
        np.zeros(_ROWS, np.bool_), {name: np.ones((_ROWS, *shape), np.float32) for name, shape in states.items()}
    )
    piece = pieces.write(pieces.content_of(spec.sha256, "e" * 12, {0: 1}, 10**9, rows, block))
    found = {"step": step, "pred": write_answers(Answers(2, (preds,), ())), "state": piece}
    return {name: round(len(content) / _ROWS) for name, content in found.items()}


def _said(spec: ModelSpec) -> set[str]:
    return {m.name for m in spec.modalities if "text" not in m.name}


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
