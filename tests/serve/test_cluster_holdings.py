"""Holdings: whatever engines believe of each other, and however their writes interleave, no session is lost, and each
is as if alone, with any of its ticks and resets beside any of others', wherever it has moved."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest
from clusters import NOW, OWNER, PARTITIONS, frame, replica_of
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import step_of, tick

from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.async_client import end_tasks
from stream_mmrnn.serve.cluster import holdings as holdings_module
from stream_mmrnn.serve.cluster.frames import read_answers
from stream_mmrnn.serve.cluster.holdings import Holdings
from stream_mmrnn.serve.cluster.receipts import WriteRefused
from stream_mmrnn.serve.cluster.subjects import Beat, Names, Table, read_table

ENGINES = ("a", "b", "c")
SESSIONS = [f"s{i}" for i in range(6)]


class Server:
    """The bucket: every write names the revision that it replaces."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.table: tuple[bytes, int] = (b"", 0)
        self.pieces: dict[str, tuple[bytes, int]] = {}
        self.revision = 0
        self.engines: dict[str, Engine] = {}
        self.frames: list[bytes] = []

    async def delay(self) -> None:
        for _ in range(self.rng.randrange(4)):
            await asyncio.sleep(0)

    def next(self) -> int:
        self.revision += 1
        return self.revision


class FakeLink:
    """A link to it, whose requests take their time in both directions."""

    names = Names()

    def __init__(self, server: Server) -> None:
        self._server = server

    async def table(self, partitions: int) -> tuple[Table | None, int]:
        await self._server.delay()
        raw, revision = self._server.table
        await self._server.delay()
        return read_table(raw, partitions) if raw else None, revision

    async def replace_table(self, table: Table, revision: int) -> int:
        server = self._server
        await server.delay()
        if server.table[1] != revision:
            raise WriteRefused
        server.table = table.to_bytes(), server.next()
        for engine in server.engines.values():
            if server.rng.random() < 0.7:  # others see it late
                engine.holdings.saw_table(*server.table)
        found = server.table[1]
        await server.delay()
        return found

    async def piece_names(self) -> list[str]:
        return list(self._server.pieces)

    async def piece(self, name: str) -> tuple[bytes, int]:
        await self._server.delay()
        found = self._server.pieces.get(name, (b"", 0))
        await self._server.delay()
        return found

    async def save_piece(self, name: str, raw: bytes, revision: int) -> int:
        server = self._server
        await server.delay()
        if server.pieces.get(name, (b"", 0))[1] != revision:
            raise WriteRefused
        server.pieces[name] = raw, server.next()
        found = server.pieces[name][1]
        await server.delay()
        return found

    async def remove_piece(self, name: str) -> None:
        await self._server.delay()
        self._server.pieces.pop(name, None)


class FakeReader:
    """Reads the log from where it is told; what an engine does not serve it leaves out itself."""

    def __init__(self) -> None:
        self.read = 0

    def change(self, subjects: list[str], after: int) -> None:
        self.read = after

    async def begin(self) -> None:
        await asyncio.sleep(0)


class Engine:
    def __init__(self, server: Server, name: str, toy: Path) -> None:
        self.server, self.name = server, name
        self.replica = replica_of(toy, slots=len(SESSIONS), me=name)
        self.reader, self.tasks, self.said = FakeReader(), set[asyncio.Task[None]](), list[str]()
        self.answers: dict[tuple[str, int], set[bytes]] = {}
        self.holdings = Holdings(
            FakeLink(server),  # type: ignore[arg-type]
            self.replica,
            self.reader,  # type: ignore[arg-type]
            name,
            Counter(),
            self.start,  # type: ignore[arg-type]
            self.said.append,
            lambda: None,
            self.send,
        )

    def start(self, coroutine: object) -> asyncio.Task[None]:
        task = asyncio.create_task(coroutine)  # type: ignore[arg-type, var-annotated]
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def send(self) -> None:
        for _, content in self.replica.out.pop():
            for of in read_answers(content).preds:
                indices, size = memoryview(of.indices).cast("q"), len(of.heads[0]) // len(of.sessions)
                for i, name in enumerate(of.sessions):
                    bits = of.heads[0][size * i : size * (i + 1)]
                    self.answers.setdefault((name, indices[i]), set()).add(bits)

    def pump(self, count: int) -> None:
        """Read some frames, and step them."""
        for content in self.server.frames[self.reader.read : self.reader.read + count]:
            self.reader.read += 1
            self.replica.receive(self.reader.read, OWNER, content, NOW)
        self.replica.step(NOW)


_acts = st.lists(
    st.tuples(
        st.sampled_from(["share", "share", "pump", "send", "save", "look"]),
        st.sampled_from(ENGINES),
        st.sets(st.sampled_from(ENGINES)),
        st.booleans(),
        st.sets(st.sampled_from(SESSIONS), min_size=1),
        st.integers(0, 4),
    ),
    max_size=60,
)
"""What, which engine, whom it takes for alive beside itself, and whether it is leaving. Of a frame, its sessions, and 0
where it resets them: else it has a tick of each."""


def as_if_alone(toy: Path, name: str, history: list[int]) -> list[bytes]:
    """The answers to a session's ticks, without any other session; -1 is a reset."""
    engine = StepEngine(toy)
    engine.open(name)
    found = []
    for index in history:
        if index < 0:
            engine.reset(name)
        else:
            found.append(engine.step([tick(name, index)])[0].heads["next"].tobytes())
    return found


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(_acts, st.integers(0, 10**6))
def test_no_session_is_lost_whatever_engines_believe_of_each_other(
    toy: Path, acts: list[tuple[str, str, set[str], bool, set[str], int]], seed: int
) -> None:
    async def main() -> None:
        server = Server(seed)
        engines = server.engines = {name: Engine(server, name, toy) for name in ENGINES}
        opens = [(name, protocol.Open(session=name), b"") for name in SESSIONS]
        server.frames.append(frame(OWNER, *opens))  # type: ignore[arg-type]
        tokens = {name: engines["a"].replica.token(name, 1).encode() for name in SESSIONS}
        ticks = dict.fromkeys(SESSIONS, 0)
        history: dict[str, list[int]] = {name: [] for name in SESSIONS}
        numbers = len(SESSIONS)
        saves = 0.0

        def send(names: list[str]) -> None:
            """A tick of each."""
            steps = [(name, step_of(tick(name, ticks[name])), tokens[name]) for name in names]
            server.frames.append(frame(OWNER, *steps))  # type: ignore[arg-type]
            for name in names:
                history[name].append(ticks[name])
                ticks[name] += 1

        def reset(names: list[str]) -> None:
            nonlocal numbers
            resets = [(name, protocol.Reset(session=name), tokens[name]) for name in names]
            server.frames.append(frame(OWNER, *resets, number=numbers))  # type: ignore[arg-type]
            numbers += len(names)
            for name in names:
                history[name].append(-1)

        send(SESSIONS)
        for act, name, others, leaving, some, nth in acts:
            engine = engines[name]
            if act == "share":
                alive = {of: Beat(of, 0, leaving and of == name) for of in sorted(others | {name})}
                await engine.holdings.share(alive)
            elif act == "pump":
                engine.pump(3)
            elif act == "send":
                (send if nth else reset)(sorted(some))
            elif act == "save":
                saves += 100.0
                engine.holdings.save_due(saves)
            else:
                engine.holdings.look_again()
            await server.delay()
        send(SESSIONS)
        # now they hear each other
        alive = {name: Beat(name, 0) for name in ENGINES}
        for _ in range(400):
            for engine in engines.values():
                engine.holdings.look_again()
                await engine.holdings.share(alive)
                engine.pump(5)
                await engine.send()
                saves += 100.0
                engine.holdings.save_due(saves)
            await asyncio.sleep(0)
            served = sorted(number for engine in engines.values() for number in engine.holdings.parts)
            behind = any(
                engine.reader.read < len(server.frames) for engine in engines.values() if engine.holdings.parts
            )
            if served == list(range(PARTITIONS)) and not behind and not any(of.tasks for of in engines.values()):
                break
        assert served == list(range(PARTITIONS)), "each partition has one owner"
        places = [place for engine in engines.values() for place in engine.replica.places.by_name.values()]
        assert sorted((place.name, place.last) for place in places) == [(name, ticks[name] - 1) for name in SESSIONS]
        assert all(place.open for place in places)
        for name in SESSIONS:
            expected = as_if_alone(toy, name, history[name])
            for i, bits in enumerate(expected):
                said = set[bytes]().union(*(engine.answers.get((name, i), set()) for engine in engines.values()))
                assert said == {bits}, "also an engine that is no owner any more says no other bits"
        assert not any(engine.said for engine in engines.values())
        for engine in engines.values():
            await end_tasks(*engine.tasks)

    before, holdings_module.MOST = holdings_module.MOST, 4
    try:
        asyncio.run(main())
    finally:
        holdings_module.MOST = before
