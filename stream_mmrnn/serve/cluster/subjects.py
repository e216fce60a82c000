"""Names of a cluster's subjects, streams and buckets in NATS, and the messages in them. Does no I/O.

    PREFIX.in.SESSION              a client's messages (`serve.protocol`), which the stream PREFIX_in stores as
    PREFIX.log.PARTITION.SESSION   partitioned by the server's hash of the name
    PREFIX.out.PARTITION.SESSION.CLIENT  an engine's answers, which the stream PREFIX_out stores and republishes as
    PREFIX.said.PARTITION.SESSION.CLIENT to which that client subscribes
    PREFIX.out.PARTITION.=fence    the newest owner of a partition: each write names the sequence number of this
                                   message, and the server rejects a write that names an older one
    PREFIX.ask.CLIENT              a client's questions (`questions`), which any engine answers; not stored
    PREFIX.beat                    heartbeats of engines; not stored
    bucket PREFIX_leases           `table`: the leases; `model`, `key`: the model and a hash of the key of all engines
    bucket PREFIX_states           `state.PARTITION.SESSION`: its newest snapshot; `low.PARTITION`: where to start

CLIENT is USER.CONNECTION, so that the server can let a user read its own answers only. A client needs PREFIX.in.*, and
PREFIX.ask.USER.* and PREFIX.said.*.*.USER.* with its own name. In a subject, `.` in a session's name is written `=`,
because `.` separates tokens.

A message's ID is "CLIENT NUMBER PROOF". The log keeps the first of the messages with one ID, and an engine takes it for
its owner's only with the proof, which needs the session's token: so a stranger's message neither takes the place of
the owner's in the log nor is stepped.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from typing import Annotated, TypeVar

import msgspec

PARTITIONS = 64
"""Fixed for the life of a cluster: the server computes a session's partition."""
PREFIX = "mmrnn"
USER = re.compile(r"[A-Za-z0-9_-]{1,32}", re.ASCII)
CLIENT = re.compile(USER.pattern + r"\.[a-z0-9]{1,32}", re.ASCII)
FENCE = "=fence"
"""Not the name of a session: none begins with a dot."""
LOG_S = 120.0
"""How long the log of requests is kept. Snapshots are much younger."""
ANSWERS_S = 120.0
"""How long answers are kept, for a client that was disconnected."""
STATE_EVERY_S = 5.0
"""A session without ticks for so long is saved, however few ticks are unsaved."""


def token_of(session: str) -> str:
    """A session's name as one token of a subject or key."""
    return session.replace(".", "=")


def session_of(token: str) -> str:
    return token.replace("=", ".")


def proof(token: str, client: str, number: str, session: str, content: bytes) -> str:
    """Of a message's ID: whoever made it has the session's token."""
    said = f"{client} {number} {session} ".encode() + content
    return hmac.new(token.encode(), said, hashlib.sha256).hexdigest()[:32]


class Names:
    """Subjects, streams and buckets of one cluster in a NATS account."""

    def __init__(self, prefix: str = PREFIX) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,32}", prefix):
            raise ValueError(prefix)
        self.prefix = prefix
        self.stream_in, self.stream_out = f"{prefix}_in", f"{prefix}_out"
        self.leases, self.states = f"{prefix}_leases", f"{prefix}_states"
        self.all_in, self.all_out, self.all_answers = f"{prefix}.in.*", f"{prefix}.out.>", f"{prefix}.said.>"
        self.log_of_all = f"{prefix}.log.{{{{partition({PARTITIONS},1)}}}}.{{{{wildcard(1)}}}}"
        self.beat, self.all_questions = f"{prefix}.beat", f"{prefix}.ask.*.*"

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

    def answers_to(self, client: str) -> str:
        return f"{self.prefix}.said.*.*.{client}"

    def questions_of(self, client: str) -> str:
        return f"{self.prefix}.ask.{client}"

    def asker(self, subject: str) -> str:
        """The client whose question has this subject."""
        return subject.removeprefix(f"{self.prefix}.ask.")


_Engine = Annotated[str, msgspec.Meta(max_length=64)]
_Epoch = Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)]


class Lease(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The owner of a partition."""

    engine: _Engine
    epoch: _Epoch
    """Grows with each owner. A lease with an empty `engine` was given back."""


class Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The value of `table`."""

    leases: dict[Annotated[int, msgspec.Meta(ge=0, lt=PARTITIONS)], Lease]


class Fence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The message of a partition's fence."""

    engine: _Engine
    epoch: _Epoch


_Stored = TypeVar("_Stored", Table, Fence)


def read_stored(raw: bytes, kind: type[_Stored]) -> _Stored | None:
    """A stored table or fence; None where these bytes are none."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def read_low(raw: bytes) -> int:
    """A stored low watermark; 0, where the log begins, if these bytes are none."""
    return int(raw) if re.fullmatch(rb"[0-9]{1,18}", raw) else 0


class Beat(msgspec.Struct, frozen=True):
    """The heartbeat of an engine, sent several times a second."""

    engine: str
    sessions: int
    leaving: bool = False
    """It gives its partitions back, and takes no more."""
    gone: bool = False
    """It has stopped: its last heartbeat."""
