"""Clients in one event loop as a transport of the load: any client that has the methods of `AsyncClient`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from stream_mmrnn.bench import models
from stream_mmrnn.core.errors import StreamError, TimedOut
from stream_mmrnn.serve.async_client import AsyncClient, AsyncServedSession, end_tasks
from stream_mmrnn.serve.client_state import KEPT_TICKS
from tools.bench.load import DRAIN_S, OpenLoop, SessionRecord, Transport, vector


class Crowd(Transport):
    """Connected clients, each of which opens a session of its own in every run."""

    def __init__(
        self, make: Callable[[], AsyncClient], count: int, seed: int = 0, apart: bool = True, named: str = "crowd"
    ) -> None:
        """`apart`: each client has a connection of its own; `named`: prefix of the sessions' names."""
        self._make, self._count, self._seed, self._apart, self._named = make, count, seed, apart, named
        self._clients: list[AsyncClient] = []
        self._sessions: list[AsyncServedSession] = []
        self._sent: list[asyncio.Event] = []
        self._stack = contextlib.AsyncExitStack()
        self._runs = 0

    async def __aenter__(self) -> Crowd:
        for _ in range(self._count if self._apart else 1):
            self._clients.append(await self._stack.enter_async_context(self._make()))
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self._stack.aclose()

    def accepts(self, record: SessionRecord) -> bool:
        return self._sessions[record.who].waiting < KEPT_TICKS

    def skipped(self, record: SessionRecord) -> int:
        """Ticks of the newest run that the server had seen already, and whose answers were lost."""
        return self._sessions[record.who].skipped

    def send(self, record: SessionRecord, tick: int, due_ns: int) -> None:
        self._sessions[record.who].send({models.MODALITY: vector(record.who, tick)}, tick=tick, event_ns=due_ns)
        self._sent[record.who].set()

    async def run(self, duration_s: float, meanwhile: Callable[[], Any] | None = None) -> OpenLoop:
        """All clients at once; `meanwhile` is awaited beside them, and clients go on until it has ended."""
        self._runs += 1
        names = [f"{self._named}-{self._runs}-{i}" for i in range(self._count)]
        self._sessions = [
            await self._clients[i if self._apart else 0].open(name, timeout_s=DRAIN_S) for i, name in enumerate(names)
        ]
        self._sent = [asyncio.Event() for _ in names]
        beside = asyncio.create_task(meanwhile() if meanwhile is not None else asyncio.sleep(0))
        load = OpenLoop(names, self._seed, duration_s, extended=lambda: not beside.done())
        reading = [asyncio.create_task(self._read(load, record)) for record in load.records]
        try:
            for wait_s in load.play(self):
                if not load.due and not any(s.waiting or s.unread for s in self._sessions):
                    break  # ticks that the server refused or had seen already have no answer
                await asyncio.sleep(wait_s)
            await beside
        finally:
            await end_tasks(beside, *reading)
        for session in self._sessions:
            with contextlib.suppress(StreamError):
                await session.close()
        return load

    async def _read(self, load: OpenLoop, record: SessionRecord) -> None:
        session, sent = self._sessions[record.who], self._sent[record.who]
        while True:
            try:
                answer = await session.receive(DRAIN_S)
            except TimedOut:
                continue
            except StreamError as e:
                record.errors[type(e).__name__] += 1
                await asyncio.sleep(0.001)
                continue
            if answer is None:
                sent.clear()
                await sent.wait()
            else:
                load.answered(record, answer.tick, answer.heads[models.HEAD].tobytes())
