"""What a client and a server of sessions say to each other, as bytes: msgpack maps, one a message, and nothing else.

Pure: no sockets, no clocks. The key `op` says which message it is; unknown keys are ignored, so that either side may
be newer. Vectors are raw little-endian float32, in the order of the modalities or heads that `welcome` names. The page
docs/serve.md shows each for those who write a client in another language. Knows nothing about who is at the other end.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.types import HeadSpec, ModalitySpec, ModelSpec, Nanoseconds

VERSION = 1
MAX_BYTES = 2**20
"""Of a message: a tick of a hundred thousand numbers is shorter."""
_MAX_MODALITIES = 64

_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=topics.SESSION_NAME)]
_Token = Annotated[str, msgspec.Meta(max_length=128)]
_Index = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
_Vectors = Annotated[tuple[bytes | None, ...], msgspec.Meta(max_length=_MAX_MODALITIES)]
_Ages = Annotated[tuple[Nanoseconds, ...], msgspec.Meta(max_length=_MAX_MODALITIES)]


class _Message(msgspec.Struct, frozen=True, gc=False, tag_field="op", kw_only=True):
    pass


# ---- what a client says ----------------------------------------------------------------------------------------------


class Hello(_Message, frozen=True, tag="hello"):
    """Who are you? Answered by `welcome`."""

    version: int = VERSION


class Open(_Message, frozen=True, tag="open"):
    """Begin a session, or go on with one by its token. Answered by `ready`, `busy` or `refused`."""

    session: _Name
    token: _Token | None = None


class Step(_Message, frozen=True, tag="step"):
    """One tick. Answered by `pred`, by `skipped` where its session has seen it, or by `refused`."""

    session: _Name
    tick: _Index
    """From 0 on; what is not above the newest one is not stepped again."""
    event_ns: Nanoseconds
    """The tick's end, by whatever clock the client has; it comes back as it is."""
    features: _Vectors
    """A vector for each modality; nil: it is absent."""
    age_ns: _Ages = ()
    """Of each: the tick's end minus its newest sample's time, -1 where there never was one. Left out: 0, and -1 where
    absent."""


class Flush(_Message, frozen=True, tag="flush"):
    """Answered by `flushed` when what this client sent before is answered and the session's state is on disk."""

    session: _Name


class Reset(_Message, frozen=True, tag="reset"):
    """Start the session's state anew; its ticks count on. Answered by `done`."""

    session: _Name


class Close(_Message, frozen=True, tag="close"):
    """The session is over and nothing of it is kept. An evicted one wants its token for that. Answered by `done`."""

    session: _Name
    token: _Token | None = None


Request: TypeAlias = Hello | Open | Step | Flush | Reset | Close


# ---- what a server says ----------------------------------------------------------------------------------------------


class Modality(ModalitySpec, frozen=True, forbid_unknown_fields=False):
    """As the model's contract has it; a newer server may say more."""


class Head(HeadSpec, frozen=True, forbid_unknown_fields=False):
    """As the model's contract has it; a newer server may say more."""


class Welcome(_Message, frozen=True, tag="welcome"):
    version: int
    name: str
    """Of the model."""
    model: str
    """sha256 of its file."""
    tick_ns: int
    queue: int
    """Ticks of one session that may wait for their answers; one more is refused as `overrun`."""
    modalities: tuple[Modality, ...]
    """In the order of `features`."""
    heads: tuple[Head, ...]
    """In the order of a prediction's `heads`."""


class Ready(_Message, frozen=True, tag="ready"):
    session: str
    token: str
    """Secret: whoever has it can take the session over. It stays the same."""
    next: _Count
    """The first tick that is still to come; earlier ones are skipped."""
    resumed: bool


class BusyNow(_Message, frozen=True, tag="busy"):
    session: str
    why: str
    retry_s: float


class Refused(_Message, frozen=True, tag="refused"):
    """Something was not done."""

    error: Literal["unknown", "duplicate", "evicted", "bad_tick", "bad_message", "failed", "overrun"]
    why: str
    session: str = ""
    tick: int = -1


class Pred(_Message, frozen=True, tag="pred"):
    session: str
    tick: int
    event_ns: int
    heads: tuple[bytes, ...]
    present: tuple[bool, ...]
    """What was used."""
    age_ns: tuple[int, ...]
    waited_ns: int
    """From the server's having the tick to the beginning of its step, ..."""
    step_ns: int
    """... and how long that step took."""
    model: str
    """sha256."""


class Skipped(_Message, frozen=True, tag="skipped"):
    """The session has seen this tick; it was not stepped again."""

    session: str
    tick: int
    next: int


class Flushed(_Message, frozen=True, tag="flushed"):
    session: str
    next: int
    """Every tick before is in the state on disk."""


class Done(_Message, frozen=True, tag="done"):
    """Of `reset` and `close`."""

    session: str


class EvictedNow(_Message, frozen=True, tag="evicted"):
    """Unasked: the session has no slot any more. Its token brings it back, while its state is kept."""

    session: str
    token: str
    """"" where another client has taken it over."""
    reason: Literal["idle", "cancelled", "leaving", "lost", "taken"]
    next: int


def welcome(spec: ModelSpec, queue: int) -> Welcome:
    """What a server of this model says of itself."""
    return Welcome(
        version=VERSION,
        name=spec.name,
        model=spec.sha256,
        tick_ns=spec.tick_ns,
        queue=queue,
        modalities=tuple(msgspec.convert(m, Modality, from_attributes=True) for m in spec.modalities),
        heads=tuple(msgspec.convert(h, Head, from_attributes=True) for h in spec.heads),
    )


Reply: TypeAlias = Welcome | Ready | BusyNow | Refused | Pred | Skipped | Flushed | Done | EvictedNow

encode = msgspec.msgpack.Encoder().encode
_read_request = msgspec.msgpack.Decoder(Request).decode
_read_reply = msgspec.msgpack.Decoder(Reply).decode


def _read(read: Any, content: bytes) -> Any:
    if len(content) > MAX_BYTES:
        raise WireError(f"a message has at most {MAX_BYTES} bytes, this one has {len(content)}")
    try:
        return read(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise WireError(f"this is no message of the protocol: {e}") from e


def read_request(content: bytes) -> Request:
    """What a client says; raises WireError where it is nothing of ours."""
    request: Request = _read(_read_request, content)
    return request


def read_reply(content: bytes) -> Reply:
    """What a server says; raises WireError where it is nothing of ours."""
    reply: Reply = _read(_read_reply, content)
    return reply
