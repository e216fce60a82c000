"""Predictions over real WebSockets of a real server: slow listeners, stalled ones, and those that leave."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from stream_mmrnn.viewers.dashboard.app import IDLE_S
from stream_mmrnn.viewers.dashboard.feed import MAX_LISTENERS, QUEUE, _Listener
from stream_mmrnn.viewers.dashboard.server import Dashboard

MODEL = {"name": "m", "heads": []}


@pytest.fixture
def board(caplog: pytest.LogCaptureFixture) -> Iterator[Dashboard]:
    dashboard = Dashboard("127.0.0.1", 0, client_timeout_s=0.5)
    dashboard.start()
    yield dashboard
    dashboard.close()
    assert not caplog.records, "what clients do is no error of ours"


def listen(board: Dashboard, **more: Any) -> ClientConnection:
    return connect(board.address.replace("http:", "ws:") + "predictions", compression=None, max_queue=None, **more)


def wait_until(what: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def prediction(tick: int, missed: int = 0, size: int = 1) -> dict[str, Any]:
    return {"tick": tick, "missed": missed, "heads": {"next": [0.5] * size}}


def stall(board: Dashboard) -> socket.socket:
    """One that asks and reads nothing."""
    port = int(board.address.rstrip("/").rsplit(":", 1)[1])
    stalled = socket.socket()
    stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    stalled.connect(("127.0.0.1", port))
    key = base64.b64encode(bytes(16)).decode()
    stalled.sendall(
        f"GET /predictions HTTP/1.1\r\nHost: localhost:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n".encode()
    )
    return stalled


def test_the_model_first_and_then_what_is_predicted(board: Dashboard) -> None:
    board.predict(prediction(0))  # nobody listens
    board.explain(MODEL)
    with listen(board) as websocket:
        wait_until(lambda: board.listeners == 1)
        for tick in range(1, 200):
            board.predict(prediction(tick))
            if tick % 20 == 0:
                time.sleep(0.01)
        board.explain({"name": "other"})
        assert json.loads(websocket.recv(5)) == {"model": MODEL}
        got = [json.loads(websocket.recv(5)) for _ in range(100)]
        ticks = [m["tick"] for m in got if "tick" in m]
        assert ticks == sorted(set(ticks))
        assert sum(1 + m["missed"] for m in got if "tick" in m) == ticks[-1]
    wait_until(lambda: board.listeners == 0)


def test_a_slow_listener_is_told_what_it_missed() -> None:
    async def main() -> list[dict[str, Any]]:
        listener = _Listener()
        for tick in range(QUEUE + 10):
            listener.put(prediction(tick, missed=2 if tick == 3 else 0))
        return [json.loads(await listener.pop() or b"") for _ in range(QUEUE)]

    got = asyncio.run(main())
    assert [m["tick"] for m in got] == list(range(10, QUEUE + 10))
    assert [m["missed"] for m in got] == [12, *[0] * (QUEUE - 1)]


def test_one_that_reads_nothing_is_cut_off_and_costs_nobody_anything(board: Dashboard) -> None:
    with stall(board) as stalled, listen(board) as good:
        wait_until(lambda: board.listeners == 2)
        tick, ticks = 0, []
        while board.listeners == 2:
            tick += 1
            board.predict(prediction(tick, size=5000))
            ticks.append(json.loads(good.recv(5))["tick"])
            assert tick < 5000
        assert ticks == list(range(1, tick + 1))
        assert stalled.fileno() >= 0
        assert board.listeners == 1


def test_a_silent_listener_stays(board: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who listens asks nothing; the patience with those who ask nothing is not for it."""
    monkeypatch.setattr("stream_mmrnn.viewers.dashboard.app.IDLE_S", 0.2)
    assert IDLE_S > 0.2
    with listen(board) as websocket:
        wait_until(lambda: board.listeners == 1)
        time.sleep(0.6)
        board.predict(prediction(1))
        assert json.loads(websocket.recv(5))["tick"] == 1


def test_what_a_listener_says_is_not_looked_at_and_has_a_limit(board: Dashboard) -> None:
    with listen(board) as websocket:
        websocket.send("x" * 1000)
        board.explain(MODEL)
        assert json.loads(websocket.recv(5)) == {"model": MODEL}
        websocket.send("x" * 10_000)
        with pytest.raises(ConnectionClosed):
            websocket.recv(5)
    wait_until(lambda: board.listeners == 0)


def test_too_many_are_refused_and_the_end_comes_to_all(board: Dashboard) -> None:
    with ExitStack() as stack:
        many = [stack.enter_context(listen(board)) for _ in range(MAX_LISTENERS)]
        wait_until(lambda: board.listeners == MAX_LISTENERS)
        with pytest.raises(InvalidStatus) as refused, listen(board):
            pass
        assert refused.value.response.status_code == 503
        board.close()
        for websocket in many:
            with pytest.raises(ConnectionClosed):
                websocket.recv(5)


def test_a_token_is_asked_for_where_there_is_one() -> None:
    token = "0123456789abcdefghij"
    board = Dashboard("127.0.0.1", 0, token=token)
    board.start()
    try:
        for headers in ({}, {"Authorization": "Bearer no"}):
            with pytest.raises(InvalidStatus) as refused, listen(board, additional_headers=headers):
                pass
            assert refused.value.response.status_code == 401
        board.explain(MODEL)
        with listen(board, additional_headers={"Authorization": f"Bearer {token}"}) as websocket:
            assert json.loads(websocket.recv(5)) == {"model": MODEL}
    finally:
        board.close()
