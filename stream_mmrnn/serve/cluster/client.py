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


class AnswerReader:
    """Passes each answer to a client on once, in the order of the log, also where the connection was lost meanwhile."""

    def __init__(self, name: str, newest: int, receive: Receive) -> None:
        """`newest`: sequence number in the log of answers after which the client `name` reads."""
        self._name, self._newest, self._receive = name, newest, receive
        self._losses = self._caught_up = 0
        """How often the connection was lost, and how many of these losses left no answer to read any more."""
        self._missed = (0, 0)
        """A loss, and the newest answer that may have been missed by it: what is newer arrives by subscription."""
        self._held: dict[int, bytes] = {}
        """Answers that arrived before those that were missed had been read."""
        self._lock = asyncio.Lock()

    def receive(self, number: int, content: bytes) -> None:
        """An answer arrived by subscription."""
        if self._caught_up < self._losses:
            self._held[number] = content
        else:
            self._pass_on(number, content)

    def _pass_on(self, number: int, content: bytes) -> None:
        if number > self._newest:
            self._newest = number
            self._receive(content)

    def lost(self) -> None:
        """The connection was lost, and answers with it."""
        self._losses += 1

    async def catch_up(self, link: Link) -> None:
        """Read what was missed, once the subscription stands again; after a failure the next call goes on."""
        async with self._lock:
            losses = self._losses
            if self._caught_up == losses:
                return
            with contextlib.suppress(*FAILURES):
                if self._missed[0] != losses:
                    self._missed = losses, await link.newest()
                if self._newest < self._missed[1]:
                    async for number, content in link.answers_between(self._name, self._newest, self._missed[1]):
                        self._pass_on(number, content)
                self._caught_up = losses
            if self._caught_up == self._losses:
                held, self._held = self._held, {}
                for number in sorted(held):
                    self._pass_on(number, held[number])


class _NatsTransport:
    """Sends the messages of each session in order, and each until it is in the log; the log deduplicates them."""

    def __init__(self, receive: Receive) -> None:
        self._deliver = receive
        self._link: Link | None = None
        self._name = new_name()
        self._queues: dict[str, _SendQueue] = {}
        self._welcome = b""
        self._sent = 0
        self._answers: AnswerReader | None = None

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
                    self._answers = AnswerReader(self._name, await self.link.newest(), self._deliver)
                    await self.link.receive_answers(self._name, self._answers.receive)
                    await connection.flush()
                    self._welcome = welcome
                    return
            if asyncio.get_running_loop().time() > end_s:
                await connection.close()
                raise NotRunning(f"no engine has served a cluster at {url} yet: {ClusterClient.starting}")
            await asyncio.sleep(0.1)

    async def _lost(self) -> None:
        if self._link is not None:
            self._link.connection_lost()
        if self._answers is not None:
            self._answers.lost()

    async def _returned(self) -> None:
        if self._link is not None and self._answers is not None:
            await self._answers.catch_up(self._link)

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

    async def again(self, session: str) -> None:
        await self._returned()

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
