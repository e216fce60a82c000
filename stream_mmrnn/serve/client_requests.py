"""Requests of a client about one session: `flush`, `reset` and `close`, and which of them a reply answers.

A reply does not name its request. Replies of one type come in the order of their requests, and also to requests for
which nobody waits any more. Knows nothing about ticks and transports.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from stream_mmrnn.core.errors import SessionError
from stream_mmrnn.serve import protocol

SessionRequest: TypeAlias = protocol.Flush | protocol.Reset | protocol.Close
SessionReply: TypeAlias = protocol.Flushed | protocol.Done


class Asked(msgspec.Struct, eq=False):
    """One request; it is sent after the ticks that were sent before it."""

    request: SessionRequest
    before: int
    """Ticks of the session, or blocks of the group, from this one on come after it."""
    reply: SessionReply | SessionError | None = None
    is_awaited: bool = True
    is_old: bool = False
    """The session was opened again since it was sent: the reply may be lost."""

    def is_answered_by(self, reply: SessionReply) -> bool:
        """Whether the reply has the type that this request gets."""
        return isinstance(reply, protocol.Flushed) == isinstance(self.request, protocol.Flush)


class Outstanding:
    """The requests of one session that were sent and have no reply yet."""

    def __init__(self) -> None:
        self._asked: list[Asked] = []

    def add(self, asked: Asked) -> None:
        self._asked.append(asked)

    def reply(self, reply: SessionReply) -> Asked | None:
        """Give a reply to the oldest request that it can answer; returns that."""
        for asked in self._asked:
            if asked.is_answered_by(reply):
                self._asked.remove(asked)
                asked.reply = reply
                return asked
        return None

    def refuse(self, name: str, error: SessionError) -> bool:
        """Give a refusal, called `name` in the protocol, to a request; False where there is none."""
        if not self._asked:
            return False
        # that a state could not be written is said in the order of requests, all else at once
        self._asked.pop(0 if name == "failed" else -1).reply = error
        return True

    def reopened(self) -> None:
        """The session was opened again, perhaps by another server: it owes no replies."""
        self._asked = [asked for asked in self._asked if asked.is_awaited]
        for asked in self._asked:
            asked.is_old = True

    def give_up(self, asked: Asked) -> None:
        """Nobody waits for it any more: its reply is skipped when it comes."""
        asked.is_awaited = False
        if asked.is_old and asked in self._asked:
            self._asked.remove(asked)
