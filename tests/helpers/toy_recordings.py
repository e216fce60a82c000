"""Recordings of the toy model's sessions, with their predictions."""

from __future__ import annotations

from pathlib import Path

import msgspec

from stream_mmrnn.bench.engine import synthetic
from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core.types import Envelope, Prediction
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.pipeline import predict
from stream_mmrnn.recording.recorder import Recorder

BEGIN = 10**15


def recorded(p: Prediction) -> bytes:
    return wire.pack(wire.prediction_message(p))


def write(path: Path, model: Path, seconds: float, head: str = "next", metadata: dict[str, str] | None = None) -> int:
    """A recording as a live session makes it: each prediction right after the message that let its tick close."""
    engine = StepEngine(model)
    settings = config.load(None, {"engine.model": str(model)})
    aligner = Aligner.of(engine.spec.modalities, engine.spec.tick_ns, settings)
    about = {"config": msgspec.json.encode(settings).decode(), "model_sha256": engine.spec.sha256, "raw": "false"}
    recorder = Recorder(path, "bench-0", {**about, **(metadata or {})})
    made: list[Prediction] = []

    def kept() -> list[Envelope]:
        out = [
            Envelope(topics.PREDICTION, "bench-0", p.tick.index, p.tick.event_ns, 0, p.tick.event_ns, recorded(p))
            for p in made
        ]
        made.clear()
        return out

    count = 0

    def heard() -> object:
        nonlocal count
        for e in synthetic(engine.spec, 1, seconds, BEGIN, 3):
            for p in kept():
                recorder.write(p)
            recorder.write(e)
            recorder.flush_due(e.publish_ns)
            yield e

    for p in predict(heard(), aligner, engine):
        count += 1
        made.append(msgspec.structs.replace(p, heads={head: p.heads["next"]}))
    for p in kept():
        recorder.write(p)
    recorder.close({"ended": "clean", "lost": "{}"})
    return count
