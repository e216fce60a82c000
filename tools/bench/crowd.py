"""The load generator: clients in one event loop, each with a session at 25 Hz, in an open loop.

The due times of ticks are fixed beforehand and do not depend on answers; latency counts from the due time until the
answer can be read. It works with every client that has the methods of `AsyncClient`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stream_mmrnn.bench import models
from stream_mmrnn.bench.sessions import TICK_NS, phases
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import StreamError, TimedOut
from stream_mmrnn.core.types import FloatArray, Stamps, Tick
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.serve.async_client import AsyncClient, AsyncServedSession, end_tasks
from stream_mmrnn.serve.client_state import KEPT_TICKS

DRAIN_S = 15.0
"""Timeout of an answer."""


_VECTORS = np.random.default_rng(0).standard_normal((997, models.INPUT)).astype(np.float32) * np.float32(0.5)


def vector(who: int, tick: int) -> FloatArray:
    """The features of one client at a tick; every client sends others."""
    features: FloatArray = _VECTORS[(31 * who + tick) % len(_VECTORS)]
    return features


class Member:
    """One client: the due times of the ticks that it sent, and the answers."""

    def __init__(self, name: str, who: int, phase_ns: int) -> None:
        self.name, self.who, self.phase_ns = name, who, phase_ns
        self.due_ns: list[int] = []
        self.answers: dict[int, list[tuple[int, bytes]]] = {}
        """Tick -> when each answer to it arrived, and its bytes."""
        self.errors: Counter[str] = Counter()
        self.skipped = 0
        self._sent = asyncio.Event()

    @property
    def missing(self) -> int:
        return sum(tick not in self.answers for tick in range(len(self.due_ns)))

    @property
    def repeated(self) -> int:
        return sum(len(got) - 1 for got in self.answers.values())

    def latencies_ns(self, since_ns: int = 0) -> list[int]:
        return [got[0][0] - self.due_ns[tick] for tick, got in self.answers.items() if self.due_ns[tick] >= since_ns]

    def gap_ns(self) -> int:
        """The longest time between two new answers."""
        came = sorted(got[0][0] for got in self.answers.values())
        return max((b - a for a, b in itertools.pairwise(came)), default=0)

    def differing(self, engine: StepEngine) -> int:
        """Answers that differ from those of an engine with this session alone."""
        wrong = 0
        engine.open("alone")
        for tick in range(len(self.due_ns)):
            features = {models.MODALITY: vector(self.who, tick)}
            present, age_ns = {models.MODALITY: True}, {models.MODALITY: 0}
            predictions = engine.step([Tick("alone", tick, 0, features, present, age_ns, Stamps(0, 0, 0, 0, ""))])
            expected = predictions[0].heads[models.HEAD].tobytes()
            wrong += any(bits != expected for _, bits in self.answers.get(tick, ()))
        engine.close("alone")
        return wrong

    async def run(
        self, session: AsyncServedSession, begin_ns: int, end_ns: int, over: Callable[[], bool] = lambda: True
    ) -> None:
        """Send ticks from `begin_ns` to `end_ns`, at least until `over()`; then wait for all answers."""
        reading = asyncio.create_task(self._read(session))
        tick = 0
        try:
            while (due_ns := begin_ns + self.phase_ns + tick * TICK_NS) < end_ns or not over():
                wait_s = (due_ns - now_ns()) / 1e9
                if wait_s > 0:
                    await asyncio.sleep(wait_s)
                while session.waiting >= KEPT_TICKS:  # no more are accepted: no answers arrive
                    await asyncio.sleep(0.001)
                try:
                    session.send({models.MODALITY: vector(self.who, tick)}, tick=tick, event_ns=due_ns)
                except StreamError as e:
                    self.errors[type(e).__name__] += 1
                    return
                self.due_ns.append(due_ns)
                self._sent.set()
                tick += 1
            deadline_ns = now_ns() + round(DRAIN_S * 1e9)
            while (session.waiting or session.unread) and now_ns() < deadline_ns:
                await asyncio.sleep(0.005)
        finally:
            self.skipped = session.skipped
            await end_tasks(reading)

    async def _read(self, session: AsyncServedSession) -> None:
        while True:
            try:
                answer = await session.receive(DRAIN_S)
            except TimedOut:
                continue
            except StreamError as e:
                self.errors[type(e).__name__] += 1
                await asyncio.sleep(0.001)
                continue
            if answer is None:
                self._sent.clear()
                if not session.waiting:
                    await self._sent.wait()
                continue
            self.answers.setdefault(answer.tick, []).append((now_ns(), answer.heads[models.HEAD].tobytes()))


class Crowd:
    """Connected clients, each of which opens a session of its own in every run."""

    def __init__(
        self, make: Callable[[], AsyncClient], count: int, seed: int = 0, apart: bool = True, named: str = "crowd"
    ) -> None:
        """`apart`: each client has a connection of its own; `named`: prefix of the sessions' names."""
        self._make, self._apart, self._named = make, apart, named
        self.phases_ns: Sequence[int] = phases(count, "spread", seed).tolist()
        self.clients: list[AsyncClient] = []
        self._stack = contextlib.AsyncExitStack()
        self._runs = 0

    async def __aenter__(self) -> Crowd:
        for _ in range(len(self.phases_ns) if self._apart else 1):
            self.clients.append(await self._stack.enter_async_context(self._make()))
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self._stack.aclose()

    async def run(self, duration_s: float, meanwhile: Callable[[], Any] | None = None) -> list[Member]:
        """All clients at once; `meanwhile` is awaited beside them, and clients go on until it has ended."""
        self._runs += 1
        members = [Member(f"{self._named}-{self._runs}-{i}", i, phase_ns) for i, phase_ns in enumerate(self.phases_ns)]
        sessions = [
            await self.clients[i if self._apart else 0].open(member.name, timeout_s=DRAIN_S)
            for i, member in enumerate(members)
        ]
        begin_ns = now_ns() + 50_000_000
        end_ns = begin_ns + round(duration_s * 1e9)
        beside = asyncio.ensure_future(meanwhile() if meanwhile is not None else asyncio.sleep(0))
        await asyncio.gather(
            beside, *(m.run(s, begin_ns, end_ns, beside.done) for m, s in zip(members, sessions, strict=True))
        )
        for session in sessions:
            with contextlib.suppress(StreamError):
                await session.close()
        return members
