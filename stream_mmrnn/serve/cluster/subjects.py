"""Names of a cluster's subjects, streams and buckets in NATS, and the small values in them. Does no I/O.

    PREFIX.in.LANES.LANE.CLIENT  a client's messages (`frames`), which the stream PREFIX_in stores
    PREFIX.said.CLIENT           the engines' answers (`frames`), to which that client subscribes; not stored
    PREFIX.ask.CLIENT            a client's question which model is served, which any engine answers; not stored
    PREFIX.beat                  heartbeats of engines; not stored
    PREFIX.table                 the table of leases, whenever it has changed
    bucket PREFIX_leases         `table`: the leases; `model`, `partitions`, `key`: the same for all engines (of the
                                 key a hash)
    bucket PREFIX_states         `piece.NAME`: the states of some partitions (`pieces`)

CLIENT is USER.CONNECTION, so that the server can let a user write and read under its own name only. A client needs
PREFIX.in.*.*.USER.*, PREFIX.ask.USER.* and PREFIX.said.USER.*.

A session's partition is a hash of its name. A lane is a range of partitions: a client that has sessions of many engines
writes to as many lanes as there are engines, roughly, and each engine reads the lanes that overlap its partitions. How
many lanes a client uses is its own choice in each message: the log has one order over all of them.

A message's ID cannot be foreseen, so that no other message has it before. The log keeps the first one with an ID.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from typing import Annotated

import msgspec

PREFIX = "mmrnn"
USER = re.compile(r"[A-Za-z0-9_-]{1,32}", re.ASCII)
CLIENT = re.compile(USER.pattern + r"\.[a-z0-9]{1,32}", re.ASCII)
LANES = (1, 4, 16, 64)
"""Into how many lanes the partitions may be divided."""
LOG_S = 120.0
"""How long the log is kept. States are much younger."""
STATE_EVERY_S = 5.0
"""The states of partitions are saved at least so often while the log grows, however few ticks are unsaved."""


def partition_of(session: str, partitions: int) -> int:
    """The partition of a session, of so many."""
    return zlib.crc32(session.encode()) % partitions


def lane_of(partition: int, lanes: int, partitions: int) -> int:
    """The lane of a partition, where there are so many lanes."""
    return partition * lanes // partitions


def lanes_for(engines: int) -> int:
    """Into how many lanes a client should divide its messages for so many engines."""
    return max(lanes for lanes in LANES if lanes <= max(engines, 1))


class Names:
    """Subjects, streams and buckets of one cluster in a NATS account."""

    def __init__(self, prefix: str = PREFIX) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", prefix):
            raise ValueError(prefix)
        self.prefix = prefix
        self.stream_in = f"{prefix}_in"
        self.leases, self.states = f"{prefix}_leases", f"{prefix}_states"
        self.all_in, self.table = f"{prefix}.in.>", f"{prefix}.table"
        self.beat, self.all_questions = f"{prefix}.beat", f"{prefix}.ask.*.*"

    def into(self, lanes: int, lane: int, client: str) -> str:
        return f"{self.prefix}.in.{lanes}.{lane}.{client}"

    def log_of(self, mine: Iterable[int], partitions: int) -> list[str]:
        """The subjects that a reader of these partitions needs: few, however many partitions there are."""
        numbers = sorted(mine)
        found = []
        for lanes in LANES:
            needed = sorted({lane_of(number, lanes, partitions) for number in numbers})
            whole = len(needed) == min(lanes, partitions)
            found += [f"{self.prefix}.in.{lanes}.{lane}.*.*" for lane in (["*"] if whole else needed)]
        return found

    def writer(self, subject: str) -> str:
        """The client that has written a message of the log, "" where the subject is not of one."""
        parts = subject.removeprefix(f"{self.prefix}.in.").split(".")
        client = ".".join(parts[2:])
        return client if CLIENT.fullmatch(client) else ""

    def answers_to(self, client: str) -> str:
        return f"{self.prefix}.said.{client}"

    def questions_of(self, client: str) -> str:
        return f"{self.prefix}.ask.{client}"

    def asker(self, subject: str) -> str:
        """The client whose question has this subject."""
        return subject.removeprefix(f"{self.prefix}.ask.")


PieceName = Annotated[str, msgspec.Meta(max_length=64, pattern=r"\A[a-z0-9-]*\Z")]


class Lease(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """The owner of a partition."""

    engine: Annotated[str, msgspec.Meta(max_length=64)]
    """"": it was given back."""
    epoch: Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]
    """Grows with each owner."""
    at: PieceName = ""
    """Which piece of the bucket has its states; "": none, it begins with nothing."""


class Table(msgspec.Struct, frozen=True):
    """Who owns which partition."""

    leases: dict[int, Lease]

    def to_bytes(self) -> bytes:
        """As JSON; consecutive partitions with equal leases are one entry."""
        runs: list[list[object]] = []
        before, last = None, -2
        for number in sorted(self.leases):
            lease = self.leases[number]
            if lease == before and number == last + 1:
                runs[-1][1] += 1  # type: ignore[operator]
            else:
                runs.append([number, 1, lease])
            before, last = lease, number
        return msgspec.json.encode({"leases": runs})


class _Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    leases: list[tuple[Annotated[int, msgspec.Meta(ge=0)], Annotated[int, msgspec.Meta(ge=1)], Lease]]


def read_table(raw: bytes, partitions: int) -> Table | None:
    """A stored table; None where these bytes are none of so many partitions."""
    try:
        stored = msgspec.json.decode(raw, type=_Stored)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    leases: dict[int, Lease] = {}
    for first, count, lease in stored.leases:
        if first + count > partitions:
            return None
        leases.update(dict.fromkeys(range(first, first + count), lease))
    return Table(leases)


class Beat(msgspec.Struct, frozen=True):
    """The heartbeat of an engine, sent several times a second."""

    engine: str
    sessions: int
    leaving: bool = False
    """It gives its partitions back, and takes no more."""
    gone: bool = False
    """It has stopped: its last heartbeat."""
