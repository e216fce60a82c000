"""The protocol between a client and a server of sessions: each message is one msgpack map.

No sockets, no clocks. The key `op` is the type of the message; unknown keys are ignored, so that either side may be
newer. Vectors are raw little-endian float32, in the order of the modalities or heads of `welcome`; columns are the raw
little-endian bytes of all ticks of a block (`block_codec` makes and reads them). docs/serve.md lists all messages, for
clients in other languages.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.types import MAX_TICK, HeadSpec, ModalitySpec, ModelSpec, Nanoseconds

VERSION = 2
OLDEST = 1
"""The oldest version that is spoken: it has no `group`, `steps`, `grouped` and `preds`."""
MAX_BYTES = 2**22
"""Limit of a message: 256 ticks of 4,000 numbers are shorter."""
MAX_ROWS = 4096
"""Sessions of a group."""
_MAX_MODALITIES = 64

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=topics.SESSION_NAME)]
_Token = Annotated[str, msgspec.Meta(max_length=128)]
_Index = Annotated[int, msgspec.Meta(ge=0, le=MAX_TICK)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_TICK + 1)]
_Vectors = Annotated[tuple[bytes | None, ...], msgspec.Meta(max_length=_MAX_MODALITIES)]
_Ages = Annotated[tuple[Nanoseconds, ...], msgspec.Meta(max_length=_MAX_MODALITIES)]
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
_Row = Annotated[int, msgspec.Meta(ge=0, lt=MAX_ROWS)]
ErrorName: TypeAlias = Literal["unknown", "duplicate", "evicted", "bad_tick", "bad_message", "failed", "overrun"]
RowError: TypeAlias = ErrorName | Literal["busy"]


class _Message(msgspec.Struct, frozen=True, gc=False, tag_field="op", kw_only=True):
    pass


# ---- requests --------------------------------------------------------------------------------------------------------


class Hello(_Message, frozen=True, tag="hello"):
    """Begin a connection. Answered by `welcome`."""

    version: int = VERSION
    """The newest one that the client speaks."""


class Open(_Message, frozen=True, tag="open"):
    """Begin a session, or continue one with its token. Answered by `ready`, `busy` or `refused`."""

    session: _Name
    token: _Token | None = None
    raw: bool = False
    """The client sends samples (`push`), and the server makes features and ticks of them."""


class Step(_Message, frozen=True, tag="step"):
    """One tick. Answered by `pred`, by `skipped` where the session had it already, or by `refused`."""

    session: _Name
    tick: _Index
    """From 0 on; a tick that is not newer than the newest one is not stepped."""
    event_ns: Nanoseconds
    """The tick's end by the client's clock; returned unchanged."""
    features: _Vectors
    """A vector for each modality; nil where absent."""
    age_ns: _Ages = ()
    """By modality: the tick's end minus the time of the newest sample, -1 where there is none. If left out: 0, and -1
    where absent."""


class OpenGroup(_Message, frozen=True, tag="group"):
    """Open sessions, as `open` does, as rows of a group that `steps` names. Answered by `grouped`, in one message or
    several. A session is in one group at most; a row is given to another session by a `group` that names that.
    """

    group: _Number
    """Chosen by the client; each connection has its own numbers."""
    sessions: Annotated[tuple[_Name, ...], msgspec.Meta(min_length=1, max_length=MAX_ROWS)]
    tokens: Annotated[tuple[_Token | None, ...], msgspec.Meta(max_length=MAX_ROWS)] = ()
    """One for each session, nil for a new one; if left out, all are new."""
    first: _Row = 0
    """The row of the first session; the others follow."""


class Steps(_Message, frozen=True, tag="steps"):
    """A block: one tick of each of N sessions of a group, as columns. Answered by one `preds`."""

    group: _Number
    block: _Index
    """Chosen by the client, and returned."""
    ticks: bytes
    """int64 [N], each as `tick` of `step`."""
    features: _Vectors
    """By modality: the vectors of the ticks that have it, in their order; nil where none has it."""
    rows: bytes = b""
    """uint32 [N]: rows of the group, none twice; "": all of them in order."""
    event_ns: bytes = b""
    """int64 [N]; "": 0."""
    present: _Vectors = ()
    """By modality: a byte (0 or 1) for each tick; nil, and if left out: all ticks have it, or none where `features` is
    nil."""
    age_ns: bytes = b""
    """int64 [N, modalities]; "": 0, and -1 where absent."""
    half: bool = False
    """Features are float16."""


class PushSample(_Message, frozen=True, tag="push"):
    """A sample for a raw session. Answered by `pushed`, or by `skipped` where the session had it already."""

    session: _Name
    push: _Index
    """Number of the push in its session, from 0 on without gaps."""
    stream: Annotated[str, msgspec.Meta(max_length=66)]
    """"": no sample; the time is `at_ns`, and nothing older comes."""
    data: bytes = b""
    """Sound: mono int16 at 16 kHz, little-endian. Picture: JPEG. Text: UTF-8. Signal: float32, little-endian."""
    at_ns: Nanoseconds | None = None
    """When it was taken, of sound its last sample, since the session's start; nil: at the newest time so far."""
    vector: bool = False
    """`data` is a feature vector of the stream, float32, as its encoder makes it."""


class Flush(_Message, frozen=True, tag="flush"):
    """Answered by `flushed` when all earlier messages are answered and the session's state, or a newer one, is on disk.
    Later ticks may be answered before that.
    """

    session: _Name


class Reset(_Message, frozen=True, tag="reset"):
    """Start the session's state anew; tick indices continue. Answered by `done` when that is on disk."""

    session: _Name


class Close(_Message, frozen=True, tag="close"):
    """End the session and delete its state. For an evicted session its token is needed. Answered by `done`."""

    session: _Name
    token: _Token | None = None


Request: TypeAlias = Hello | Open | OpenGroup | Step | Steps | PushSample | Flush | Reset | Close


# ---- replies ---------------------------------------------------------------------------------------------------------


class Modality(ModalitySpec, frozen=True, forbid_unknown_fields=False):
    """As in the model's contract; a newer server may send more keys."""


class Head(HeadSpec, frozen=True, forbid_unknown_fields=False):
    """As in the model's contract; a newer server may send more keys."""


class Welcome(_Message, frozen=True, tag="welcome"):
    version: int
    """The newest one that both sides speak."""
    name: str
    """Of the model."""
    model: str
    """sha256 of its file."""
    tick_ns: int
    queue: int
    """Ticks of one session that may wait for their answers; one more is refused with `overrun`."""
    modalities: tuple[Modality, ...]
    """In the order of `features`."""
    heads: tuple[Head, ...]
    """In the order of a prediction's `heads`."""


class Ready(_Message, frozen=True, tag="ready"):
    session: str
    token: str
    """Secret: a client that has it can take the session over. It does not change."""
    next: _Count
    """Index of the next tick, of a raw session number of the next push; earlier ones are skipped."""
    resumed: bool
    at_ns: int = 0
    """Of a raw session: its newest time so far."""


class BusyNow(_Message, frozen=True, tag="busy"):
    session: str
    why: str
    retry_s: float


class Refused(_Message, frozen=True, tag="refused"):
    """A request was refused."""

    error: ErrorName
    why: str
    session: str = ""
    tick: int = -1


class Pred(_Message, frozen=True, tag="pred"):
    session: str
    tick: int
    event_ns: int
    heads: tuple[bytes, ...]
    present: tuple[bool, ...]
    """By modality: whether it was used."""
    age_ns: tuple[int, ...]
    waited_ns: int
    """From receiving the tick until its step began."""
    step_ns: int
    """Duration of that step."""
    model: str
    """sha256."""


class RowRefused(msgspec.Struct, frozen=True, gc=False):
    """A session of a `group` that was not opened."""

    row: int
    error: RowError
    why: str
    retry_s: float = 0.0
    """With `busy`."""


class Grouped(_Message, frozen=True, tag="grouped"):
    """Rows of a group are open, from `first` on; others follow in further messages."""

    group: int
    first: int
    tokens: tuple[str, ...]
    """Of each session; "" where it was refused."""
    next: bytes
    """int64: index of each session's next tick."""
    resumed: bytes
    """A byte for each session: 1 where it continues from a saved state."""
    refused: tuple[RowRefused, ...] = ()


class RowsRefused(msgspec.Struct, frozen=True, gc=False):
    """Ticks of a `steps` that were refused for the same reason."""

    error: ErrorName
    why: str
    rows: bytes = b""
    """uint32: rows of the group; "": all of the block."""


class Preds(_Message, frozen=True, tag="preds"):
    """The answer to a block."""

    group: int
    block: int
    heads: tuple[bytes, ...]
    """By head: float32 [N, size]; none where no row was stepped."""
    waited_ns: int
    """From receiving the block until its step began."""
    step_ns: int
    model: str
    rows: bytes = b""
    """uint32 [N]: rows of the group that were stepped; "": all of the block, in its order."""
    skipped: bytes = b""
    """uint32: rows that had the tick already."""
    next: bytes = b""
    """int64: the next index of each of these."""
    refused: tuple[RowsRefused, ...] = ()


class Pushed(_Message, frozen=True, tag="pushed"):
    """The answer to a push: the predictions of the ticks that it completes, which have times of the session."""

    session: str
    push: int
    predictions: tuple[Pred, ...]
    error: str = ""
    """Why the sample was refused; "" if it was not."""


class Skipped(_Message, frozen=True, tag="skipped"):
    """The session had this tick (or push) already; it was not stepped again."""

    session: str
    tick: int
    next: int


class Flushed(_Message, frozen=True, tag="flushed"):
    session: str
    next: int
    """Every earlier tick is in the state on disk."""


class Done(_Message, frozen=True, tag="done"):
    """Reply to `reset` and `close`."""

    session: str


class EvictedNow(_Message, frozen=True, tag="evicted"):
    """Sent without a request: the session has lost its slot. Its token opens it again, while its state is kept."""

    session: str
    token: str
    """"" where another client has taken it over."""
    reason: Literal["idle", "cancelled", "leaving", "lost", "taken"]
    next: int


class Alive(_Message, frozen=True, tag="alive"):
    """Sent without a request to silent clients when some client has disconnected: which one was it? It is ignored."""


def welcome(spec: ModelSpec, queue: int, version: int = VERSION) -> Welcome:
    """The `welcome` of a server of this model."""
    return Welcome(
        version=version,
        name=spec.name,
        model=spec.sha256,
        tick_ns=spec.tick_ns,
        queue=queue,
        modalities=tuple(msgspec.convert(m, Modality, from_attributes=True) for m in spec.modalities),
        heads=tuple(msgspec.convert(h, Head, from_attributes=True) for h in spec.heads),
    )


Reply: TypeAlias = (
    Welcome
    | Ready
    | Grouped
    | BusyNow
    | Refused
    | Pred
    | Preds
    | Pushed
    | Skipped
    | Flushed
    | Done
    | EvictedNow
    | Alive
)

encode = msgspec.msgpack.Encoder().encode
_read_request = msgspec.msgpack.Decoder(Request).decode
_read_reply = msgspec.msgpack.Decoder(Reply).decode


def _read(read: Any, content: bytes) -> Any:
    if len(content) > MAX_BYTES:
        raise WireError(f"a message has at most {MAX_BYTES} bytes, this one has {len(content)}")
    try:
        return read(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise WireError(f"this is not a message of the protocol: {e}") from e


def read_request(content: bytes) -> Request:
    """Decode a request; raises WireError where it is not valid."""
    request: Request = _read(_read_request, content)
    return request


def read_reply(content: bytes) -> Reply:
    """Decode a reply; raises WireError where it is not valid."""
    reply: Reply = _read(_read_reply, content)
    return reply
