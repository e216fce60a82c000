"""Predictions over real WebSockets of a real server: slow, stalled and disconnecting clients."""

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

from stream_mmrnn.viewers.dashboard.feed import MAX_LISTENERS, QUEUE, Listener
from stream_mmrnn.viewers.dashboard.server import Dashboard

MODEL = {"name": "m", "heads": []}


@pytest.fixture
def board(caplog: pytest.LogCaptureFixture) -> Iterator[Dashboard]:
    dashboard = Dashboard("127.0.0.1", 0, client_timeout_s=0.5)
    dashboard.start()
    yield dashboard
    dashboard.close()
    assert not caplog.records, "mistakes of clients are not logged"


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
    """A client that sends its request and reads nothing."""
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


def test_the_model_is_sent_before_the_predictions(board: Dashboard) -> None:
    board.predict(prediction(0))  # there is no client yet
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


def test_a_slow_client_is_told_how_many_it_missed() -> None:
    async def main() -> list[dict[str, Any]]:
        listener = Listener()
        for tick in range(QUEUE + 10):
            listener.put(prediction(tick, missed=2 if tick == 3 else 0))
        return [json.loads(await listener.pop() or b"") for _ in range(QUEUE)]

    got = asyncio.run(main())
    assert [m["tick"] for m in got] == list(range(10, QUEUE + 10))
    assert [m["missed"] for m in got] == [12, *[0] * (QUEUE - 1)]


def test_a_client_that_reads_nothing_is_disconnected_and_does_not_slow_the_others(board: Dashboard) -> None:
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


def test_a_silent_websocket_stays_open() -> None:
    """The idle timeout is for connections that wait for a request."""
    board = Dashboard(idle_timeout_s=0.2)
    board.start()
    with listen(board) as websocket:
        wait_until(lambda: board.listeners == 1)
        time.sleep(0.6)
        board.predict(prediction(1))
        assert json.loads(websocket.recv(5))["tick"] == 1
    board.close()


def test_messages_from_clients_are_ignored_and_have_a_limit(board: Dashboard) -> None:
    with listen(board) as websocket:
        websocket.send("x" * 1000)
        board.explain(MODEL)
        assert json.loads(websocket.recv(5)) == {"model": MODEL}
        websocket.send("x" * 10_000)
        with pytest.raises(ConnectionClosed):
            websocket.recv(5)
    wait_until(lambda: board.listeners == 0)


def test_too_many_clients_are_refused_and_closing_disconnects_all(board: Dashboard) -> None:
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


def test_a_websocket_needs_the_token() -> None:
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
