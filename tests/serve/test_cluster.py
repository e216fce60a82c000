"""A cluster: engines that read the same log give the same answers, and the server lets only the owner write."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from clusters import NOW, Log, Reader, S, drive, needs_nats, running, timeless
from hypothesis import example, given, settings
from hypothesis import strategies as st
from serving import alone, step_of, tick

from stream_mmrnn import AsyncClient, ClusterClient
from stream_mmrnn.core import config
from stream_mmrnn.core.errors import (
    BadTick,
    Busy,
    DuplicateSession,
    Evicted,
    NotRunning,
    ProcessError,
    UnknownSession,
)
from stream_mmrnn.core.topics import SESSION_NAME
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.cluster.client import AnswerReader
from stream_mmrnn.serve.cluster.connection import connect
from stream_mmrnn.serve.cluster.log_reader import LogReader
from stream_mmrnn.serve.cluster.membership import DEAD_AFTER_S, Members, plan
from stream_mmrnn.serve.cluster.nats import Followed, Heartbeat, Link, Logged
from stream_mmrnn.serve.cluster.node import ClusterNode
from stream_mmrnn.serve.cluster.outbox import Outbox, Partition
from stream_mmrnn.serve.cluster.receipts import WriteRefused
from stream_mmrnn.serve.cluster.replica import OutgoingAnswer, SavedState
from stream_mmrnn.serve.cluster.subjects import (
    PARTITIONS,
    Beat,
    Fence,
    Lease,
    Names,
    Table,
    proof,
    session_of,
    token_of,
)
from tools.bench.nats_cluster import Cluster

# ---- names and leases ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@given(st.from_regex(SESSION_NAME), st.from_regex(SESSION_NAME))
def test_each_session_has_its_own_subject(one: str, other: str) -> None:
    names = Names()
    assert session_of(token_of(one)) == one
    assert "." not in token_of(one)
    assert (names.into(one) == names.into(other)) == (one == other)
    assert not names.out(3, one, "c").startswith(names.fence(3))


@settings(max_examples=60)
@given(st.data())
def test_leases_converge_to_even_shares(data: st.DataObject) -> None:
    """Engines start, die, leave and look in any order: each partition has one owner, and no epoch occurs twice."""
    table, owners = Table({}), dict[tuple[int, int], str]()
    parts: dict[str, set[int]] = {}
    leaving: set[str] = set()
    for step in range(12):
        act = data.draw(st.sampled_from(["come", "die", "leave", "look"])) if step < 8 else "look"
        if act == "come" or not parts:
            parts[f"engine{step}"] = set()
        elif act == "die" and len(parts) > 1:
            del parts[data.draw(st.sampled_from(sorted(parts)))]
        elif act == "leave" and len(set(parts) - leaving) > 1:
            leaving.add(data.draw(st.sampled_from(sorted(set(parts) - leaving))))
        leaving &= set(parts)
        alive = {name: Beat(name, 0, name in leaving) for name in sorted(parts)}
        for name in data.draw(st.permutations(sorted(parts))) * (3 if step > 8 else 1):
            take, give, release = plan(table, name, alive, parts[name], set(), set())
            assert not (take and give)
            assert not release, "each lease has its partition here"
            for number, lease in take.items():
                assert owners.setdefault((number, lease.epoch), name) == name
            table = Table({**table.leases, **take, **{n: Lease("", table.leases[n].epoch) for n in give}})
            parts[name] = parts[name] - set(give) | set(take)
            for other in parts:
                parts[other] = {n for n in parts[other] if table.leases[n].engine == other}
    staying = len(set(parts) - leaving)
    fair = -(-PARTITIONS // max(staying, 1))
    assert sorted(n for of in parts.values() for n in of) == (list(range(PARTITIONS)) if staying else [])
    for name, of in parts.items():
        assert len(of) <= (0 if name in leaving else fair)


def test_a_partition_is_given_back_once() -> None:
    table = Table({n: Lease("a", 1) for n in range(PARTITIONS)})
    alive = {name: Beat(name, 0) for name in ("a", "b")}
    parts = set(range(PARTITIONS))
    first = plan(table, "a", alive, parts, set(), set())
    assert len(first.give) == PARTITIONS // 2
    assert plan(table, "a", alive, parts, set(), set(first.give)) == ({}, [], [])
    assert plan(table, "b", alive, set(), set(), set()) == ({}, [], []), "the other engine still has them"
    # a lease of ours without a partition is left from a failed attempt, or being acquired
    assert set(plan(table, "a", {"a": alive["a"]}, set(), set(), set()).take) == parts
    assert not plan(table, "a", {"a": alive["a"]}, set(), parts, set()).take


def test_no_engine_counts_as_dead_before_a_heartbeat_could_arrive() -> None:
    members = Members("a")
    assert members.alive(5.0) == {}
    members.begin(10.0)
    for at_s in (10.1, 10.2, 10.3, 10.4, 10.5):
        members.observe(Beat("a", 0), at_s)
        assert set(members.alive(at_s)) == ({"a"} if at_s > 10 + DEAD_AFTER_S else set())
    members.observe(Beat("b", 0), 10.5)
    assert set(members.alive(10.6)) == {"a", "b"}
    members.observe(Beat("a", 0), 11.0)
    assert set(members.alive(11.0)) == {"a"}
    assert members.alive(12.0) == {}, "without our own heartbeat we cannot tell"
    members.observe(Beat("a", 0), 12.0)
    members.observe(Beat("b", 0, gone=True), 12.0)
    assert set(members.alive(12.0)) == {"a"}


# ---- the replica -----------------------------------------------------------------------------------------------------


_acts = st.lists(
    st.tuples(
        st.sampled_from(["a", "b.c", "d"]),
        st.sampled_from(["step"] * 8 + ["open", "again", "flush", "reset", "close", "garbled"]),
    ),
    max_size=60,
)
_moves = st.lists(
    st.tuples(st.sampled_from(["hear", "step", "hand on", "die", "die unkept", "give"]), st.integers(1, 12)),
    max_size=60,
)


@pytest.mark.slow
@settings(max_examples=150)
@example([("a", "step")] * 8 + [("a", "open")] * 2, [("hear", 9), ("step", 1), ("hear", 1), ("give", 1)])
@given(_acts, _moves)
def test_engines_that_die_anywhere_give_the_answers_of_one_engine(
    toy: Path, acts: list[tuple[str, str]], moves: list[tuple[str, int]]
) -> None:
    log, whole = Log(), Log()
    ticks: dict[str, int] = {}
    for session, act in acts:
        if act == "step":
            request: protocol.Request = step_of(tick(session, ticks.get(session, 0)))
            ticks[session] = ticks.get(session, 0) + 1
        elif act == "again":
            request = step_of(tick(session, max(ticks.get(session, 0) - 1, 0)))
        elif act == "garbled":
            request = protocol.Step(session=session, tick=1, event_ns=0, features=(b"123",))
        else:
            kinds = {"open": protocol.Open, "flush": protocol.Flush, "reset": protocol.Reset, "close": protocol.Close}
            request = kinds[act](session=session)
        for of in (log, whole):
            of.put(session, request)
    Reader(toy, whole).finish()
    engine = Reader(toy, log)
    for move, count in moves:
        if move == "hear":
            engine.receive(count)
        elif move == "step":
            engine.step()
        elif move == "hand on":
            engine.hand_on()
        elif move == "give":
            while engine.replica.ready:
                engine.step()
            engine.replica.save_all(0, NOW)
            engine.hand_on()
            assert log.low == engine.read, "after a partition was given back, no message is read again"
            engine = Reader(toy, log)
        else:
            engine.hand_on(lost=move == "die", unkept=True)
            engine = Reader(toy, log)
    engine.finish()
    assert set(log.said) == set(whole.said)
    for key, said in log.said.items():
        assert {timeless(content) for content in said} == {timeless(whole.said[key][0])}
    assert set(log.states) == set(whole.states)


def test_what_is_in_a_snapshot_is_not_stepped_again(toy: Path) -> None:
    log = Log()
    log.put("s", protocol.Open(session="s"))
    for i in range(10):
        log.put("s", step_of(tick("s", i)))
    first = Reader(toy, log)
    first.finish()
    assert log.low == 9, "the snapshot of the tenth message, the eighth tick, is the newest"
    second = Reader(toy, log)
    log.low = 0
    second.read = 0  # as if the low watermark were not stored
    second.finish()
    assert second.replica.counts["again"] == 9
    assert second.replica.sessions.counts["stepped"] == 2
    preds = [timeless(log.said["s", str(seq)][0]) for seq in range(2, 12)]
    assert [p.heads[0] for p in preds if isinstance(p, protocol.Pred)] == alone(toy, [tick("s", i) for i in range(10)])


def test_idle_and_closed_sessions_do_not_hold_the_low_watermark_back(toy: Path) -> None:
    log = Log()
    reader = Reader(toy, log, snapshot_every=100)
    for name in ("silent", "closed"):
        log.put(name, protocol.Open(session=name))
        log.put(name, step_of(tick(name, 0)))
    reader.finish()
    assert log.low == 1, "its first snapshot is from its beginning"
    log.put("closed", protocol.Close(session="closed"))
    reader.finish()
    assert log.low == 1
    reader.replica.save_idle(5 * S, NOW + 6 * S)
    reader.hand_on()
    assert log.low == 5


def test_an_evicted_session_comes_back_on_another_engine_by_its_token(toy: Path) -> None:
    log = Log()
    reader = Reader(toy, log, idle_s=10)
    log.put("s", protocol.Open(session="s"))
    for i in range(3):
        log.put("s", step_of(tick("s", i)))
    reader.finish()
    reader.replica.housekeeping(NOW + 11 * S)
    reader.hand_on()
    [notice] = [timeless(c[0]) for (_, name), c in log.said.items() if name.endswith("evicted")]
    assert isinstance(notice, protocol.EvictedNow)
    assert (notice.reason, notice.next) == ("idle", 3)
    other = Reader(toy, log)
    assert len(other.replica.sessions) == 0
    log.put("s", step_of(tick("s", 3)))
    log.put("s", protocol.Open(session="s"))
    log.put("s", protocol.Open(session="s", token="wrong"))
    log.put("s", protocol.Open(session="s", token=notice.token))
    log.put("s", step_of(tick("s", 3)))
    other.finish()
    replies = [timeless(log.said["s", str(seq)][0]) for seq in range(5, 10)]
    assert [r.error for r in replies if isinstance(r, protocol.Refused)] == ["evicted"] * 3
    assert isinstance(replies[3], protocol.Ready)
    assert isinstance(replies[4], protocol.Pred)
    assert replies[4].heads[0] == alone(toy, [tick("s", i) for i in range(4)])[3]


def test_a_message_under_another_name_is_refused(toy: Path) -> None:
    log = Log()
    log.put("s", protocol.Open(session="s"))
    log.put("other", protocol.Close(session="s"))
    reader = Reader(toy, log)
    reader.finish()
    refused = timeless(log.said["other", "2"][0])
    assert isinstance(refused, protocol.Refused)
    assert "came as 'other'" in refused.why
    assert "s" in reader.replica.sessions


# ---- with a server ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(toy: Path, tmp_path: Path) -> Iterator[Cluster]:
    found = Cluster(tmp_path, toy)
    yield found
    found.close()


@needs_nats
@pytest.mark.process
def test_a_client_of_a_cluster_has_what_a_client_of_a_server_has(cluster: Cluster, toy: Path) -> None:
    async def main() -> None:
        async with running(cluster, toy, slots=3) as node, ClusterClient(cluster.url, prefix=cluster.prefix) as client:
            assert isinstance(client, AsyncClient)
            ticks = [tick("a.b", i) for i in range(12)]
            async with await client.open("a.b") as session:
                assert await drive(session, ticks[:8]) == alone(toy, ticks[:8])
                assert await session.flush() == 8
                await session.reset()
                assert await drive(session, ticks[8:]) == alone(toy, ticks[8:])
                async with ClusterClient(cluster.url, prefix=cluster.prefix) as other:
                    with pytest.raises(DuplicateSession):
                        await other.open("a.b")
                    with pytest.raises(UnknownSession):
                        await other.open("never", token="x")
                    more = [await other.open(name) for name in ("c", "d")]
                    with pytest.raises(Busy) as busy:
                        await other.open("e")
                    assert busy.value.retry_after_s > 0
                    first = client.model.modalities[0]
                    with pytest.raises(BadTick, match="not finite"):
                        await more[0].step({first.name: np.full(first.size, np.inf, np.float32)})
                    for of in more:
                        await of.close()
                    taken = await other.open("a.b", session.token)
                    with pytest.raises(Evicted, match="taken over"):
                        await session.step({})
                    assert (await drive(taken, [tick("a.b", 12)]))[0] == alone(toy, [*ticks[8:], tick("a.b", 12)])[-1]
                    await taken.close()
            assert len(node.replica.sessions) == 0

    asyncio.run(main())


@needs_nats
@pytest.mark.process
def test_sessions_continue_when_every_engine_is_replaced(cluster: Cluster, toy: Path) -> None:
    async def main() -> None:
        ticks = [tick("s", i) for i in range(15)]
        got = []
        async with contextlib.AsyncExitStack() as clients:
            session = None
            for i in range(3):
                async with running(cluster, toy) as node:
                    if session is None:
                        client = await clients.enter_async_context(ClusterClient(cluster.url, prefix=cluster.prefix))
                        session = await client.open("s")
                    got += await drive(session, ticks[5 * i : 5 * i + 5])
                assert node.counts["given_back"] == PARTITIONS
                assert node.counts["fenced"] == 0
        assert got == alone(toy, ticks)

    asyncio.run(main())


@needs_nats
@pytest.mark.process
def test_the_server_rejects_writes_of_a_former_owner(cluster: Cluster) -> None:
    async def main() -> None:
        connections = [await connect(cluster.url) for _ in range(2)]
        old, new = (Link(connection, Names(cluster.prefix)) for connection in connections)
        for link in (old, new):
            await link.settle(60.0, 1, 64)
        table, revision = await old.table()
        assert (table, revision) == (None, 0)
        revision = await old.replace_table(Table({5: Lease("old", 1)}), revision)
        with pytest.raises(WriteRefused):
            await new.replace_table(Table({5: Lease("new", 1)}), 0)
        before = await old.fence(5, Fence("old", 1))
        assert await (await old.send(5, "s", "c", "1", b"one", before)) is True
        assert await (await old.send(5, "s", "c", "1", b"one", before)) is False, "sent twice, stored once"
        await new.replace_table(Table({5: Lease("new", 2)}), revision)
        after = await new.fence(5, Fence("new", 2))
        with pytest.raises(WriteRefused):
            await (await old.send(5, "s", "c", "2", b"stale", before))
        with pytest.raises(WriteRefused):
            await old.fence(5, Fence("old", 1))
        assert await (await new.send(5, "s", "c", "2", b"two", after)) is True
        assert await (await old.send(6, "s", "c", "3", b"elsewhere", await old.fence(6, Fence("old", 1)))) is True
        last = await new.newest()
        found = [of async for of in new.answers_between("c", 0, last)]
        assert [content for _, content in found] == [b"one", b"two", b"elsewhere"]
        assert found[-1][0] == last
        first = found[0][0]
        assert [of async for of in new.answers_between("c", first, last - 1)] == found[1:2]
        assert [of async for of in new.answers_between("c", last, last)] == []
        revision = await old.save(5, "s", b"state", 0)
        with pytest.raises(WriteRefused):
            await new.save(5, "s", b"older", 0)
        assert await new.states_of(5) == [("s", b"state", revision)]
        await new.save(5, "s", None, revision)
        assert await new.states_of(5) == []
        raw, revision = await new.saved(5, "s")
        assert raw == b""
        assert await new.save(5, "s", b"anew", revision) > revision
        assert (await old.saved(5, "s"))[0] == b"anew"
        for connection in connections:
            await connection.close()

    asyncio.run(main())


@needs_nats
@pytest.mark.process
def test_messages_read_before_a_partition_was_lost_are_not_stepped_after(cluster: Cluster, toy: Path) -> None:
    async def main() -> None:
        async with running(cluster, toy) as node, ClusterClient(cluster.url, prefix=cluster.prefix) as client:
            ticks = [tick("s", i) for i in range(8)]
            async with await client.open("s") as session:
                first = await drive(session, ticks[:4])
                await session.flush()
                number = node.replica.partition_of("s")
                before = node.parts[number]
                node.lose(number)  # as if it had been suspended; the table still has our lease
                while node.parts.get(number) in (None, before) or "s" not in node.replica.sessions:
                    await asyncio.sleep(0.01)
                content = protocol.encode(step_of(ticks[7]))
                token, owner = session.token, node.replica._places["s"].owner
                node.receive(before, "s", 10**6, f"{owner} 99 {proof(token, owner, '99', 's', content)}", content)
                assert first + await drive(session, ticks[4:]) == alone(toy, ticks)
                assert node.replica.sessions.counts["skipped"] == 0

    asyncio.run(main())


@needs_nats
@pytest.mark.process
def test_an_engine_of_another_model_does_not_join(cluster: Cluster, toy: Path, model: Path) -> None:
    async def main() -> None:
        async with running(cluster, toy):
            asked = msgspec.structs.replace(cluster.settings(), engine=config.EngineSettings(model=str(model)))
            with pytest.raises(ProcessError, match=r"serves toy .* not toy"):
                await ClusterNode(asked).run(lambda: True)

    asyncio.run(main())


def test_a_missing_nats_server_is_an_error_within_the_timeout() -> None:
    async def main() -> None:
        with pytest.raises(NotRunning, match="no NATS server answers at nats://127"):
            async with ClusterClient("nats://127.0.0.1:9", timeout_s=0.3):
                pass

    asyncio.run(main())


@needs_nats
@pytest.mark.process
def test_a_cluster_without_engines_is_an_error(cluster: Cluster) -> None:
    async def main() -> None:
        with pytest.raises(NotRunning, match="no engine of a cluster answers 'any'"):
            async with ClusterClient(cluster.url, timeout_s=0.3):
                pass

    asyncio.run(main())


@needs_nats
@pytest.mark.process
def test_garbage_in_the_log_is_counted_and_does_no_harm(cluster: Cluster, toy: Path) -> None:
    async def main() -> None:
        async with running(cluster, toy) as node, ClusterClient(cluster.url, prefix=cluster.prefix) as client:
            connection = await connect(cluster.url)
            names = Names(cluster.prefix)
            for i in range(20):
                await connection.publish(
                    names.into(f"g{i}"), b"\xc1 no message", headers={"Nats-Msg-Id": f"a.g{i} 1 2"}
                )
                await connection.publish(names.into("s"), b"\xc1", headers={"Nats-Msg-Id": f"*.> {i}"})
                await connection.publish(names.beat, b"\xc1")
            await connection.publish(f"{cluster.prefix}.in.=", b"")
            await connection.flush()
            ticks = [tick("s", i) for i in range(5)]
            async with await client.open("s") as session:
                assert await drive(session, ticks) == alone(toy, ticks)
            while node.replica.host.counts["garbage"] < 41:
                await asyncio.sleep(0.01)
            await connection.close()

    asyncio.run(main())


# ---- reading the log -------------------------------------------------------------------------------------------------


class FakeLog:
    """A link whose server may lose the subscription, leave messages out or repeat them."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.follows: list[Callable[[Logged | Heartbeat], None]] = []

    async def follow(self, partition: int, after: int, heard: Callable[[Logged | Heartbeat], None]) -> Followed:
        self.follows.append(heard)
        self.at, self.nth = after, 0
        return Followed(None, "", "")  # type: ignore[arg-type]

    async def leave(self, followed: Followed) -> None:
        pass

    def give(self, skip: int = 0) -> None:
        """The next message; those that are skipped are sent, too, and lost."""
        for lost in [True] * skip + [False]:
            if self.at < self.length:
                self.at, self.nth = self.at + 1, self.nth + 1
                if not lost:
                    self.follows[-1](Logged("s", self.at, self.nth, "c", b""))

    def beat(self) -> None:
        self.follows[-1](Heartbeat(self.nth))


@given(st.lists(st.sampled_from(["give", "skip", "begin", "old", "life"]), max_size=40))
def test_a_log_reader_leaves_no_message_out(acts: list[str]) -> None:
    async def main() -> None:
        log, heard = FakeLog(10), list[int]()
        reading = LogReader(log, 0, 0, lambda session, number, client, content: heard.append(number))  # type: ignore[arg-type]
        await reading.begin()
        for act in acts:
            if act == "give":
                log.give()
            elif act == "skip":
                log.give(skip=1)
            elif act == "old" and len(log.follows) > 1:
                log.follows[0](Logged("s", 1, 1, "c", b""))  # of the earlier subscription
            elif act == "life":
                log.beat()
            if act == "begin" or reading.silent:
                await reading.begin()
        while log.at < 10:
            log.give()
        log.beat()  # the last message may be the lost one
        if reading.silent:
            await reading.begin()
            while log.at < 10:
                log.give()
        assert heard == list(range(1, 11))
        await reading.end()
        log.follows[-1](Logged("s", 11, 11, "c", b""))
        assert len(heard) == 10

    asyncio.run(main())


# ---- writing answers, and reading them -------------------------------------------------------------------------------


class FakeAnswers:
    """A link that stores answers, until its connection is lost: then what was sent is gone, and receipts fail.

    It may refuse one of those that are under way.
    """

    def __init__(self) -> None:
        self.connected, self.flight = True, list[tuple[str, str, asyncio.Future[bool]]]()
        self.stored: dict[str, list[str]] = {"a": [], "b": []}
        """By session, each answer's name when it was first stored."""

    async def send(
        self, partition: int, session: str, client: str, name: str, content: bytes, fence: int
    ) -> asyncio.Future[bool]:
        await asyncio.sleep(0)
        if not self.connected:
            raise OSError("no connection")
        future = asyncio.get_running_loop().create_future()
        self.flight.append((session, name, future))
        return future

    async def store(self, count: int) -> None:
        flight, self.flight = self.flight[:count], self.flight[count:]
        for session, name, future in flight:
            names = self.stored[session]
            future.set_result(name not in names)
            if name not in names:
                names.append(name)
        await asyncio.sleep(0)

    async def refuse(self) -> None:
        if self.flight:
            self.flight.pop(0)[2].set_exception(OSError("not just now"))
        await asyncio.sleep(0)

    async def lose(self) -> None:
        self.connected, flight, self.flight = False, self.flight, []
        for _, _, future in flight:
            future.set_exception(TimeoutError())
        await asyncio.sleep(0)


class FakeReplica:
    """Has an answer for each number that is put into it."""

    def __init__(self) -> None:
        self.made: list[OutgoingAnswer] = []

    def put(self, session: str, number: int, after_stored: bool = False) -> None:
        self.made.append(OutgoingAnswer(0, session, "c", str(number), b"", False, after_stored))

    def pop(self) -> tuple[list[OutgoingAnswer], list[SavedState]]:
        made, self.made = self.made, []
        return made, []


@given(st.lists(st.sampled_from(["a", "b", "store", "store all", "lose", "return", "retry", "old"]), max_size=60))
def test_answers_are_stored_in_the_order_of_their_session_whatever_the_connection_loses(acts: list[str]) -> None:
    async def main() -> None:
        log, replica, part, counts = FakeAnswers(), FakeReplica(), Partition(0, 1, 1), Counter[str]()
        outbox = Outbox(replica, log, {0: part}, counts, asyncio.create_task, pytest.fail)  # type: ignore[arg-type]
        made: dict[str, list[str]] = {"a": [], "b": []}
        for number, act in enumerate(acts):
            if act in made:
                replica.put(act, number)
                made[act].append(str(number))
                await outbox.flush()
            elif act.startswith("store"):
                await log.store(1 if act == "store" else len(log.flight))
            elif act == "lose":
                await log.lose()
            elif act == "return":
                log.connected = True
                resending = asyncio.create_task(outbox.retry(part, 1.0))
                replica.put("a", number)
                made["a"].append(str(number))
                await outbox.flush()  # beside it
                await resending
            else:
                await outbox.retry(part, 0.0 if act == "old" else 1.0)
        log.connected = True
        while part.unstored:
            await outbox.retry(part, 0.0)
            await log.store(len(log.flight))
        assert log.stored == made
        assert counts["stored"] == sum(map(len, made.values()))

    asyncio.run(main())


@example(["tick", "open", "refuse", "store"])
@given(st.lists(st.sampled_from(["tick", "open", "store", "refuse", "lose", "return", "retry", "old"]), max_size=60))
def test_the_last_word_on_older_ticks_is_stored_after_their_answers(acts: list[str]) -> None:
    """Also where the server refuses one answer, and stores another that was sent after it."""

    async def main() -> None:
        log, replica, part, counts = FakeAnswers(), FakeReplica(), Partition(0, 1, 1), Counter[str]()
        outbox = Outbox(replica, log, {0: part}, counts, asyncio.create_task, pytest.fail)  # type: ignore[arg-type]
        last_words = set[str]()
        count = 0
        for act in acts:
            if act in ("tick", "open"):
                replica.put("a", count, act == "open")
                last_words |= {str(count)} if act == "open" else set()
                count += 1
                await outbox.flush()
            elif act == "store":
                await log.store(1)
                await asyncio.sleep(0)  # what has waited for it is sent
            elif act == "refuse":
                await log.refuse()
            elif act == "lose":
                await log.lose()
            else:
                log.connected |= act == "return"
                await outbox.retry(part, 1.0 if act == "retry" else 0.0)
        log.connected = True
        for _ in range(2 * count + 2):
            await log.store(len(log.flight))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            if part.held:
                await outbox.retry(part, 1.0)
        assert not part.unstored
        assert sorted(log.stored["a"], key=int) == [str(n) for n in range(count)]
        for name in last_words:
            before = log.stored["a"][: log.stored["a"].index(name)]
            assert set(before) >= {str(n) for n in range(int(name))}

    asyncio.run(main())


class FakeOut:
    """A link whose log has `newest` answers; they can be read while it is connected."""

    def __init__(self) -> None:
        self.length, self.connected = 0, True

    async def missed(self, after: int) -> AsyncIterator[tuple[int, bytes]]:
        await asyncio.sleep(0)
        if not self.connected:
            raise OSError("no connection")
        for number in range(after + 1, self.length + 1):
            await asyncio.sleep(0)
            if not self.connected:
                raise OSError("no connection")
            yield number, str(number).encode()


@given(st.lists(st.sampled_from(["answer", "lost", "returned", "arrive", "again"]), max_size=60))
def test_a_client_gets_its_answers_once_and_in_order_whatever_the_connection_loses(acts: list[str]) -> None:
    async def main() -> None:
        out, got = FakeOut(), list[bytes]()
        reader = AnswerReader(0, got.append)
        queue: deque[int] = deque()
        """Answers that arrived by subscription, and are not handled yet."""
        tasks: list[asyncio.Task[None]] = []

        def arrive() -> None:
            number = queue.popleft()
            reader.receive(number, str(number).encode())

        for act in acts:
            if act == "answer":
                out.length += 1
                if out.connected:
                    queue.append(out.length)
            elif act == "lost" and out.connected:
                out.connected = False
                reader.lost()
            elif act == "returned" and not out.connected:
                out.connected = True
                tasks.append(asyncio.create_task(reader.catch_up(out.missed)))  # type: ignore[arg-type]
            elif act == "arrive" and queue:
                arrive()
            elif act == "again":
                tasks.append(asyncio.create_task(reader.catch_up(out.missed)))  # type: ignore[arg-type]
            await asyncio.sleep(0)
        out.connected = True
        await asyncio.gather(*tasks, reader.catch_up(out.missed))  # type: ignore[arg-type]
        while queue:
            arrive()
        assert got == [str(number).encode() for number in range(1, out.length + 1)]

    asyncio.run(main())
