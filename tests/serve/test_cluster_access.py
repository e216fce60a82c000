"""Who may do what in a cluster, and what becomes of what cannot be read: leases, states, messages of strangers."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import nkeys
import pytest
from clusters import NOW, OWNER, Log, Reader, S, drive, needs_nats, running, timeless
from hypothesis import example, given, settings
from hypothesis import strategies as st
from serving import alone, features_of, step_of, tick

from stream_mmrnn import ClusterClient
from stream_mmrnn.core import config
from stream_mmrnn.core.errors import ConfigError, FileError, NotRunning, ProcessError, SnapshotError, UsageError
from stream_mmrnn.predict.snapshots import Snapshot, from_bytes, to_bytes
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.cluster.connection import connect, without_secrets
from stream_mmrnn.serve.cluster.membership import plan
from stream_mmrnn.serve.cluster.nats import FAILURES, Link
from stream_mmrnn.serve.cluster.node import ClusterNode
from stream_mmrnn.serve.cluster.questions import ask_missed
from stream_mmrnn.serve.cluster.replica import Replica
from stream_mmrnn.serve.cluster.subjects import (
    PARTITIONS,
    Beat,
    Fence,
    Lease,
    Names,
    Table,
    proof,
    read_low,
    read_stored,
    token_of,
)
from tools.bench.nats_cluster import Cluster

PACKAGED = Path(__file__).parents[2] / "packaging" / "nats.conf"


@pytest.fixture
def cluster(toy: Path, tmp_path: Path) -> Iterator[Cluster]:
    found = Cluster(tmp_path, toy)
    yield found
    found.close()


def test_a_foreign_snapshot_is_an_error(toy: Path) -> None:
    replica = Reader(toy, Log()).replica
    with pytest.raises(SnapshotError, match="are no snapshot"):
        replica.adopt(0, "s", b"nonsense", NOW)
    raw = to_bytes(Snapshot("s", replica.sessions.engine.spec.sha256, 0, {}))
    with pytest.raises(SnapshotError, match="has no position in the log"):
        replica.adopt(0, "s", raw, NOW)
    log = Log()
    log.put("s", protocol.Open(session="s"))
    log.put("s", step_of(tick("s", 0)))
    Reader(toy, log, snapshot_every=1).finish()
    with pytest.raises(SnapshotError, match="the snapshot of session 'other' is of 's'"):
        replica.adopt(0, "other", log.states["s"], NOW)
    assert replica.seq_of("other", log.states["s"]) == -1
    assert replica.seq_of("s", log.states["s"]) == 2
    # nothing of it is left: the session begins anew
    answers = open_and_say(replica, "other")
    assert isinstance(answers[0], protocol.Ready)


def open_and_say(replica: Replica, session: str) -> list[protocol.Reply]:
    replica.receive(0, session, 9, f"{OWNER} 9 -", protocol.encode(protocol.Open(session=session)), NOW)
    return [timeless(answer.content) for answer in replica.pop()[0]]


def test_an_evicted_session_is_resumed_by_its_own_token_whatever_hash_its_snapshot_has(toy: Path) -> None:
    log = Log()
    reader = Reader(toy, log, idle_s=10)
    log.put("s", protocol.Open(session="s"))
    log.put("s", step_of(tick("s", 0)))
    reader.finish()
    reader.replica.housekeeping(NOW + 11 * S)
    reader.hand_on()
    snapshot = from_bytes(log.states["s"])
    strangers = hashlib.sha256(b"stranger").hexdigest()
    log.states["s"] = to_bytes(msgspec.structs.replace(snapshot, extra={**snapshot.extra, "token_sha256": strangers}))
    other = Reader(toy, log)
    log.put("s", protocol.Open(session="s", token="stranger"))
    log.put("s", protocol.Open(session="s", token=reader.replica.token("s", 1)))
    other.finish()
    replies = [timeless(log.said["s", str(seq)][0]) for seq in (3, 4)]
    assert isinstance(replies[0], protocol.Refused)
    assert isinstance(replies[1], protocol.Ready)


# ---- who may speak for a session -------------------------------------------------------------------------------------

_strangers = st.lists(
    st.tuples(
        st.integers(0, 8),
        st.sampled_from(["step", "bad step", "reset", "flush", "close", "garbage"]),
        st.sampled_from([OWNER, "bob.d"]),
        st.sampled_from(["", "0" * 32, "of another session"]),
        st.integers(0, 8),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@example([(3, "step", OWNER, "0" * 32, 3), (3, "step", "bob.d", "", 3)])
@example([(4, "step", "bob.d", "", 3)])
@given(_strangers)
def test_no_message_without_the_token_takes_the_place_of_the_owners(
    toy: Path, strangers: list[tuple[int, str, str, str, int]]
) -> None:
    """`strangers`: before which tick, what, under which name, with which proof, and of which tick they send."""
    replica = Reader(toy, Log()).replica
    ticks = [tick("s", i) for i in range(8)]
    seq, own = 1, dict[int, int]()
    replica.receive(0, "s", seq, f"{OWNER} 1 -", protocol.encode(protocol.Open(session="s")), NOW)
    token = replica.token("s", 1)
    for i in range(9):
        for at, what, client, given_proof, index in strangers:
            if at != i:
                continue
            seq += 1
            step = step_of(tick("s", index, seed=7))
            content = {
                "step": protocol.encode(step),
                "bad step": protocol.encode(msgspec.structs.replace(step, features=(b"123",))),
                "reset": protocol.encode(protocol.Reset(session="s")),
                "flush": protocol.encode(protocol.Flush(session="s")),
                "close": protocol.encode(protocol.Close(session="s", token="guess")),
                "garbage": b"\xc1",
            }[what]
            if given_proof == "of another session":
                given_proof = proof(token, client, str(seq), "t", content)
            replica.receive(0, "s", seq, f"{client} {seq} {given_proof}", content, NOW)
        if i < 8:
            seq += 1
            own[seq] = i
            content = protocol.encode(step_of(ticks[i]))
            replica.receive(0, "s", seq, f"{OWNER} {seq} {proof(token, OWNER, str(seq), 's', content)}", content, NOW)
        if i % 3 == 0:
            replica.step(NOW)
    while replica.ready:
        replica.step(NOW)
    answers = [answer for answer in replica.pop()[0] if answer.client == OWNER]
    assert isinstance(timeless(answers[0].content), protocol.Ready)
    preds = [timeless(answer.content) for answer in answers[1:]]
    assert [answer.name for answer in answers[1:]] == [str(n) for n in own], "each under the name of its own message"
    assert [pred.heads[0] for pred in preds if isinstance(pred, protocol.Pred)] == alone(toy, ticks)


@pytest.mark.parametrize("content", [b"\xc1", protocol.encode(protocol.Reset(session="s"))])
def test_a_message_under_the_owners_name_without_a_proof_is_counted_and_not_answered(toy: Path, content: bytes) -> None:
    replica = Reader(toy, Log()).replica
    replica.receive(0, "s", 1, f"{OWNER} 1 -", protocol.encode(protocol.Open(session="s")), NOW)
    replica.pop()
    for seq, given_proof in enumerate(("-", "0" * 32, proof("wrong", OWNER, "4", "s", content)), 2):
        replica.receive(0, "s", seq, f"{OWNER} {seq} {given_proof}", content, NOW)
    assert replica.counts["unproven"] == 3
    assert replica.pop()[0] == []
    for name in ("", OWNER, f"{OWNER} 5", f"{OWNER} 5 6 7", "* 5 6", "c 5 6", "a.b.c 5 6"):
        replica.receive(0, "s", 9, name, content, NOW)
    assert replica.pop()[0] == []
    assert replica.host.counts["garbage"] == 7


# ---- what cannot be read ---------------------------------------------------------------------------------------------

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["leases", "engine", "epoch", "1", "99"]), inner),
    max_leaves=8,
)
_near_tables = st.dictionaries(
    st.integers(-1, PARTITIONS).map(str),
    st.fixed_dictionaries({"engine": st.sampled_from(["", "a", "b"]), "epoch": st.integers(-1, 2**53)}),
).map(lambda leases: {"leases": leases})


@pytest.mark.slow
@example(b'{"stream":"mmrnn_in","seq":5}')
@example(b"")
@example(b"[" * 5000)
@example(b'{"leases":{"1":{"engine":"a","epoch":' + b"9" * 400 + b"}}}")
@given(st.binary() | (_json | _near_tables).map(lambda of: json.dumps(of).encode()))
def test_whatever_stands_in_the_bucket_is_a_table_to_plan_by_or_none(raw: bytes) -> None:
    table = read_stored(raw, Table)
    fence = read_stored(raw, Fence)
    assert fence is None or 0 <= fence.epoch < 2**53
    low = read_low(raw)
    assert 0 <= low < 10**18
    if table is None:
        return
    alive = {name: Beat(name, 0) for name in ("a", "b")}
    for engine in alive:
        take, _, release = plan(table, engine, alive, set(), set(), set())
        assert all(0 <= number < PARTITIONS for number in (*take, *release))
        written = msgspec.json.encode(Table({**table.leases, **take}))
        # an epoch at its end makes a table that counts as unreadable: the fences say again how it was
        assert read_stored(written, Table) is not None or any(lease.epoch == 2**53 for lease in take.values())


def test_a_lease_without_a_partition_and_without_room_is_cleared() -> None:
    table = Table({n: Lease("a" if n <= 32 else "b", 3) for n in range(PARTITIONS)})
    alive = {name: Beat(name, 0) for name in ("a", "b")}
    mine = set(range(32))
    assert plan(table, "a", alive, mine, set(), set()) == ({}, [], [32])
    assert plan(table, "a", alive, mine, {32}, set()).release == [], "it is being acquired"
    assert set(plan(table, "a", {"a": alive["a"]}, mine, set(), set()).take) == set(range(32, PARTITIONS))


# ---- with a server ---------------------------------------------------------------------------------------------------


@needs_nats
@pytest.mark.process
def test_a_strangers_tick_under_the_owners_name_is_not_stepped_and_the_owners_is(cluster: Cluster, toy: Path) -> None:
    """The stranger reads the log of an open server: it knows the owner's name and the numbers of its messages."""

    async def main() -> None:
        async with running(cluster, toy) as node, ClusterClient(cluster.url, prefix=cluster.prefix) as client:
            stranger = Link(await connect(cluster.url), Names(cluster.prefix))
            read, mine = list[str](), set[str]()

            async def look(message: Any) -> None:
                if (name := message.headers["Nats-Msg-Id"]) not in mine:
                    read.append(name)

            await stranger.nats.subscribe(stranger.names.into("s"), cb=look)
            await stranger.nats.flush()
            ticks, got = [tick("s", i) for i in range(6)], list[bytes]()
            async with await client.open("s") as session:
                for of in ticks:
                    with contextlib.suppress(TimeoutError):  # then it guesses from what it has read
                        async with asyncio.timeout(10):
                            while len(read) <= of.index:
                                await asyncio.sleep(0.001)
                    owner, number, given = read[-1].split(" ")
                    foreseen = f"{owner} {int(number) + 1}"
                    content = protocol.encode(step_of(tick("s", of.index, seed=7)))
                    for name in (foreseen, f"{foreseen} {given}", f"{foreseen} {'0' * 32}", f"bob.x 1{of.index} 2"):
                        mine.add(name)
                        await stranger.log("s", name, content)
                    got += await drive(session, [of])
            assert got == alone(toy, ticks)
            assert node.replica.counts["unproven"] >= 2 * len(ticks)
            await stranger.nats.close()

    asyncio.run(main())


@needs_nats
@pytest.mark.slow
@pytest.mark.process
def test_engines_go_on_when_the_table_of_leases_cannot_be_read(cluster: Cluster, toy: Path) -> None:
    async def main() -> None:
        notes: list[str] = []
        async with running(cluster, toy, notes) as node, ClusterClient(cluster.url, prefix=cluster.prefix) as client:
            connection = await connect(cluster.url)
            link = Link(connection, Names(cluster.prefix))
            assert await link.find()
            ticks, got = [tick("s", i) for i in range(6)], list[bytes]()
            before = dict(node.parts)
            async with await client.open("s") as session:
                for of, raw in zip(ticks, [b"\xff", b"", b"{}", b'{"stream":"x","seq":5}', None, "purge"], strict=True):
                    tables = node.counts["tables"]
                    if raw == "purge":
                        await link.leases.purge("table")
                    elif raw is None:
                        await link.leases.delete("table")
                    else:
                        await link.leases.put("table", raw)
                    while node.counts["tables"] == tables:
                        await asyncio.sleep(0.005)
                    got += await drive(session, [of])
            assert got == alone(toy, ticks)
            assert node.parts == before, "no partition was lost"
            assert node.counts["fenced"] == 0
            assert set(notes) == {"the cluster's table of leases could not be read; it was written anew"}
            await link.leases.put("table", b"[]")
            await connection.publish(link.names.fence(3), b"garbage")
            async with running(cluster, toy, share=PARTITIONS // 2) as other:
                while not len(node.parts) == len(other.parts) == PARTITIONS // 2:
                    await asyncio.sleep(0.01)
            await connection.close()

    asyncio.run(main())


@needs_nats
@pytest.mark.process
def test_a_snapshot_under_another_name_locks_nobody_out(cluster: Cluster, toy: Path) -> None:
    async def main() -> None:
        ticks = [tick("b.c", i) for i in range(4)]
        notes: list[str] = []
        async with contextlib.AsyncExitStack() as clients:
            async with running(cluster, toy) as node:
                client = await clients.enter_async_context(ClusterClient(cluster.url, prefix=cluster.prefix))
                other = await client.open("a")
                first = await drive(other, [tick("a", 0)])
                await other.flush()
                session = await client.open("b.c")
                partition = node.replica.partition_of("b.c")
                await session.close()
                raw, _ = await node.link.saved(node.replica.partition_of("a"), "a")
                await node.link.states.put(f"state.{partition}.{token_of('b.c')}", raw)
            async with running(cluster, toy, notes) as node:
                assert node.counts["damaged"] == 1
                assert notes == ["a state in the bucket counts as none: the snapshot of session 'b.c' is of 'a'"]
                session = await client.open("b.c")
                assert await drive(session, ticks) == alone(toy, ticks)
                assert await session.flush() == 4
                raw, _ = await node.link.saved(partition, "b.c")
                assert (from_bytes(raw).session, from_bytes(raw).tick_index) == ("b.c", 3)
                assert first + await drive(other, [tick("a", 1)]) == alone(toy, [tick("a", i) for i in range(2)])

    asyncio.run(main())


@needs_nats
@pytest.mark.process
def test_tokens_hold_on_the_next_engine_and_no_bucket_has_what_they_are_made_of(cluster: Cluster, toy: Path) -> None:
    async def main() -> None:
        key = Path(cluster.settings().cluster.key)
        async with running(cluster, toy) as node, ClusterClient(cluster.url, prefix=cluster.prefix) as client:
            session = await client.open("s")
            first = await drive(session, [tick("s", 0)])
            await session.flush()
            assert key.stat().st_mode & 0o077 == 0
            secrets = [key.read_bytes().strip(), session.token.encode()]
            for bucket in (node.link.leases, node.link.states):
                for name in await bucket.keys():
                    value = (await bucket.get(name)).value or b""
                    assert not any(secret in value for secret in secrets), name
        async with running(cluster, toy), ClusterClient(cluster.url, prefix=cluster.prefix) as other:
            taken = await other.open("s", session.token)
            assert first + await drive(taken, [tick("s", 1)]) == alone(toy, [tick("s", i) for i in range(2)])
        key.write_text("another-key-of-somebody\n")
        with pytest.raises(ProcessError, match="have another key than"):
            await ClusterNode(cluster.settings()).run(lambda: True)

    asyncio.run(main())


@needs_nats
@pytest.mark.slow
@pytest.mark.process
def test_the_packaged_configuration_lets_a_client_read_its_own_answers_only(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENGINE_PASSWORD", "engines")
    monkeypatch.setenv("ALICE_PASSWORD", "alices")
    kept = 'jetstream { store_dir: "/var/lib/nats" }'
    text = PACKAGED.read_text(encoding="utf-8")
    assert kept in text
    text = text.replace(kept, "")  # it is an option here
    assert 'listen: "127.0.0.1:' in text
    begin = text.index("  ALICE {")
    bob = text[begin : text.index("\n  }\n", begin) + 5].replace("ALICE_PASSWORD", "ALICE_PASSWORD ")
    bob = bob.replace("ALICE {", "BOB {").replace("alice", "bob")
    conf = tmp_path / "nats.conf"
    conf.write_text(text.rstrip().removesuffix("}") + bob + "}\n", encoding="utf-8")
    cluster = Cluster(tmp_path, toy, "mmrnn", "engine:engines", ("-c", str(conf)))

    async def main() -> None:
        alices, bobs = cluster.url_of("alice:alices"), cluster.url_of("bob:alices")
        async with running(cluster, toy) as node, ClusterClient(alices) as alice, ClusterClient(bobs) as bob:
            table = await node.link.table()
            spy = Link(await connect(alices), node.link.names)
            seen: list[str] = []

            async def look(message: Any) -> None:
                seen.append(message.subject)

            for subject in (">", "mmrnn.in.*", "mmrnn.log.>", "mmrnn.said.>", "mmrnn.out.>", "$KV.>", "mmrnn.beat"):
                await spy.nats.subscribe(subject, cb=look)
            await spy.nats.flush()
            ticks = [tick("of.bob", i) for i in range(4)]
            async with await bob.open("of.bob") as session:
                assert await drive(session, ticks) == alone(toy, ticks)
                await session.flush()
                assert seen == [], "of another client alice sees nothing"
                own = [tick("of.alice", i) for i in range(4)]
                async with await alice.open("of.alice") as mine:
                    assert await drive(mine, own[:2]) == alone(toy, own)[:2]
                    asks = alice._transport
                    missed = [of async for _, of in ask_missed(asks.link, asks._name, 0)]
                    kinds = [type(protocol.read_reply(of)) for of in missed]
                    assert kinds == [protocol.Ready, protocol.Pred, protocol.Pred]
                    assert [of async for _, of in ask_missed(asks.link, asks._name, await node.link.newest())] == []
                    cluster.kill_server()  # what is missed while it is away is asked for
                    for of in own[2:]:
                        mine.send(features_of(of), event_ns=of.event_ns, age_ns=of.age_ns)
                    cluster.start_server()
                    later = [answer.heads["next"].tobytes() async for answer in mine.answers(20.0)]
                    assert later == alone(toy, own)[2:]
                assert all(subject.split(".")[-2] == "alice" for subject in seen if subject.startswith("mmrnn.said"))
                assert not any(subject.startswith(("mmrnn.log", "$KV", "mmrnn.beat")) for subject in seen)
                bobs_name = node.replica.host.owner("of.bob").decode()
                for forbidden in (
                    spy.find(),
                    spy.newest(),
                    spy.js.get_msg("mmrnn_in", 1),
                    spy.js.get_msg("KV_mmrnn_states", 1),
                    spy.js.stream_info("mmrnn_in"),
                    spy.js.purge_stream("mmrnn_in"),
                    spy.nats.request(spy.names.questions_of(bobs_name), b"\x80", timeout=0.5),
                ):
                    with contextlib.suppress(*FAILURES):
                        assert await forbidden is False
                # what it writes elsewhere, or lets the server answer to elsewhere, stays in its own account
                for subject in ("$KV.mmrnn_leases.table", "mmrnn.out.3.=fence", "mmrnn.beat"):
                    await spy.nats.publish(subject, b"garbage")
                    await spy.nats.publish("mmrnn.in.x", b"garbage", reply=subject)
                await spy.nats.flush()
                assert await drive(session, [tick("of.bob", 4)])
                assert await node.link.table() == table
                assert node.counts["garbage"] == node.counts["fenced"] == 0
            await spy.nats.close()
        with pytest.raises(NotRunning, match="does not accept these credentials") as refused:
            await connect(cluster.url_of("alice:wrong"), timeout_s=3.0)
        assert "wrong" not in str(refused.value)
        with pytest.raises(NotRunning, match="does not accept these credentials"):
            await connect(cluster.url_of(""), timeout_s=3.0)
        with pytest.raises(NotRunning, match="answers 'bob'"):
            async with ClusterClient(alices, user="bob", timeout_s=1.0):
                pass

    try:
        asyncio.run(main())
    finally:
        cluster.close()


@needs_nats
@pytest.mark.process
def test_credentials_may_be_an_nkey(toy: Path, tmp_path: Path) -> None:
    seed = nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER)
    public = nkeys.from_seed(bytearray(seed)).public_key.decode()
    (conf := tmp_path / "nats.conf").write_text(f"authorization {{ users: [{{nkey: {public}}}] }}", encoding="ascii")
    (key := tmp_path / "engine.nk").write_bytes(seed + b"\n")
    cluster = Cluster(tmp_path, toy, options=("-c", str(conf)))

    async def main() -> None:
        connection = await connect(cluster.url, str(key))
        assert (await Link(connection, Names("x")).js.account_info()).streams == 0
        await connection.close()
        with pytest.raises(FileError, match="cannot be read: No such file"):
            await connect(cluster.url, str(tmp_path / "none"))
        for content in (b"", b"S" * 58, b"\xff", seed[:-1]):
            key.write_bytes(content)
            with pytest.raises(FileError, match="holds no credentials of NATS"):
                await connect(cluster.url, str(key))

    try:
        asyncio.run(main())
    finally:
        cluster.close()


@needs_nats
@pytest.mark.process
def test_an_engine_refuses_a_server_that_others_can_reach_without_credentials(toy: Path, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path, toy, options=("-a", "0.0.0.0"))
    try:
        cluster.start_engine()
        engine = cluster.engines.pop()
        assert engine.process.wait(30) == 2
        said = engine.wait()["said"]
    finally:
        cluster.close()
    assert "listens on 0.0.0.0 and asks nobody for credentials: start it with" in said
    assert "Traceback" not in said


@pytest.mark.process
@pytest.mark.parametrize("url", ["nats://192.0.2.1:4222", "192.0.2.1", "nats://127.0.0.1,nats://[2001:db8::1]:4222"])
def test_serve_refuses_an_address_beyond_loopback_without_credentials(url: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "stream_mmrnn", "serve", "--cluster", url], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    assert "can be reached by others: give a user and a password in it, or a credentials file" in " ".join(
        ran.stderr.split()
    )


def test_addresses_are_shown_without_passwords_and_with_them_reach_beyond_loopback() -> None:
    hidden = "nats://u:p//w@a.example:1,tls://b.example,nats://t0ken@[::1]:3,u:p@c"
    assert without_secrets(hidden) == "nats://a.example:1,tls://b.example,nats://[::1]:3,c"
    for cluster in (
        {"url": "nats://u:p@192.0.2.1:4222"},
        {"url": "nats://192.0.2.1", "credentials": "a.creds"},
        {"url": "nats://127.0.0.1:4222,nats://[::1]:4222,localhost:4222"},
    ):
        config.parse({"cluster": cluster})
    with pytest.raises(ConfigError, match=r"`cluster.url` 192.0.2.1 can be reached"):
        config.parse({"cluster": {"url": "nats://u:p@192.0.2.2,nats://192.0.2.1"}})
    with pytest.raises(UsageError, match="cannot be the user of a cluster"):
        ClusterClient("nats://a.b:c@127.0.0.1")
