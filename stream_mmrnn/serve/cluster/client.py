"""ClusterClient: sessions on a cluster, with the calls of `AsyncClient`.

    async with ClusterClient("nats://127.0.0.1:4222") as client, await client.open("alice") as session:
        answer = await session.step({"audio": vector})

Each message of a session is stored in the cluster's log before the next one is sent. Answers that were missed while the
connection was lost are read from the log of answers, by an engine that is asked: a client reads no stream itself. The
ID of each message proves that its sender has the session's token. Knows nothing about leases and partitions.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from stream_mmrnn.core.errors import NotRunning, UsageError
from stream_mmrnn.serve.async_client import AsyncClient, Receive, Transport, end_tasks
from stream_mmrnn.serve.cluster.connection import connect, without_secrets
from stream_mmrnn.serve.cluster.nats import FAILURES, Link, new_name
from stream_mmrnn.serve.cluster.questions import ask_missed, ask_model
from stream_mmrnn.serve.cluster.subjects import PREFIX, USER, Names, proof

Missed = Callable[[int], AsyncIterator[tuple[int, bytes]]]
"""Stored answers after a number, in order, each with its number; raises one of FAILURES where some are missing."""


class _SendQueue:
    """The messages of one session, in order."""

    def __init__(self, sender: Callable[[_SendQueue], Coroutine[Any, Any, None]]) -> None:
        self.messages: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue()
        """Each with its ID."""
        self.sender = asyncio.create_task(sender(self))


class AnswerReader:
    """Passes each answer to a client on once, in the order of the log, also where the connection was lost meanwhile."""

    def __init__(self, newest: int, receive: Receive) -> None:
        """`newest`: sequence number in the log of answers after which the client reads."""
        self._newest, self._receive = newest, receive
        self._losses = self._caught_up = 0
        """How often the connection was lost, and how many of these losses left no answer to read any more."""
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

    async def catch_up(self, missed: Missed) -> bool:
        """Read what was missed, once the subscription stands again; whether nothing is missing any more.

        What is stored after the question arrives by subscription.
        """
        async with self._lock:
            losses = self._losses
            if self._caught_up == losses:
                return True
            try:
                async for number, content in missed(self._newest):
                    self._pass_on(number, content)
            except FAILURES:
                return False
            self._caught_up = losses
            if self._caught_up != self._losses:
                return False
            held, self._held = self._held, {}
            for number in sorted(held):
                self._pass_on(number, held[number])
            return True


class _NatsTransport:
    """Sends the messages of each session in order, and each until it is in the log; the log deduplicates them."""

    def __init__(self, receive: Receive, user: str) -> None:
        self._deliver = receive
        self._link: Link | None = None
        self._name = f"{user}.{new_name()}"
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
                self._welcome, newest = await ask_model(self.link, self._name)
                self._answers = AnswerReader(newest, self._deliver)
                await self.link.receive_answers(self._name, self._answers.receive)
                await connection.flush()
                return
            if asyncio.get_running_loop().time() > end_s:
                await connection.close()
                raise NotRunning(
                    f"no engine of a cluster answers {self._name.partition('.')[0]!r} at {without_secrets(url)}: "
                    f"{ClusterClient.starting}"
                )
            await asyncio.sleep(0.1)

    async def _lost(self) -> None:
        if self._link is not None:
            self._link.connection_lost()
        if self._answers is not None:
            self._answers.lost()

    async def _returned(self) -> None:
        if self._answers is not None:
            while self.link.nats.is_connected and not await self._answers.catch_up(self._missed):
                await asyncio.sleep(0.05)  # no engine is there yet

    def _missed(self, after: int) -> AsyncIterator[tuple[int, bytes]]:
        return ask_missed(self.link, self._name, after)

    def post(self, session: str, content: bytes, token: str | None = None) -> None:
        if not session:  # `hello`
            self._deliver(self._welcome)
            return
        queue = self._queues.get(session)
        if queue is None:
            queue = self._queues[session] = _SendQueue(lambda queue: self._run_sender(session, queue))
        self._sent += 1
        number = str(self._sent)
        # without a token: what nobody can foresee, so that no stranger's message has this ID before ours
        proven = proof(token, self._name, number, session, content) if token else secrets.token_hex(16)
        queue.messages.put_nowait((f"{self._name} {number} {proven}", content))

    async def _run_sender(self, session: str, queue: _SendQueue) -> None:
        while True:
            name, content = await queue.messages.get()
            while True:
                try:
                    await self.link.log(session, name, content)
                    break
                except FAILURES:
                    await asyncio.sleep(0.05)

    async def again(self, session: str) -> None:
        if self._answers is not None:
            await self._answers.catch_up(self._missed)

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

    def __init__(
        self, url: str, *, prefix: str = PREFIX, credentials: str = "", user: str = "", timeout_s: float = 5.0
    ) -> None:
        """`url`: nats://HOST:PORT or nats://USER:PASSWORD@HOST:PORT, several separated by commas; `prefix`: the
        cluster's name on that server; `credentials`: a NATS credentials file; `user`: the name under which the server
        lets this client read answers, by default the URL's.

        Raises:
            UsageError: `user` is not a name.

        """
        super().__init__(without_secrets(url), timeout_s=timeout_s)
        self._url, self._prefix, self._credentials = url, prefix, credentials
        named = re.match(r"(?:.*?//)?([^:@/]*)(?::[^@/]*)?@", url)
        self._user = user or (named[1] if named else "") or "any"
        if not USER.fullmatch(self._user):
            raise UsageError(
                f"{self._user!r} cannot be the user of a cluster: expected letters, digits, _ and -, 32 at most; give "
                "another one as `user`"
            )

    async def _connect(self, receive: Receive) -> Transport:
        transport = _NatsTransport(receive, self._user)
        await transport.begin(self._url, self._prefix, self._credentials, self._timeout_s)
        return transport
