"""One session as a client sees it: what it sent, what came back, and a tick's features as they are sent.

Knows nothing about connections and what the server says (`client_state`).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from stream_mmrnn.core.errors import BadTick, SessionError
from stream_mmrnn.core.types import FloatArray, Vectors
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.client_requests import Asked, Outstanding


class Answer(msgspec.Struct, frozen=True):
    """The answer to one tick."""

    session: str
    tick: int
    event_ns: int
    """As it was given."""
    heads: Vectors
    """By head, each float32 [size]."""
    present: dict[str, bool]
    """By modality: whether it was used."""
    age_ns: dict[str, int]
    waited_ns: int
    """In the server's queue."""
    step_ns: int
    round_trip_ns: int
    """From the first `send` until it was received."""
    model: str
    """sha256 of the model file."""


class Sent(msgspec.Struct, gc=False):
    """A tick that was sent, as it was packed, and when."""

    content: bytes
    at_ns: int


class ClientSession(msgspec.Struct):
    """A session as the client sees it."""

    name: str
    token: str | None = None
    next_tick: int = 0
    """Index for `send`, where none is given."""
    sent: OrderedDict[int, Sent] = msgspec.field(default_factory=OrderedDict)
    """The newest ticks, answered or not: they may have to be sent again."""
    unanswered: OrderedDict[int, int] = msgspec.field(default_factory=OrderedDict)
    """By tick: when it was sent, or the session last opened again because of it."""
    answers: deque[Answer | SessionError] = msgspec.field(default_factory=deque)
    opened: protocol.Ready | None = None
    outstanding: Outstanding = msgspec.field(default_factory=Outstanding)
    error: SessionError | None = None
    """Why the newest `open` failed, or why the session is over here."""
    to_send: deque[int | Asked] = msgspec.field(default_factory=deque)
    """Ticks that wait until the server's queue has room, and requests that come after them."""
    on_the_way: set[int] = msgspec.field(default_factory=set)
    reopening: bool = False
    raw: bool = False
    """It sends samples; ticks are then pushes."""
    begin_ns: int = 0
    """Of a raw session: how far it was when it was opened."""
    pushed: dict[int, list[Answer] | SessionError] = msgspec.field(default_factory=dict)
    """By push, what came of it, until it is read."""
    skipped: int = 0
    """Ticks that the server had seen already, and whose answers were lost when it died."""


def vectors(
    modalities: tuple[protocol.Modality, ...], features: Mapping[str, Any], tick: int, session: str
) -> tuple[bytes | None, ...]:
    """A tick's features as they are sent, each float32 [size] or None; raises BadTick."""
    if unknown := set(features) - {m.name for m in modalities}:
        known = ", ".join(m.name for m in modalities)
        raise BadTick(f"the model of session {session!r} has no {sorted(unknown)[0]!r}; it takes {known}")
    found: list[bytes | None] = []
    for m in modalities:
        value = features.get(m.name)
        if value is None:
            found.append(None)
            continue
        vector: FloatArray = np.ascontiguousarray(value, "<f4")
        if vector.shape != (m.size,):
            raise BadTick(
                f"tick {tick} of session {session!r}: expected {m.size} numbers as {m.name}, got {list(vector.shape)}"
            )
        found.append(vector.tobytes())
    return tuple(found)


def ages(
    modalities: tuple[protocol.Modality, ...], features: Mapping[str, Any], age_ns: Mapping[str, int] | None
) -> tuple[int, ...]:
    """The ages of a tick's features in ns as they are sent; () where all are new."""
    if age_ns is None:
        return ()
    return tuple(age_ns.get(m.name, 0 if features.get(m.name) is not None else -1) for m in modalities)
