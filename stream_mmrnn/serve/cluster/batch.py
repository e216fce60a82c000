"""Batch: what a client's sessions have to say, gathered into few frames: one for each lane.

The messages of a session keep their order: a later one is in a later round. Knows nothing about NATS or answers.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import NamedTuple, TypeAlias

import numpy as np

from stream_mmrnn.serve.cluster.frames import MOST_BYTES, MOST_ROWS, Columns, Control, Round, write_frame
from stream_mmrnn.serve.cluster.subjects import lane_of, partition_of

_ROW_BYTES = 128
"""Of a row without features, roughly."""


class Chunk(NamedTuple):
    """Ticks of different sessions, as columns in bytes: as in `frames.Columns`."""

    sessions: list[str]
    tokens: list[bytes]
    indices: bytes
    event_ns: bytes
    before: bytes
    answered: bytes
    present: bytes
    age_ns: bytes
    half: bool
    features: tuple[bytes, ...]

    def take(self, lanes: list[int], lane: int) -> Chunk:
        """The ticks of one lane; `lanes`: of each tick."""
        rows = np.flatnonzero(np.array(lanes) == lane)
        count = len(self.sessions)
        present = np.frombuffer(self.present, np.uint8).reshape(count, -1) != 0

        def some(column: bytes) -> bytes:
            return np.frombuffer(column, np.uint8).reshape(count, -1)[rows].tobytes()

        return Chunk(
            [self.sessions[row] for row in rows],
            [self.tokens[row] for row in rows],
            some(self.indices),
            some(self.event_ns),
            some(self.before),
            some(self.answered),
            some(self.present),
            some(self.age_ns),
            self.half,
            tuple(
                np.frombuffer(vectors, np.uint8).reshape(here.sum(), -1)[np.isin(np.flatnonzero(here), rows)].tobytes()
                if vectors
                else b""
                for vectors, here in zip(self.features, present.T, strict=True)
            ),
        )

    @property
    def size(self) -> int:
        return sum(map(len, self.features)) + _ROW_BYTES * len(self.sessions)


def one_tick(
    session: str,
    token: str,
    index: int,
    event_ns: int,
    before: int,
    answered: int,
    features: tuple[bytes | None, ...],
    age_ns: tuple[int, ...],
) -> Chunk:
    """One tick as columns; absent features are None, and no ages mean 0, and -1 where absent."""
    present = bytes(vector is not None for vector in features)
    ages = age_ns or tuple(here - 1 for here in present)
    return Chunk(
        [session],
        [token.encode()],
        index.to_bytes(8, "little"),
        event_ns.to_bytes(8, "little", signed=True),
        before.to_bytes(8, "little", signed=True),
        answered.to_bytes(8, "little", signed=True),
        present,
        struct.pack(f"<{len(ages)}q", *ages),
        False,
        tuple(vector or b"" for vector in features),
    )


class _Round:
    def __init__(self) -> None:
        self.controls: list[tuple[Control, bytes]] = []
        self.chunks: list[Chunk] = []
        self.rows = 0

    def has_room(self, chunk: Chunk) -> bool:
        return not self.chunks or (self.rows + len(chunk.sessions) <= MOST_ROWS and self.chunks[0].half == chunk.half)

    def build(self) -> tuple[Round, list[bytes]]:
        """The round, and the tokens of its items."""
        tokens = [token for _, token in self.controls]
        columns = None
        if self.chunks:
            chunks = self.chunks
            sessions = [name for of in chunks for name in of.sessions]
            tokens += [token for of in chunks for token in of.tokens]
            columns = Columns(
                sessions,
                b"".join([of.indices for of in chunks]),
                b"".join([of.event_ns for of in chunks]),
                b"".join([of.before for of in chunks]),
                b"".join([of.answered for of in chunks]),
                b"".join([of.present for of in chunks]),
                b"".join([of.age_ns for of in chunks]),
                chunks[0].half,
                tuple(b"".join(column) for column in zip(*(of.features for of in chunks), strict=True)),
            )
        return Round(tuple(control for control, _ in self.controls), columns), tokens


class _Lane:
    """The rounds of the next frame of one lane, and what does not fit into it."""

    def __init__(self) -> None:
        self.rounds: list[_Round] = []
        self.next: dict[str, int] = {}
        """By session, the first round that may have its next message."""
        self.bytes = 0

    def _round(self, first: int, chunk: Chunk | None) -> tuple[int, _Round]:
        while True:
            if first == len(self.rounds):
                self.rounds.append(_Round())
            found = self.rounds[first]
            if chunk is None or found.has_room(chunk):
                return first, found
            first += 1

    def add_control(self, control: Control, token: bytes) -> None:
        at, found = self._round(self.next.get(control.session, 0), None)
        found.controls.append((control, token))
        self.next[control.session] = at + 1
        self.bytes += len(control.content) + _ROW_BYTES

    def add_chunk(self, chunk: Chunk) -> None:
        first = max([self.next.get(name, 0) for name in chunk.sessions])
        at, found = self._round(first, chunk)
        found.chunks.append(chunk)
        found.rows += len(chunk.sessions)
        self.next.update(dict.fromkeys(chunk.sessions, at + 1))
        self.bytes += chunk.size


_Item: TypeAlias = tuple[Control, bytes] | Chunk
"""A control message with its session's token, or ticks."""


class Batch:
    """Takes messages in order; `take` returns what goes into the log next."""

    def __init__(self, client: str, partitions: int) -> None:
        self._client, self._partitions = client, partitions
        self._lanes = 1
        self._waiting: dict[int, deque[_Item]] = {}
        """By lane."""
        self._lane_of: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    @property
    def lanes(self) -> int:
        """Into how many lanes it divides, one of `subjects.LANES`: any number at each `take`."""
        return self._lanes

    def divide(self, lanes: int) -> None:
        if lanes == self._lanes:
            return
        self._lanes, waiting, self._waiting = lanes, self._waiting, {}
        self._lane_of.clear()
        for items in waiting.values():
            for item in items:
                for part in self._split(item) if isinstance(item, Chunk) else [item]:
                    self._put(part)

    def _split(self, chunk: Chunk) -> list[Chunk]:
        """Ticks by lane, as they may be of several where there are more lanes than before."""
        lanes = [self.lane(name) for name in chunk.sessions]
        return [chunk] if len(set(lanes)) == 1 else [chunk.take(lanes, lane) for lane in sorted(set(lanes))]

    def control(self, control: Control, token: bytes) -> None:
        self._put((control, token))

    def ticks(self, chunk: Chunk) -> None:
        """Ticks of one session, or of sessions of one lane (`lane`)."""
        self._put(chunk)

    def _put(self, item: _Item) -> None:
        lane = self.lane(item.sessions[0] if isinstance(item, Chunk) else item[0].session)
        self._waiting.setdefault(lane, deque()).append(item)

    def lane(self, session: str) -> int:
        found = self._lane_of.get(session)
        if found is None:
            partition = partition_of(session, self._partitions)
            found = self._lane_of[session] = lane_of(partition, self._lanes, self._partitions)
        return found

    def forget(self, session: str) -> None:
        self._lane_of.pop(session, None)

    def take(self) -> list[tuple[int, bytes]]:
        """The next frame of each lane: the lane's number and the frame. What does not fit waits for the next call."""
        found = []
        for number, items in list(self._waiting.items()):
            lane = _Lane()
            while items and lane.bytes < MOST_BYTES // 2:
                item = items.popleft()
                if isinstance(item, Chunk):
                    lane.add_chunk(item)
                else:
                    lane.add_control(*item)
            if not items:
                del self._waiting[number]
            built = [of.build() for of in lane.rounds]
            rounds, tokens = [of for of, _ in built], [token for _, some in built for token in some]
            found.append((number, write_frame(self._client, rounds, tokens)))
        return found
