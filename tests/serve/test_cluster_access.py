"""Who may do what in a cluster, and what becomes of what cannot be read: leases, states, frames of strangers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import nkeys
import pytest
from clusters import NOW, OWNER, PARTITIONS, Log, Reader, drive, frame, needs_nats, replica_of, running
from hypothesis import example, given, settings
from hypothesis import strategies as st
from serving import alone, features_of, step_of, tick

from stream_mmrnn import ClusterClient
from stream_mmrnn.core import config
from stream_mmrnn.core.errors import (
    ConfigError,
    FileError,
    NotRunning,
    ProcessError,
    SessionError,
    SnapshotError,
    UsageError,
)
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.cluster import pieces
from stream_mmrnn.serve.cluster.connection import connect, without_secrets
from stream_mmrnn.serve.cluster.frames import read_answers, read_frame
from stream_mmrnn.serve.cluster.membership import plan
from stream_mmrnn.serve.cluster.nats import FAILURES, Link
from stream_mmrnn.serve.cluster.node import ClusterNode
from stream_mmrnn.serve.cluster.places import Piece
from stream_mmrnn.serve.cluster.subjects import Beat, Lease, Names, Table, read_table
from tools.bench.nats_cluster import Cluster

PACKAGED = Path(__file__).parents[2] / "packaging" / "nats.conf"


@pytest.fixture
def cluster(toy: Path, tmp_path: Path) -> Iterator[Cluster]:
    found = Cluster(tmp_path, toy)
    yield found
    found.close()


def whole_piece(after: int = 0) -> Piece:
    return Piece("p", dict.fromkeys(range(PARTITIONS), 1), after)


@given(st.binary() | st.binary(max_size=3).flatmap(lambda head: st.binary(min_size=33).map(lambda raw: head + raw)))
def test_strange_bytes_are_no_piece(raw: bytes) -> None:
    with pytest.raises(SnapshotError, match="are no states of a cluster's partitions"):
        pieces.read(raw)


@pytest.mark.slow
def test_a_damaged_piece_and_one_of_another_model_are_errors(toy: Path) -> None:
    log = Log()
    log.put(("s", protocol.Open(session="s")))
    log.put(("s", step_of(tick("s", 0))))
    Reader(toy, log).finish()
    raw = log.piece
    assert pieces.read(raw) == pieces.read(pieces.sealed(raw))
    assert [pieces.is_sealed(of) for of in (raw, pieces.sealed(raw))] == [False, True]
    for at in range(0, len(raw), 7):
        with pytest.raises(SnapshotError):
            pieces.read(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
    content = pieces.read(raw)
    [name] = content.states
    for changed in (
        {"version": 9},
        {"fresh": b""},
        {"states": {name: msgspec.structs.replace(content.states[name], dtype="O")}},
        {"states": {name: msgspec.structs.replace(content.states[name], shape=(3,))}},
        {"sessions": (msgspec.structs.replace(content.sessions[0], owner="*.>"),)},
    ):
        with pytest.raises(SnapshotError):
            pieces.read(pieces.write(msgspec.structs.replace(content, **changed)))
    replica = replica_of(toy)
    with pytest.raises(SessionError, match="of another model"):
        replica.adopt(whole_piece(), msgspec.structs.replace(content, model_sha256="0" * 64), NOW)
    # nothing of it is left: the session begins anew
    replica.adopt(whole_piece(), None, NOW)
    replica.receive(1, OWNER, frame(OWNER, ("s", protocol.Open(session="s"), b"")), NOW)
    assert [type(reply) for reply in replies_of(replica)] == [protocol.Ready]


def replies_of(replica: Any) -> list[protocol.Reply]:
    return [
        protocol.read_reply(said.content) for _, content in replica.out.pop() for said in read_answers(content).said
    ]


# ---- who may speak for a session -------------------------------------------------------------------------------------

_strangers = st.lists(
    st.tuples(
        st.integers(0, 8),
        st.sampled_from(["step", "bad step", "reset", "flush", "close", "again", "garbage"]),
        st.sampled_from([OWNER, "bob.d"]),
        st.sampled_from([b"", b"guess", b"of another frame"]),
        st.integers(0, 8),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@example([(3, "step", OWNER, b"guess", 3), (3, "step", "bob.d", b"", 3)])
@example([(4, "step", "bob.d", b"of another frame", 3)])
@example([(4, "reset", OWNER, b"of another frame", 3)])
@given(_strangers)
def test_no_item_without_the_token_takes_the_place_of_the_owners(
    toy: Path, strangers: list[tuple[int, str, str, bytes, int]]
) -> None:
    """`strangers`: before which tick, what, under which name, with which proof, and of which tick they send."""
    replica = replica_of(toy)
    replica.adopt(whole_piece(), None, NOW)
    ticks = [tick("s", i) for i in range(8)]
    seq = 1
    replica.receive(seq, OWNER, frame(OWNER, ("s", protocol.Open(session="s"), b"")), NOW)
    secret = replica.places.by_name["s"].secret
    last = b""
    for i in range(9):
        for at, what, client, token, index in strangers:
            if at != i:
                continue
            seq += 1
            step = step_of(tick("s", index, seed=7))
            request: protocol.Request = {
                "step": step,
                "bad step": msgspec.structs.replace(step, features=(b"123", *step.features[1:])),
                "reset": protocol.Reset(session="s"),
                "flush": protocol.Flush(session="s"),
                "close": protocol.Close(session="s", token="guess"),
            }.get(what, step)
            content = frame(client, ("s", request, b"" if token == b"of another frame" else token), number=1000)
            if token == b"of another frame" and last:
                body, proofs = msgspec.msgpack.decode(content)[0], msgspec.msgpack.decode(last)[1]
                content = msgspec.msgpack.encode([body, proofs])
            if what == "again" and last:
                content, client = last, OWNER  # a frame of the owner, once more
            replica.receive(seq, client, b"\xc1" if what == "garbage" else content, NOW)
        if i < 8:
            seq += 1
            last = frame(OWNER, ("s", step_of(ticks[i]), secret))
            replica.receive(seq, OWNER, last, NOW)
        if i % 3 == 0:
            replica.step(NOW)
    replica.step(NOW)
    found: dict[int, set[bytes]] = {}
    for client, content in replica.out.pop():
        if client == OWNER:
            for of in read_answers(content).preds:
                indices, size = memoryview(of.indices).cast("q"), len(of.heads[0]) // len(of.sessions)
                for k, index in enumerate(indices):
                    found.setdefault(index, set()).add(of.heads[0][size * k : size * (k + 1)])
    assert [found[i] for i in range(8)] == [{bits} for bits in alone(toy, ticks)]


@pytest.mark.parametrize("request_", [step_of(tick("s", 5)), protocol.Reset(session="s")])
def test_an_item_under_the_owners_name_without_a_proof_is_counted_and_not_answered(
    toy: Path, request_: protocol.Request
) -> None:
    replica = replica_of(toy)
    replica.adopt(whole_piece(), None, NOW)
    replica.receive(1, OWNER, frame(OWNER, ("s", protocol.Open(session="s"), b"")), NOW)
    replica.out.pop()
    for seq, token in enumerate((b"", b"wrong", b"0" * 64), 2):
        replica.receive(seq, OWNER, frame(OWNER, ("s", request_, token), number=5), NOW)
    assert replica.counts["unproven"] == 3
    assert replica.out.pop() == []
    for client, content in (
        ("", b""),
        (OWNER, b""),
        (OWNER, b"\xc0"),
        (OWNER, frame("other.c", ("s", request_, b"x"))[:-1]),
    ):
        replica.receive(9, client, content, NOW)
    assert replica.out.pop() == []
    assert replica.counts["garbage"] == 4


@given(st.binary(max_size=64))
def test_strange_bytes_are_no_frame(content: bytes) -> None:
    with contextlib.suppress(Exception):
        assert msgspec.msgpack.decode(content) == [b"\x90", b""]
        return
    with pytest.raises(Exception, match="not a frame"):
        read_frame(OWNER, content)


# ---- what cannot be read ---------------------------------------------------------------------------------------------

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["leases", "engine", "epoch", "1", "99"]), inner),
    max_leaves=8,
)
_near_tables = st.lists(
    st.tuples(
        st.integers(-1, PARTITIONS),
        st.integers(0, PARTITIONS),
        st.tuples(st.sampled_from(["", "a", "b"]), st.integers(-1, 2**53), st.sampled_from(["", "a-1", "*.>"])),
    )
).map(lambda leases: {"leases": leases})


@pytest.mark.slow
@example(b'{"stream":"mmrnn_in","seq":5}')
@example(b"")
@example(b"[" * 5000)
@example(b'{"leases":[[1,1,["a",' + b"9" * 400 + b',""]]]}')
@example(b'{"leases":[[0,1000000000000,["a",1,""]]]}')
@given(st.binary() | (_json | _near_tables).map(lambda of: json.dumps(of).encode()))
def test_whatever_stands_in_the_bucket_is_a_table_to_plan_by_or_none(raw: bytes) -> None:
    table = read_table(raw, PARTITIONS)
    if table is None:
        return
    alive = {name: Beat(name, 0) for name in ("a", "b")}
    for engine in alive:
        take, _, release = plan(table, engine, alive, set(), set(), set(), PARTITIONS)
        assert all(0 <= number < PARTITIONS for number in (*take, *release))
        written = Table({**table.leases, **take}).to_bytes()
        # an epoch at its end makes a table that counts as unreadable: the pieces say again how it was
        assert read_table(written, PARTITIONS) is not None or any(lease.epoch == 2**53 for lease in take.values())


def test_a_lease_without_a_partition_and_without_room_is_cleared() -> None:
    half = PARTITIONS // 2
    table = Table({n: Lease("a" if n <= half else "b", 3) for n in range(PARTITIONS)})
    alive = {name: Beat(name, 0) for name in ("a", "b")}
    mine = set(range(half))
    assert plan(table, "a", alive, mine, set(), set(), PARTITIONS) == ({}, [], [half])
    assert plan(table, "a", alive, mine, {half}, set(), PARTITIONS).release == [], "it is being acquired"
    alone = plan(table, "a", {"a": alive["a"]}, mine, set(), set(), PARTITIONS)
    assert set(alone.take) == set(range(half, PARTITIONS))


# ---- with a server ---------------------------------------------------------------------------------------------------


@needs_nats
@pytest.mark.process
def test_a_strangers_tick_under_the_owners_name_is_not_stepped_and_the_owners_is(cluster: Cluster, toy: Path) -> None:
    """The stranger reads the log of an open server: it knows the owner's name and the numbers of its messages."""

    async def main() -> None:
        async with running(cluster, toy) as node, ClusterClient(cluster.url, prefix=cluster.prefix) as client:
            stranger = Link(await connect(cluster.url), Names(cluster.prefix))
            read, mine = list[tuple[str, bytes]](), set[str]()

            async def look(message: Any) -> None:
                if message.headers["Nats-Msg-Id"] not in mine:
                    read.append((message.subject, message.data))

            await stranger.nats.subscribe(stranger.names.all_in, cb=look)
            await stranger.nats.flush()
            ticks, got = [tick("s", i) for i in range(6)], list[bytes]()
            async with await client.open("s") as session:
                for of in ticks:
                    with contextlib.suppress(TimeoutError):  # then it guesses from what it has read
                        async with asyncio.timeout(10):
                            while len(read) <= of.index:
                                await asyncio.sleep(0.001)
                    subject, content = read[-1]
                    owner = stranger.names.writer(subject)
                    forged = frame(owner, ("s", step_of(tick("s", of.index, seed=7)), b""))
                    body, proofs = msgspec.msgpack.decode(forged)[0], msgspec.msgpack.decode(content)[1]
                    for attempt in (forged, msgspec.msgpack.encode([body, proofs]), content):
                        mine.add(name := f"{of.index} {len(mine)}")
                        await stranger.stored(await stranger.log(subject, name, attempt))
                    got += await drive(session, [of])
            assert got == alone(toy, ticks)
            assert node.replica.counts["unproven"] >= 2 * len(ticks) - 2
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
            before = set(node.parts)
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
            await connection.publish(link.names.table, b"garbage")
            half = cluster.settings().cluster.partitions // 2
            async with running(cluster, toy, share=half) as other:
                while not len(node.parts) == len(other.parts) == half:
                    await asyncio.sleep(0.01)
            await connection.close()

    asyncio.run(main())


@needs_nats
@pytest.mark.process
def test_states_that_cannot_be_read_lock_nobody_out(cluster: Cluster, toy: Path) -> None:
    """The sessions begin anew from what the log has of them."""

    async def main() -> None:
        ticks = [tick("b.c", i) for i in range(4)]
        notes: list[str] = []
        async with contextlib.AsyncExitStack() as clients:
            client = ClusterClient(cluster.url, prefix=cluster.prefix)
            async with running(cluster, toy) as node:
                await clients.enter_async_context(client)
                session = await client.open("b.c")
                first = await drive(session, ticks[:2])
                await session.flush()
            connection = await connect(cluster.url)
            link = Link(connection, Names(cluster.prefix))
            await link.settle(node.settings.state.ttl_s, 1, node.settings.cluster.disk_mb)
            for name in await link.piece_names():
                await link.states.put(f"piece.{name}", b"\0\0garbage")
            await connection.close()
            async with running(cluster, toy, notes) as node:
                assert node.counts["damaged"] >= 1
                assert notes[0].startswith("states in the bucket count as none: these 8 bytes are no states")
                assert first + await drive(session, ticks[2:]) == alone(toy, ticks)

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
            for bucket in (node.link.names.leases, node.link.names.states):
                # not KeyValue.keys(): it finds none where the server is faster than its own request
                found = await node.link.js.stream_info(f"KV_{bucket}", subjects_filter=">")
                assert found.state.subjects
                for subject in found.state.subjects:
                    value = (await node.link.js.get_last_msg(f"KV_{bucket}", subject)).data or b""
                    assert not any(secret in value for secret in secrets), subject
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
            partitions = cluster.settings().cluster.partitions
            table = await node.link.table(partitions)
            spy = Link(await connect(alices), node.link.names)
            seen: list[str] = []

            async def look(message: Any) -> None:
                seen.append(message.subject)

            for subject in (">", "mmrnn.in.>", "mmrnn.said.>", "mmrnn.table", "$KV.>", "mmrnn.beat"):
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
                    cluster.kill_server()  # what is missed while it is away is asked for
                    for of in own[2:]:
                        mine.send(features_of(of), event_ns=of.event_ns, age_ns=of.age_ns)
                    cluster.start_server()
                    later = [answer.heads["next"].tobytes() async for answer in mine.answers(20.0)]
                    assert later == alone(toy, own)[2:]
                own_subjects = ("mmrnn.said", "mmrnn.in")
                assert all(subject.split(".")[-2] == "alice" for subject in seen if subject.startswith(own_subjects))
                assert not any(subject.startswith(("mmrnn.table", "$KV", "mmrnn.beat")) for subject in seen)
                bobs_name = node.replica.places.by_name["of.bob"].owner
                for forbidden in (
                    spy.find(),
                    spy.js.get_msg("mmrnn_in", 1),
                    spy.js.get_msg("KV_mmrnn_states", 1),
                    spy.js.stream_info("mmrnn_in"),
                    spy.js.purge_stream("mmrnn_in"),
                    spy.nats.request(spy.names.questions_of(bobs_name), b"", timeout=0.5),
                    spy.js.publish(spy.names.into(1, 0, bobs_name), b"garbage", timeout=0.5),
                ):
                    with contextlib.suppress(*FAILURES):
                        assert await forbidden is False
                # what it writes elsewhere, or lets the server answer to elsewhere, stays in its own account
                for subject in ("$KV.mmrnn_leases.table", "mmrnn.table", "mmrnn.beat"):
                    await spy.nats.publish(subject, b"garbage")
                    await spy.nats.publish("mmrnn.in.1.0.alice.x", b"garbage", reply=subject)
                await spy.nats.flush()
                assert await drive(session, [tick("of.bob", 4)])
                assert await node.link.table(partitions) == table
                assert node.counts["garbage"] == node.counts["fenced"] == 0
            await spy.nats.close()
        with pytest.raises(NotRunning, match="does not accept these credentials") as refused:
            await connect(cluster.url_of("alice:wrong"), timeout_s=3.0)
        assert "wrong" not in str(refused.value)
        with pytest.raises(NotRunning, match="does not accept these credentials"):
            await connect(cluster.url_of(""), timeout_s=3.0)
        with pytest.raises(NotRunning, match="answers 'bob'"):
            async with ClusterClient(alices, user="bob"):
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
