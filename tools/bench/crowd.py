"""Clients in one event loop as a transport of the load: any client that has the methods of `AsyncClient`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np

from stream_mmrnn.bench import models
from stream_mmrnn.core.errors import StreamError, TimedOut
from stream_mmrnn.serve.async_client import AsyncClient, AsyncServedSession, end_tasks
from stream_mmrnn.serve.client_group import AsyncGroup
from stream_mmrnn.serve.client_groups import KEPT_TICKS
from tools.bench.load import DRAIN_S, OpenLoop, SessionRecord, Transport, vector

_GATHER_S = 0.01
"""Of a group, what is due within so long is one block."""


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

    @property
    def repeated(self) -> int:
        """Answers that came a second time, and were dropped by the clients."""
        return sum(getattr(client._transport, "repeated", 0) for client in self._clients)

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


class GroupCrowd(Transport):
    """The same for one client with all sessions in groups: a gateway."""

    def __init__(self, make: Callable[[], AsyncClient], count: int, seed: int = 0, of_group: int = 64) -> None:
        self._make, self._count, self._seed, self._of_group = make, count, seed, of_group
        self._groups: list[AsyncGroup] = []
        self._due: list[dict[int, tuple[int, int]]] = []
        """By group and row: the tick that is due, and when it is."""
        self._stack = contextlib.AsyncExitStack()
        self._runs = 0

    async def __aenter__(self) -> GroupCrowd:
        self._client = await self._stack.enter_async_context(self._make())
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self._stack.aclose()

    @property
    def repeated(self) -> int:
        """Answers that came a second time, and were dropped by the client."""
        return int(getattr(self._client._transport, "repeated", 0))

    def skipped(self, record: SessionRecord) -> int:
        """Ticks of the record's group that the server had seen already, and whose answers were lost."""
        return self._groups[record.who // self._of_group].skipped

    def accepts(self, record: SessionRecord) -> bool:
        group, row = divmod(record.who, self._of_group)
        return row not in self._due[group] and self._groups[group].waiting < KEPT_TICKS

    def send(self, record: SessionRecord, tick: int, due_ns: int) -> None:
        group, row = divmod(record.who, self._of_group)
        self._due[group][row] = tick, due_ns

    def _flush(self) -> None:
        for number, (group, due) in enumerate(zip(self._groups, self._due, strict=True)):
            if due:
                rows = list(due)
                vectors = np.stack([vector(number * self._of_group + row, due[row][0]) for row in rows])
                ticks, event_ns = zip(*due.values(), strict=True)
                due.clear()
                group.send({models.MODALITY: vectors}, rows=rows, ticks=ticks, event_ns=event_ns)

    async def run(self, duration_s: float, meanwhile: Callable[[], Any] | None = None) -> OpenLoop:
        """As `Crowd.run`."""
        self._runs += 1
        names = [f"group-{self._runs}-{i}" for i in range(self._count)]
        parts = [names[i : i + self._of_group] for i in range(0, self._count, self._of_group)]
        self._groups = [await self._client.group(part, timeout_s=DRAIN_S) for part in parts]
        self._due = [{} for _ in parts]
        beside = asyncio.create_task(meanwhile() if meanwhile is not None else asyncio.sleep(0))
        load = OpenLoop(names, self._seed, duration_s, extended=lambda: not beside.done())
        reading = [asyncio.create_task(self._read(load, number)) for number in range(len(parts))]
        flushed_s = 0.0
        loop = asyncio.get_running_loop()
        try:
            for wait_s in load.play(self):
                if loop.time() - flushed_s > _GATHER_S or not load.due:
                    self._flush()
                    flushed_s = loop.time()
                await asyncio.sleep(min(wait_s, _GATHER_S))
            await beside
        finally:
            await end_tasks(beside, *reading)
        for group in self._groups:
            with contextlib.suppress(StreamError):
                await group.close(DRAIN_S)
        return load

    async def _read(self, load: OpenLoop, number: int) -> None:
        group = self._groups[number]
        while True:
            try:
                answer = await group.receive(DRAIN_S)
            except TimedOut:
                continue
            if answer is None:
                await asyncio.sleep(0.001)
                continue
            for i, (row, tick) in enumerate(zip(answer.rows.tolist(), answer.ticks.tolist(), strict=True)):
                record = load.records[number * self._of_group + row]
                if answer.stepped[i]:
                    load.answered(record, tick, answer.heads[models.HEAD][i].tobytes())
                else:
                    record.errors[type(answer.errors.get(i)).__name__] += 1
