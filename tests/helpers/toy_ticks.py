"""Seeded ticks of the toy model, and what a session of them gives when it is alone on an engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import toy_model

from stream_mmrnn.core.block import Block
from stream_mmrnn.core.types import Stamps, Tick
from stream_mmrnn.predict.engine import StepEngine

NOWHERE = Stamps(0, 0, 0, 0, "")


def tick(session: str, index: int, seed: int = 0, kind: type[np.floating] = np.float32) -> Tick:
    """`kind`: float16 gives numbers that a float16 holds exactly."""
    rng = np.random.default_rng([seed, index])
    vectors = {m.name: rng.standard_normal(m.size).astype(kind).astype(np.float32) for m in toy_model.MODALITIES}
    present = {m.name: bool(rng.integers(2)) for m in toy_model.MODALITIES}
    features = {name: v if present[name] else np.zeros_like(v) for name, v in vectors.items()}
    age = {m.name: int(rng.integers(-1, 20)) * 1_000_000_000 for m in toy_model.MODALITIES}
    return Tick(session, index, index * toy_model.TICK_NS, features, present, age, NOWHERE)


def block_of(ticks: Sequence[Tick], handles: Sequence[int], kind: type[np.floating] = np.float32) -> Block:
    """The ticks as a block, row by row; as float16 only where no number of theirs needs more bits."""
    names = [m.name for m in toy_model.MODALITIES]
    features = []
    for m in toy_model.MODALITIES:
        vectors = [t.features[m.name] for t in ticks if t.present[m.name]]
        features.append(np.array(vectors, np.float32).reshape(-1, m.size).astype(kind))
        assert features[-1].astype(np.float32).tobytes() == b"".join(v.tobytes() for v in vectors)
    return Block(
        np.array(handles, np.int64),
        np.array([t.index for t in ticks], np.int64),
        np.array([t.event_ns for t in ticks], np.int64),
        np.array([[t.present[n] for n in names] for t in ticks], np.bool_).reshape(-1, len(names)),
        np.array([[t.age_ns[n] for n in names] for t in ticks], np.int64).reshape(-1, len(names)),
        tuple(features),
    )


def alone(path: Path, slots: int, seed: int, count: int) -> list[bytes]:
    engine = StepEngine(path, slots)
    engine.open("x")
    return [engine.step([tick("x", k, seed)])[0].heads["next"].tobytes() for k in range(count)]
