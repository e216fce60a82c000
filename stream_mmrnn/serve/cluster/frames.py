"""Frames: the messages of a cluster's log and the answers to them. One frame has what many sessions say at a time.

A frame of the log has rounds; in a round each session has at most one item: a control message (`serve.protocol`), or a
tick as a row of columns. Items have a proof each, an HMAC of the frame's hash under the session's token: whoever made
the frame has that token. Numbers in columns are little-endian. Knows nothing about NATS, sessions or engines.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec
import numpy as np

from stream_mmrnn.core.block import Block
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.types import MAX_TICK

PROOF = 16
"""Bytes of a proof."""
NO_PROOF = bytes(PROOF)
MOST_BYTES = 768 << 10
"""Of a frame; a NATS server takes 1 MiB unless it is told otherwise."""
MOST_ROWS = 256
"""Of the columns of a round."""
_U8, _I8, _F4, _F2 = np.dtype(np.uint8), np.dtype("<i8"), np.dtype("<f4"), np.dtype("<f2")
_Int = Annotated[int, msgspec.Meta(ge=0, le=1 << 62)]
_Names = Annotated[list[str], msgspec.Meta(max_length=4096)]


class Control(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A message of a session that is not a tick."""

    session: str
    number: _Int
    """Of the client's control messages, growing; the same where it is sent again."""
    content: bytes
    """`serve.protocol`; b"": send again the answers that I do not have."""
    answered: int = -1
    """All answers to ticks up to this one have been received."""


class Columns(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Ticks of N sessions; M modalities in the order of the model."""

    sessions: _Names
    indices: bytes
    """int64 [N]"""
    event_ns: bytes
    """int64 [N]"""
    before: bytes
    """int64 [N]: the session's tick before this one; -1 for none. A tick is stepped after that one only."""
    answered: bytes
    """int64 [N]: all answers of the session up to this tick have been received; -1 for none."""
    present: bytes
    """uint8 [N, M]"""
    age_ns: bytes
    """int64 [N, M]"""
    half: bool
    """Features are float16."""
    features: tuple[bytes, ...]
    """By modality [P, size]: of the P ticks that have it."""

    def to_block(self, sizes: Sequence[int]) -> Block:
        """As a block whose handles are row numbers. Raises WireError where the columns are of other lengths."""
        count, width = len(self.sessions), len(sizes)
        if any(len(of) != 8 * count for of in (self.indices, self.event_ns, self.before, self.answered)):
            raise WireError(f"expected {count} indices, times, ticks before and answered ones as int64")
        if len(self.present) != count * width or len(self.age_ns) != 8 * count * width or len(self.features) != width:
            raise WireError(f"expected masks, ages and vectors of {count} ticks and {width} modalities")
        present = np.frombuffer(self.present, _U8).reshape(count, width) != 0
        kind = _F2 if self.half else _F4
        features = []
        for content, size, rows in zip(self.features, sizes, present.sum(0).tolist(), strict=True):
            if len(content) != rows * size * kind.itemsize:
                raise WireError(f"expected {rows} vectors of {size} {kind.name}, got {len(content)} bytes")
            features.append(np.frombuffer(content, kind).reshape(rows, size))
        found = np.frombuffer(self.indices, _I8)
        if count and (int(found.min()) < 0 or int(found.max()) > MAX_TICK):
            raise WireError("expected tick indices from 0 to 2^53 - 1")
        return Block(
            np.arange(count),
            found,
            np.frombuffer(self.event_ns, _I8),
            present,
            np.frombuffer(self.age_ns, _I8).reshape(count, width),
            tuple(features),
        )

    def order(self) -> tuple[list[int], list[int]]:
        """`before` and `answered`, by tick."""
        return np.frombuffer(self.before, _I8).tolist(), np.frombuffer(self.answered, _I8).tolist()


class Round(msgspec.Struct, frozen=True, array_like=True, gc=False):
    controls: tuple[Control, ...]
    columns: Columns | None


class _Frame(msgspec.Struct, frozen=True, array_like=True, gc=False):
    body: bytes
    proofs: bytes


class Frame(msgspec.Struct, frozen=True, gc=False):
    """A message of the log, decoded."""

    rounds: tuple[Round, ...]
    digest: bytes
    proofs: bytes

    def with_proofs(self) -> Iterator[tuple[Round, int]]:
        """The rounds, each with the offset of its first proof."""
        at = 0
        for of in self.rounds:
            yield of, at
            at += PROOF * (len(of.controls) + (len(of.columns.sessions) if of.columns is not None else 0))


def digest_of(client: str, body: bytes) -> bytes:
    return hashlib.sha256(client.encode() + b"\0" + body).digest()


def proof(token: bytes, digest: bytes) -> bytes:
    """Of one item of a frame with this hash: whoever made the frame has the session's token."""
    return hmac.digest(token, digest, "sha256")[:PROOF]


_encode = msgspec.msgpack.Encoder().encode
_read_frame = msgspec.msgpack.Decoder(_Frame).decode
_read_rounds = msgspec.msgpack.Decoder(tuple[Round, ...]).decode


def write_frame(client: str, rounds: Sequence[Round], tokens: Sequence[bytes]) -> bytes:
    """`tokens`: of each item, in order; b"" where the sender has none."""
    body = _encode(rounds)
    digest = digest_of(client, body)
    proofs = b"".join([proof(token, digest) if token else NO_PROOF for token in tokens])
    return _encode(_Frame(body, proofs))


def read_frame(client: str, content: bytes) -> Frame:
    """Raises WireError where it is none."""
    try:
        frame = _read_frame(content)
        rounds = _read_rounds(frame.body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise WireError(f"this is not a frame of a cluster's log: {e}") from e
    count = sum(len(of.controls) + (len(of.columns.sessions) if of.columns is not None else 0) for of in rounds)
    if len(frame.proofs) != PROOF * count:
        raise WireError(f"expected {count} proofs of {PROOF} bytes, got {len(frame.proofs)} bytes")
    return Frame(rounds, digest_of(client, frame.body), frame.proofs)


class Said(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A reply that is not a prediction."""

    session: str
    number: int
    """Of the control message that it answers; -1: it answers a tick, or nothing."""
    tick: int
    """That it answers; -1: it answers none."""
    content: bytes
    """`serve.protocol`."""


class PredColumns(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Predictions for ticks of N sessions, one step's or those that were kept."""

    sessions: _Names
    indices: bytes
    event_ns: bytes
    present: bytes
    age_ns: bytes
    heads: tuple[bytes, ...]
    """By head: float32 [N, size]."""
    waited_ns: int
    step_ns: int


class Answers(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What an engine says to a client: predictions first."""

    engines: int
    """How many engines there are."""
    preds: tuple[PredColumns, ...]
    said: tuple[Said, ...]


_read_answers = msgspec.msgpack.Decoder(Answers).decode


def write_answers(answers: Answers) -> bytes:
    return _encode(answers)


def read_answers(content: bytes) -> Answers:
    """Raises WireError where it is none."""
    try:
        return _read_answers(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise WireError(f"this is not a cluster's answer: {e}") from e
