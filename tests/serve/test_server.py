"""Sessions over the network: each as if alone, with clients that disconnect, flood or send garbage."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest
import toy_model
from harness import descendants
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT
from serving import NOW, Line, alone, features_of, running, settings_for, start, step_of, tick

from stream_mmrnn import AsyncClient, Client
from stream_mmrnn.bus import Dealer, request_reply
from stream_mmrnn.bus.keys import KeyFolder
from stream_mmrnn.core import config
from stream_mmrnn.core.block import Block, BlockPredictions
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import (
    BadTick,
    Busy,
    ConfigError,
    DuplicateSession,
    Evicted,
    NotRunning,
    ProcessError,
    SessionError,
    ShardDied,
    StreamError,
    TimedOut,
    UnknownSession,
    UsageError,
    WireError,
)
from stream_mmrnn.core.settings import Settings, StateSettings
from stream_mmrnn.core.types import FEATURE_BOUND, MAX_TICK, Tick
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.snapshots import StateStore
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve import server as server_module
from stream_mmrnn.serve.client import ServedSession
from stream_mmrnn.serve.client_state import KEPT_TICKS, ClientState
from stream_mmrnn.serve.server import Server
from stream_mmrnn.serve.session_host import Host
from stream_mmrnn.serve.session_input import SessionInput
from stream_mmrnn.serve.sessions import Sessions

S = 1_000_000_000
Make = Callable[..., Host]


# ---- the host, without sockets ---------------------------------------------------------------------------------------


@pytest.fixture
def make(toy: Path, tmp_path: Path) -> Make:
    def make(
        slots: int = 4,
        queue: int = 8,
        engine: type[StepEngine] = StepEngine,
        host_slots: int = 0,
        groups: bool = False,
        **state: float,
    ) -> Host:
        kept = StateSettings(**{"idle_s": 10, "ttl_s": 100, "snapshot_every": 4, **state})  # type: ignore[arg-type]
        store = StateStore(tmp_path / "states", kept.ttl_s)
        return Host(Sessions(engine(toy, slots), store, kept), queue, slots=host_slots, groups=groups)

    return make


def say(host: Host, request: protocol.Request, peer: bytes = b"a", at_ns: int = NOW) -> None:
    host.receive(peer, protocol.encode(request), at_ns)


def finish(host: Host) -> None:
    while host.ready:
        host.step(NOW)


def replies_of(host: Host) -> list[tuple[bytes, protocol.Reply]]:
    out, host.out = host.out, []
    return [(peer, protocol.read_reply(protocol.encode(reply))) for peer, reply in out]


def bits(replies: list[tuple[bytes, protocol.Reply]]) -> list[tuple[str, int, tuple[bytes, ...]]]:
    return [(r.session, r.tick, r.heads) for _, r in replies if isinstance(r, protocol.Pred)]


def test_welcome_describes_the_model(make: Make) -> None:
    host = make()
    say(host, protocol.Hello())
    [(peer, welcome)] = replies_of(host)
    spec = host.sessions.engine.spec
    assert peer == b"a"
    assert isinstance(welcome, protocol.Welcome)
    assert [(m.name, m.size) for m in welcome.modalities] == [(m.name, m.size) for m in spec.modalities]
    assert [h.name for h in welcome.heads] == [h.name for h in spec.heads]
    assert (welcome.model, welcome.tick_ns) == (spec.sha256, spec.tick_ns)
    assert welcome.version == 1, "without groups"
    say(host, protocol.Hello(version=0))
    [(_, refused)] = replies_of(host)
    assert isinstance(refused, protocol.Refused)
    assert "version 0 is older than 1" in refused.why


def test_the_newest_version_that_both_sides_speak_is_spoken(make: Make) -> None:
    host = make(groups=True)
    for version, spoken in ((1, 1), (2, 2), (3, 2)):
        say(host, protocol.Hello(version=version))
        [(_, welcome)] = replies_of(host)
        assert isinstance(welcome, protocol.Welcome)
        assert welcome.version == spoken


def test_each_session_is_as_if_alone(make: Make, toy: Path) -> None:
    host = make()
    names = ["a", "b", "c"]
    for name in names:
        say(host, protocol.Open(session=name), name.encode())
    replies_of(host)
    ticks = {name: [tick(name, i, i + 100 * n) for i in range(12)] for n, name in enumerate(names)}
    for i in range(12):
        for name in names[: 1 + i % 3]:
            say(host, step_of(ticks[name].pop(0)), name.encode())
        while host.ready:
            host.step(NOW)
    got = bits(replies_of(host))
    assert len(got) == 24
    for n, name in enumerate(names):
        mine = [heads[0] for session, _, heads in got if session == name]
        expected = alone(toy, [tick(name, i, i + 100 * n) for i in range(len(mine))])
        assert mine == expected


def test_a_batch_takes_one_tick_of_each_session(make: Make, toy: Path) -> None:
    host = make(queue=8)
    for name in ("flood", "steady"):
        say(host, protocol.Open(session=name), name.encode())
    replies_of(host)
    for i in range(10):
        say(host, step_of(tick("flood", i)), b"flood")
    say(host, step_of(tick("steady", 0)), b"steady")
    refused = [r for _, r in replies_of(host)]
    assert [(r.error, r.tick) for r in refused if isinstance(r, protocol.Refused)] == [("overrun", 8), ("overrun", 9)]
    assert host.step(NOW) == 2
    assert {(session, index) for session, index, _ in bits(replies_of(host))} == {("flood", 0), ("steady", 0)}
    while host.ready:
        host.step(NOW)
    assert [index for _, index, _ in bits(replies_of(host))] == list(range(1, 8))
    assert host.counts["overrun"] == 2


def test_refusals_have_names(make: Make, toy: Path) -> None:
    host = make(slots=1)
    good = step_of(tick("s", 0))
    say(host, good)
    say(host, protocol.Open(session="s"))
    say(host, protocol.Open(session="s"))
    say(host, protocol.Open(session="other"))
    say(host, protocol.Open(session="gone", token="x"))
    say(host, msgspec.structs.replace(good, features=good.features[:1]))
    say(host, msgspec.structs.replace(good, features=(b"123", *good.features[1:])))
    say(host, msgspec.structs.replace(good, features=(np.full(4, np.nan, "<f4").tobytes(), *good.features[1:])))
    finish(host)
    say(host, good, b"another client")
    say(host, protocol.Close(session="s"), b"another client")
    replies = [r for _, r in replies_of(host)]
    assert [r.error if isinstance(r, protocol.Refused) else type(r).__name__ for r in replies] == [
        "unknown", "Ready", "duplicate", "BusyNow", "unknown", "bad_tick", "bad_tick", "bad_tick", "unknown", "unknown",
    ]  # fmt: skip
    busy = replies[3]
    assert isinstance(busy, protocol.BusyNow)
    assert busy.retry_s > 0
    assert not host.ready


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38, -3e38, FEATURE_BOUND])
def test_a_value_that_would_spoil_the_state_is_refused(make: Make, toy: Path, value: float) -> None:
    host = make()
    say(host, protocol.Open(session="s"))
    replies_of(host)
    good = step_of(tick("s", 0))
    first = np.array([0, value, 0, 0, 0], "<f4").tobytes()
    say(host, msgspec.structs.replace(good, features=(first, *good.features[1:])))
    host.step(NOW)
    [(_, refused)] = replies_of(host)
    assert isinstance(refused, protocol.Refused)
    assert refused.error == "bad_tick"
    assert "not below 1e+12" in refused.why
    say(host, good)
    host.step(NOW)
    assert [heads[0] for _, _, heads in bits(replies_of(host))] == alone(toy, [tick("s", 0)])


def test_a_token_takes_a_session_over_and_the_first_client_is_told(make: Make, toy: Path) -> None:
    host = make()
    say(host, protocol.Open(session="s"), b"a")
    [(_, ready)] = replies_of(host)
    assert isinstance(ready, protocol.Ready)
    say(host, step_of(tick("s", 0)), b"a")
    say(host, protocol.Open(session="s", token=ready.token), b"b")
    say(host, step_of(tick("s", 1)), b"a")  # too late: it comes after the other one's request
    finish(host)
    first, evicted, again, late = replies_of(host)
    assert isinstance(first[1], protocol.Pred), "an earlier tick is answered first"
    assert evicted[0] == b"a"
    assert evicted[1] == protocol.EvictedNow(session="s", token="", reason="taken", next=1)
    assert again == (b"b", protocol.Ready(session="s", token=ready.token, next=1, resumed=True))
    assert late[0] == b"a"
    assert isinstance(late[1], protocol.Refused)
    say(host, step_of(tick("s", 1)), b"a")
    [(_, refused)] = replies_of(host)
    assert isinstance(refused, protocol.Refused)
    say(host, step_of(tick("s", 1)), b"b")
    host.step(NOW)
    assert bits(replies_of(host)) == [("s", 1, (alone(toy, [tick("s", 0), tick("s", 1)])[1],))]


def test_the_largest_tick_is_stepped_and_its_session_resumed(make: Make, toy: Path) -> None:
    """One more is refused at once: its successor is no integer of every client."""
    host = make()
    say(host, protocol.Open(session="s"))
    [(_, ready)] = replies_of(host)
    assert isinstance(ready, protocol.Ready)
    say(host, step_of(msgspec.structs.replace(tick("s", 0), index=MAX_TICK)))
    host.step(NOW)
    assert bits(replies_of(host))
    host.gone(b"a", NOW)
    say(host, protocol.Open(session="s", token=ready.token), b"b")
    [(_, again)] = replies_of(host)
    assert isinstance(again, protocol.Ready)
    assert again.next == MAX_TICK + 1
    host.receive(b"b", protocol.encode(step_of(msgspec.structs.replace(tick("s", 0), index=MAX_TICK + 1))), NOW)
    [(_, refused)] = replies_of(host)
    assert isinstance(refused, protocol.Refused)
    assert refused.error == "bad_message"


def test_duplicate_ticks_are_skipped_and_reported(make: Make, toy: Path) -> None:
    host = make()
    say(host, protocol.Open(session="s"))
    for index in (0, 3, 3, 1):
        say(host, step_of(tick("s", index)))
        while host.ready:
            host.step(NOW)
    replies = [r for _, r in replies_of(host)][1:]
    assert [(type(r).__name__, getattr(r, "tick", None)) for r in replies] == [
        ("Pred", 0), ("Pred", 3), ("Skipped", 3), ("Skipped", 1),
    ]  # fmt: skip
    assert host.sessions.counts["skipped"] == 2  # 1 and 2 were never sent


def test_states_of_disconnected_and_idle_peers_are_saved(make: Make, toy: Path) -> None:
    host = make()
    tokens = {}
    for name in ("gone", "silent"):
        say(host, protocol.Open(session=name), name.encode())
        [(_, ready)] = replies_of(host)
        assert isinstance(ready, protocol.Ready)
        tokens[name] = ready.token
        say(host, step_of(tick(name, 0)), name.encode())
        host.step(NOW)
        replies_of(host)
    assert host.gone(b"gone", NOW) == 1
    assert replies_of(host) == []
    host.housekeeping(NOW + 11 * S)
    assert replies_of(host) == [
        (b"silent", protocol.EvictedNow(session="silent", token=tokens["silent"], reason="idle", next=1))
    ]
    assert len(host.sessions) == 0
    for name, token in tokens.items():
        say(host, protocol.Open(session=name, token=token), b"back", NOW + 12 * S)
        say(host, step_of(tick(name, 1)), b"back", NOW + 12 * S)
        host.step(NOW + 12 * S)
        ready, pred = (r for _, r in replies_of(host))
        assert ready == protocol.Ready(session=name, token=token, next=1, resumed=True)
        assert isinstance(pred, protocol.Pred)
        assert pred.heads[0] == alone(toy, [tick(name, 0), tick(name, 1)])[1]


def test_a_flushed_state_is_on_disk_and_a_reset_one_is_new(make: Make, toy: Path) -> None:
    host = make(snapshot_every=0)
    say(host, protocol.Open(session="s"))
    say(host, step_of(tick("s", 0)))
    say(host, protocol.Flush(session="s"))
    finish(host)
    ready, pred, flushed = (r for _, r in replies_of(host))
    assert isinstance(ready, protocol.Ready)
    assert isinstance(pred, protocol.Pred)
    assert flushed == protocol.Flushed(session="s", next=1)
    kept = host.sessions.store.load("s", NOW)
    assert kept is not None
    assert kept.tick_index == 0
    say(host, step_of(tick("s", 1)))
    say(host, protocol.Reset(session="s"))
    finish(host)
    kept = host.sessions.store.load("s", NOW)
    assert kept is not None, "after a crash, ticks are stepped on the state after the reset"
    assert (kept.tick_index, kept.state) == (1, {})
    say(host, step_of(tick("s", 2)))
    host.step(NOW)
    assert [heads[0] for _, _, heads in bits(replies_of(host))][1:] == alone(toy, [tick("s", 2)])
    say(host, protocol.Close(session="s"))
    assert replies_of(host) == [(b"a", protocol.Done(session="s"))]
    assert host.sessions.store.load("s", NOW) is None


class HalfDeadEngine(StepEngine):
    """As if the shard with session "dead" had died."""

    is_dead = False

    def step_block(self, block: Block) -> BlockPredictions:
        if not self.is_dead:
            return super().step_block(block)
        error = ShardDied("one of two died")
        error.sessions = ("dead",)
        error.block = super().step_block(block.take(block.handles != self.handle("dead")))
        raise error


def test_a_dead_shard_does_not_affect_other_sessions(make: Make, toy: Path) -> None:
    host = make(snapshot_every=1, engine=HalfDeadEngine)
    tokens = {}
    for name in ("dead", "well"):
        say(host, protocol.Open(session=name), name.encode())
        [(_, ready)] = replies_of(host)
        assert isinstance(ready, protocol.Ready)
        tokens[name] = ready.token
        say(host, step_of(tick(name, 0)), name.encode())
        host.step(NOW)
        host.housekeeping(NOW)
        replies_of(host)
    engine = host.sessions.engine
    assert isinstance(engine, HalfDeadEngine)
    engine.is_dead = True
    for name in ("dead", "well"):
        say(host, step_of(tick(name, 1)), name.encode())
    host.step(NOW)
    pred, evicted = replies_of(host)
    assert isinstance(pred[1], protocol.Pred)
    assert pred[1].session == "well"
    assert isinstance(evicted[1], protocol.EvictedNow)
    assert (evicted[1].session, evicted[1].reason) == ("dead", "lost")
    engine.is_dead = False
    say(host, protocol.Open(session="dead", token=tokens["dead"]), b"dead")
    say(host, step_of(tick("dead", 1)), b"dead")
    host.step(NOW)
    [(_, _, heads)] = bits(replies_of(host))
    assert heads[0] == alone(toy, [tick("dead", 0), tick("dead", 1)])[1]


@pytest.mark.slow
@given(st.lists(st.binary(max_size=200), max_size=8))
def test_no_bytes_harm_a_host(toy: Path, messages: list[bytes]) -> None:
    host = Host(Sessions(StepEngine(toy, 2), StateStore(_folder(), 10), StateSettings()), 4)
    for content in messages:
        host.receive(b"x", content, NOW)
    say(host, protocol.Open(session="honest"))
    assert isinstance(replies_of(host)[-1][1], protocol.Ready)


_text = st.text(max_size=70)
_number = st.integers(-(2**64), 2**64 - 1).filter(lambda n: n >= -(2**63))
_shapes = st.fixed_dictionaries(
    {
        "op": st.sampled_from(["hello", "open", "step", "push", "flush", "reset", "close", "pred", "pushed", "ready"])
        | st.sampled_from(["group", "steps", "grouped", "preds"])
    },
    optional={
        "session": st.sampled_from(["s", "", "../x", "a b"]) | _text,
        "token": st.none() | _text,
        "tick": _number | st.floats() | _text,
        "event_ns": _number | st.binary(max_size=16),
        "features": st.lists(st.none() | st.binary(max_size=40) | _number, max_size=5),
        "age_ns": st.lists(_number, max_size=5) | st.binary(max_size=32),
        "raw": st.booleans() | _number,
        "push": st.integers(0, 3) | _number,
        "stream": st.sampled_from(["", "audio", "text", "a.b"]) | _text,
        "data": st.binary(max_size=40) | _text,
        "at_ns": st.none() | st.integers(0, 10**9) | _number,
        "vector": st.booleans(),
        "version": _number,
        "group": st.integers(0, 1) | _number,
        "block": st.integers(0, 3) | _number,
        "sessions": st.lists(st.sampled_from(["s", "t", "u", "a b"]) | _text, max_size=4),
        "tokens": st.lists(st.none() | _text, max_size=4),
        "first": st.integers(0, 2) | _number,
        "rows": st.binary(max_size=16) | st.sampled_from([b"", bytes(4), bytes(8), b"\1\0\0\0"]),
        "ticks": st.binary(max_size=40) | st.sampled_from([bytes(8), bytes(16)]) | _number,
        "present": st.lists(st.none() | st.binary(max_size=3), max_size=5),
        "half": st.booleans(),
        "more": _text,
    },
)


@pytest.mark.slow
@settings(max_examples=200)
@given(st.lists(_shapes, max_size=12))
def test_no_message_harms_a_host(toy: Path, messages: list[dict[str, object]]) -> None:
    engine = StepEngine(toy, 2)
    make_input = partial(SessionInput, engine.spec, Settings(), must_save=True)
    host = Host(Sessions(engine, StateStore(_folder(), 10), StateSettings()), 4, make_input=make_input)
    for i, message in enumerate(messages):
        host.receive(b"xy"[i % 2 :], msgspec.msgpack.encode(message), NOW)
        host.step(NOW)
        for _, reply in host.out:
            assert protocol.read_reply(protocol.encode(reply)) == reply
        host.housekeeping(NOW)
    assert len(host.sessions) <= 2


_FOLDERS: list[Path] = []


def _folder() -> Path:
    return _FOLDERS[0]


@pytest.fixture(autouse=True, scope="module")
def _one_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    _FOLDERS.append(tmp_path_factory.mktemp("served"))
    yield
    _FOLDERS.clear()


# ---- the state of a client, without sockets --------------------------------------------------------------------------


def test_a_restarted_server_is_sent_the_ticks_that_it_has_not_seen(make: Make, toy: Path) -> None:
    line = Line(partial(make, snapshot_every=4))
    session = line.client.new_session("s")
    line.client.send(protocol.Open(session="s"))
    line.carry()
    ticks = [tick("s", i) for i in range(20)]
    for of in ticks[:10]:
        line.put(session, of)
        line.carry()
        line.host.housekeeping(line.at_ns)
    line.die()
    for of in ticks[10:13]:
        line.put(session, of)
    line.carry(answers=False)  # it dies again before its answers arrive
    line.die()
    for of in ticks[13:]:
        line.put(session, of)
    line.carry()
    line.at_ns += 2 * S
    line.client.poll(line.at_ns)
    line.carry()
    got = [a for a in session.answers if not isinstance(a, Exception)]
    assert [a.tick for a in got] == list(range(20))
    assert [a.heads["next"].tobytes() for a in got] == alone(toy, ticks)
    assert session.skipped == 0
    assert not session.unanswered


def test_ticks_that_are_not_kept_any_more_are_an_error(make: Make, toy: Path) -> None:
    line = Line(partial(make, snapshot_every=0))
    session = line.client.new_session("s")
    line.client.send(protocol.Open(session="s"))
    line.carry()
    line.client.send(protocol.Flush(session="s"))
    line.carry()
    for i in range(KEPT_TICKS + 3):
        line.client.put(session, {}, None, i, None, line.at_ns)
        line.carry()
    session.answers.clear()
    line.die()
    line.client.put(session, {}, None, 0, None, line.at_ns)
    line.carry()
    assert isinstance(session.error, Evicted)
    assert "as it was at tick 0" in str(session.error)


@given(st.binary(max_size=300))
def test_no_bytes_harm_a_client(content: bytes) -> None:
    client = ClientState()
    client.new_session("s")
    try:
        client.receive(content, NOW)
    except WireError:
        assert client.welcome is None


# ---- over sockets ----------------------------------------------------------------------------------------------------


@pytest.fixture
def server(toy: Path, tmp_path: Path) -> Iterator[Server]:
    with running(settings_for(toy, tmp_path)) as found:
        yield found


def drive(session: ServedSession, ticks: list[Tick]) -> list[bytes]:
    got = []
    for of in ticks:
        answer = session.step(features_of(of), event_ns=of.event_ns, age_ns=of.age_ns)
        assert answer is not None
        assert (answer.tick, answer.event_ns) == (of.index, of.event_ns)
        assert answer.present == of.present
        got.append(answer.heads["next"].tobytes())
    return got


def test_a_session_step_by_step(server: Server, toy: Path) -> None:
    ticks = [tick("alice", i) for i in range(30)]
    with Client(server.address) as client, client.open("alice") as session:
        assert client.model.model == StepEngine(toy).spec.sha256
        assert drive(session, ticks) == alone(toy, ticks)
        assert session.skipped == 0
    assert len(server.sessions) == 0
    assert server.summary()["counts"]["stepped"] == 30


def test_ticks_may_be_sent_ahead_and_answers_read_later(server: Server, toy: Path) -> None:
    ticks = [tick("s", i) for i in range(20)]
    with Client(server.address) as client, client.open("s") as session:
        for of in ticks:
            session.send(features_of(of), event_ns=of.event_ns, age_ns=of.age_ns)
        assert session.waiting == 20
        answers = list(session.answers())
        assert [a.heads["next"].tobytes() for a in answers] == alone(toy, ticks)
        assert all(a.round_trip_ns >= a.waited_ns + a.step_ns for a in answers)
        assert session.receive() is None
        assert session.flush() == 20
        session.reset()
        again = [tick("s", i) for i in range(20, 22)]
        assert drive(session, again) == alone(toy, again)


def test_a_client_that_reads_misses_no_answer(toy: Path, tmp_path: Path) -> None:
    """Whatever the queue, and with many sessions: all answers of a batch go to one client."""

    async def drive(address: str) -> int:
        async with AsyncClient(address) as client:
            sessions = [await client.open(f"s{i}") for i in range(40)]
            for _ in range(10):
                for session in sessions:
                    session.send({})
                for session in sessions:
                    assert len([answer async for answer in session.answers()]) == 1
            assert [await session.flush() for session in sessions] == [10] * 40
            return sum(session.skipped for session in sessions)

    with running(settings_for(toy, tmp_path / "many", slots=40, queue=8)) as server:
        assert asyncio.run(drive(server.address)) == 0
        assert "unread" not in server.host.counts
    with running(settings_for(toy, tmp_path / "one", slots=2, queue=1)) as server:
        with Client(server.address) as client, client.open("s") as session:
            for i in range(20):
                session.send({})
                assert session.flush() == i + 1
        assert "unread" not in server.host.counts


def test_each_refusal_raises_its_own_error(server: Server, toy: Path) -> None:
    with Client(server.address) as client, client.open("s") as session, Client(server.address) as other:
        with pytest.raises(DuplicateSession, match="is open already"):
            other.open("s")
        with pytest.raises(UnknownSession, match="no state of session"):
            other.open("never", token="x")
        with pytest.raises(SessionError, match=r"a session cannot be called '\.\./s'"):
            other.open("../s")
        with pytest.raises(BadTick, match="has no 'smell'"):
            session.send({"smell": [1.0]})
        first = client.model.modalities[0]
        with pytest.raises(BadTick, match="numbers as"):
            session.send({first.name: [1.0]})
        with pytest.raises(BadTick, match="not finite"):
            session.step({first.name: np.full(first.size, np.inf, np.float32)})
        others = [other.open(f"o{i}") for i in range(7)]
        with pytest.raises(Busy) as busy:
            other.open("one_more")
        assert busy.value.retry_after_s > 0
        taken = other.open("s", session.token)
        with pytest.raises(Evicted, match="taken over"):
            session.step({})
        assert taken.step({}) is not None
        for o in (*others, taken):
            o.close()


def test_async_sessions_are_the_same(server: Server, toy: Path) -> None:
    ticks = {name: [tick(name, i, 50 * n + i) for i in range(15)] for n, name in enumerate("abc")}

    async def one(client: AsyncClient, name: str) -> list[bytes]:
        async with await client.open(name) as session:
            got = []
            for of in ticks[name][:10]:
                answer = await session.step(features_of(of), event_ns=of.event_ns, age_ns=of.age_ns)
                assert answer is not None
                got.append(answer.heads["next"].tobytes())
            for of in ticks[name][10:]:
                session.send(features_of(of), event_ns=of.event_ns, age_ns=of.age_ns)
            got += [a.heads["next"].tobytes() async for a in session.answers()]
            assert await session.flush() == 15
            return got

    async def main() -> None:
        async with AsyncClient(server.address) as client:
            found = await asyncio.gather(*(one(client, name) for name in ticks))
            for name, got in zip(ticks, found, strict=True):
                assert got == alone(toy, ticks[name])
            with pytest.raises(UnknownSession):
                await client.open("never", token="x")

    asyncio.run(main())
    assert len(server.sessions) == 0


def test_garbage_is_counted_and_does_not_affect_other_clients(toy: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    with running(settings_for(toy, tmp_path), notes.append) as server:
        liar = Dealer(server.address, 1000, 1000)
        with Client(server.address) as client, client.open("s") as session:
            for i in range(200):
                liar.send(os.urandom(50) if i % 2 else b"")
            ticks = [tick("s", i) for i in range(10)]
            assert drive(session, ticks) == alone(toy, ticks)
            end_ns = now_ns() + 5 * S
            while server.host.counts["garbage"] < 200 and now_ns() < end_ns:
                session.flush()
        liar.close()
    assert server.host.counts["garbage"] == 200
    assert 1 <= len(notes) <= 3, "one line per second and peer"
    assert "an invalid message" in notes[0]


@pytest.mark.slow
def test_a_client_without_a_key_is_refused(toy: Path, tmp_path: Path) -> None:
    keys, stranger = KeyFolder.new(tmp_path / "keys"), KeyFolder.new(tmp_path / "stranger")
    asked = settings_for(toy, tmp_path / "states", keys=str(keys.path))
    with running(asked) as server:
        with pytest.raises(NotRunning, match="keys let you in"):
            Client(server.address, timeout_s=0.5)
        with pytest.raises(NotRunning):
            Client(server.address, keys=stranger.path, server_key=keys.server, timeout_s=0.5)
        keys.allow("reader", stranger.client)
        with pytest.raises(NotRunning):  # a right to read does not include stepping
            Client(server.address, keys=stranger.path, server_key=keys.server, timeout_s=0.5)
        keys.remove("reader")
        keys.allow("writer", stranger.client, write=True)
        for folder, key in ((stranger, keys.server), (keys, "")):
            with Client(server.address, keys=folder.path, server_key=key) as client, client.open("s") as session:
                assert session.step({}) is not None
        assert server.authenticator is not None
        assert server.authenticator.refused.get("key_not_allowed", 0) >= 2
    with pytest.raises(ConfigError, match=r"`serve\.host` 0\.0\.0\.0 can be reached by others"):
        config.parse({"serve": {"host": "0.0.0.0"}})


def test_a_folder_of_states_and_a_port_belong_to_one_server(server: Server, toy: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="another server keeps its sessions"):
        Server(settings_for(toy, tmp_path))
    port = int(server.address.rpartition(":")[2])
    with pytest.raises(ProcessError, match="cannot bind"):
        Server(settings_for(toy, tmp_path / "other", port=port))


@pytest.mark.slow
def test_a_missing_server_is_an_error_within_the_timeout(tmp_path: Path) -> None:
    with pytest.raises(NotRunning, match=r"no server answers at tcp://127\.0\.0\.1:9"):
        Client("tcp://127.0.0.1:9", timeout_s=0.2)
    with pytest.raises(ProcessError, match="is no address"):
        Client("nonsense")

    async def main() -> None:
        with pytest.raises(NotRunning, match="no server answers"):
            async with AsyncClient("tcp://127.0.0.1:9", timeout_s=0.2):
                pass

    asyncio.run(main())


def test_a_missing_answer_is_an_error(server: Server) -> None:
    with Client(server.address) as client, client.open("s") as session:
        with pytest.raises(TimedOut, match="no answer came to 1 ticks of session 's'"):
            session.step({}, timeout_s=0)
        answer = session.receive()
        assert answer is not None
        assert answer.tick == 0


# ---- as a process ----------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_killed_server_comes_back_and_no_tick_is_lost_or_differs(toy: Path, tmp_path: Path) -> None:
    ticks = [tick("s", i) for i in range(90)]
    process, address = start(toy, tmp_path, 0)
    port = int(address.rpartition(":")[2])
    try:
        with Client(address, timeout_s=20) as client:
            session = client.open("s", timeout_s=20)
            got = drive(session, ticks[:40])
            session.flush()
            for of in ticks[40:60]:
                session.send(features_of(of), event_ns=of.event_ns, age_ns=of.age_ns)
            process.kill()
            process.communicate()
            process, _ = start(toy, tmp_path, port)
            answers = []
            while session.waiting or len(answers) < 20:
                answer = session.receive(timeout_s=20)
                if answer is None:
                    break
                answers.append(answer)
            by_tick = {a.tick: a.heads["next"].tobytes() for a in answers}
            expected = alone(toy, ticks)
            assert {t: by_tick[t] == expected[t] for t in by_tick} == dict.fromkeys(by_tick, True)
            # a tick that was stepped and saved, but whose answer was lost, is counted
            assert len(by_tick) + session.skipped == 20
            got += [expected[t] for t in range(40, 60)]
            got += drive(session, ticks[60:])
            assert got == expected
            session.close()
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=10)
        assert process.returncode == 0
        document = json.loads(out.splitlines()[-1])
        assert document["counts"]["resumed"] == 1
        assert document["sessions"] == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


def test_a_server_that_ends_in_order_keeps_every_session(toy: Path, tmp_path: Path) -> None:
    ticks = [tick("s", i) for i in range(8)]
    with running(settings_for(toy, tmp_path)) as server, Client(server.address) as client:
        session = client.open("s")
        token = session.token
        first = drive(session, ticks[:5])
        session.leave()
    with running(settings_for(toy, tmp_path)) as server, Client(server.address) as client:
        with pytest.raises(Evicted, match="its state is kept"):
            client.open("s")
        with client.open("s", token) as session:
            assert (session.resumed, session.next_tick) == (True, 5)
            assert first + drive(session, ticks[5:]) == alone(toy, ticks)


def test_a_server_without_its_folder_of_states_says_so_and_serves_on(toy: Path, tmp_path: Path) -> None:
    said: list[str] = []
    asked = settings_for(toy, tmp_path)
    with running(asked, said.append) as server, Client(server.address) as client:
        folder = config.state_folder(asked.state) / "sessions"
        with client.open("s") as session:
            drive(session, [tick("s", 0)])
            session.flush()
            folder.rename(tmp_path / "kept")
            folder.write_text("in its place")
            assert server.sessions.sweep(NOW) == 0  # not an OSError that ends the server
            end_ns = now_ns() + 5 * S
            while not server.sessions.counts["unswept"] and now_ns() < end_ns:
                time.sleep(0.01)
            assert server.sessions.counts["unswept"] == 1
            drive(session, [tick("s", 1)])
            with pytest.raises(StreamError, match="cannot be written to"):
                session.flush()
            drive(session, [tick("s", 2)])
            with pytest.raises(StreamError, match="cannot be written to"):
                session.flush()
            folder.unlink()
            drive(session, [tick("s", 3)])
            assert session.flush() == 4, "the folder is made again"
    failures, again = said
    assert "expired states cannot be removed" in failures or "cannot be written to" in failures
    assert failures.endswith("sessions stay open, and it is tried again")
    assert re.fullmatch(r"states are written again; ([3-9]|\d\d+) times that was not possible", again)
    assert server.unsaved == 0


@pytest.mark.slow
@pytest.mark.parametrize("keys", [False, True])
def test_the_sessions_of_a_client_that_died_silently_are_freed_and_kept(toy: Path, tmp_path: Path, keys: bool) -> None:
    """It waits for no answer, so nothing is sent that could fail. Another idle one has its session on."""
    folder = KeyFolder.new(tmp_path / "keys")
    folder.allow("writer", folder.client, write=True)
    secret = folder.keys(folder.server) if keys else None
    with running(settings_for(toy, tmp_path, **({"keys": str(folder.path)} if keys else {}))) as server:
        dealers = {name: Dealer(server.address, 16, protocol.MAX_BYTES, secret) for name in ("s", "other")}
        tokens = {}
        for name, dealer in dealers.items():
            dealer.send(protocol.encode(protocol.Open(session=name)))
            content = dealer.receive(5000)
            assert content is not None
            ready = protocol.read_reply(content)
            assert isinstance(ready, protocol.Ready)
            tokens[name] = ready.token
            dealer.send(protocol.encode(step_of(tick(name, 0))))
            assert dealer.receive(5000) is not None
        dealers["s"].close()
        end_ns = now_ns() + 20 * S
        while len(server.sessions) == 2 and now_ns() < end_ns:
            time.sleep(0.05)
        assert server.host.counts["gone"] == 1
        assert "other" in server.sessions
        content = dealers["other"].receive(10_000)
        assert content is not None
        assert protocol.read_reply(content) == protocol.Alive()
        with Client(server.address, keys=secret) as client, client.open("s", tokens["s"]) as session:
            assert (session.resumed, session.next_tick) == (True, 1)
            assert drive(session, [tick("s", 1)]) == alone(toy, [tick("s", 0), tick("s", 1)])[1:]
        dealers["other"].close()


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(os.name == "nt", reason="a process cannot be stopped there")
def test_the_sessions_of_a_machine_that_is_off_are_freed_and_kept(toy: Path, tmp_path: Path) -> None:
    """A stopped process answers no heartbeat, as a machine that is off."""
    with running(settings_for(toy, tmp_path)) as server:
        code = (
            "import sys, time; from stream_mmrnn import Client; "
            "print(Client(sys.argv[1]).open('s').token, flush=True); time.sleep(60)"
        )
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        client = subprocess.Popen(
            [sys.executable, "-c", code, server.address], stdout=subprocess.PIPE, text=True, env=env
        )
        try:
            assert client.stdout is not None
            token = client.stdout.readline().strip()
            assert "s" in server.sessions
            client.send_signal(signal.SIGSTOP)
            end_ns = now_ns() + 30 * S
            while len(server.sessions) and now_ns() < end_ns:
                time.sleep(0.05)
            assert not len(server.sessions)
            with Client(server.address) as other, other.open("s", token) as session:
                assert session.token == token
        finally:
            client.kill()
            client.communicate()


def test_the_page_says_how_soon_a_lost_client_is_noticed() -> None:
    found = re.search(
        r"saved and evicted within (\d+) s, within (\d+) s where its machine is off", PAGE.replace("\n  ", " ")
    )
    assert found is not None
    program_s, machine_s = map(int, found.groups())
    probes_s = server_module._PROBES * server_module._PROBE_EVERY_NS / 1e9
    beats_s = (request_reply._HEARTBEAT_MS + request_reply._DEAD_AFTER_MS) / 1e3
    assert probes_s + 1 <= program_s, "a second to write the states"
    assert beats_s + probes_s + 1 <= machine_s <= 6


def test_one_client_has_no_more_sessions_than_it_may_have(toy: Path, tmp_path: Path) -> None:
    with running(settings_for(toy, tmp_path, client_slots=2)) as server, Client(server.address) as client:
        one, two = client.open("one"), client.open("two")
        with pytest.raises(Busy, match="this client has 2 sessions, as many as one may have"):
            client.open("three")
        with Client(server.address) as other, other.open("three"):
            pass
        one.close()
        client.open("four").close()
        two.close()


def test_one_client_has_no_more_sessions_than_are_left_for_others(make: Make, toy: Path) -> None:
    """Without a setting: alone it has half of the slots, and whoever comes later always finds one."""
    host = make(slots=16, host_slots=16)

    def takes(peer: bytes) -> int:
        for i in range(20):
            say(host, protocol.Open(session=f"{peer.decode()}{i}"), peer)
        finish(host)
        replies = [reply for to, reply in replies_of(host) if to == peer]
        assert len(replies) == 20
        busy = [r for r in replies if isinstance(r, protocol.BusyNow)]
        assert all("slots are left for others" in r.why and r.retry_s > 0 for r in busy)
        return sum(isinstance(reply, protocol.Ready) for reply in replies)

    assert [takes(peer) for peer in (b"a", b"b", b"c", b"d", b"e")] == [8, 4, 2, 1, 1]
    say(host, protocol.Close(session="b0"), b"b")
    say(host, protocol.Open(session="more"), b"b")
    say(host, protocol.Open(session="more"), b"a")
    say(host, protocol.Open(session="one"), b"f")
    finish(host)
    kinds = [(peer, type(reply).__name__) for peer, reply in replies_of(host)]
    assert kinds == [(b"b", "Done"), (b"b", "BusyNow"), (b"a", "BusyNow"), (b"f", "Ready")]


def test_a_client_that_reconnects_before_that_is_noticed_gets_all_its_sessions(make: Make) -> None:
    """They are open, and take no slot that is left for others."""
    host = make(slots=16, host_slots=16)
    for peer, count in ((b"a", 8), (b"b", 4)):
        for i in range(count):
            say(host, protocol.Open(session=f"{peer.decode()}{i}"), peer)
    finish(host)
    tokens = {r.session: r.token for _, r in replies_of(host) if isinstance(r, protocol.Ready)}
    assert len(tokens) == 12
    for i in range(8):
        say(host, protocol.Open(session=f"a{i}", token=tokens[f"a{i}"]), b"again")
    say(host, protocol.Open(session="more"), b"again")
    finish(host)
    replies = [reply for peer, reply in replies_of(host) if peer == b"again"]
    assert [type(reply).__name__ for reply in replies] == ["Ready"] * 8 + ["BusyNow"]


@pytest.mark.process
def test_states_that_are_lost_at_the_end_are_counted_and_the_exit_code_is_3(toy: Path, tmp_path: Path) -> None:
    process, address = start(toy, tmp_path, 0)
    try:
        with Client(address, timeout_s=20) as client:
            session = client.open("s", timeout_s=20)
            drive(session, [tick("s", 0)])
            (folder,) = tmp_path.rglob("sessions")
            folder.rename(tmp_path / "kept")
            folder.write_text("in its place")
            drive(session, [tick("s", 1)])
            process.send_signal(signal.SIGTERM)
            out, _ = process.communicate(timeout=20)
        document = json.loads(out.splitlines()[-1])
        assert process.returncode == 3
        assert document["unsaved_sessions"] == 1
        assert "cannot be written to" in document["last_problem"]
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.mark.process
@pytest.mark.skipif(os.name == "nt", reason="there is no limit of open files on Windows")
@pytest.mark.parametrize(
    ("files", "code", "sentence"),
    [
        (60, 2, "this process may open 60 files, and serve needs 64 and one for each client"),
        (100, 0, "at most 36 sessions, not 50: this process may open 100 files"),
    ],
)
def test_sessions_are_limited_by_open_files(toy: Path, tmp_path: Path, files: int, code: int, sentence: str) -> None:
    """The soft limit is raised to the hard one; beyond that there are fewer sessions, and a sentence."""
    command = ["-m", "stream_mmrnn", "serve", "--model", str(toy), "--port", "0", "--slots", "50", "--duration", "0.3"]
    shell = f"ulimit -Sn 50; ulimit -Hn {files}; exec " + shlex.join([sys.executable, *command])
    env = os.environ | {"XDG_STATE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", shell], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert sentence in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def running_still(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until(what: Callable[[], bool], seconds: float = 10) -> bool:
    end_s = time.monotonic() + seconds
    while not (done := what()) and time.monotonic() < end_s:
        time.sleep(0.02)
    return done


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_model_that_loops_for_ever_does_not_make_it_deaf(tmp_path: Path, processes: int) -> None:
    model = toy_model.make(tmp_path / "endless.onnx", endless_above=1e6)
    process, address = start(model, tmp_path, 0, processes=processes)
    try:
        with Client(address, timeout_s=20) as client:
            session = client.open("s", timeout_s=20)
            drive(session, [tick("s", i) for i in range(3)])
            session.flush()
            token = session.token
            children = descendants(process.pid)
            session.send({"vision": np.full(5, 1e9, np.float32)})
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            if processes > 1:  # the first one is heard: the server waits for the answer of the process that steps
                time.sleep(1)
                process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=30)
        assert process.returncode == (1 if processes == 1 else 130)
        assert "Traceback" not in err
        if processes == 1:
            assert "error: a step of the model, or another operation, does not end" in err
        assert wait_until(lambda: not any(running_still(pid) for pid in children))
        process, address = start(model, tmp_path, 0, processes=processes)
        with Client(address, timeout_s=20) as client:
            assert client.open("s", token, timeout_s=20).next_tick == 3
    finally:
        process.kill()
        process.communicate()


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_closed_terminal_stops_it_with_its_summary(toy: Path, tmp_path: Path, processes: int) -> None:
    """The signal reaches the processes of the engine, too: they go on until the sessions are saved."""
    process, address = start(toy, tmp_path, 0, processes=processes)
    try:
        with Client(address, timeout_s=20) as client:
            drive(client.open("s", timeout_s=20), [tick("s", 0)])
            os.killpg(process.pid, signal.SIGHUP)
            out, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        document = json.loads(out.splitlines()[-1])
        assert (document["counts"]["evicted"], document["unsaved_sessions"]) == (1, 0)
        assert "Traceback" not in err
    finally:
        process.kill()
        process.communicate()


# ---- the page --------------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "serve.md").read_text()


@pytest.mark.process
def test_the_page_runs_as_written(tmp_path: Path) -> None:
    command = re.search(r"```sh\n(stream-mmrnn serve .*)\n```", PAGE)
    assert command is not None
    env = os.environ | {"XDG_STATE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    # a busy machine may be measured as too slow for more than one session
    (tmp_path / "serve.toml").write_text("[admission]\nshare = 1.0\n[serve]\nport = 0\n")
    words = [*command.group(1).split()[1:], "--config", str(tmp_path / "serve.toml")]
    server = subprocess.Popen(
        [sys.executable, "-m", "stream_mmrnn", *words], stdout=subprocess.PIPE, text=True, env=env
    )
    try:
        assert server.stdout is not None
        address = re.search(r"serving turn_taking at (tcp://127\.0\.0\.1:\d+)", server.stdout.readline())
        assert address is not None
        snippets = [b for b in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "ClusterClient" not in b]
        assert len(snippets) == 4
        for snippet in snippets:
            assert "tcp://127.0.0.1:7701" in snippet, "the usual port, which may be taken here"
            code = snippet.replace("tcp://127.0.0.1:7701", address[1])
            said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)
            assert said.returncode == 0, said.stderr
            assert len(said.stdout.splitlines()) == 25
        server.send_signal(signal.SIGINT)
        said, _ = server.communicate(timeout=10)
        assert server.returncode == 0
        assert "1687 ticks of 67 sessions" in said
    finally:
        if server.poll() is None:
            server.kill()
            server.communicate()


def test_the_page_names_every_message_and_every_key_of_it() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE, re.MULTILINE))
    kinds = [*typing.get_args(protocol.Request), *typing.get_args(protocol.Reply)]
    for kind in kinds:
        row = rows[kind.__struct_config__.tag]
        for field in kind.__struct_fields__:
            assert f"`{field}`" in row, (kind, field)
