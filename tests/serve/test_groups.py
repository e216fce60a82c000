"""Groups of sessions that are stepped by blocks: each session as if alone, whatever comes between."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from serving import alone, running, settings_for, start, step_of, tick

from stream_mmrnn import AsyncClient, Client
from stream_mmrnn.core.block import Block, BlockPredictions
from stream_mmrnn.core.errors import (
    BadTick,
    Busy,
    DuplicateSession,
    Evicted,
    ShardDied,
    UsageError,
    WireError,
)
from stream_mmrnn.core.settings import StateSettings
from stream_mmrnn.core.types import Tick
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.block_codec import StepsReader, column, row_bytes, rows_of, to_steps
from stream_mmrnn.serve.client_groups import GroupAnswer
from stream_mmrnn.serve.client_state import ClientState
from stream_mmrnn.serve.save_queue import WRITERS
from stream_mmrnn.serve.server import Server
from stream_mmrnn.serve.session_host import Host
from stream_mmrnn.serve.sessions import Sessions
from stream_mmrnn.serve.state_store import StateBlockStore
from stream_mmrnn.serve.turns import BUDGET

S = 1_000_000_000
NOW = 10**15
NAMES = [f"s{i}" for i in range(6)]


@pytest.fixture
def server(toy: Path, tmp_path: Path) -> Iterator[Server]:
    with running(settings_for(toy, tmp_path, slots=80)) as found:
        yield found


def columns(ticks: list[Tick]) -> dict[str, Any]:
    """What `Group.send` takes for these ticks."""
    names = list(ticks[0].features)
    present = {m: np.array([t.present[m] for t in ticks]) for m in names}
    features = {m: np.array([t.features[m] for t in ticks if t.present[m]]) for m in names if present[m].any()}
    return {
        "features": features,
        "present": {m: present[m] for m in features},
        "age_ns": np.array([[t.age_ns[m] for m in names] for t in ticks]),
        "event_ns": np.array([t.event_ns for t in ticks]),
    }


def block_of(ticks: list[Tick], rows: list[int]) -> Block:
    names = list(ticks[0].features)
    present = np.array([[t.present[m] for m in names] for t in ticks])
    return Block(
        np.array(rows),
        np.array([t.index for t in ticks]),
        np.array([t.event_ns for t in ticks]),
        present,
        np.array([[t.age_ns[m] for m in names] for t in ticks]),
        tuple(
            np.array([t.features[m] for t in ticks if t.present[m]], np.float32).reshape(-1, len(ticks[0].features[m]))
            for m in names
        ),
    )


def of_row(answers: list[GroupAnswer], row: int) -> list[bytes]:
    return [a.heads["next"][i].tobytes() for a in answers for i in np.flatnonzero((a.rows == row) & a.stepped).tolist()]


# ---- over sockets ----------------------------------------------------------------------------------------------------


def test_each_session_of_a_group_is_as_if_alone(server: Server, toy: Path) -> None:
    names = [f"s{i}" for i in range(70)]
    ticks = {name: [tick(name, k, 100 * n + k) for k in range(6)] for n, name in enumerate(names)}
    answers = []
    with Client(server.address) as client, client.group(names) as group:
        assert (len(group), group.names) == (70, names)
        for k in range(6):
            answer = group.step(**columns([ticks[name][k] for name in names]))
            assert answer.stepped.all()
            assert not answer.errors
            assert answer.ticks.tolist() == [k] * len(names)
            assert answer.event_ns.tolist() == [ticks[name][k].event_ns for name in names]
            answers.append(answer)
        assert group.flush().tolist() == [6] * len(names)
    for row, name in enumerate(names):
        assert of_row(answers, row) == alone(toy, ticks[name])
    assert len(server.sessions) == 0


def test_rows_of_a_group_are_stepped_in_any_order(server: Server, toy: Path) -> None:
    rng = np.random.default_rng(0)
    following = [0] * 5
    answers = []
    with Client(server.address) as client, client.group(NAMES[:5]) as group:
        for _ in range(12):
            rows = rng.permutation(5)[: 1 + int(rng.integers(5))].tolist()
            some = [tick(NAMES[row], following[row], row) for row in rows]
            number = group.send(rows=rows, **columns(some))
            for row in rows:
                following[row] += 1
            assert group.next_ticks.tolist() == following
            answer = group.receive()
            assert answer is not None
            assert (answer.block, answer.rows.tolist()) == (number, rows)
            answers.append(answer)
        assert group.receive() is None
    for row in range(5):
        assert of_row(answers, row) == alone(toy, [tick(NAMES[row], k, row) for k in range(following[row])])


def test_an_async_group_is_the_same(server: Server, toy: Path) -> None:
    ticks = {name: [tick(name, k, 50 * n + k) for k in range(8)] for n, name in enumerate(NAMES)}

    async def main() -> list[GroupAnswer]:
        async with AsyncClient(server.address) as client, await client.group(NAMES) as group:
            made = [await group.step(**columns([ticks[name][k] for name in NAMES])) for k in range(4)]
            for k in range(4, 8):
                group.send(**columns([ticks[name][k] for name in NAMES]))
            made += [answer async for answer in group.answers()]
            assert (await group.flush()).tolist() == [8] * len(NAMES)
            await group.reset()
            assert (await group.receive()) is None
            return made

    answers = asyncio.run(main())
    for row, name in enumerate(NAMES):
        assert of_row(answers, row) == alone(toy, ticks[name])


def test_float16_is_the_same_as_its_numbers_in_float32(server: Server, toy: Path) -> None:
    ticks = [[tick(name, k, 9 * n + k) for n, name in enumerate(NAMES)] for k in range(3)]
    with Client(server.address) as client, client.group(NAMES) as group:
        for k in range(3):
            asked = columns(ticks[k])
            asked["features"] = {m: v.astype(np.float16) for m, v in asked["features"].items()}
            answer = group.step(**asked)
            assert answer.stepped.all()
    with Client(server.address) as client, client.group(NAMES) as group:
        for k in range(3):
            asked = columns(ticks[k])
            asked["features"] = {m: v.astype(np.float16).astype(np.float32) for m, v in asked["features"].items()}
            same = group.step(**asked)
    assert same.heads["next"].tobytes() == answer.heads["next"].tobytes()


def test_what_does_not_fit_is_refused_and_the_others_are_stepped(server: Server, toy: Path) -> None:
    with Client(server.address) as client, client.group(NAMES[:3]) as group:
        first = client.model.modalities[0]
        good = np.zeros((3, first.size), np.float32)
        with pytest.raises(BadTick, match="has no 'smell'"):
            group.send({"smell": good})
        with pytest.raises(BadTick, match="expected 3 vectors"):
            group.send({first.name: good[:2]})
        with pytest.raises(BadTick, match="one tick of each session"):
            group.send({}, rows=[0, 0])
        with pytest.raises(BadTick, match="rows from 0 to 2"):
            group.send({}, rows=[3])
        with pytest.raises(BadTick, match="indices"):
            group.send({}, ticks=-1)
        bad = good.copy()
        bad[1, 0] = np.nan
        answer = group.step({first.name: bad})
        assert answer.stepped.tolist() == [True, False, True]
        assert isinstance(answer.errors[1], BadTick)
        assert "not finite" in str(answer.errors[1])
        assert np.isnan(answer.heads["next"][1]).all()
        assert group.step({first.name: good}, ticks=[1, 0, 1]).stepped.all(), "the refused one is sent again"
        again = group.step({first.name: good}, ticks=1)
        assert (again.stepped.tolist(), group.skipped) == ([False, True, False], 2)


def test_all_sessions_of_a_group_are_opened_or_none(server: Server, toy: Path) -> None:
    with Client(server.address) as client, Client(server.address) as other, other.open("s1"):
        with pytest.raises(DuplicateSession, match="1 of 3 sessions were not opened; the first one: 's1'"):
            client.group(NAMES[:3])
        with pytest.raises(Busy) as busy:
            client.group([f"many{i}" for i in range(100)])
        assert busy.value.retry_after_s > 0
        with pytest.raises(UsageError, match="must differ"):
            client.group(["a", "a"])
        with client.group(["s0", "s2"]) as group:
            assert group.step({}).stepped.all()
            with pytest.raises(DuplicateSession, match="open over this connection already"):
                client.open("s0")
    assert not len(server.sessions), "what was opened before the refusal was closed again"


def test_a_group_continues_from_its_tokens_and_what_is_taken_over_ends(server: Server, toy: Path) -> None:
    ticks = [[tick(name, k, n) for n, name in enumerate(NAMES)] for k in range(6)]
    with Client(server.address) as client:
        group = client.group(NAMES)
        answers = [group.step(**columns(ticks[k])) for k in range(3)]
        tokens = group.tokens
        with Client(server.address) as other:
            again = other.group(NAMES, tokens)
            assert again.resumed.all()
            assert again.next_ticks.tolist() == [3] * len(NAMES)
            answers += [again.step(**columns(ticks[k])) for k in range(3, 6)]
            assert group.receive() is None
            client.open("z").close()  # the notices have come before its answers
            assert {type(error) for error in group.errors.values()} == {Evicted}
            assert set(group.errors) == set(range(len(NAMES)))
            with pytest.raises(Evicted, match="taken over"):
                group.step({})
            again.close()
    for row, name in enumerate(NAMES):
        assert of_row(answers, row) == alone(toy, [of[row] for of in ticks])
        assert name not in server.sessions


def test_a_client_of_version_1_gets_what_it_knows(server: Server) -> None:
    from stream_mmrnn.bus import Dealer

    dealer = Dealer(server.address, 100, 2**20)

    def ask(message: dict[str, object]) -> dict[str, Any]:
        dealer.send(msgspec.msgpack.encode(message))
        content = dealer.receive(5000)
        assert content is not None
        found: dict[str, Any] = msgspec.msgpack.decode(content)
        return found

    welcome = ask({"op": "hello", "version": 1})
    assert (welcome["op"], welcome["version"]) == ("welcome", 1)
    assert ask({"op": "open", "session": "old"})["op"] == "ready"
    nothing = [None] * len(welcome["modalities"])
    pred = ask({"op": "step", "session": "old", "tick": 0, "event_ns": 7, "features": nothing})
    assert (pred["op"], pred["tick"], pred["event_ns"], len(pred["heads"])) == ("pred", 0, 7, len(welcome["heads"]))
    assert ask({"op": "close", "session": "old"})["op"] == "done"
    dealer.close()


def test_a_server_of_version_1_is_asked_again_and_has_no_groups() -> None:
    client = ClientState()
    client.send(protocol.Hello())
    client.out.clear()
    why = "protocol version 2 is not 1; use the same release on both sides"
    client.receive(protocol.encode(protocol.Refused(error="bad_message", why=why)), NOW)
    assert protocol.read_request(client.out.popleft()[1]) == protocol.Hello(version=1)
    assert client.problem is None
    client.receive(protocol.encode(protocol.Welcome(1, "m", "0" * 64, 40_000_000, 4, (), ())), NOW)
    with pytest.raises(UsageError, match="knows no groups"):
        client.new_group(["a"], None)


@pytest.mark.process
def test_a_killed_server_comes_back_and_no_tick_of_a_group_is_lost_or_differs(toy: Path, tmp_path: Path) -> None:
    ticks = [[tick(name, k, n) for n, name in enumerate(NAMES)] for k in range(90)]
    process, address = start(toy, tmp_path, 0)
    port = int(address.rpartition(":")[2])
    try:
        with Client(address, timeout_s=20) as client:
            group = client.group(NAMES, timeout_s=20)
            answers = [group.step(timeout_s=20, **columns(ticks[k])) for k in range(40)]
            group.flush()
            for k in range(40, 60):
                group.send(**columns(ticks[k]))
            process.kill()
            process.communicate()
            process, _ = start(toy, tmp_path, port)
            while (answer := group.receive(timeout_s=20)) is not None:
                answers.append(answer)
            answers += [group.step(timeout_s=20, **columns(ticks[k])) for k in range(60, 90)]
            expected = [alone(toy, [of[row] for of in ticks]) for row in range(len(NAMES))]
            seen = 0
            for answer in answers:
                for i in np.flatnonzero(answer.stepped).tolist():
                    row, index = int(answer.rows[i]), int(answer.ticks[i])
                    assert answer.heads["next"][i].tobytes() == expected[row][index]
                    seen += 1
            # a tick that was stepped and saved, but whose answer was lost, is counted
            assert seen + group.skipped == 90 * len(NAMES)
            group.close()
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


# ---- any interleaving, without sockets -------------------------------------------------------------------------------

ROW = st.integers(0, 3)
"""Rows of the group are s0 to s3; s4 and s5 are alone."""
ACTIONS = st.one_of(
    st.tuples(st.just("block"), st.lists(ROW, min_size=1, max_size=4, unique=True)),
    st.tuples(st.just("block"), st.just([0, 1, 2, 3])),
    st.tuples(st.just("tick"), st.integers(0, 5)),
    st.tuples(st.just("again"), st.integers(0, 5)),
    st.tuples(st.just("reset"), st.integers(0, 5)),
    st.tuples(st.just("flush"), st.integers(0, 5)),
    st.tuples(st.just("regroup"), st.lists(ROW, min_size=4, max_size=4, unique=True)),
    st.tuples(st.just("take"), st.integers(0, 5)),
    st.tuples(st.sampled_from(["step", "step", "save", "evict", "kill", "vanish", "bad"]), st.just(0)),
)


class Machine:
    """A client that sends anything, in bytes, and what each session must have been through."""

    def __init__(self, toy: Path, folder: Path, writer: bool) -> None:
        self.toy, self.folder = toy, folder
        self.writer = ThreadPoolExecutor(WRITERS) if writer else None
        self.at_ns = NOW
        self.tokens: dict[str, str] = {}
        self.sent = dict.fromkeys(NAMES, 0)
        self.log: dict[str, list[tuple[int, bytes]]] = {name: [] for name in NAMES}
        """Ticks with their heads, in the order in which they were stepped."""
        self.resets: dict[str, list[int]] = {name: [] for name in NAMES}
        """Indices of ticks before which a reset was sent."""
        self.unconfirmed = 0
        """Resets without an answer: they may be confirmed after later ticks are."""
        self.group = NAMES[:4]
        self.blocks: dict[int, tuple[list[str], list[int]]] = {}
        self.ticks_of: dict[int, list[int]] = {}
        self.number = self.lives = 0
        self.begin()
        self.open_all()

    def begin(self) -> None:
        """A new server, on what the last one has left on the disk."""
        state = StateSettings(idle_s=1000, ttl_s=1e6, snapshot_every=3)
        store = StateBlockStore(self.folder, state.ttl_s)
        self.sessions = Sessions(StepEngine(self.toy, 8), store, state, writer=self.writer)
        self.host = Host(self.sessions, 16, slots=8, peer_sessions=8, groups=True)
        self.peer = b"client %d" % self.lives
        self.other = b"another " + self.peer
        self.lives += 1

    def say(self, request: protocol.Request) -> None:
        self.host.receive(self.peer, protocol.encode(request), self.at_ns)

    def settle(self) -> None:
        """Until everything is answered."""
        end_s = time.monotonic() + 30
        while time.monotonic() < end_s:
            self.host.housekeeping(self.at_ns)
            self.read()
            if not self.host.ready and not self.sessions.is_awaited:
                return
            self.host.step(self.at_ns)
            time.sleep(0 if self.host.ready else 0.001)
        raise AssertionError("something is never answered")

    def open_all(self) -> None:
        tokens = [self.tokens.get(name) for name in self.group]
        self.say(protocol.OpenGroup(group=1, sessions=tuple(self.group), tokens=tuple(tokens)))
        for name in NAMES[4:]:
            self.say(protocol.Open(session=name, token=self.tokens.get(name)))
        self.settle()
        while not all(self.sessions.store.holds(name, self.at_ns) for name in NAMES):
            self.settle()  # a server that dies before that has never had the session
            self.at_ns += S // 10
            time.sleep(0.001)

    def begin_at(self, name: str, token: str, following: int) -> None:
        """A server has the session as it was at this tick: later ones are stepped again."""
        self.tokens[name] = token
        self.log[name] = [of for of in self.log[name] if of[0] < following]
        self.sent[name] = following

    def read(self) -> None:
        out, self.host.out = self.host.out, []
        for peer, reply in out:
            assert protocol.read_reply(protocol.encode(reply)) == reply
            if peer not in (self.peer, self.other):
                continue
            match reply:
                case protocol.Ready():
                    self.begin_at(reply.session, reply.token, reply.next)
                case protocol.Grouped():
                    assert not reply.refused
                    following = np.frombuffer(reply.next, "<i8").tolist()
                    for i, token in enumerate(reply.tokens):
                        self.begin_at(self.group[reply.first + i], token, following[i])
                case protocol.Pred():
                    self.log[reply.session].append((reply.tick, reply.heads[0]))
                case protocol.Preds():
                    self.read_preds(reply)
                case protocol.Done():
                    self.unconfirmed -= 1

    def read_preds(self, reply: protocol.Preds) -> None:
        group, rows = self.blocks.pop(reply.block)
        stepped = [] if not reply.heads else rows_of(reply.rows).tolist() if reply.rows else rows
        size = len(reply.heads[0]) // len(stepped) if stepped else 0
        ticks = dict(zip(rows, self.ticks_of[reply.block], strict=True))
        for i, row in enumerate(stepped):
            self.log[group[row]].append((ticks[row], reply.heads[0][i * size : (i + 1) * size]))
        refused = [row for of in reply.refused for row in (rows_of(of.rows).tolist() if of.rows else rows)]
        assert sorted(stepped + rows_of(reply.skipped).tolist() + refused) == sorted(rows), "each row has one answer"

    def content(self, name: str, index: int) -> Tick:
        return tick(name, index, 31 * NAMES.index(name) + index)

    def act(self, what: str, with_: Any) -> None:
        self.at_ns += 1_000_000
        if what == "block":
            rows = list(with_)
            some = [self.content(self.group[row], self.sent[self.group[row]]) for row in rows]
            self.blocks[self.number] = list(self.group), rows
            self.ticks_of[self.number] = [of.index for of in some]
            for of in some:
                self.sent[of.session] += 1
            self.say(to_steps(1, self.number, block_of(some, rows), whole=rows == [0, 1, 2, 3]))
            self.number += 1
        elif what in ("tick", "again"):
            name = NAMES[with_]
            index = self.sent[name] if what == "tick" else max(self.sent[name] - 1, 0)
            self.say(step_of(self.content(name, index)))
            self.sent[name] = max(self.sent[name], index + 1)
        elif what == "reset":
            self.resets[NAMES[with_]].append(self.sent[NAMES[with_]])
            self.unconfirmed += 1
            self.say(protocol.Reset(session=NAMES[with_]))
        elif what == "flush":
            self.say(protocol.Flush(session=NAMES[with_]))
        elif what == "regroup":
            self.settle()
            self.group = [self.group[row] for row in with_]
            self.say(
                protocol.OpenGroup(
                    group=1, sessions=tuple(self.group), tokens=tuple(self.tokens[name] for name in self.group)
                )
            )
            self.settle()
        elif what == "take":
            # the session moves to another client, which steps it, and back
            self.settle()
            name = NAMES[with_]
            for request in (
                protocol.Open(session=name, token=self.tokens[name]),
                step_of(self.content(name, self.sent[name])),
            ):
                self.host.receive(self.other, protocol.encode(request), self.at_ns)
            self.settle()
            self.sent[name] += 1
            assert self.log[name][-1][0] == self.sent[name] - 1, "the other client has it"
            self.open_all()
        elif what == "step":
            self.host.step(self.at_ns)
        elif what == "save":
            self.host.housekeeping(self.at_ns)
        elif what == "bad":
            self.blocks[self.number] = list(self.group), [0]
            self.ticks_of[self.number] = [0]
            self.say(protocol.Steps(group=1, block=self.number, ticks=b"1", features=(), rows=row_bytes(np.array([0]))))
            self.number += 1
        else:
            if what == "evict" or self.unconfirmed:
                self.settle()
            if what == "evict":
                self.at_ns += 1001 * S
                self.settle()
                self.settle()
            elif what == "vanish":
                self.host.gone(self.peer, self.at_ns)
                self.peer += b"'"
                self.settle()
                while len(self.sessions):
                    self.host.housekeeping(self.at_ns)
                    time.sleep(0.001)
                self.host.out.clear()
                self.blocks.clear()
            else:
                self.host.out.clear()  # answers that never arrive
                self.blocks.clear()
                if self.writer is not None:
                    self.writer.shutdown()
                    self.writer = ThreadPoolExecutor(WRITERS)
                self.begin()
            self.open_all()
        self.read()

    def check(self) -> int:
        """Every number that was said is that of the session alone; returns how many."""
        compared = 0
        for name in NAMES:
            engine = StepEngine(self.toy)
            engine.open(name)
            resets = sorted(self.resets[name])
            for index, heads in self.log[name]:
                while resets and resets[0] <= index:
                    engine.reset(name)
                    resets.pop(0)
                assert engine.step([self.content(name, index)])[0].heads["next"].tobytes() == heads, (name, index)
                compared += 1
        return compared


def play(toy: Path, actions: list[tuple[str, Any]], writer: bool) -> int:
    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(toy, Path(folder), writer)
        try:
            for what, with_ in actions:
                machine.act(what, with_)
            machine.settle()
            return machine.check()
        finally:
            if machine.writer is not None:
                machine.writer.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("writer", [False, True])
def test_any_interleaving_leaves_each_session_as_if_alone(toy: Path, writer: bool) -> None:
    compared = 0

    @settings(max_examples=40, phases=[Phase.explicit, Phase.reuse, Phase.generate])
    @given(st.lists(ACTIONS, min_size=10, max_size=40))
    def each(actions: list[tuple[str, Any]]) -> None:
        nonlocal compared
        compared += play(toy, actions, writer)

    each()
    assert compared > 200


# ---- columns ---------------------------------------------------------------------------------------------------------

SIZES = {"a": 2, "b": 3}
READER = StepsReader(list(SIZES), list(SIZES.values()))


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    rows = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6, unique=True))
    count = len(rows)
    present = np.array(draw(st.lists(st.lists(st.booleans(), min_size=2, max_size=2), min_size=count, max_size=count)))
    kind = draw(st.sampled_from([np.float32, np.float16]))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    ages = draw(st.sampled_from([present.astype(np.int64) - 1, rng.integers(-1, 9, (count, 2))]))
    features = tuple(
        rng.standard_normal((int(present[:, i].sum()), n)).astype(kind) for i, n in enumerate(SIZES.values())
    )
    indices, event_ns = rng.integers(0, 2**53, count), rng.integers(-(2**62), 2**62, count)
    return Block(np.array(rows), indices, event_ns, present, ages, features)


@given(blocks())
def test_a_block_comes_back_as_it_was_sent(block: Block) -> None:
    request = protocol.read_request(protocol.encode(to_steps(3, 4, block)))
    assert isinstance(request, protocol.Steps)
    found = READER.read(request, 10)
    assert not found.fits(list(SIZES.values()))
    for name in ("handles", "indices", "event_ns", "present", "age_ns"):
        assert np.array_equal(getattr(found, name), getattr(block, name)), name
    assert [v.tobytes() for v in found.features] == [v.tobytes() for v in block.features]
    absent = ~block.present.any(axis=0)
    assert [of is None for of in request.features] == absent.tolist(), "what is absent everywhere is not sent"


@given(
    blocks(),
    st.sampled_from(["ticks", "rows", "event_ns", "age_ns", "features", "present"]),
    st.binary(max_size=40) | st.none(),
    st.integers(0, 1),
)
def test_columns_of_any_bytes_fit_or_are_refused(block: Block, name: str, content: bytes | None, at: int) -> None:
    request = to_steps(0, 0, block)
    value: Any = content or b""
    if name in ("features", "present"):
        value = [*(getattr(request, name) or (None, None))]
        value[at] = content
        value = tuple(value)
    try:
        found = READER.read(msgspec.structs.replace(request, **{name: value}), 10)
    except BadTick:
        return
    assert not found.fits(list(SIZES.values()))
    assert ((found.handles >= 0) & (found.handles < 10)).all()


@given(st.binary(max_size=60), st.binary(max_size=60), st.integers(0, 3), st.integers(0, 3))
def test_no_answer_harms_a_client(heads: bytes, rows: bytes, block: int, first: int) -> None:
    client = ClientState()
    client.welcome = protocol.Welcome(
        2, "m", "0" * 64, 1, 4, (protocol.Modality("a", 2),), (protocol.Head("h", "regression", 1),)
    )
    group = client.new_group(["x", "y"], None)
    following = np.zeros(2, "<i8").tobytes()
    grouped = protocol.Grouped(group=0, first=0, tokens=("t", "u"), next=following, resumed=bytes(2))
    client.receive(protocol.encode(grouped), NOW)
    group.put({"a": np.zeros((2, 2))}, None, None, None, None, None, NOW)
    for reply in (
        protocol.Preds(group=0, block=block, heads=(heads,), waited_ns=0, step_ns=0, model="", rows=rows),
        protocol.Preds(group=0, block=block, heads=(), waited_ns=0, step_ns=0, model="", skipped=rows, next=heads),
        protocol.Grouped(group=0, first=first, tokens=("t",), next=rows, resumed=heads),
    ):
        try:
            client.receive(protocol.encode(reply), NOW)
        except WireError:
            continue
    good = np.array([[1.0], [2.0]], "<f4").tobytes()
    reply = protocol.Preds(group=0, block=0, heads=(good,), waited_ns=0, step_ns=0, model="m")
    client.receive(protocol.encode(reply), NOW)
    assert len(group.answers) == 1


def test_a_busy_session_of_a_group_is_asked_for_once_a_second(toy: Path) -> None:
    client, at_ns = ClientState(), NOW
    welcome = protocol.welcome(StepEngine(toy).spec, 8)
    client.receive(protocol.encode(welcome), at_ns)
    group = client.new_group(NAMES[:3], None)

    def grouped(following: int, *refused: protocol.RowRefused) -> None:
        said = protocol.Grouped(0, 0, ("t", "u", "v"), column(np.full(3, following)), bytes(3), refused)
        client.receive(protocol.encode(said), at_ns)

    def preds(rows: bytes, *refused: protocol.RowsRefused) -> None:
        count = 3 if not rows else len(rows) // 4
        heads = tuple(np.zeros((count, head.size), "<f4").tobytes() for head in welcome.heads)
        said = protocol.Preds(0, 0, heads, 1, 1, "m", rows, refused=refused)
        client.receive(protocol.encode(said), at_ns)

    def sent() -> list[str]:
        found = [type(protocol.read_request(content)).__name__ for _, content in client.out]
        client.out.clear()
        return found

    def rows(*of: int) -> bytes:
        return np.array(of, "<u4").tobytes()

    grouped(0)
    group.put({}, None, None, None, None, None, at_ns)
    assert sent() == ["OpenGroup", "Steps"]
    preds(rows(0, 2), protocol.RowsRefused("evicted", "it has no slot", rows(1)))
    assert sent() == ["OpenGroup"]
    busy = protocol.RowRefused(1, "busy", "no slot is free", 1.0)
    grouped(1, busy)
    assert sent() == [], "there is no room for it yet"
    assert list(group.unanswered) == [0]
    for _ in range(2):
        at_ns += 2 * 10**9
        client.poll(at_ns)
        client.poll(at_ns)
        assert sent() == ["OpenGroup"]
        grouped(1, busy)
        assert sent() == []
    at_ns += 2 * 10**9
    client.poll(at_ns)
    following = column(np.array([1, 0, 1]))
    client.receive(protocol.encode(protocol.Grouped(0, 0, ("t", "u", "v"), following, bytes(3))), at_ns)
    assert sent() == ["OpenGroup", "Steps"]
    preds(rows(1))
    [answer] = group.answers
    assert answer.stepped.all()
    assert group.skipped == 0


# ---- the host, without sockets ---------------------------------------------------------------------------------------


class HalfDeadEngine(StepEngine):
    """As if the shard with session s1 had died."""

    is_dead = False

    def step_block(self, block: Block) -> BlockPredictions:
        if not self.is_dead:
            return super().step_block(block)
        self.is_dead = False
        error = ShardDied("one of two died")
        error.sessions = ("s1",)
        error.block = super().step_block(block.take(block.handles != self.handle("s1")))
        raise error


Make = Callable[..., Host]


@pytest.fixture
def make(toy: Path, tmp_path: Path) -> Make:
    def make(groups: bool = True, engine: type[StepEngine] = StepEngine) -> Host:
        state = StateSettings(idle_s=10, ttl_s=100, snapshot_every=4)
        sessions = Sessions(engine(toy, 16), StateBlockStore(tmp_path / "states", 100), state)
        return Host(sessions, 8, slots=16, peer_sessions=16, groups=groups)

    return make


def ask(host: Host, request: protocol.Request, peer: bytes = b"a") -> list[Any]:
    """Whatever comes of a request for this peer, when all is stepped."""
    host.receive(peer, protocol.encode(request), NOW)
    while host.ready:
        host.step(NOW)
    out, host.out = host.out, []
    return [reply for to, reply in out if to == peer]


def group_of(host: Host, names: list[str], peer: bytes = b"a", number: int = 1) -> list[str]:
    """Opens a group; the tokens of its sessions."""
    replies = ask(host, protocol.OpenGroup(group=number, sessions=tuple(names)), peer)
    assert all(isinstance(reply, protocol.Grouped) and not reply.refused for reply in replies)
    return [token for reply in replies for token in reply.tokens]


def block(names: list[str], index: int, number: int = 0, rows: list[int] | None = None) -> protocol.Steps:
    some = [tick(name, index, n) for n, name in enumerate(names)]
    return to_steps(1, number, block_of(some, rows or list(range(len(names)))), whole=rows is None)


def test_a_host_without_groups_refuses_them(make: Make) -> None:
    host = make(groups=False)
    for request in (protocol.OpenGroup(group=0, sessions=("a",)), protocol.Steps(0, 0, b"", ())):
        [reply] = ask(host, request)
        assert isinstance(reply, protocol.Refused)
        assert (reply.error, "no groups" in reply.why) == ("bad_message", True)
        host.handle(b"a", request, NOW)
        assert isinstance(host.out.pop()[1], protocol.Refused)
    assert len(host.sessions) == 0


def with_a_dead_shard(make: Make, count: int) -> tuple[Host, list[str], list[str]]:
    """A host with a group of so many sessions, whose states were saved before a shard of its engine died."""
    host = make(engine=HalfDeadEngine)
    names = NAMES[:count]
    tokens = group_of(host, names)
    ask(host, block(names, 0))
    for _ in names:
        host.housekeeping(NOW)
    assert isinstance(host.sessions.engine, HalfDeadEngine)
    host.sessions.engine.is_dead = True
    return host, names, tokens


def test_a_dead_shard_costs_a_group_its_own_rows_only(make: Make, toy: Path) -> None:
    host, names, tokens = with_a_dead_shard(make, 3)
    preds, evicted = ask(host, block(names, 1))
    assert rows_of(preds.rows).tolist() == [0, 2]
    assert [(of.error, rows_of(of.rows).tolist()) for of in preds.refused] == [("evicted", [1])]
    assert (evicted.session, evicted.reason, evicted.token) == ("s1", "lost", tokens[1])
    [again] = ask(host, protocol.OpenGroup(group=1, first=1, sessions=("s1",), tokens=(tokens[1],)))
    assert np.frombuffer(again.next, "<i8").tolist() == [1]
    [last] = ask(host, to_steps(1, 5, block_of([tick("s1", 1, 1)], [1])))
    assert last.heads[0] == alone(toy, [tick("s1", k, 1) for k in range(2)])[1]


def test_a_session_of_a_group_that_is_taken_over_is_refused_alone(make: Make, toy: Path) -> None:
    host = make()
    names = NAMES[:3]
    tokens = group_of(host, names)
    host.receive(b"a", protocol.encode(block(names, 0, 0)), NOW)
    host.receive(b"b", protocol.encode(protocol.Open(session="s1", token=tokens[1])), NOW)
    host.receive(b"a", protocol.encode(block(names, 1, 1)), NOW)
    while host.ready:
        host.step(NOW)
    out, host.out = host.out, []
    first, taken, ready, second = out
    assert first == (b"a", first[1])
    assert (first[1].block, first[1].rows, first[1].refused) == (0, b"", ()), "earlier ticks come first"
    assert taken == (b"a", protocol.EvictedNow(session="s1", token="", reason="taken", next=1))
    assert ready == (b"b", protocol.Ready(session="s1", token=tokens[1], next=1, resumed=True))
    assert rows_of(second[1].rows).tolist() == [0, 2]
    assert [(of.error, rows_of(of.rows).tolist()) for of in second[1].refused] == [("unknown", [1])]
    [pred] = ask(host, step_of(tick("s1", 1, 1)), b"b")
    assert pred.heads[0] == alone(toy, [tick("s1", k, 1) for k in range(2)])[1]


def test_a_session_that_finds_no_slot_when_its_group_comes_back_is_refused_alone(make: Make, toy: Path) -> None:
    host = make()
    names = NAMES[:4]
    tokens = group_of(host, names)
    ask(host, block(names, 0))
    host.gone(b"a", NOW)
    for i in range(13):
        ask(host, protocol.Open(session=f"b{i}"), b"b")
    [found] = ask(host, protocol.OpenGroup(group=1, sessions=tuple(names), tokens=tuple(tokens)))
    assert [(of.row, of.error) for of in found.refused] == [(3, "busy")]
    [preds] = ask(host, block(names, 1))
    assert [(of.error, rows_of(of.rows).tolist()) for of in preds.refused] == [("unknown", [3])]
    assert rows_of(preds.rows).tolist() == [0, 1, 2]
    expected = [alone(toy, [tick(names[i], 0, i), tick(names[i], 1, i)])[1] for i in range(3)]
    assert preds.heads[0] == b"".join(expected)


def test_a_block_with_a_row_twice_is_stepped_without_it(make: Make, toy: Path) -> None:
    host = make()
    group_of(host, NAMES[:2])
    some = block_of([tick("s0", 0), tick("s1", 0, 1), tick("s0", 1)], [0, 1, 0])
    [preds] = ask(host, to_steps(1, 3, some))
    assert rows_of(preds.rows).tolist() == [0, 1]
    assert [(of.error, rows_of(of.rows).tolist()) for of in preds.refused] == [("bad_tick", [0])]
    assert preds.heads[0][:8] == alone(toy, [tick("s0", 0)])[0]


def test_a_group_of_many_is_opened_in_parts_and_others_go_on(make: Make) -> None:
    host = make()
    host.receive(b"a", protocol.encode(protocol.OpenGroup(group=1, sessions=tuple(f"m{i}" for i in range(14)))), NOW)
    assert [type(reply).__name__ for _, reply in host.out] == ["Grouped"], "a budget is enough for eight"
    assert isinstance(ask(host, protocol.Open(session="b"), b"b")[0], protocol.Ready)
    [preds] = ask(host, block([f"m{i}" for i in range(14)], 0))
    assert len(preds.heads[0]) == 14 * 8


def steps_until_idle(host: Host) -> int:
    """Steps the host as long as something waits, but no more than a hundred times."""
    for count in range(100):
        if not host.ready:
            return count
        host.step(NOW)
    return 100


def test_groups_that_exchange_their_sessions_do_not_wait_for_each_other(make: Make, toy: Path) -> None:
    host = make()
    [one], [two] = group_of(host, ["s0"]), group_of(host, ["s1"], number=2)
    for _ in range(BUDGET):
        host.receive(b"a", protocol.encode(protocol.Hello()), NOW)  # both messages wait
    host.out.clear()
    for number, name, token in ((1, "s1", two), (2, "s0", one)):
        request = protocol.OpenGroup(group=number, sessions=(name,), tokens=(token,))
        host.receive(b"a", protocol.encode(request), NOW)
    assert steps_until_idle(host) < 100
    assert [(r.group, r.tokens) for _, r in host.out if isinstance(r, protocol.Grouped)] == [(1, (two,)), (2, (one,))]
    host.out.clear()
    [preds] = ask(host, block(["s1"], 0))
    assert preds.heads[0] == alone(toy, [tick("s1", 0)])[0]


def test_a_session_moves_to_another_group_after_the_blocks_that_were_sent_before(make: Make) -> None:
    host = make()
    group_of(host, ["s0"])
    [token] = group_of(host, ["s1"], number=2)
    for _ in range(BUDGET):
        host.receive(b"a", protocol.encode(protocol.Hello()), NOW)
    for request in (
        protocol.OpenGroup(group=2, sessions=("s2",), first=1),
        msgspec.structs.replace(block(["s1"], 0, rows=[0]), group=2),
        protocol.OpenGroup(group=1, sessions=("s1",), tokens=(token,), first=1),
    ):
        host.receive(b"a", protocol.encode(request), NOW)
    assert steps_until_idle(host) < 100
    [preds] = [reply for _, reply in host.out if isinstance(reply, protocol.Preds)]
    assert not preds.refused


def test_a_session_that_is_lost_while_it_is_taken_over_stops_nobody(make: Make) -> None:
    host, names, tokens = with_a_dead_shard(make, 2)
    host.receive(b"a", protocol.encode(block(names, 1)), NOW)
    host.receive(b"b", protocol.encode(protocol.Open(session="s1", token=tokens[1])), NOW)
    assert steps_until_idle(host) < 100
    host.out.clear()
    host.receive(b"a", protocol.encode(block(names, 2)), NOW)
    assert steps_until_idle(host) < 100, "the rest of the group waits for nothing"
    [(_, preds)] = host.out
    assert isinstance(preds, protocol.Preds)
    assert rows_of(preds.rows).tolist() == [0]


def test_a_server_that_ends_saves_the_states_whatever_waits(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clients take the same two sessions over, each in its own order: neither may."""
    host = make()
    tokens = {name: ask(host, protocol.Open(session=name))[0].token for name in NAMES[:2]}
    for name in tokens:
        host.receive(b"a", protocol.encode(step_of(tick(name, 0))), NOW)
    for peer, names in ((b"b", NAMES[:2]), (b"c", NAMES[1::-1])):
        request = protocol.OpenGroup(group=1, sessions=tuple(names), tokens=tuple(tokens[name] for name in names))
        host.receive(peer, protocol.encode(request), NOW)
    assert steps_until_idle(host) == 100
    step, steps = host.step, iter(range(10))
    monkeypatch.setattr(host, "step", lambda now_ns: (next(steps), step(now_ns)))
    assert host.leave(NOW) == 2
    assert all(host.sessions.is_kept(name, NOW) for name in NAMES[:2])


def test_more_blocks_than_may_wait_are_refused(make: Make) -> None:
    host = make()
    group_of(host, NAMES[:2])
    for i in range(10):
        host.receive(b"a", protocol.encode(block(NAMES[:2], i, i)), NOW)
    refused = [reply for _, reply in host.out]
    assert [(r.block, r.refused[0].error, r.refused[0].rows) for r in refused] == [
        (8, "overrun", b""),
        (9, "overrun", b""),
    ]
