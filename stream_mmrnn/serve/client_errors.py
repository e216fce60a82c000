"""The errors that a server's refusals become in a client."""

from __future__ import annotations

from stream_mmrnn.core.errors import BadTick, DuplicateSession, Evicted, SessionError, UnknownSession

ERRORS: dict[str, type[SessionError]] = {
    "unknown": UnknownSession,
    "duplicate": DuplicateSession,
    "evicted": Evicted,
    "bad_tick": BadTick,
}
