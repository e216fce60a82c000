"""ClusterClient: sessions on a cluster, with the calls of `AsyncClient`.

    async with ClusterClient("nats://127.0.0.1:4222") as client, await client.open("alice") as session:
        answer = await session.step({"audio": vector})

Each message of a session is stored in the cluster's log before the next one is sent. Answers that were missed while the
connection was lost are read from the log of answers. Knows nothing about engines.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

from stream_mmrnn.core.errors import NotRunning
from stream_mmrnn.serve.async_client import AsyncClient, Receive, Transport, end_tasks
from stream_mmrnn.serve.cluster.nats import FAILURES, Link, connect, new_name
from stream_mmrnn.serve.cluster.subjects import PREFIX, Names


class _SendQueue:
    """The messages of one session, in order."""

    def __init__(self, sender: Callable[[_SendQueue], Coroutine[Any, Any, None]]) -> None:
        self.messages: asyncio.Queue[bytes] = asyncio.Queue()
        self.sender = asyncio.create_task(sender(self))


class _NatsTransport:
    """Sends the messages of each session in order, and each until it is in the log; the log deduplicates them."""

    def __init__(self, receive: Receive) -> None:
        self._deliver = receive
        self._link: Link | None = None
        self._name = new_name()
        self._queues: dict[str, _SendQueue] = {}
        self._welcome = b""
        self._sent = 0
        self._newest = 0
        """Sequence number of the newest answer, in the log of answers."""
        self._missed_from: int | None = None
        """`_newest` when the connection was lost; None once the answers since then have been read."""
        self._seen: set[int] = set()
        """Answers that arrived on the new connection meanwhile."""

    @property
    def link(self) -> Link:
        assert self._link is not None
        return self._link

    async def begin(self, url: str, prefix: str, credentials: str, timeout_s: float) -> None:
        """Connect, and read the cluster's model; raises NotRunning where no server or engine is there in time."""
        end_s = asyncio.get_running_loop().time() + timeout_s
        connection = await connect(url, credentials, self._returned, timeout_s, self._lost)
        self._link = Link(connection, Names(prefix))
        while True:
            with contextlib.suppress(*FAILURES):
                welcome = await self.link.shared("model") if await self.link.find() else None
                if welcome is not None:
                    self._newest = await self.link.newest()
                    await connection.subscribe(self.link.names.answers_to(self._name), cb=self._handle)
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
        if number in self._seen or number <= (self._newest if self._missed_from is None else self._missed_from):
            return
        if self._missed_from is not None:
            self._seen.add(number)
        self._newest = max(self._newest, number)
        self._deliver(content)

    async def _lost(self) -> None:
        if self._missed_from is None:
            self._missed_from = self._newest

    def post(self, session: str, content: bytes) -> None:
        if not session:  # `hello`
            self._deliver(self._welcome)
            return
        queue = self._queues.get(session)
        if queue is None:
            queue = self._queues[session] = _SendQueue(lambda queue: self._run_sender(session, queue))
        queue.messages.put_nowait(content)

    async def _run_sender(self, session: str, queue: _SendQueue) -> None:
        while True:
            content = await queue.messages.get()
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
            self._link.connection_returned()  # messages without a receipt are sent again at once
        await self._catch_up()

    async def _catch_up(self) -> None:
        """Read the answers that were missed while the connection was lost."""
        if self._link is None:
            return
        since = self._newest if self._missed_from is None else self._missed_from
        with contextlib.suppress(*FAILURES):
            async for number, content in self.link.answers_after(self._name, since):
                self._receive(number, content)
            self._missed_from = None
            self._seen.clear()

    async def again(self, session: str) -> None:
        if self._missed_from is not None:  # else answers arrive by subscription
            await self._catch_up()

    async def end(self, session: str) -> None:
        queue = self._queues.pop(session, None)
        if queue is not None:
            await end_tasks(queue.sender)

    async def close(self) -> None:
        for session in list(self._queues):
            await self.end(session)
        with contextlib.suppress(*FAILURES):
            await self.link.nats.close()


class ClusterClient(AsyncClient):
    """A client of a cluster: `async with ClusterClient(url) as client`."""

    starting = "start some by stream-mmrnn serve --cluster URL"

    def __init__(self, url: str, *, prefix: str = PREFIX, credentials: str = "", timeout_s: float = 5.0) -> None:
        """`url`: nats://HOST:PORT, several separated by commas; `prefix`: the cluster's name on that server;
        `credentials`: a NATS credentials file.
        """
        super().__init__(url, timeout_s=timeout_s)
        self._prefix, self._credentials = prefix, credentials

    async def _connect(self, receive: Receive) -> Transport:
        transport = _NatsTransport(receive)
        await transport.begin(self._address, self._prefix, self._credentials, self._timeout_s)
        return transport
