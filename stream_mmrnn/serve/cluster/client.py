"""ClusterClient: sessions on a cluster, with the calls of `AsyncClient`; which engine serves one it never knows.

    async with ClusterClient("nats://127.0.0.1:4222") as client, await client.open("alice") as session:
        answer = await session.step({"audio": vector})

What is sent is in the cluster's log before the next of its session is sent; what was said while the connection was away
is read from the log of answers. Knows nothing about engines.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from stream_mmrnn.core.errors import NotRunning
from stream_mmrnn.serve.async_client import AsyncClient, Hear, Transport, end_tasks
from stream_mmrnn.serve.cluster.nats import FAILURES, Link, connect, new_name
from stream_mmrnn.serve.cluster.subjects import PREFIX, Names


class _Line:
    """What one session has to say, in order."""

    def __init__(self, sender: Callable[[_Line], Coroutine[Any, Any, None]]) -> None:
        self.queue: asyncio.Queue[bytes] = asyncio.Queue()
        self.sender = asyncio.create_task(sender(self))


class _OverNats:
    """Messages of each session in their order; a message is sent until it is in the log, which has it once."""

    def __init__(self, hear: Hear) -> None:
        self._give = hear
        self._link: Link | None = None
        self._name = new_name()
        self._lines: dict[str, _Line] = {}
        self._welcome = b""
        self._sent = 0
        self._heard = 0
        """The number of the newest answer, in the log of answers."""
        self._missed_from: int | None = None
        """What it was when the connection was lost, until what was said since has been read."""
        self._seen: set[int] = set()
        """And what came by itself meanwhile."""

    @property
    def link(self) -> Link:
        assert self._link is not None
        return self._link

    async def begin(self, url: str, prefix: str, credentials: str, timeout_s: float) -> None:
        """Connect, and see who they are; raises NotRunning where nobody is there in that time."""
        end_s = asyncio.get_running_loop().time() + timeout_s
        connection = await connect(url, credentials, self._returned, timeout_s, self._lost)
        self._link = Link(connection, Names(prefix))
        while True:
            with contextlib.suppress(*FAILURES):
                welcome = await self.link.common("model") if await self.link.find() else None
                if welcome is not None:
                    self._heard = await self.link.newest()
                    await connection.subscribe(self.link.names.said_to(self._name), cb=self._handle)
                    await connection.flush()
                    self._welcome = welcome
                    return
            if asyncio.get_running_loop().time() > end_s:
                await connection.close()
                raise NotRunning(f"no engine has served a cluster at {url} yet: {ClusterClient.starting}")
            await asyncio.sleep(0.1)

    async def _handle(self, message: Any) -> None:
        self._receive(int(message.headers["Nats-Sequence"]), message.data)

    def _receive(self, number: int, content: bytes) -> None:
        if number in self._seen or number <= (self._heard if self._missed_from is None else self._missed_from):
            return
        if self._missed_from is not None:
            self._seen.add(number)
        self._heard = max(self._heard, number)
        self._give(content)

    async def _lost(self) -> None:
        if self._missed_from is None:
            self._missed_from = self._heard

    def post(self, session: str, content: bytes) -> None:
        if not session:  # `hello`
            self._give(self._welcome)
            return
        line = self._lines.get(session)
        if line is None:
            line = self._lines[session] = _Line(lambda line: self._speak(session, line))
        line.queue.put_nowait(content)

    async def _speak(self, session: str, line: _Line) -> None:
        while True:
            content = await line.queue.get()
            self._sent += 1
            name = f"{self._name} {self._sent}"
            while True:
                try:
                    await self.link.log(session, name, content)
                    break
                except FAILURES:
                    await asyncio.sleep(0.05)

    async def _returned(self) -> None:
        if self._link is not None:
            self._link.give_up()  # what has no receipt is sent again at once; the log has it once
        await self._catch_up()

    async def _catch_up(self) -> None:
        """What was said while we did not hear."""
        if self._link is None:
            return
        since = self._heard if self._missed_from is None else self._missed_from
        with contextlib.suppress(*FAILURES):
            async for number, content in self.link.said_after(self._name, since):
                self._receive(number, content)
            self._missed_from = None
            self._seen.clear()

    async def again(self, session: str) -> None:
        if self._missed_from is not None:  # else what is said comes by itself
            await self._catch_up()

    async def end(self, session: str) -> None:
        line = self._lines.pop(session, None)
        if line is not None:
            await end_tasks(line.sender)

    async def close(self) -> None:
        for session in list(self._lines):
            await self.end(session)
        with contextlib.suppress(*FAILURES):
            await self.link.nats.close()


class ClusterClient(AsyncClient):
    """A client of a cluster: `async with ClusterClient(url) as client`."""

    starting = "start some by stream-mmrnn serve --cluster URL"

    def __init__(self, url: str, *, prefix: str = PREFIX, credentials: str = "", timeout_s: float = 5.0) -> None:
        """`url`: nats://HOST:PORT, several separated by commas; `prefix`: the cluster's name on that server;
        `credentials`: a file of NATS's.
        """
        super().__init__(url, timeout_s=timeout_s)
        self._prefix, self._credentials = prefix, credentials

    async def _connect(self, hear: Hear) -> Transport:
        transport = _OverNats(hear)
        await transport.begin(self._address, self._prefix, self._credentials, self._timeout_s)
        return transport
