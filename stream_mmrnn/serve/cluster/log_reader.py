"""LogReader: reads subjects of the log, and survives restarts of the server and lost connections.

Knows nothing about what is in messages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from stream_mmrnn.serve.cluster.nats import Followed, Heartbeat, Link, Logged

_TIMEOUT_S = 3.5
"""The server sends a heartbeat every second."""
Handler = Callable[[str, int, bytes], None]
"""Called with subject, sequence number and content."""


class LogReader:
    """Passes each message to a handler, in the order of sequence numbers, without gaps."""

    def __init__(self, link: Link, handler: Handler) -> None:
        self.read = 0
        """The newest sequence number that was passed on."""
        self.subjects: list[str] = []
        self._link, self._handler = link, handler
        self._followed: Followed | None = None
        self._lock = asyncio.Lock()
        self.changes = 0
        """How often `change` was called: what was passed on before counts no more."""
        self._run = 0
        """Counts subscriptions: messages of an earlier one are ignored."""
        self._expected = 1
        self._alive_s = float("-inf")

    @property
    def silent(self) -> bool:
        """Whether heartbeats stopped or a message is missing: then `begin` again."""
        return bool(self.subjects) and asyncio.get_running_loop().time() - self._alive_s > _TIMEOUT_S

    def change(self, subjects: list[str], after: int) -> None:
        """Read other subjects, from after this number on: nothing more is passed on before `begin`."""
        self.subjects, self.read = subjects, after
        self.changes += 1
        self._run += 1
        self._alive_s = float("-inf")

    async def begin(self) -> None:
        """Subscribe (again), after the newest message that was read. Raises one of FAILURES."""
        async with self._lock:
            await self._end()
            if not self.subjects:
                return
            self._expected = 1
            self._alive_s = float("-inf")  # until the subscription stands
            run = self._run
            self._followed = await self._link.follow(self.subjects, self.read, partial(self._handle, run))
            if run == self._run:  # else a message was lost meanwhile
                self._alive_s = asyncio.get_running_loop().time()

    def _handle(self, run: int, message: Logged | Heartbeat) -> None:
        if run != self._run:
            return
        lost = message.delivered >= self._expected if isinstance(message, Heartbeat) else message.nth != self._expected
        if lost:
            self._alive_s = float("-inf")  # a gap: subscribe again from there
            self._run += 1
            return
        self._alive_s = asyncio.get_running_loop().time()
        if not isinstance(message, Heartbeat):
            self._expected += 1
            self.read = message.number
            self._handler(message.subject, message.number, message.content)

    async def end(self) -> None:
        """Stop reading."""
        async with self._lock:
            await self._end()

    async def _end(self) -> None:
        self._run += 1
        followed, self._followed = self._followed, None
        if followed is not None:
            await self._link.leave(followed)
