"""Targets that decode messages and JSON, and the strategies for good and bad ones."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np

from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.streams import usual
from stream_mmrnn.core.types import Envelope, Stamps
from tools.hostile import mutate

# ---- messages ----------------------------------------------------------------------------------------------------


EVERY_TOPIC = [*topics.TOPICS, *(topic for row in usual().values() for topic in row.topics())]


def honest(rng: Random) -> Envelope:
    """A message as our own processes send them."""
    at_ns = rng.randrange(10**15)
    topic = rng.choice((*EVERY_TOPIC, topics.STATUS + "engine"))
    payload: Any = b""
    if topic.startswith(topics.FEATURE):
        payload = np.frombuffer(rng.randbytes(4 * rng.choice((1, 8, 80))), np.uint8).view("<i2").astype(np.float32)
    elif topic == topics.raw("audio"):
        payload = np.zeros(320, np.int16)
    elif topic in (topics.SESSION, topics.TICK, topics.PREDICTION) or topic.startswith(topics.STATUS):
        payload = said(topic, rng)
    else:
        payload = rng.randbytes(rng.randrange(200))
    return Envelope(topic, rng.choice("abcd"), rng.randrange(1000), at_ns, at_ns, at_ns, payload, "x@0")


def said(topic: str, rng: Random) -> bytes:
    """The JSON of a topic, honest."""
    at_ns = rng.randrange(10**15)
    here = {"vision": True, "audio": False}
    stamps = Stamps(at_ns, at_ns, at_ns, at_ns, topics.CLOCK)
    if topic == topics.SESSION:
        return wire.pack(wire.SessionMessage(rng.choice(("open", "close", "streams")), at_ns, ("audio",)))
    if topic == topics.TICK:
        return wire.pack(wire.TickMessage(3, at_ns, here, {"audio": 5}, stamps))
    if topic == topics.PREDICTION:
        heads: dict[str, list[float | None]] = {"next": [0.25, None], "other": [1.0]}
        return wire.pack(wire.PredictionMessage(3, at_ns, heads, here, {"audio": 5}, stamps, at_ns, at_ns, "sha"))
    node = rng.choice(("engine", "recorder", "dashboard", "camera", "unknown"))
    detail = {
        "spec": {"name": "m", "sha256": "0", "provider": "cpu", "heads": [{"name": "next"}], "modalities": ["audio"]},
        "streams": {"vision": {"arrived": 1, "lost": 0, "used": 1, "late_joined": 0}},
        "misfits": {"vision": "why"},
        "address": "http://127.0.0.1:80/",
        "path": "x.mcap",
    }
    counts = {"ticks": 1, "predictions": 1, "messages": 1, "bytes": 1, "lost": 0}
    state: Any = rng.choice(("ready", "open", "missing", "closed"))
    return wire.pack(wire.StatusMessage(node, state, 1, "vision", rng.choice(("", "why")), counts, detail))


KINDS: dict[str, Any] = {
    topics.SESSION: wire.SessionMessage,
    topics.TICK: wire.TickMessage,
    topics.PREDICTION: wire.PredictionMessage,
    topics.STATUS: wire.StatusMessage,
}


def bad_header(rng: Random) -> bytes:
    """A header of the right form with a wrong thing in it."""
    values: list[Any] = [wire.VERSION, "a", 0, 0, 0, 0, "", "", (0,)]
    nasty: list[Any] = [n for n in mutate.NASTY_NUMBERS if -(2**63) <= n < 2**64]
    nasty += [
        None,
        True,
        1.5,
        float("nan"),
        "",
        "x" * 300,
        b"\xff" * 10,
        [],
        {},
        [[]],
        (2**24,) * 4,
        (1,) * 5,
        "|O",
        "<c8",
    ]
    nasty += [n for n in mutate.NASTY_NAMES if n.isprintable()]
    values[rng.randrange(9)] = rng.choice(nasty)
    if rng.randrange(8) == 0:
        return b"\x9a" + msgspec.msgpack.encode(values)[1:] + b"\x91" * rng.choice((10, 100_000)) + b"\xc0"
    return msgspec.msgpack.encode(values)


def bad_frames(rng: Random) -> list[bytes]:
    """Frames that are a message no more, or hardly."""
    frames = [bytes(f) for f in wire.encode(honest(rng))]
    kind = rng.randrange(8)
    if kind < 3:
        frames[kind] = mutate.flipped(frames[kind], rng)
    elif kind == 3:
        frames[1] = bad_header(rng)
    elif kind == 4:
        frames = [rng.randbytes(rng.randrange(100)) for _ in range(rng.randrange(1, 8))]
    elif kind == 5:
        rng.shuffle(frames)
    elif kind == 6:
        frames = (frames * rng.choice((2, 100)))[: rng.choice((1, 2, 4, 300))]
    else:
        topic = rng.choice(tuple(KINDS))
        frames[0] = (topic + "engine" if topic == topics.STATUS else topic).encode()
        body = mutate.json(said(topic, rng), rng)
        frames[1] = wire.encode(Envelope("clock", "a", 0, 0, 0, 0, body))[1]  # type: ignore[assignment]
        frames[2] = body
    return frames


class Wire:
    """`wire.decode`, and `wire.unpack` of what it lets through."""

    def __init__(self, folder: Path) -> None:
        self._corpus = [bad_frames(Random(i)) for i in range(50)]
        self._corpus += [[n.encode("utf-8", "surrogatepass"), b"", b""] for n in mutate.NASTY_NAMES]

    def case(self, rng: Random, number: int) -> None:
        frames = self._corpus[number] if number < len(self._corpus) else bad_frames(rng)
        envelope = wire.decode(frames)
        kind = topics.STATUS if envelope.topic.startswith(topics.STATUS) else envelope.topic
        if kind in KINDS:
            wire.unpack(envelope.payload, KINDS[kind])

    def close(self) -> dict[str, int]:
        return {}


class Json:
    """`wire.unpack` alone."""

    def __init__(self, folder: Path) -> None:
        self._nasty = [n.encode("utf-8", "surrogatepass") for n in mutate.NASTY_JSON]

    def case(self, rng: Random, number: int) -> None:
        topic = tuple(KINDS)[number % 4]
        body = self._nasty[number // 4] if number < 4 * len(self._nasty) else mutate.json(said(topic, rng), rng)
        message = wire.unpack(body, KINDS[topic])
        wire.pack(message)

    def close(self) -> dict[str, int]:
        return {}
