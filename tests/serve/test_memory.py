"""A server that many clients came to and left holds no more than at its start: every table, whatever it is called."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import tracemalloc
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace
from serving import running, settings_for

from stream_mmrnn import Client
from stream_mmrnn.bus import Dealer
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.core.settings import ServeSettings
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve import server as server_module
from stream_mmrnn.serve.server import Server

_S = 1_000_000_000
_BOUNDED = (Histogram,)
"""They have an entry for each duration that occurs, up to a limit."""


def tables(root: object) -> Counter[str]:
    """By where it is, how many entries each table has that objects of this package hold."""
    found: Counter[str] = Counter()
    seen: set[int] = set()
    waiting = deque([("", root)])
    while waiting:
        path, value = waiting.popleft()
        if id(value) in seen or isinstance(value, _BOUNDED):
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            found[path] += len(value)
            waiting.extend((f"{path}[]", v) for v in value.values())
        elif isinstance(value, list | set | frozenset | deque | tuple):
            found[path] += len(value)
            waiting.extend((f"{path}[]", v) for v in value)
        elif type(value).__module__.startswith("stream_mmrnn"):
            names = [*getattr(value, "__struct_fields__", ()), *getattr(value, "__dict__", ())]
            names += [n for kind in type(value).__mro__ for n in getattr(kind, "__slots__", ())]
            waiting.extend((f"{path}.{name}", getattr(value, name, None)) for name in dict.fromkeys(names))
    return found


class Clients:
    """Clients that come and leave, each in one of the ways that there are."""

    def __init__(self, server: Server) -> None:
        self._server, self._host = server, server.host
        self._host.send_now = lambda: None  # there are no sockets
        self._features = tuple(np.zeros(m.size, "<f4").tobytes() for m in server.engine.spec.modalities)
        self._numbers = itertools.count()
        self._at_ns = now_ns()

    def _say(self, peer: bytes, request: protocol.Request) -> None:
        self._host.receive(peer, protocol.encode(request), self._at_ns)

    def come_and_leave(self) -> None:
        number = next(self._numbers)
        peer, session = b"peer %d" % number, f"session{number}"
        self._say(peer, protocol.Hello())
        self._say(peer, protocol.Open(session=session, raw=number % 2 == 0))
        ready = next((r for _, r in self._host.out if isinstance(r, protocol.Ready)), None)
        assert ready is not None, self._host.out
        if number % 2:
            self._say(peer, protocol.Step(session=session, tick=0, event_ns=1, features=self._features))
        else:
            vector = self._features[0]
            stream = self._server.engine.spec.modalities[0].name
            self._say(peer, protocol.PushSample(session=session, push=0, stream=stream, data=vector, vector=True))
        self._say(peer, protocol.Step(session=f"never{number}", tick=0, event_ns=1, features=self._features))
        while self._host.ready:
            self._host.step(self._at_ns)
        way = number // 2 % 4
        if way == 0:
            self._say(peer, protocol.Close(session=session))
        elif way == 1:
            self._host.gone(peer, self._at_ns)
        elif way == 2:
            self._say(other := b"other" + peer, protocol.Open(session=session, token=ready.token, raw=number % 2 == 0))
            self._say(other, protocol.Close(session=session))
        else:
            self._host.receive(b"garbage" + peer, b"\xc1", self._at_ns)
            self._at_ns += 20 * _S  # it is evicted as idle
        self._rest()
        for _ in range(1000):  # states that are being written still have their slot
            if len(self._server.sessions) <= 8:
                break
            time.sleep(0.001)
            self._rest()

    def settle(self) -> None:
        """Until every state is written, and no session is left."""
        end_s = time.monotonic() + 15
        while time.monotonic() < end_s:
            self._at_ns += _S  # what could not be evicted while others were written is looked at again
            self._rest()
            if not len(self._server.sessions) and not self._server.sessions.is_awaited:
                break
            time.sleep(0.001)
        self._rest()

    def _rest(self) -> None:
        self._host.out.clear()
        self._host.housekeeping(self._at_ns)
        self._host.out.clear()


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[Server]:
    asked = settings_for(model, tmp_path, slots=64)
    asked = replace(asked, state=replace(asked.state, idle_s=10.0))
    with closing(Server(asked)) as server:
        server.sessions.admission = None  # how many a busy machine can serve is not the question
        yield server


_FILES = ".sessions.store._files"
"""A number that is bounded, and not the same twice."""


def without_files(found: Counter[str]) -> Counter[str]:
    return Counter({k: n for k, n in found.items() if k != _FILES})


def until_equal(expected: Counter[str], found: Callable[[], Counter[str]], seconds: float = 15) -> Counter[str]:
    """What differs in the end; empty once it is the same."""
    end_s = time.monotonic() + seconds
    while without_files(now := found()) != without_files(expected) and time.monotonic() < end_s:
        time.sleep(0.05)
    assert now.pop(_FILES, 0) < 20, "the store rewrites small files as one"
    expected = Counter({k: n for k, n in expected.items() if k != _FILES})
    return Counter({k: now[k] - expected[k] for k in now | expected if now[k] != expected[k]})


def test_no_table_grows_with_the_clients_that_came(server: Server) -> None:
    clients = Clients(server)
    for _ in range(32):
        clients.come_and_leave()
    clients.settle()
    before = tables(server)
    assert len(before) > 30, "the tables are found"
    for _ in range(96):
        clients.come_and_leave()
    clients.settle()
    assert until_equal(before, lambda: tables(server)) == {}
    counts = server.sessions.counts
    assert (counts["opened"], counts["closed"], server.host.counts["taken"]) == (128, 64, 32)
    assert counts["evicted"] == 64


@pytest.mark.slow
def test_memory_does_not_grow_with_the_clients_that_came(server: Server) -> None:
    """Python's own count of bytes: what the allocator keeps of freed memory is not in it."""
    clients = Clients(server)
    for _ in range(64):
        clients.come_and_leave()
    clients.settle()
    tracemalloc.start()
    try:
        taken = []
        for _ in range(6):  # the first ones also fill caches, and each is some 30 kB more or less than the one before
            for _ in range(400):
                clients.come_and_leave()
            clients.settle()
            gc.collect()
            taken.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    # an entry of a table with its key has 150 bytes and more; durations that occur for the first time have some
    assert taken[5] - taken[1] < 64 * 4 * 400


@pytest.mark.slow
def test_clients_that_vanish_leave_no_entry(model: Path, tmp_path: Path) -> None:
    with running(replace(settings_for(model, tmp_path), serve=ServeSettings(port=0, slots=64))) as server:
        server.sessions.admission = None

        def come(names: list[str]) -> None:
            dealers = [Dealer(server.address, 100, protocol.MAX_BYTES) for _ in names]
            for name, dealer in zip(names, dealers, strict=True):
                dealer.send(protocol.encode(protocol.Open(session=name)))
            for dealer in dealers:
                assert dealer.receive(20_000) is not None
                dealer.close()

        come([f"warm{i}" for i in range(8)])
        assert until_equal(Counter(), lambda: +Counter(open=len(server.sessions), answered=len(server._answered))) == {}
        before = tables(server)
        come([f"s{i}" for i in range(30)])
        assert until_equal(before, lambda: tables(server)) == {}
        assert server.sessions.counts["evicted"] == 38


def test_the_server_gives_memory_back_to_the_system(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()
    monkeypatch.setattr(server_module, "_TRIM_EVERY_NS", 1)
    monkeypatch.setattr(server_module, "_TRIM_AFTER", 1)
    monkeypatch.setattr(server_module, "return_free_memory", done.set)
    with running(settings_for(model, tmp_path)) as server, Client(server.address) as client:
        with client.open("s"):
            assert done.wait(20)
        done.clear()
        assert not done.wait(0.5), "no session was opened since"
