"""Seeded ticks of the toy model, and what a session of them gives when it is alone on an engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import toy_model

from stream_mmrnn.core.types import Stamps, Tick
from stream_mmrnn.predict.engine import StepEngine

NOWHERE = Stamps(0, 0, 0, 0, "")


def tick(session: str, index: int, seed: int = 0) -> Tick:
    rng = np.random.default_rng([seed, index])
    vectors = {m.name: rng.standard_normal(m.size).astype(np.float32) for m in toy_model.MODALITIES}
    present = {m.name: bool(rng.integers(2)) for m in toy_model.MODALITIES}
    features = {name: v if present[name] else np.zeros_like(v) for name, v in vectors.items()}
    age = {m.name: int(rng.integers(-1, 20)) * 1_000_000_000 for m in toy_model.MODALITIES}
    return Tick(session, index, index * toy_model.TICK_NS, features, present, age, NOWHERE)


def alone(path: Path, slots: int, seed: int, count: int) -> list[bytes]:
    engine = StepEngine(path, slots)
    engine.open("x")
    return [engine.step([tick("x", k, seed)])[0].heads["next"].tobytes() for k in range(count)]
