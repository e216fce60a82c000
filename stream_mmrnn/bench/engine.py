"""Engine: synthetic sessions at their real rate through the same generator, with latency from the intended time.

Open loop: a message's intended time is fixed beforehand, so a slow step makes the next one late and the figures
say so (no coordinated omission). One process: what it measures is aligner and engine under load. Knows nothing about
the bus.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from stream_mmrnn.bench.machine import Processes
from stream_mmrnn.bench.plots import Pictures
from stream_mmrnn.bench.report import Document, document, ratio
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.latency import Histogram, StageTable, stages
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.streams import Kind, Stream
from stream_mmrnn.core.types import Envelope, ModelSpec
from stream_mmrnn.graph.runtime import Provider
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.pipeline import predict

RATES_HZ: dict[Kind, float] = {"vision": 25.0, "audio": 50.0, "text": 2.0, "signal": 50.0}
CLOCK_HZ = 100.0


def _rate_hz(modality: str) -> float:
    return RATES_HZ[Stream.of(modality).kind]


def synthetic(spec: ModelSpec, sessions: int, duration_s: float, start_ns: int, seed: int) -> Iterator[Envelope]:
    """Messages of `sessions` sessions for `duration_s`, in the order of their intended times, none of them late.

    Each stream of each session has its own phase, so that the load is spread as that of strangers is.
    """
    rng = np.random.default_rng(seed)
    vectors = {m.name: rng.standard_normal((64, m.size // m.stack)).astype(np.float32) * 0.5 for m in spec.modalities}
    origins = {m.name: m.encoder for m in spec.modalities}
    names = [f"bench-{i}" for i in range(sessions)]
    streams = tuple(v for v in vectors if Stream.of(v).dense)
    for name in names:
        opening = wire.pack(wire.SessionMessage("open", start_ns, streams))
        yield Envelope(topics.SESSION, name, 0, start_ns, start_ns, start_ns, opening)
    heap: list[tuple[int, int, str, str, int]] = []
    order = 0
    for name in names:
        for modality in vectors:
            period_ns = int(1e9 / _rate_hz(modality))
            heap.append((start_ns + int(rng.integers(1, period_ns + 1)), order, name, modality, 0))
            order += 1
    heap.append((start_ns, order, topics.EVERYONE, "", 0))
    heapq.heapify(heap)
    end_ns = start_ns + int(duration_s * 1e9)
    while heap[0][0] < end_ns:
        at_ns, rank, name, modality, seq = heap[0]
        rate_hz = _rate_hz(modality) if modality else CLOCK_HZ
        heapq.heapreplace(heap, (at_ns + int(1e9 / rate_hz), rank, name, modality, seq + 1))
        if modality:
            payload = vectors[modality][(rank + seq) % 64]
            topic = topics.feature(modality)
            yield Envelope(topic, name, seq, at_ns, at_ns, at_ns, payload, origins[modality])
        else:
            yield Envelope(topics.CLOCK, name, seq, at_ns, at_ns, at_ns, b"")
    for name in names:
        closing = wire.pack(wire.SessionMessage("close", end_ns))
        yield Envelope(topics.SESSION, name, 1, end_ns, end_ns, end_ns, closing)


def _in_time(envelopes: Iterator[Envelope], alive: Callable[[], bool]) -> Iterator[Envelope]:
    """Hand out each message when its time has come, and stamp when that really was."""
    for envelope in envelopes:
        while (left_ns := envelope.publish_ns - now_ns()) > 0:
            time.sleep(left_ns / 1e9)
        if not alive():
            return
        yield msgspec.structs.replace(envelope, received_ns=now_ns())


def run(
    model: Path,
    *,
    sessions: int = 1,
    duration_s: float = 10.0,
    hot: bool = False,
    provider: Provider = "auto",
    seed: int = 0,
    alive: Callable[[], bool] = lambda: True,
    progress: Callable[[float], None] = lambda _: None,
) -> tuple[Document, Pictures]:
    """Paced (or, `hot`, as fast as it goes) sessions: the stages, and what was dropped or late."""
    engine = StepEngine(model, sessions, provider)
    spec = engine.spec
    aligner = Aligner.of(spec.modalities, spec.tick_ns, Settings())
    start_ns = now_ns() + 200_000_000
    envelopes = synthetic(spec, sessions, duration_s, start_ns, seed)
    latency, whole = StageTable(), Histogram()
    pictures = Pictures()
    timeline = pictures.stages.setdefault("engine", []) if not hot else []
    count = late = 0
    processes, began_ns = Processes(), now_ns()
    for p in predict(envelopes if hot else _in_time(envelopes, alive), aligner, engine):
        count += 1
        done_ns = now_ns()
        if hot:
            latency.add({"step": p.step_end_ns - p.step_start_ns})
            whole.add(p.step_end_ns - p.step_start_ns)
        else:
            took = stages(p.tick.event_ns, p.tick.closed, p.step_start_ns, p.step_end_ns, done_ns)
            latency.add(took)
            del took["wait"], took["total"]
            # from the message that closed the tick: was the prediction there before the next tick's end?
            whole.add(done_ns - p.tick.closed.event_ns)
            late += done_ns - p.tick.closed.event_ns > spec.tick_ns
            timeline.append(((p.tick.event_ns - start_ns) / 1e9, took))
        if count % 64 == 0:
            progress((p.tick.event_ns - start_ns) / 1e9)
        if not alive():
            break
    seconds, usage = (now_ns() - began_ns) / 1e9, processes.used()
    pictures.histograms["latency"] = {"step" if hot else "event to prediction": whole}
    mode = "hot" if hot else "paced"
    row = {
        "mode": mode,
        "sessions": sessions,
        "seconds": round(seconds, 3),
        "predictions": count,
        "predictions_per_s": round(count / seconds, 1),
        "late": late,
        "event_to_prediction_ms": whole.row() if not hot else None,
        "latency_ms": latency.table(),
        "streams": {
            name: {"received": c.received, "delivered": c.used, "dropped": c.dropped()}
            for name, c in aligner.counts.items()
        },
        "cpu_share": round(usage.cpu.get("bench", 0.0), 3),
        **usage.row(),
    }
    ratios = {f"step_{mode}_{p}_ms": ratio(row["latency_ms"].get("step", {}).get(p)) for p in ("p50", "p99")}
    ratios[f"predictions_per_s_{mode}"] = ratio(row["predictions_per_s"], better="more")
    settings = {
        "model": spec.name,
        "sha256": spec.sha256,
        "provider": engine.provider,
        "sessions": sessions,
        "duration_s": duration_s,
        "seed": seed,
        "tick_ms": spec.tick_ns / 1e6,
    }
    return document("engine", settings, [row], ratios), pictures
