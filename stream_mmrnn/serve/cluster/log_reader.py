"""Reading: one partition's part of the log from a number on, whatever becomes of server and connection meanwhile.

Knows nothing about NATS but by a link, nor about what messages say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from stream_mmrnn.serve.cluster.nats import Followed, Link, Logged

_SILENT_S = 3.5
"""The server gives a sign of life every second."""
Heard = Callable[[str, int, str, bytes], None]
"""Session, number, client, content."""


class LogReader:
    """Gives messages in the order of their numbers, each once, or again from an older one; never leaves one out."""

    def __init__(self, link: Link, partition: int, after: int, heard: Heard) -> None:
        self.read = after
        """The newest number that was given."""
        self._link, self._partition, self._heard = link, partition, heard
        self._followed: Followed | None = None
        self._lock = asyncio.Lock()
        self._run = 0
        """Counts beginnings: what still comes of the one before is not listened to."""
        self._expected = 1
        self._alive_s = float("-inf")

    @property
    def silent(self) -> bool:
        """Nothing came for long, or something is missing: it is to be begun again."""
        return asyncio.get_running_loop().time() - self._alive_s > _SILENT_S

    async def begin(self) -> None:
        """Read on; also where the server has forgotten us. Raises one of FAILURES."""
        async with self._lock:
            await self._end()
            self._expected = 1
            self._alive_s = float("-inf")  # until somebody sends
            self._followed = await self._link.follow(self._partition, self.read, partial(self._handle, self._run))
            self._alive_s = max(self._alive_s, asyncio.get_running_loop().time())

    def _handle(self, run: int, message: Logged | None) -> None:
        if run != self._run:
            return
        if message is not None and message.nth != self._expected:
            self._alive_s = float("-inf")  # one is missing between: from there on it is read again
            self._run += 1
            return
        self._alive_s = asyncio.get_running_loop().time()
        if message is not None:
            self._expected += 1
            self.read = message.number
            self._heard(message.session, message.number, message.client, message.content)

    async def end(self) -> None:
        """Read no more."""
        async with self._lock:
            await self._end()

    async def _end(self) -> None:
        self._run += 1
        followed, self._followed = self._followed, None
        if followed is not None:
            await self._link.leave(followed)
