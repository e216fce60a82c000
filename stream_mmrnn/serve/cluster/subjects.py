"""What a cluster keeps in NATS, and under which names. Pure: it asks nobody.

    PREFIX.in.SESSION              a client's messages (`serve.protocol`), which the stream PREFIX_in keeps as
    PREFIX.log.PARTITION.SESSION   by the server's own hash of the name, so that everybody agrees
    PREFIX.out.PARTITION.SESSION.CLIENT  what an engine says, which the stream PREFIX_out, once it has it, says again as
    PREFIX.said.PARTITION.SESSION.CLIENT where that client listens
    PREFIX.out.PARTITION.=fence    the newest owner of a partition: whoever writes to it names the number of this, and
                                   the server refuses who names an older one
    PREFIX.beat                    engines that are alive; not kept
    bucket PREFIX_leases           `table`: which engine has what; `model`, `secret`: what they have in common
    bucket PREFIX_states           `state.PARTITION.SESSION`: its newest snapshot; `low.PARTITION`: where to read from

A session's name stands in a subject with `=` for `.`, which would divide it. Knows nothing about engines or sockets.
"""

from __future__ import annotations

import re

import msgspec

PARTITIONS = 64
"""Fixed for a cluster's life: a session's partition is what the server's hash says."""
PREFIX = "mmrnn"
CLIENT = re.compile(r"[a-z0-9]{1,32}", re.ASCII)
"""How a client may call itself: it names its messages so, CLIENT and a number."""
FENCE = "=fence"
"""No session is written so: none begins with a dot."""
LOG_S = 120.0
"""How long the log of what clients said is kept. Snapshots are newer than a fraction of it."""
SAID_S = 120.0
"""How long what engines said is kept, for a client that was away."""
STATE_EVERY_S = 5.0
"""A session that has been silent for so long is written down as it is, however few ticks that are."""


def token_of(session: str) -> str:
    """A session's name as one part of a subject or key."""
    return session.replace(".", "=")


def session_of(token: str) -> str:
    return token.replace("=", ".")


class Names:
    """Subjects, streams and buckets of one cluster in a NATS account."""

    def __init__(self, prefix: str = PREFIX) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", prefix):
            raise ValueError(prefix)
        self.prefix = prefix
        self.stream_in, self.stream_out = f"{prefix}_in", f"{prefix}_out"
        self.leases, self.states = f"{prefix}_leases", f"{prefix}_states"
        self.all_in, self.all_out, self.all_said = f"{prefix}.in.*", f"{prefix}.out.>", f"{prefix}.said.>"
        self.log_of_all = f"{prefix}.log.{{{{partition({PARTITIONS},1)}}}}.{{{{wildcard(1)}}}}"
        self.beat = f"{prefix}.beat"

    def into(self, session: str) -> str:
        return f"{self.prefix}.in.{token_of(session)}"

    def log(self, partition: int) -> str:
        return f"{self.prefix}.log.{partition}.*"

    def out(self, partition: int, session: str, client: str) -> str:
        return f"{self.prefix}.out.{partition}.{token_of(session)}.{client}"

    def fence(self, partition: int) -> str:
        return f"{self.prefix}.out.{partition}.{FENCE}"

    def out_to(self, client: str) -> str:
        return f"{self.prefix}.out.*.*.{client}"

    def said_to(self, client: str) -> str:
        return f"{self.prefix}.said.*.*.{client}"


class Lease(msgspec.Struct, frozen=True):
    """Who has a partition, and since which revision of the table."""

    engine: str
    epoch: int
    """Grows with every owner; 0: nobody's, whoever had it gave it back."""


class Table(msgspec.Struct, frozen=True):
    """The value of `table`."""

    leases: dict[int, Lease] = {}


class Fence(msgspec.Struct, frozen=True):
    """The message of a partition's fence."""

    engine: str
    epoch: int


class Beat(msgspec.Struct, frozen=True):
    """What an engine says of itself, several times a second."""

    engine: str
    sessions: int
    leaving: bool = False
    """It takes no more partitions, and gives those away that it has."""
    gone: bool = False
    """Its last word."""
