"""Seeded ticks of the toy model, and what a session of them gives when it is alone on an engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import toy_model

from stream_mmrnn.core import topics
from stream_mmrnn.core.block import Block
from stream_mmrnn.core.message_columns import ChannelColumns, MessageColumns
from stream_mmrnn.core.types import Envelope, Stamps, Tick
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


def columns_of(messages: Sequence[Envelope], alone: float = 0.0, seed: int = 0) -> MessageColumns:
    """The messages as a recording's reader gives them; a share `alone` of them one by one."""
    rng = np.random.default_rng(seed)
    channels: dict[tuple[object, ...], list[int]] = {}
    others = []
    for place, e in enumerate(messages):
        if (
            e.topic == topics.SESSION
            or (e.topic != topics.CLOCK and isinstance(e.payload, bytes))
            or rng.random() < alone
        ):
            others.append((place, e))
        else:
            size = 0 if isinstance(e.payload, bytes) else len(e.payload)
            channels.setdefault((e.topic, e.session, e.origin, size), []).append(place)
    columns = []
    for (topic, session, origin, _), places in channels.items():
        mine = [messages[place] for place in places]
        numbers = [
            np.array([getattr(e, name) for e in mine], np.int64)
            for name in ("seq", "event_ns", "capture_ns", "publish_ns", "device_ns")
        ]
        values = None if topic == topics.CLOCK else np.stack([np.asarray(e.payload) for e in mine])
        columns.append(ChannelColumns(topic, session, origin, np.array(places, np.int64), *numbers, values))
    return MessageColumns(0, len(messages), columns, others)
