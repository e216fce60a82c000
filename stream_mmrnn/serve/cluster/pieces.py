"""Pieces: the states of some partitions as one value, with their position in the log and the answers that are kept.

The value's first byte says whether it is sealed: whoever takes partitions over seals the piece that has their states,
by compare-and-swap, so that every later write of the former owner is refused. The rest has a hash. Tokens are not in
it. Knows nothing about NATS or engines.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import msgspec
import numpy as np

from stream_mmrnn.core.block import StateBlock
from stream_mmrnn.core.errors import SnapshotError
from stream_mmrnn.core.types import MAX_TICK
from stream_mmrnn.serve.cluster.subjects import CLIENT

_OPEN, _SEALED = b"\0", b"\1"
_VERSION = 1
_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
_KINDS = frozenset("fiub")


class KeptRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An answer that its client has not confirmed."""

    index: int
    event_ns: int
    present: bytes
    """uint8 [M]"""
    age_ns: bytes
    """int64 [M]"""
    heads: tuple[bytes, ...]
    """By head float32 [size]."""


class SessionRow(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A session of a piece."""

    session: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    opened: _Count
    """The message that began it, from which its token is made."""
    owner: str
    """The client that has it; "": it was evicted."""
    number: int
    """Of its newest control message."""
    replies: dict[int, bytes]
    """To the newest ones, by number."""
    last: Annotated[int, msgspec.Meta(ge=-1, le=MAX_TICK)]
    """Index of its newest tick; -1 before the first."""
    left_ns: int
    """Unix time of its eviction; 0 where it is open."""
    kept: tuple[KeptRow, ...]


class Tensor(msgspec.Struct, frozen=True, array_like=True):
    dtype: Annotated[str, msgspec.Meta(max_length=8)]
    shape: tuple[_Count, ...]
    """Of one session."""
    content: bytes


class Content(msgspec.Struct, frozen=True, array_like=True):
    """The value of a piece."""

    version: int
    model_sha256: str
    engine: str
    """Who has written it."""
    epochs: dict[int, int]
    """By partition, the epoch of its lease."""
    position: _Count
    """Every message of the log up to this one is in it."""
    sessions: tuple[SessionRow, ...]
    fresh: bytes
    """uint8 [S]: before the first step."""
    states: dict[str, Tensor]
    """By state, all sessions' rows."""

    def block(self) -> StateBlock:
        """The states, in the order of `sessions`; checked by `read`."""
        count = len(self.sessions)
        states = {
            name: np.frombuffer(of.content, np.dtype(of.dtype)).reshape((count, *of.shape))
            for name, of in self.states.items()
        }
        return StateBlock(np.frombuffer(self.fresh, np.uint8) != 0, states)


def tensors(states: StateBlock) -> dict[str, Tensor]:
    return {
        name: Tensor(rows.dtype.newbyteorder("<").str, rows.shape[1:], rows.tobytes())
        for name, rows in states.states.items()
    }


def write(content: Content) -> bytes:
    body = msgspec.msgpack.encode(content)
    return _OPEN + hashlib.sha256(body).digest() + body


def content_of(
    model_sha256: str,
    engine: str,
    epochs: dict[int, int],
    position: int,
    sessions: tuple[SessionRow, ...],
    states: StateBlock,
) -> Content:
    return Content(
        _VERSION,
        model_sha256,
        engine,
        epochs,
        position,
        sessions,
        states.fresh.astype(np.uint8).tobytes(),
        tensors(states),
    )


def is_sealed(raw: bytes) -> bool:
    return raw[:1] == _SEALED


def sealed(raw: bytes) -> bytes:
    return _SEALED + raw[1:]


def read(raw: bytes) -> Content:
    """The content of a piece. Raises SnapshotError where these bytes are none, or damaged."""
    try:
        if raw[:1] not in (_OPEN, _SEALED) or hashlib.sha256(raw[33:]).digest() != raw[1:33]:
            raise ValueError("its hash does not match")
        content = msgspec.msgpack.decode(raw[33:], type=Content)
        if content.version != _VERSION:
            raise ValueError(f"expected version {_VERSION}, got {content.version}")
        if len(content.fresh) != len(content.sessions):
            raise ValueError("it has another number of states than of sessions")
        for of in content.states.values():
            if np.dtype(of.dtype).kind not in _KINDS:
                raise ValueError(f"a state is of type {of.dtype}")
        if any(row.owner and not CLIENT.fullmatch(row.owner) for row in content.sessions):
            raise ValueError("a session belongs to no client")
        content.block()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError, TypeError, OverflowError) as e:
        raise SnapshotError(
            f"these {len(raw)} bytes are no states of a cluster's partitions, or damaged ones: {e}"
        ) from e
    return content
