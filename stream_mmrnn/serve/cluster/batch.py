"""Batch: what a client's sessions have to say, gathered into few frames: one for each lane.

The messages of a session keep their order: a later one is in a later round. Knows nothing about NATS or answers.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

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


class Batch:
    """Takes messages in order; `take` returns what goes into the log next."""

    def __init__(self, client: str, partitions: int) -> None:
        self._client, self._partitions = client, partitions
        self.lanes = 1
        """Into how many lanes it divides: any number of `subjects.LANES`, and at each `take` another one."""
        self._waiting: list[tuple[Control, bytes] | Chunk] = []
        self._lane_of: dict[str, int] = {}
        self._lanes_known = 1

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def control(self, control: Control, token: bytes) -> None:
        self._waiting.append((control, token))

    def ticks(self, chunk: Chunk) -> None:
        """Ticks of one session, or of sessions of one lane (`lane`)."""
        self._waiting.append(chunk)

    def lane(self, session: str) -> int:
        if self._lanes_known != self.lanes:
            self._lane_of.clear()
            self._lanes_known = self.lanes
        found = self._lane_of.get(session)
        if found is None:
            partition = partition_of(session, self._partitions)
            found = self._lane_of[session] = lane_of(partition, self.lanes, self._partitions)
        return found

    def forget(self, session: str) -> None:
        self._lane_of.pop(session, None)

    def take(self) -> list[tuple[int, bytes]]:
        """The next frame of each lane: the lane's number and the frame. What does not fit waits for the next call."""
        lanes: dict[int, _Lane] = {}
        left: list[tuple[Control, bytes] | Chunk] = []
        full: set[int] = set()
        for item in self._waiting:
            number = self.lane(item.sessions[0] if isinstance(item, Chunk) else item[0].session)
            lane = lanes.setdefault(number, _Lane())
            if number in full or lane.bytes > MOST_BYTES // 2:
                full.add(number)
                left.append(item)
            elif isinstance(item, Chunk):
                lane.add_chunk(item)
            else:
                lane.add_control(*item)
        self._waiting = left
        found = []
        for number, lane in lanes.items():
            built = [of.build() for of in lane.rounds]
            rounds, tokens = [of for of, _ in built], [token for _, some in built for token in some]
            found.append((number, write_frame(self._client, rounds, tokens)))
        return found
