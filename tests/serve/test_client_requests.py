"""A client's `flush`, `reset`, `close` and `open`: in order with its ticks, each with its own reply."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from serving import Line, alone, features_of, running, settings_for, tick

from stream_mmrnn import AsyncClient, Client
from stream_mmrnn.core.errors import DuplicateSession, Evicted, SessionError, TimedOut
from stream_mmrnn.core.settings import StateSettings
from stream_mmrnn.core.types import Tick
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.snapshots import StateStore
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.client_groups import ClientGroup
from stream_mmrnn.serve.client_requests import Asked, SessionRequest
from stream_mmrnn.serve.client_session import ClientSession
from stream_mmrnn.serve.session_host import Host
from stream_mmrnn.serve.sessions import Sessions

NAMES = ["s0", "s1", "s2"]


def host(toy: Path, folder: Path, queue: int = 8, slots: int = 4) -> Host:
    state = StateSettings(idle_s=10, ttl_s=1e6, snapshot_every=3)
    sessions = Sessions(StepEngine(toy, slots), StateStore(folder, state.ttl_s), state)
    return Host(sessions, queue, peer_sessions=8, slots=32, groups=True)


@pytest.fixture
def make(toy: Path, tmp_path: Path) -> Callable[..., Line]:
    return lambda **more: Line(partial(host, toy, tmp_path / "states", **more))


Make = Callable[..., Line]


def answers_of(session: ClientSession, begin: int = 0) -> list[bytes]:
    assert not any(isinstance(answer, SessionError) for answer in session.answers)
    return [a.heads["next"].tobytes() for a in session.answers if not isinstance(a, SessionError) and a.tick >= begin]


def send(line: Line, session: ClientSession, ticks: list[Tick]) -> None:
    for of in ticks:
        line.put(session, of)


def put_block(line: Line, group: ClientGroup, index: int) -> None:
    some = [tick(name, index, row) for row, name in enumerate(group.names)]
    present = {m: np.array([t.present[m] for t in some]) for m in some[0].features}
    features = {m: np.array([t.features[m] for t in some if t.present[m]]) for m in present if present[m].any()}
    ages = np.array([[t.age_ns[m] for m in t.features] for t in some])
    group.put(features, None, None, None, {m: present[m] for m in features}, ages, line.at_ns)


def requests(line: Line) -> list[protocol.Request]:
    """What the client sends now, which is lost."""
    found = [protocol.read_request(content) for _, content in line.client.out]
    line.client.out.clear()
    return found


def reply(line: Line, *replies: Any) -> None:
    for of in replies:
        line.client.receive(protocol.encode(of), line.at_ns)


# ---- order -----------------------------------------------------------------------------------------------------------


def test_a_reset_while_a_session_is_reopened_comes_after_the_ticks_before_it(make: Make, toy: Path) -> None:
    line = make()
    session = line.open("s")
    ticks = [tick("s", i) for i in range(12)]
    for of in ticks[:4]:
        line.put(session, of)
        line.carry()
        line.host.housekeeping(line.at_ns)
    line.die()
    send(line, session, ticks[4:8])
    line.say()
    line.hear()
    assert session.reopening
    asked = line.client.ask(session, protocol.Reset(session="s"))
    send(line, session, ticks[8:])
    line.carry()
    assert isinstance(asked.reply, protocol.Done)
    assert answers_of(session) == alone(toy, ticks[:8]) + alone(toy, ticks[8:])


def test_a_reset_while_a_group_is_reopened_comes_after_the_blocks_before_it(make: Make, toy: Path) -> None:
    line = make()
    line.carry()
    group = line.client.new_group(NAMES, None)
    line.carry()
    for i in range(4):
        put_block(line, group, i)
        line.carry()
        line.host.housekeeping(line.at_ns)
    line.die()
    put_block(line, group, 4)
    line.say()
    line.hear()
    asked = group.ask(lambda row: protocol.Reset(session=NAMES[row]))
    put_block(line, group, 5)
    line.carry()
    assert all(isinstance(of.reply, protocol.Done) for of in asked)
    for row, name in enumerate(NAMES):
        ticks = [tick(name, i, row) for i in range(6)]
        got = [answer.heads["next"][row].tobytes() for answer in group.answers]
        assert got == alone(toy, ticks[:5]) + alone(toy, ticks[5:])


@pytest.mark.parametrize("request_type", [protocol.Flush, protocol.Reset])
def test_a_request_has_its_reply_after_the_answers_to_more_ticks_than_the_servers_queue_takes(
    request_type: Callable[..., SessionRequest], make: Make, toy: Path
) -> None:
    line = make()
    session = line.open("s")
    ticks = [tick("s", i) for i in range(60)]
    send(line, session, ticks[:40])
    asked = line.client.ask(session, request_type(session="s"))
    while asked.reply is None:
        line.say()
        line.host.step(line.at_ns)
        line.host.housekeeping(line.at_ns)
        line.hear()
    assert not session.unanswered
    send(line, session, ticks[40:])
    line.carry()
    begin = 40 if request_type is protocol.Reset else 0
    assert answers_of(session) == alone(toy, ticks[:begin] or ticks) + (alone(toy, ticks[begin:]) if begin else [])


def test_a_group_has_its_replies_after_the_answers_to_all_blocks(make: Make) -> None:
    line = make()
    line.carry()
    group = line.client.new_group(NAMES, None)
    line.carry()
    for i in range(20):
        put_block(line, group, i)
    asked = group.ask(lambda row: protocol.Flush(session=NAMES[row]))
    while any(of.reply is None for of in asked):
        line.say()
        line.host.step(line.at_ns)
        line.hear()
    assert [of.reply.next for of in asked if isinstance(of.reply, protocol.Flushed)] == [20] * 3
    assert not group.unanswered


def test_ticks_after_a_reset_are_kept_until_a_state_with_them_is_on_the_disk(make: Make, toy: Path) -> None:
    line = make()
    session = line.open("s")
    ticks = [tick("s", i) for i in range(9)]
    send(line, session, ticks[:4])
    line.client.ask(session, protocol.Reset(session="s"))
    send(line, session, ticks[4:6])
    line.carry()
    assert list(session.sent) == [4, 5]
    line.die()
    send(line, session, ticks[6:])
    line.carry()
    assert session.error is None
    assert answers_of(session, 4) == alone(toy, ticks[4:])


def test_a_session_that_the_server_has_no_room_for_can_be_closed(make: Make) -> None:
    line = make(slots=1)
    session = line.open("s")
    line.put(session, tick("s", 0))
    line.carry()
    line.host.gone(b"c", line.at_ns)
    line.host.out.clear()
    line.host.receive(b"other", protocol.encode(protocol.Open(session="o")), line.at_ns)
    line.put(session, tick("s", 1))
    line.carry()
    assert session.reopening
    asked = line.client.ask(session, protocol.Close(session="s", token=session.token))
    line.carry()
    assert isinstance(asked.reply, protocol.Done)


def test_nothing_is_sent_after_the_close_of_a_session_that_is_opened_again(make: Make) -> None:
    line = make()
    session = line.open("s")
    line.put(session, tick("s", 0))
    requests(line)
    line.wait()
    line.client.ask(session, protocol.Close(session="s", token=session.token))
    assert [type(of).__name__ for of in requests(line)] == ["Open", "Close"]
    reply(line, protocol.Ready(session="s", token=session.token or "", next=0, resumed=True))
    assert requests(line) == []
    assert not session.unanswered


# ---- any interleaving ------------------------------------------------------------------------------------------------

ACTIONS = st.lists(
    st.sampled_from(["tick", "tick", "tick", "reset", "flush", "say", "step", "hear", "die", "wait", "save"]),
    min_size=10,
    max_size=60,
)


class Play:
    """A session, or a group of three, and what it asks for; the server may die."""

    def __init__(self, toy: Path, folder: Path, is_group: bool) -> None:
        self.toy = toy
        self.line = Line(partial(host, toy, folder, 3))
        self.line.carry()
        self.group = self.line.client.new_group(NAMES, None) if is_group else None
        self.session = None if is_group else self.line.open(NAMES[0])
        self.line.carry()
        self.count = 0
        self.asked = self.ask(protocol.Flush)
        self.settle()  # a server that dies before that has never had the session

    def ask(self, of: Callable[..., SessionRequest]) -> list[Asked]:
        if self.group is not None:
            return self.group.ask(lambda row: of(session=NAMES[row]))
        assert self.session is not None
        return [self.line.client.ask(self.session, of(session=NAMES[0]))]

    def act(self, what: str) -> None:
        line = self.line
        line.at_ns += 1_000_000
        match what:
            case "tick" if self.group is not None:
                put_block(line, self.group, self.count)
                self.count += 1
            case "tick":
                assert self.session is not None
                line.put(self.session, tick(NAMES[0], self.count))
                self.count += 1
            case "reset":
                self.asked += self.ask(protocol.Reset)
            case "flush":
                self.asked += self.ask(protocol.Flush)
            case "die":
                if any(asked.reply is None and asked not in self.unsent for asked in self.asked):
                    self.settle()  # else it has no reply, and its caller is told so
                line.client.out.clear()
                line.die()
            case "wait" if not (line.client.out or line.host.ready or line.host.out):
                line.wait()
            case "save":
                line.host.housekeeping(line.at_ns)
            case "step":
                line.host.step(line.at_ns)
            case "say":
                line.say()
            case "hear":
                line.hear()

    @property
    def unsent(self) -> list[Asked]:
        """Requests that the client holds back."""
        if self.group is not None:
            return [asked for of in self.group._to_send if isinstance(of, list) for asked in of]
        assert self.session is not None
        return [of for of in self.session.to_send if isinstance(of, Asked)]

    def settle(self) -> None:
        for _ in range(100):
            self.line.carry()
            self.line.host.housekeeping(self.line.at_ns)
            if all(asked.reply is not None for asked in self.asked):
                return
            self.line.wait()
        raise AssertionError("a request has no reply")

    def check(self) -> int:
        self.settle()
        while self.waiting:
            self.line.wait()
            self.line.carry()
        for asked in self.asked:
            # what is asked for before the client knows of a restart is refused; the next time it is not
            assert asked.is_answered_by(asked.reply) or isinstance(asked.reply, Evicted)  # type: ignore[arg-type]
        compared = 0
        for row, name in enumerate(NAMES if self.group is not None else NAMES[:1]):
            found = self.heads(row)
            mine = [a for a in self.asked if a.request.session == name and isinstance(a.request, protocol.Reset)]
            engine = StepEngine(self.toy)
            engine.open(name)
            resets = [a.before for a in mine if isinstance(a.reply, protocol.Done)]
            for index in range(self.count):
                while resets and resets[0] <= index:
                    engine.reset(name)
                    resets.pop(0)
                expected = engine.step([tick(name, index, row)])[0].heads["next"].tobytes()
                if index in found:
                    assert found[index] == expected, (name, index)
                    compared += 1
        return compared

    @property
    def waiting(self) -> int:
        of = self.group or self.session
        assert of is not None
        return len(of.unanswered)

    def heads(self, row: int) -> dict[int, bytes]:
        if self.group is not None:
            return {int(a.ticks[row]): a.heads["next"][row].tobytes() for a in self.group.answers if a.stepped[row]}
        assert self.session is not None
        found = [answer for answer in self.session.answers if not isinstance(answer, SessionError)]
        return {answer.tick: answer.heads["next"].tobytes() for answer in found}


@pytest.mark.slow
@pytest.mark.parametrize("is_group", [False, True])
def test_any_interleaving_of_ticks_and_requests_is_in_order(toy: Path, is_group: bool) -> None:
    compared = 0

    @settings(max_examples=60, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
    @given(ACTIONS)
    def each(actions: list[str]) -> None:
        nonlocal compared
        with tempfile.TemporaryDirectory() as folder:
            play = Play(toy, Path(folder), is_group)
            for what in actions:
                play.act(what)
            compared += play.check()

    each()
    assert compared > 200


# ---- replies ---------------------------------------------------------------------------------------------------------


def test_a_late_reply_is_not_that_of_the_next_request(make: Make) -> None:
    line = make()
    session = line.open("s")
    late = line.client.ask(session, protocol.Flush(session="s"))
    line.client.take_back(session, late)
    reset, flush = (line.client.ask(session, of(session="s")) for of in (protocol.Reset, protocol.Flush))
    reply(line, protocol.Flushed(session="s", next=0))
    assert (reset.reply, flush.reply) == (None, None)
    reply(line, protocol.Done(session="s"), protocol.Flushed(session="s", next=1))
    assert reset.reply == protocol.Done(session="s")
    assert flush.reply == protocol.Flushed(session="s", next=1)


def test_a_reply_is_that_of_a_request_of_its_kind_and_a_refusal_that_of_the_newest_or_oldest(make: Make) -> None:
    line = make()
    session = line.open("s")
    flush, reset, other = (
        line.client.ask(session, of(session="s")) for of in (protocol.Flush, protocol.Reset, protocol.Flush)
    )
    reply(line, protocol.Refused(error="duplicate", why="an `open` that was given up", session="s"))
    assert (flush.reply, reset.reply, other.reply) == (None, None, None)
    reply(line, protocol.Done(session="s"))
    assert (flush.reply, other.reply) == (None, None)
    assert reset.reply is not None
    newest = line.client.ask(session, protocol.Reset(session="s"))
    reply(line, protocol.Refused(error="overrun", why="too many wait", session="s"))
    assert (flush.reply, other.reply, str(newest.reply)) == (None, None, "too many wait")
    reply(line, protocol.Refused(error="failed", why="the disk is full", session="s"))
    assert (str(flush.reply), other.reply, session.error) == ("the disk is full", None, None)


def test_what_is_asked_for_after_a_time_out_is_done(toy: Path, tmp_path: Path) -> None:
    with running(settings_for(toy, tmp_path)) as server, Client(server.address) as client:
        with client.open("s") as session:
            with pytest.raises(TimedOut):
                session.flush(timeout_s=0)
            session.send({})
            assert session.flush() == 1
        with client.group(NAMES) as group:
            with pytest.raises(TimedOut):
                group.flush(timeout_s=0)
            group.send({})
            assert group.flush().tolist() == [1] * 3


def test_a_late_reply_to_a_group_is_not_that_of_the_next_request(make: Make) -> None:
    line = make()
    line.carry()
    group = line.client.new_group(NAMES, None)
    line.carry()
    group.take_back(group.ask(lambda row: protocol.Flush(session=NAMES[row])))
    asked = group.ask(lambda row: protocol.Flush(session=NAMES[row]))
    assert [session for session, _ in line.client.out] == NAMES * 2, "a cluster's transport needs them"
    reply(line, *(protocol.Flushed(session=name, next=0) for name in NAMES))
    assert [of.reply for of in asked] == [None] * 3
    reply(line, *(protocol.Flushed(session=name, next=1) for name in NAMES))
    assert [of.reply for of in asked] == [protocol.Flushed(session=name, next=1) for name in NAMES]


def test_a_server_that_was_restarted_owes_no_reply_to_what_was_asked_before(make: Make) -> None:
    line = make()
    session = line.open("s")
    for in_time in (False, True):  # whether the caller gives up before the session is opened again
        line.put(session, tick("s", session.next_tick))
        asked = line.client.ask(session, protocol.Flush(session="s"))
        requests(line)  # they die with the server
        if in_time:
            line.client.take_back(session, asked)
        line.wait()
        line.carry()
        line.client.take_back(session, asked)
        assert asked.reply is None
        asked = line.client.ask(session, protocol.Flush(session="s"))
        line.carry()
        line.host.housekeeping(line.at_ns)
        line.hear()
        assert asked.reply == protocol.Flushed(session="s", next=session.next_tick)


def test_a_server_that_was_restarted_owes_a_group_no_reply(make: Make) -> None:
    line = make()
    line.carry()
    group = line.client.new_group(NAMES, None)
    line.carry()
    put_block(line, group, 0)
    group.take_back(group.ask(lambda row: protocol.Flush(session=NAMES[row])))
    requests(line)
    line.wait()
    line.carry()
    asked = group.ask(lambda row: protocol.Flush(session=NAMES[row]))
    for _ in range(10):
        line.carry()
        line.host.housekeeping(line.at_ns)
    assert [of.reply for of in asked] == [protocol.Flushed(session=name, next=1) for name in NAMES]


def test_a_refusal_is_that_of_the_request_and_does_not_stop_a_reopening(make: Make, toy: Path) -> None:
    line = make()
    session = line.open("s")
    ticks = [tick("s", i) for i in range(8)]
    for of in ticks[:4]:
        line.put(session, of)
        line.carry()
        line.host.housekeeping(line.at_ns)
    line.die()
    send(line, session, ticks[4:])
    asked = line.client.ask(session, protocol.Reset(session="s"))
    line.carry()
    assert isinstance(asked.reply, Evicted)
    assert answers_of(session) == alone(toy, ticks)
    assert session.error is None


def test_a_request_that_was_not_sent_in_time_is_not_sent(make: Make) -> None:
    line = make()
    session = line.open("s")
    line.die()
    send(line, session, [tick("s", 0)])
    line.say()
    line.hear()
    assert session.reopening
    line.client.take_back(session, line.client.ask(session, protocol.Reset(session="s")))
    assert [type(of).__name__ for of in requests(line)] == ["Open"]
    assert [of for of in session.to_send if isinstance(of, Asked)] == []


# ---- an `open` for which nobody waits --------------------------------------------------------------------------------


def test_the_name_of_an_open_that_was_given_up_is_free(toy: Path, tmp_path: Path) -> None:
    async def main(address: str) -> None:
        async with AsyncClient(address) as client:
            for end in ("again", "later"):
                opening = asyncio.create_task(client.open(end))
                await asyncio.sleep(0)
                opening.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await opening
                if end == "later":
                    await (await client.open("other")).close()
                async with await client.open(end) as session:
                    assert not session.resumed
                    assert await session.step({}) is not None
                    assert await session.flush() == 1
                with pytest.raises(TimedOut):
                    await client.open(end, timeout_s=0)
            with pytest.raises(TimedOut):
                await client.group(["a", "b"], timeout_s=0)
            await (await client.open("other")).close()
            async with await client.group(["a", "b"]) as group:
                assert (await group.flush()).tolist() == [0, 0]

    with running(settings_for(toy, tmp_path)) as server:
        asyncio.run(main(server.address))
        with Client(server.address) as client:
            with pytest.raises(TimedOut):
                client.open("s", timeout_s=0)
            with client.open("s") as session:
                assert session.step(features_of(tick("s", 0))) is not None
            with pytest.raises(TimedOut):
                client.group(["a", "b"], timeout_s=0)
            client.open("other").close()
            with client.group(["a", "b"]) as group:
                assert group.flush().tolist() == [0, 0]
        assert len(server.sessions) == 0


def test_what_the_server_opens_later_is_closed(make: Make) -> None:
    line = make()
    line.carry()
    for again in (False, True):
        session = line.client.new_session("s")
        line.client.send(protocol.Open(session="s"))
        line.client.give_up(session, new=True)
        if again:
            session = line.client.new_session("s")
            line.client.send(protocol.Open(session="s"))
        line.carry()
        assert ("s" in line.host.sessions) == again
    assert session.opened is not None
    assert session.error is None, "the server refuses the second one: it has the session"
    group = line.client.new_group(NAMES, None)
    line.client.give_up_group(group)
    line.carry()
    assert list(line.client.sessions) == ["s"]
    assert len(line.host.sessions) == 1
    assert not line.client._groups_given_up


def test_a_session_that_was_there_before_is_not_closed_by_an_open_that_is_given_up(make: Make) -> None:
    line = make()
    token = line.open("s").token
    del line.client.sessions["s"]  # as `leave`
    for new in (True, False):
        session = line.client.new_session("s")
        line.client.send(protocol.Open(session="s", token=None if new else token))
        line.client.give_up(session, new)
        line.carry()
        assert "s" in line.host.sessions
        group = line.client.new_group(["s"], None if new else [token])
        line.client.give_up_group(group)
        line.carry()
        assert "s" in line.host.sessions
    line.client.give_up(line.client.new_session("s"), new=True)  # its `open` is lost
    line.client.new_session("s")
    line.client.send(protocol.Open(session="s", token=token))
    line.client.give_up(line.client.sessions["s"], new=False)
    line.carry()
    assert "s" in line.host.sessions
    line.open("s")
    with pytest.raises(DuplicateSession):
        line.client.new_group(["x", "s"], None)
