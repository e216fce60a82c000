"""A cluster: engines that read the same log give the same answers, and the server lets only the owner save states."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from clusters import NOW, OWNER, PARTITIONS, Log, Reader, S, drive, frame, needs_nats, replica_of, running
from hypothesis import given, settings
from hypothesis import strategies as st
from nats.errors import Error as NatsError
from serving import alone, step_of, tick

from stream_mmrnn import AsyncClient, ClusterClient
from stream_mmrnn.core.errors import (
    BadTick,
    Busy,
    DuplicateSession,
    Evicted,
    NotRunning,
    ProcessError,
    UnknownSession,
)
from stream_mmrnn.core.settings import EngineSettings
from stream_mmrnn.core.topics import SESSION_NAME
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.cluster import pieces
from stream_mmrnn.serve.cluster.connection import connect
from stream_mmrnn.serve.cluster.log_reader import LogReader
from stream_mmrnn.serve.cluster.membership import DEAD_AFTER_S, Members, plan
from stream_mmrnn.serve.cluster.nats import Followed, Heartbeat, Link, Logged
from stream_mmrnn.serve.cluster.node import ClusterNode
from stream_mmrnn.serve.cluster.places import Piece
from stream_mmrnn.serve.cluster.receipts import WriteRefused
from stream_mmrnn.serve.cluster.subjects import LANES, Beat, Lease, Names, Table, lane_of, partition_of, read_table
from tools.bench.nats_cluster import Cluster

# ---- names and leases ------------------------------------------------------------------------------------------------


@given(st.integers(1, 2000), st.data())
def test_a_reader_of_some_partitions_gets_every_frame_with_their_sessions(partitions: int, data: st.DataObject) -> None:
    """However many lanes the client has divided its sessions into; and few subjects are enough."""
    names = Names()
    mine = data.draw(st.sets(st.integers(0, partitions - 1), min_size=1, max_size=50))
    subjects = names.log_of(mine, partitions)
    assert len(subjects) == len(set(subjects)) <= sum(LANES)
    for lanes in LANES:
        for number in mine:
            subject = names.into(lanes, lane_of(number, lanes, partitions), "any.c").split(".")
            fitting = [s for s in subjects if all(a in ("*", b) for a, b in zip(s.split("."), subject, strict=True))]
            assert len(fitting) == 1, "the server refuses a consumer whose filters overlap"
    assert len(names.log_of(range(partitions), partitions)) == len(LANES)


@given(st.from_regex(SESSION_NAME, fullmatch=True))
def test_a_subject_tells_its_writer(session: str) -> None:
    names = Names("p")
    assert names.writer(names.into(4, 3, "alice.c0")) == "alice.c0"
    for strange in ("p.in.4.3.alice", "p.in.4.3.a.b.c", "p.in.1", f"p.in.4.3.{session}.>"):
        assert names.writer(strange) == ""
    assert 0 <= partition_of(session, 1024) < 1024


_lease = st.builds(Lease, st.sampled_from(["", "a", "b"]), st.integers(0, 5), st.sampled_from(["", "a-1"]))


@given(st.dictionaries(st.integers(0, 40), _lease))
def test_a_table_is_read_as_it_was_written(leases: dict[int, Lease]) -> None:
    table = Table(leases)
    assert read_table(table.to_bytes(), 41) == table
    if 40 in leases:
        assert read_table(table.to_bytes(), 40) is None, "it is of more partitions"


def test_a_table_of_many_partitions_is_short() -> None:
    table = Table({n: Lease("ab" * 6, 3, f"{'ab' * 6}-{n // 64}") for n in range(1024)})
    assert len(table.to_bytes()) < 1000


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
            take, give, release = plan(table, name, alive, parts[name], set(), set(), PARTITIONS)
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
    table = Table({n: Lease("a", 1, "a-0") for n in range(PARTITIONS)})
    alive = {name: Beat(name, 0) for name in ("a", "b")}
    parts = set(range(PARTITIONS))
    first = plan(table, "a", alive, parts, set(), set(), PARTITIONS)
    assert len(first.give) == PARTITIONS // 2
    assert plan(table, "a", alive, parts, set(), set(first.give), PARTITIONS) == ({}, [], [])
    assert plan(table, "b", alive, set(), set(), set(), PARTITIONS) == ({}, [], []), "the other engine still has them"
    # a lease of ours without a partition is left from a failed attempt, or being acquired
    alone = plan(table, "a", {"a": alive["a"]}, set(), set(), set(), PARTITIONS)
    assert alone.take == dict.fromkeys(parts, Lease("a", 2, "a-0")), "it says where the states are"
    assert not plan(table, "a", {"a": alive["a"]}, set(), parts, set(), PARTITIONS).take


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


_items = st.tuples(
    st.sampled_from(["a", "b.c", "d"]),
    st.sampled_from(["step"] * 8 + ["open", "again", "flush", "reset", "close", "infinite"]),
)
_acts = st.lists(st.lists(_items, min_size=1, max_size=4), max_size=30)
"""Frames, each with what some sessions say."""
_moves = st.lists(
    st.tuples(st.sampled_from(["hear", "step", "save", "say", "die"]), st.integers(1, 8)),
    max_size=60,
)


def _put(log: Log, acts: list[list[tuple[str, str]]]) -> None:
    ticks: dict[str, int] = {}
    for items in acts:
        of: list[tuple[str, protocol.Request]] = []
        for session, act in items:
            if act == "step":
                of.append((session, step_of(tick(session, ticks.get(session, 0)))))
                ticks[session] = ticks.get(session, 0) + 1
            elif act == "again":
                of.append((session, step_of(tick(session, max(ticks.get(session, 0) - 1, 0)))))
            elif act == "infinite":
                step = step_of(tick(session, ticks.get(session, 0)))
                vectors = tuple(v and np.full(len(v) // 4, np.inf, "<f4").tobytes() for v in step.features)
                of.append((session, msgspec.structs.replace(step, features=vectors)))
                ticks[session] = ticks.get(session, 0) + 1
            else:
                kinds = {
                    "open": protocol.Open,
                    "flush": protocol.Flush,
                    "reset": protocol.Reset,
                    "close": protocol.Close,
                }
                of.append((session, kinds[act](session=session)))
        log.put(*of)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(_acts, _moves)
def test_engines_that_die_anywhere_give_the_answers_of_one_engine(
    toy: Path, acts: list[list[tuple[str, str]]], moves: list[tuple[str, int]]
) -> None:
    log, whole = Log(), Log()
    for of in (log, whole):
        _put(of, acts)
    Reader(toy, whole).finish()
    engine = Reader(toy, log)
    for move, count in moves:
        if move == "hear":
            engine.receive(count)
        elif move == "step":
            engine.step()
        elif move == "save":
            engine.save()
        elif move == "say":
            engine.said()
        else:
            engine = Reader(toy, log)  # what was not said is lost with it
    engine.finish()
    assert set(log.preds) == set(whole.preds), "no answer is missing"
    for key, answers in log.preds.items():
        assert answers == whole.preds[key], "each has the same bits, whoever gave it"
    assert set(log.replies) <= set(whole.replies)
    # a client begins a session anew after the reply to its `close`, so that this is never asked for then
    closes = {
        (session, 10 * seq + number)
        for seq, items in enumerate(log.frames, 1)
        for number, (session, request) in enumerate(of for of in items if not isinstance(of[1], protocol.Step))
        if isinstance(request, protocol.Close)
    }
    assert set(whole.replies) - set(log.replies) <= closes


def test_ticks_of_many_sessions_and_clients_are_stepped_as_one_block(toy: Path) -> None:
    log = Log()
    reader = Reader(toy, log)
    names = [f"s{i}" for i in range(8)]
    log.put(*((name, protocol.Open(session=name)) for name in names))
    for i in range(3):
        log.put(*((name, step_of(tick(name, i))) for name in names[:5]))
        log.put(*((name, step_of(tick(name, i))) for name in names[5:]))
    calls = list[int]()
    step_block = reader.replica.engine.step_block
    reader.replica.engine.step_block = lambda block: calls.append(len(block)) or step_block(block)  # type: ignore
    reader.finish()
    assert calls == [8, 8, 8]
    for name in names:
        assert [log.preds[name, i] for i in range(3)] == [{b} for b in alone(toy, [tick(name, i) for i in range(3)])]


def test_what_is_in_a_piece_is_not_stepped_again(toy: Path) -> None:
    log = Log()
    log.put(("s", protocol.Open(session="s")))
    for i in range(10):
        log.put(("s", step_of(tick("s", i))))
    first = Reader(toy, log)
    first.receive(9)
    first.save()
    second = Reader(toy, log)
    assert second.read == 9
    second.read = 0  # as if the log were read from its beginning
    second.finish()
    assert second.replica.counts["stepped"] == 2
    assert [log.preds["s", i] for i in range(10)] == [{b} for b in alone(toy, [tick("s", i) for i in range(10)])]


def test_answers_are_kept_until_the_client_confirms_them(toy: Path) -> None:
    log = Log()
    log.put(("s", protocol.Open(session="s")))
    for i in range(5):
        log.put(("s", step_of(tick("s", i))))
    first = Reader(toy, log)
    first.finish()
    place = first.replica.places.by_name["s"]
    confirmed = frame(OWNER, ("s", step_of(tick("s", 5)), place.secret), answered=2)
    first.replica.receive(7, OWNER, confirmed, NOW)
    first.save()
    assert list(place.kept) == [3, 4, 5]
    log.preds.clear()
    other = Reader(toy, log)
    other.said()
    assert log.preds.keys() == {("s", 3), ("s", 4), ("s", 5)}, "who takes over says again what was not confirmed"
    assert [log.preds["s", i] for i in (3, 4, 5)] == [{b} for b in alone(toy, [tick("s", i) for i in range(6)])[3:]]
    other.replica.receive(8, OWNER, frame(OWNER, ("s", step_of(tick("s", 5)), place.secret), answered=4), NOW)
    other.replica.receive(9, OWNER, frame(OWNER, ("s", step_of(tick("s", 4)), place.secret), answered=4), NOW)
    log.preds.clear()
    log.replies.clear()
    other.said()
    assert log.preds.keys() == {("s", 5)}
    assert log.replies[("s", -1)] == {protocol.Skipped(session="s", tick=4, next=6)}


def test_a_tick_is_stepped_after_the_one_before_it_only(toy: Path) -> None:
    """A client that was told of a newer state than the engine has, by a former owner, sends again what is missing."""
    log = Log()
    reader = Reader(toy, log)
    log.put(("s", protocol.Open(session="s")))
    log.put(("s", step_of(tick("s", 0))))
    reader.finish()
    secret = reader.replica.places.by_name["s"].secret
    steps = [frame(OWNER, ("s", step_of(tick("s", i)), secret), before={"s": before}) for i, before in ((2, 1), (5, 0))]
    for seq, content in enumerate(steps, 3):
        reader.replica.receive(seq, OWNER, content, NOW)
    reader.step()
    [refused] = reader.said()
    reply = protocol.read_reply(refused.content)
    assert isinstance(reply, protocol.Refused)
    assert (reply.error, reply.tick) == ("evicted", 2)
    assert "follows tick 1, and its newest one is 0" in reply.why
    assert log.preds.keys() == {("s", 0), ("s", 5)}, "a client may leave out indices"


def test_a_reply_is_said_again_to_who_asks_again_and_not_before_the_states_are_saved(toy: Path) -> None:
    log = Log()
    reader = Reader(toy, log)
    log.put(("s", protocol.Open(session="s")))
    reader.finish()
    secret = reader.replica.places.by_name["s"].secret
    flush = frame(OWNER, ("s", protocol.Flush(session="s"), secret), number=50)
    for seq in (2, 3):
        reader.replica.receive(seq, OWNER, flush, NOW)
        assert reader.said() == []
    reader.save()
    assert [said.number for said in reader.said()] == [50]
    other = Reader(toy, log)
    other.replica.receive(4, OWNER, flush, NOW)
    assert [said.number for said in other.said()] == [50], "also by the next engine"
    other.replica.receive(5, OWNER, frame(OWNER, ("s", protocol.Reset(session="s"), secret), number=49), NOW)
    assert other.said() == [], "an older message of the owner that somebody sends once more does nothing"
    assert other.replica.counts["again"] == 2


def test_an_evicted_session_comes_back_on_another_engine_by_its_token(toy: Path) -> None:
    log = Log()
    reader = Reader(toy, log, idle_s=10)
    log.put(("s", protocol.Open(session="s")))
    for i in range(3):
        log.put(("s", step_of(tick("s", i))))
    reader.finish()
    reader.replica.housekeeping(NOW + 11 * S, NOW)
    assert reader.said() == []
    reader.save()
    [said] = reader.said()
    notice = protocol.read_reply(said.content)
    assert isinstance(notice, protocol.EvictedNow)
    assert (notice.reason, notice.next) == ("idle", 3)
    other = Reader(toy, log)
    assert len(other.replica.engine) == 0
    requests: list[protocol.Request] = [
        step_of(tick("s", 3)),
        protocol.Open(session="s"),
        protocol.Open(session="s", token="wrong"),
        protocol.Open(session="s", token=notice.token),
        step_of(tick("s", 3)),
    ]
    for seq, request in enumerate(requests, 5):
        other.replica.receive(seq, OWNER, frame(OWNER, ("s", request, notice.token.encode()), number=seq), NOW)
    other.step()
    replies = [protocol.read_reply(said.content) for said in other.said()]
    assert [r.error for r in replies if isinstance(r, protocol.Refused)] == ["evicted"] * 3
    assert isinstance(replies[3], protocol.Ready)
    assert log.preds["s", 3] == {alone(toy, [tick("s", i) for i in range(4)])[3]}


def test_a_session_that_finds_no_slot_on_another_engine_expires(toy: Path) -> None:
    log = Log()
    log.put(*((name, protocol.Open(session=name)) for name in "abc"))
    log.put(*((name, step_of(tick(name, 0))) for name in "abc"))
    Reader(toy, log).finish()
    replica = replica_of(toy, slots=1, idle_s=10, ttl_s=100)
    piece = Piece("p", dict.fromkeys(range(PARTITIONS), 1), 6)
    replica.adopt(piece, pieces.read(log.piece), NOW)
    left = [place for place in replica.places.by_name.values() if not place.open]
    assert [(place.owner, place.kept) for place in left] == [("", {})] * 2
    assert piece.changed, "that they have left is to be saved"
    replica.housekeeping(NOW + S, NOW + S)
    assert [place.left_ns for place in left] == [NOW + S] * 2
    assert len(replica.places.by_name) == 3
    for k in range(2, 120):
        replica.housekeeping(NOW + k * S, NOW + k * S)
    assert all(place.name not in replica.places.by_name for place in left)


def test_a_message_under_another_name_is_refused(toy: Path) -> None:
    log = Log()
    log.put(("s", protocol.Open(session="s")))
    log.put(("other", protocol.Close(session="s")))
    reader = Reader(toy, log)
    reader.finish()
    [refused] = log.replies["other", 20]
    assert isinstance(refused, protocol.Refused)
    assert "came as 'other'" in refused.why
    assert "s" in reader.replica.places.by_name


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
            assert len(node.engine) == 0

    asyncio.run(main())


@needs_nats
@pytest.mark.process
def test_a_group_of_sessions_is_stepped_by_blocks_over_engines_that_change(cluster: Cluster, toy: Path) -> None:
    async def main() -> None:
        names = [f"s{i}" for i in range(12)]
        got: dict[str, list[bytes]] = {name: [] for name in names}
        async with contextlib.AsyncExitStack() as clients:
            group = None
            for turn in range(3):
                async with running(cluster, toy), contextlib.AsyncExitStack() as engines:
                    if turn:
                        half = cluster.settings().cluster.partitions // 2
                        await engines.enter_async_context(running(cluster, toy, share=half))
                    if group is None:
                        client = await clients.enter_async_context(ClusterClient(cluster.url, prefix=cluster.prefix))
                        group = await client.group(names)
                    for i in range(4 * turn, 4 * turn + 4):
                        rows = [row for row in range(len(names)) if (row + i) % 3] if i % 4 == 3 else None
                        ticks = [tick(names[row], int(group.next_ticks[row]), row) for row in rows or range(len(names))]
                        answer = await group.step(
                            {
                                m.name: np.array([of.features[m.name] for of in ticks if of.present[m.name]] or [])
                                .reshape(-1, m.size)
                                .astype(np.float32)
                                for m in client.model.modalities
                            },
                            present={m.name: [of.present[m.name] for of in ticks] for m in client.model.modalities},
                            age_ns=[list(of.age_ns.values()) for of in ticks],
                            rows=rows,
                        )
                        assert answer.stepped.all()
                        assert not answer.errors
                        for row, bits in zip(answer.rows.tolist(), answer.heads["next"], strict=True):
                            got[names[row]].append(bits.tobytes())
                    assert (await group.flush()).tolist() == group.next_ticks.tolist()
            async with running(cluster, toy) as node:
                await group.reset()
                await group.close()
                assert len(node.engine) == 0
                assert not client._transport.groups._groups
        for row, name in enumerate(names):
            assert got[name] == alone(toy, [tick(name, i, row) for i in range(len(got[name]))])

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
                assert node.counts["given_back"] == cluster.settings().cluster.partitions
                assert node.counts["fenced"] == 0
        assert got == alone(toy, ticks)

    asyncio.run(main())


@needs_nats
@pytest.mark.process
def test_the_server_rejects_writes_of_a_former_owner(cluster: Cluster) -> None:
    async def main() -> None:
        connections = [await connect(cluster.url) for _ in range(2)]
        old, new = (Link(connection, Names(cluster.prefix)) for connection in connections)
        seen: list[tuple[bytes, int]] = []
        for link in (old, new):
            await link.settle(60.0, 1, 64)
        await new.watch_table(lambda raw, revision: seen.append((raw, revision)))
        await new.nats.flush()
        assert await old.table(64) == (None, 0)
        first = Table({5: Lease("old", 1)})
        revision = await old.replace_table(first, 0)
        with pytest.raises(WriteRefused):
            await new.replace_table(Table({5: Lease("new", 1)}), 0)
        while not seen:
            await asyncio.sleep(0.001)
        assert seen == [(first.to_bytes(), revision)], "a table that was refused is not seen"
        assert await new.table(64) == (first, revision)
        revision = await old.save_piece("p-0", b"state", 0)
        with pytest.raises(WriteRefused):
            await new.save_piece("p-0", b"older", 0)
        assert await new.piece("p-0") == (b"state", revision)
        await new.save_piece("p-0", b"sealed", revision)
        with pytest.raises(WriteRefused):
            await old.save_piece("p-0", b"newer", revision)
        # longer than a message may be
        long = bytes(range(256)) * 8000
        revision = await new.save_piece("p-1", long, 0)
        assert await old.piece("p-1") == (long, revision)
        with pytest.raises(WriteRefused):
            await old.save_piece("p-1", long[1:], 0)
        await new.save_piece("p-1", long[2:], revision)
        assert (await old.piece("p-1"))[0] == long[2:]
        assert sorted(await new.piece_names()) == ["p-0", "p-1"]
        assert len(await new._parts_of("p-1", [])) == 4, "no part of an older or refused value is left"
        await new.remove_piece("p-1")
        assert (await new.piece_names(), await new._parts_of("p-1", [])) == (["p-0"], [])
        await new.js.delete_stream(f"KV_{new.names.states}")
        with pytest.raises(NatsError, match="does not have the bucket"):
            await new.piece("p-0")  # not the same as a piece that was never written
        for connection in connections:
            await connection.close()

    asyncio.run(main())


@needs_nats
@pytest.mark.process
def test_frames_read_before_a_piece_was_lost_are_not_stepped_after(cluster: Cluster, toy: Path) -> None:
    async def main() -> None:
        async with running(cluster, toy) as node, ClusterClient(cluster.url, prefix=cluster.prefix) as client:
            ticks = [tick("s", i) for i in range(8)]
            async with await client.open("s") as session:
                first = await drive(session, ticks[:4])
                await session.flush()
                place = node.replica.places.by_name["s"]
                node.holdings.lose(place.piece)  # as if it had been suspended; the table still has our lease
                node.holdings.look_again()
                content = frame(place.owner, ("s", step_of(ticks[7]), place.secret))
                node.receive(f"{cluster.prefix}.in.1.0.{place.owner}", 10**6, content)
                node._inbox[-1] = (node.reader.changes - 1, *node._inbox[-1][1:])
                assert first + await drive(session, ticks[4:]) == alone(toy, ticks)
                assert node.replica.counts["skipped"] == 0
                assert node.replica.places.by_name["s"] is not place

    asyncio.run(main())


@needs_nats
@pytest.mark.process
def test_an_engine_of_another_model_or_number_of_partitions_does_not_join(
    cluster: Cluster, toy: Path, model: Path
) -> None:
    async def main() -> None:
        async with running(cluster, toy):
            asked = msgspec.structs.replace(cluster.settings(), engine=EngineSettings(model=str(model)))
            with pytest.raises(ProcessError, match=r"serves toy .* not toy"):
                await ClusterNode(asked).run(lambda: True)
            few = msgspec.structs.replace(cluster.settings().cluster, partitions=64)
            with pytest.raises(ProcessError, match=r"has 1024 partitions, not 64: set cluster\.partitions"):
                await ClusterNode(msgspec.structs.replace(cluster.settings(), cluster=few)).run(lambda: True)
            other = msgspec.structs.replace(few, prefix="few", partitions=3)
            node, going = ClusterNode(msgspec.structs.replace(cluster.settings(), cluster=other)), True
            serving = asyncio.create_task(node.run(lambda: going))
            async with ClusterClient(cluster.url, prefix="few") as client, await client.open("s") as session:
                assert await drive(session, [tick("s", 0)]) == alone(toy, [tick("s", 0)])
            going = False
            await serving
            assert node.counts["given_back"] == 3

    asyncio.run(main())


def test_a_missing_nats_server_is_an_error_within_the_timeout() -> None:
    async def main() -> None:
        with pytest.raises(NotRunning, match="no NATS server answers at nats://127"):
            async with ClusterClient("nats://127.0.0.1:9", timeout_s=0.3):
                pass

    asyncio.run(main())


@needs_nats
@pytest.mark.slow
@pytest.mark.process
def test_a_cluster_without_engines_is_an_error(cluster: Cluster) -> None:
    async def main() -> None:
        with pytest.raises(NotRunning, match="no engine of a cluster answers 'any'"):
            async with ClusterClient(cluster.url):  # in less time NATS may not answer, which is another error
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
                for client_name in ("a.g", "strange", "a.b.c"):
                    await connection.publish(names.into(1, 0, client_name), b"\xc1 no frame")
                await connection.publish(names.into(4, i, "a.g"), frame("a.g", (f"g{i}", step_of(tick("g", 0)), b"")))
                await connection.publish(names.beat, b"\xc1")
            await connection.flush()
            ticks = [tick("s", i) for i in range(5)]
            async with await client.open("s") as session:
                assert await drive(session, ticks) == alone(toy, ticks)
            while node.replica.counts["garbage"] < 20 or node.counts["garbage"] < 20:
                await asyncio.sleep(0.01)
            await connection.close()

    asyncio.run(main())


# ---- reading the log -------------------------------------------------------------------------------------------------


class FakeLog:
    """A link whose server may lose the subscription, leave messages out or repeat them."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.follows: list[Callable[[Logged | Heartbeat], None]] = []

    async def follow(self, subjects: list[str], after: int, heard: Callable[[Logged | Heartbeat], None]) -> Followed:
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
                    self.follows[-1](Logged("s", self.at, self.nth, b""))

    def beat(self) -> None:
        self.follows[-1](Heartbeat(self.nth))


@given(st.lists(st.sampled_from(["give", "skip", "begin", "old", "life"]), max_size=40))
def test_a_log_reader_leaves_no_message_out(acts: list[str]) -> None:
    async def main() -> None:
        log, heard = FakeLog(10), list[int]()
        reading = LogReader(log, lambda subject, number, content: heard.append(number))  # type: ignore[arg-type]
        reading.change(["s"], 0)
        await reading.begin()
        for act in acts:
            if act == "give":
                log.give()
            elif act == "skip":
                log.give(skip=1)
            elif act == "old" and len(log.follows) > 1:
                log.follows[0](Logged("s", 1, 1, b""))  # of the earlier subscription
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
        log.follows[-1](Logged("s", 11, 11, b""))
        assert len(heard) == 10
        reading.change(["s", "t"], 4)
        log.give()
        assert len(heard) == 10, "nothing is passed on between a change and its subscription"
        await reading.begin()
        while log.at < 10:
            log.give()
        assert heard[10:] == list(range(5, 11))

    asyncio.run(main())
