"""A client that floods, with any request, and a disk that stands still: others are served as before."""

from __future__ import annotations

import itertools
import threading
import typing
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from serving import alone, features_of, running, settings_for, step_of, tick

from stream_mmrnn import Client
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import SnapshotError, StreamError
from stream_mmrnn.core.types import ModelSpec, Stamps, Tick
from stream_mmrnn.predict.snapshots import Snapshot
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve import server as server_module
from stream_mmrnn.serve.client_requests import Asked, SessionRequest
from stream_mmrnn.serve.server import Server
from stream_mmrnn.serve.state_rows import StateRows
from stream_mmrnn.serve.state_store import StateBlockStore
from stream_mmrnn.serve.turns import BUDGET, Put, Turns, cost_of
from tools.faults.floods import FLOODS, OTHER

S = 1_000_000_000
VICTIM, FLOOD = b"victim", b"flood"
ROUNDS = 40
"""Ticks of the victim."""
OWN = 4
"""Slots that the flood may have."""

# ---- floods of every request -----------------------------------------------------------------------------------------


def tick_of(spec: ModelSpec, session: str, index: int) -> Tick:
    rng = np.random.default_rng(index)
    features = {m.name: rng.standard_normal(m.size).astype(np.float32) for m in spec.modalities}
    present, age_ns = dict.fromkeys(features, True), dict.fromkeys(features, 0)
    return Tick(session, index, index, features, present, age_ns, Stamps(0, 0, 0, 0, ""))


class FloodedRouter:
    """Two peers: the flood always has a message, the victim one tick when its last one is answered. As a ROUTER socket
    it gives the messages of its peers in turns."""

    def __init__(self, flood: Iterator[protocol.Request], spec: ModelSpec, most: int) -> None:
        self.flood, self._spec, self._most = flood, spec, most
        self._turns = itertools.cycle((FLOOD, VICTIM))
        self._sent: deque[bytes] = deque([protocol.encode(protocol.Open(session=OTHER))])
        self._next = 0
        self.heads: list[bytes] = []
        self.foreign = 0
        """Messages of the flood since the victim's newest one was sent."""
        self.between: list[int] = []
        self.replies: Counter[str] = Counter()

    def receive(self, timeout_ms: int) -> tuple[bytes, bytes] | None:
        if len(self.heads) >= ROUNDS:
            return None  # the server ends
        if self.foreign > self._most:
            raise AssertionError(f"{self.foreign} messages of the flood were read, and the victim has no answer")
        for peer in itertools.islice(self._turns, 2):
            if peer == FLOOD:
                self.foreign += 1
                return peer, protocol.encode(next(self.flood))
            if self._sent:
                return peer, self._sent.popleft()
        return None

    def send(self, peer: bytes, content: bytes) -> Literal["sent"]:
        reply = protocol.read_reply(content)
        if peer == FLOOD:
            self.replies[type(reply).__name__] += 1
        elif isinstance(reply, protocol.Ready | protocol.Pred):
            if isinstance(reply, protocol.Pred):
                self.heads.append(reply.heads[0])
            self.between.append(self.foreign)
            self.foreign = 0
            self._sent.append(protocol.encode(step_of(tick_of(self._spec, OTHER, self._next))))
            self._next += 1
        else:
            assert isinstance(reply, protocol.EvictedNow)
            assert reply.reason == "leaving"
        return "sent"

    def any_gone(self) -> bool:
        return False

    def close(self) -> None:
        pass


class HeldStore(StateBlockStore):
    """A disk that stands still while `held` is set."""

    going = threading.Event()
    waits = threading.Event()

    def _wait(self) -> None:
        self.waits.set()
        serving = threading.current_thread() is threading.main_thread()
        assert self.going.is_set() or not serving, "the disk is waited for"
        assert self.going.wait(60)

    def save(self, snapshot: Snapshot, unix_ns: int) -> Path:
        self._wait()
        return super().save(snapshot, unix_ns)

    def save_rows(self, rows: StateRows, unix_ns: int) -> None:
        self._wait()
        super().save_rows(rows, unix_ns)

    def forget_all(self, sessions: Sequence[str]) -> None:
        self._wait()
        super().forget_all(sessions)

    def sweep(self, unix_ns: int) -> int:
        self._wait()
        return super().sweep(unix_ns)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[HeldStore]]:
    monkeypatch.setattr(server_module, "StateBlockStore", HeldStore)
    HeldStore.going.clear()
    HeldStore.waits.clear()
    yield HeldStore
    HeldStore.going.set()


def own_step(session: str, index: int) -> protocol.Step:
    return step_of(tick(session, index))


def test_a_flood_of_every_request_is_here() -> None:
    found = {type(request) for flood in FLOODS.values() for request in itertools.islice(flood("f", own_step), 3)}
    assert found == set(typing.get_args(protocol.Request))


def flooded(server: Server, name: str, most: int) -> FloodedRouter:
    spec = server.engine.spec
    router = FloodedRouter(FLOODS[name]("f", lambda session, i: step_of(tick_of(spec, session, i))), spec, most)
    server._router.close(0)
    server._router = router  # type: ignore[assignment]
    return router


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_of_any_request_delays_others_by_its_share(
    name: str, model: Path, tmp_path: Path, held: type[HeldStore]
) -> None:
    """Counted in messages of the flood that are read between two answers of the other client: with the disk still, so
    that a single write in the serving thread would be seen, too."""
    server = Server(settings_for(model, tmp_path, client_slots=OWN))
    try:
        router = flooded(server, name, 1000)
        server.run(lambda: len(router.heads) < ROUNDS or held.going.set())
        assert max(router.between) <= 2 * (32 + OWN)
        assert router.heads == alone(model, [tick_of(server.engine.spec, OTHER, i) for i in range(ROUNDS)])
        assert router.replies.keys() - {"Refused", "BusyNow"} or "of another" in name or "of none" in name
    finally:
        held.going.set()
        server.close()


@pytest.mark.parametrize("name", [name for name in FLOODS if "push" not in name])
def test_a_flood_takes_one_row_of_each_batch_and_no_batch_is_its_own(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(settings_for(model, tmp_path))
    try:
        router = flooded(server, name, 1000)
        batches: list[Counter[str]] = []
        step, step_block = server.engine.step, server.engine.step_block
        monkeypatch.setattr(
            server.engine, "step", lambda ticks: batches.append(Counter(t.session for t in ticks)) or step(ticks)
        )
        names = server.sessions._table.names
        monkeypatch.setattr(
            server.engine,
            "step_block",
            lambda block: batches.append(Counter(names[i] for i in block.handles)) or step_block(block),
        )
        before_end = [0]

        def alive() -> bool:
            before_end.append(len(batches))
            return len(router.heads) < ROUNDS

        server.run(alive)
    finally:
        server.close()
    assert all(max(batch.values()) == 1 for batch in batches)
    assert before_end[-1] <= 2 * ROUNDS + 2


# ---- a disk that stands still ----------------------------------------------------------------------------------------


def _drop(client: Client, name: str) -> None:
    client.close()


def _ask(client: Client, request: SessionRequest) -> Asked:
    return client.client_state.ask(client.client_state.sessions[request.session], request)


ASKS: dict[str, Callable[[Client, str], Asked | None]] = {
    "flush": lambda client, name: _ask(client, protocol.Flush(session=name)),
    "reset": lambda client, name: _ask(client, protocol.Reset(session=name)),
    "close": lambda client, name: _ask(client, protocol.Close(session=name)),
    "disconnect": _drop,
    "nothing": lambda client, name: None,
}
"""What has a state written or removed; a state is due without being asked for, too."""


@pytest.mark.parametrize("name", ASKS)
def test_a_disk_that_stands_still_stops_nobody(name: str, toy: Path, tmp_path: Path, held: type[HeldStore]) -> None:
    with running(settings_for(toy, tmp_path)) as server, Client(server.address) as client:
        try:
            other = Client(server.address)
            session = other.open("f")
            session.step({})
            assert held.waits.wait(20), "its first state is due"
            asked = ASKS[name](other, "f")
            if name != "disconnect":
                other.post()
            with client.open("v") as victim:
                ticks = [tick("v", i) for i in range(30)]
                got = [victim.step(features_of(t), event_ns=t.event_ns, age_ns=t.age_ns) for t in ticks]
                assert [a.heads["next"].tobytes() for a in got if a is not None] == alone(toy, ticks)
                if name in ("flush", "reset"):
                    assert asked is not None
                    assert asked.reply is None, "it is answered when it is written"
                    held.going.set()
                    other.wait(lambda: asked.reply is not None, now_ns() + 20 * S, "no answer came")
                held.going.set()
            if name != "disconnect":
                other.close()
        finally:
            held.going.set()


def test_many_requests_are_one_write(toy: Path, tmp_path: Path, held: type[HeldStore]) -> None:
    """While the first state is written, flushes and resets of the session wait for the second one together."""
    with running(settings_for(toy, tmp_path)) as server, Client(server.address) as client:
        try:
            session = client.open("s")
            assert held.waits.wait(20)
            answered: list[protocol.Reply] = []
            for i in range(20):
                client.client_state.send(step_of(tick("s", i)))
                ask = protocol.Reset(session="s") if i % 5 == 4 else protocol.Flush(session="s")
                client.client_state.send(ask)
            client.post()
            end_ns = now_ns() + 20 * S
            while server.sessions.counts["stepped"] < 20 and now_ns() < end_ns:
                client._dealer.receive(1)
            held.going.set()
            while len(answered) < 20 and now_ns() < end_ns:
                content = client._dealer.receive(10)
                reply = protocol.read_reply(content) if content is not None else None
                if isinstance(reply, protocol.Flushed | protocol.Done):
                    answered.append(reply)
            assert [r.next if isinstance(r, protocol.Flushed) else "done" for r in answered] == [
                "done" if i % 5 == 4 else i + 1 for i in range(20)
            ]
            assert server.sessions.counts["saved"] <= 3
            kept = server.sessions.store.load("s", now_ns() + server.sessions._states._offset_ns)
            assert kept is not None
            assert (kept.tick_index, kept.state) == (19, {})
            assert session.token
        finally:
            held.going.set()


class ReadOnlyStore(StateBlockStore):
    def save_rows(self, rows: StateRows, unix_ns: int) -> None:
        raise SnapshotError("no space")


def test_who_waits_for_a_state_that_cannot_be_written_is_told(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "StateBlockStore", ReadOnlyStore)
    with running(settings_for(toy, tmp_path)) as server, Client(server.address) as client:
        session = client.open("s")
        session.step({})
        for ask in (session.flush, session.reset):
            with pytest.raises(StreamError, match="no space"):
                ask()
        assert session.step({}) is not None
        session.close()
    assert server.unsaved == 0


def test_a_closed_session_is_opened_anew_while_its_state_is_removed(
    toy: Path, tmp_path: Path, held: type[HeldStore]
) -> None:
    with running(settings_for(toy, tmp_path)) as server, Client(server.address) as client:
        try:
            held.going.set()
            session = client.open("s")
            session.step({})
            session.flush()
            held.going.clear()
            client.client_state.send(protocol.Close(session="s"))
            client.post()
            with Client(server.address) as other:
                end_ns = now_ns() + 20 * S
                while len(server.sessions) and now_ns() < end_ns:
                    pass
                again = other.open("s")
                assert (again.resumed, again.next_tick) == (False, 0)
                again.step({})
                held.going.set()
                assert again.flush() == 1
                kept = server.sessions.store.load("s", now_ns() + server.sessions._states._offset_ns)
                assert kept is not None, "the old state was removed before the new one was written"
                again.close()
        finally:
            held.going.set()


# ---- turns, alone ----------------------------------------------------------------------------------------------------


def put(peer: bytes, session: str, request: protocol.Request, size: int = 10) -> Put:
    return Put(peer, session, request, size, 0)


def test_each_peer_has_its_budget_and_each_session_its_order() -> None:
    turns = Turns(1000)
    for i in range(40):
        for peer in (b"a", b"b"):
            assert turns.put_off(put(peer, f"s{i % 3}", protocol.Step(session="s", tick=i, event_ns=0, features=())))
            assert turns.put_off(put(peer, f"s{i % 3}", protocol.Flush(session="s")))
    seen: dict[tuple[bytes, str], list[int]] = {}
    while turns:
        spent: Counter[bytes] = Counter()
        for of in turns.due(lambda _: True):
            spent[of.peer] += cost_of(of.request)
            if isinstance(of.request, protocol.Step):
                assert isinstance(of.key, str)
                seen.setdefault((of.peer, of.key), []).append(of.request.tick)
        assert set(spent) <= {b"a", b"b"}
        assert max(spent.values()) <= BUDGET
    assert all(ticks == sorted(ticks) for ticks in seen.values())
    assert sum(map(len, seen.values())) == 80


def test_no_more_messages_wait_than_may() -> None:
    turns = Turns(3)
    flush = protocol.Flush(session="s")
    assert [turns.put_off(put(b"a", "s", flush)) for _ in range(4)] == [True, True, True, False]
    assert turns.put_off(put(b"b", "s", flush, 16 << 20))
    assert not turns.put_off(put(b"b", "s", flush))
    turns.forget(b"a")
    assert turns.put_off(put(b"a", "s", flush))
