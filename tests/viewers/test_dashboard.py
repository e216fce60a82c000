"""The live page: what LiveState computes, and how the server treats good, slow and malicious clients."""

from __future__ import annotations

import http.client
import io
import itertools
import json
import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from trickle import Trickle

from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core.errors import ConfigError, ProcessError
from stream_mmrnn.core.latency import STAGES
from stream_mmrnn.core.stream_table import stream_table
from stream_mmrnn.core.types import Envelope, HeadSpec, ModalitySpec, Prediction, Stamps, Tick
from stream_mmrnn.viewers.dashboard import connections
from stream_mmrnn.viewers.dashboard.access import Access
from stream_mmrnn.viewers.dashboard.app import MAX_CLIENTS, METRICS_TYPE
from stream_mmrnn.viewers.dashboard.connections import MAX_CONNECTIONS, MAX_WAITING
from stream_mmrnn.viewers.dashboard.heads import HISTORY_POINTS
from stream_mmrnn.viewers.dashboard.server import Dashboard
from stream_mmrnn.viewers.dashboard.sound import BANDS, COLUMN_NS, COLUMNS, Spectrogram
from stream_mmrnn.viewers.dashboard.state import LiveState
from stream_mmrnn.viewers.terminal_view import render

MS = 1_000_000
S = 1_000_000_000
T0 = 1_000 * S


def envelope(
    topic: str,
    at_ns: int,
    payload: Any = b"",
    *,
    event_ns: int | None = None,
    seq: int = 0,
    session: str = "a",
) -> Envelope:
    return Envelope(topic, session, seq, at_ns if event_ns is None else event_ns, at_ns, at_ns, payload)


def prediction(
    end_ns: int,
    heads: dict[str, list[float]],
    *,
    scale: int = 1,
    seq: int = 0,
    session: str = "a",
    **more: Any,
) -> Envelope:
    """Stages of 1, 2, 3 ... 7 ms times `scale`."""
    at = [end_ns + scale * MS * n for n in (1, 3, 6, 10, 15, 21, 28)]
    payload = {
        "tick": end_ns // (40 * MS),
        "event_ns": end_ns,
        "heads": heads,
        "present": {"vision": True, "text": False},
        "age_ns": {"vision": 3},
        "closed": {
            "event_ns": at[0],
            "capture_ns": at[1],
            "publish_ns": at[2],
            "received_ns": at[3],
            "by": "feature/audio",
        },
        "step_start_ns": at[4],
        "step_end_ns": at[5],
        "model": "ab" * 32,
        **more,
    }
    return Envelope("prediction", session, seq, end_ns, end_ns, at[6], json.dumps(payload).encode())


def status(node: str, at_ns: int, **payload: Any) -> Envelope:
    return envelope("status/" + node, at_ns, json.dumps({"node": node, **payload}).encode())


# --- state


@pytest.mark.parametrize("rate_hz", [1, 25, 50, 1000])
def test_rate_is_an_average_over_two_seconds(rate_hz: int) -> None:
    live = LiveState()
    for i in range(5 * rate_hz):
        live.observe(envelope("feature/audio", T0 + i * S // rate_hz, seq=i))
    stream = live.snapshot(T0 + 5 * S)["streams"]["feature/audio"]
    assert stream["rate_hz"] == pytest.approx(rate_hz, abs=0.51)
    assert stream["age_ms"] == pytest.approx(1000 / rate_hz)
    assert not stream["silent"]
    later = live.snapshot(T0 + 8 * S)["streams"]["feature/audio"]
    assert later["rate_hz"] == 0
    assert later["silent"]


def test_rate_of_the_first_second_is_not_too_low() -> None:
    live = LiveState()
    for i in range(25):
        live.observe(envelope("clock", T0 + i * 40 * MS, seq=i))
    assert live.snapshot(T0 + S)["streams"]["clock"]["rate_hz"] == pytest.approx(25, abs=1)


def test_stages_add_up_and_are_dropped_after_ten_seconds() -> None:
    live = LiveState()
    for i in range(100):
        live.observe(prediction(T0 + i * 40 * MS, {"vap": [0.5]}, seq=i, scale=10 if i == 99 else 1))
    table = live.snapshot(T0 + 4 * S)["latency"]
    assert list(table) == list(STAGES)
    assert [table[s]["p50"] for s in STAGES] == [1, 2, 3, 4, 5, 6, 7, 28]
    assert table["step"]["p99"] > 6
    assert sum(table[s]["p50"] for s in STAGES[:-1]) == table["total"]["p50"]
    assert live.snapshot(T0 + 15 * S)["latency"] == {}


def test_heads_have_values_meaning_and_a_bounded_history() -> None:
    live = LiveState()
    head = {
        "name": "vap",
        "kind": "activity_projection",
        "labels": ["x", "y"],
        "horizons_s": [[0, 0.2], [0.2, 0.6]],
    }
    live.observe(
        status("engine", T0, state="ready", detail={"spec": {"name": "m", "heads": [head], "modalities": ["vision"]}})
    )
    for i in range(3000):
        live.observe(prediction(T0 + i * 10 * MS, {"vap": [i / 3000, 0.123456]}, seq=i, tick=i))
    snap = live.snapshot(T0 + 30 * S)
    vap = snap["heads"]["vap"]
    assert vap["values"] == [round(2999 / 3000, 4), 0.1235]
    assert vap["horizons_s"] == [(0, 0.2), (0.2, 0.6)]
    assert vap["labels"] == ["x", "y"]
    assert len(vap["history"]["series"]) == 2
    ages = vap["history"]["age_ms"]
    assert 240 <= len(ages) <= HISTORY_POINTS
    assert ages == sorted(ages, reverse=True)
    assert 29_000 <= ages[0] <= 30_000
    assert all(len(line) == len(ages) for line in vap["history"]["series"])
    assert snap["model"] == {"name": "m", "sha256": "ab" * 32}
    assert vap["threshold"] is None, "two numbers are no yes or no"
    assert snap["predictions_per_s"] == pytest.approx(100, abs=1)
    assert snap["tick"] == 2999
    assert snap["ticks"] is None
    # the model has vision, and no vision features arrived
    assert snap["streams"]["feature/vision"]["silent"]
    assert snap["streams"]["feature/vision"]["age_ms"] is None


def test_a_binary_head_is_compared_with_its_threshold() -> None:
    live = LiveState()
    heads = [{"name": "over", "kind": "classification", "threshold": 0.25}]
    live.observe(
        status("engine", T0, state="ready", detail={"spec": {"name": "m", "heads": heads, "modalities": ["vision"]}})
    )
    for tick, (value, word) in enumerate(((0.3, "0.30 yes"), (0.2, "0.20 no"))):
        live.observe(prediction(T0, {"over": [value]}, tick=tick))
        snap = live.snapshot(T0 + S)
        assert snap["heads"]["over"]["threshold"] == 0.25
        written = io.StringIO()
        Console(width=100, file=written).print(render(snap, 100, "", []))
        shown = written.getvalue()
        assert word in shown
        assert "over[0]" not in shown


def test_a_restarted_run_starts_a_new_history() -> None:
    live = LiveState()
    for i in range(50):
        live.observe(prediction(T0 + i * 40 * MS, {"vap": [0.1]}, seq=i))
    before = T0 - 5000 * 40 * MS
    live.observe(prediction(before, {"vap": [0.9]}))
    assert live.snapshot(before + S)["heads"]["vap"]["history"]["series"] == [[0.9]]


def test_republished_ticks_are_shown_once() -> None:
    live = LiveState()
    for i in (*range(50), *range(30, 60)):
        live.observe(prediction(T0 + i * 40 * MS, {"vap": [i / 100]}, seq=i))
    snap = live.snapshot(T0 + 60 * 40 * MS)
    assert snap["repeated"] == 20
    assert snap["heads"]["vap"]["history"]["series"] == [[i / 100 for i in range(1, 60, 2)]]  # two ticks a point
    assert snap["latency"] != {}
    assert snap["losses"] == []


def test_one_session_is_shown_until_it_is_silent() -> None:
    live = LiveState()
    for i in range(10):
        live.observe(prediction(T0 + i * 40 * MS, {"vap": [0.1]}, session="a", seq=i))
        live.observe(prediction(T0 + i * 40 * MS, {"vap": [0.9]}, session="b", seq=i))
    snap = live.snapshot(T0 + S)
    assert (snap["session"], snap["heads"]["vap"]["values"]) == ("a", [0.1])
    assert snap["sessions"] == {"count": 2, "names": ["a", "b"]}
    live.observe(prediction(T0 + 5 * S, {"vap": [0.9]}, session="b", seq=10))
    snap = live.snapshot(T0 + 5 * S)
    assert (snap["session"], snap["heads"]["vap"]["values"]) == ("b", [0.9])


def test_text_is_newest_first_truncated_and_without_control_characters() -> None:
    live = LiveState()
    for i in range(20):
        live.observe(envelope("raw/text", T0 + i * S, f"line\x1b[2J {i}".encode(), seq=i))
    live.observe(envelope("raw/text", T0 + 20 * S, b"\xff" * 10_000, seq=20))
    texts = live.snapshot(T0 + 21 * S)["texts"]
    assert len(texts) == 21
    assert len(live.snapshot(T0 + 90 * S)["texts"]) == 8, "of lines older than 30 s"
    assert texts[0]["age_ms"] == 1000
    assert len(texts[0]["text"]) == 240
    assert texts[1] == {"text": "line [2J 19", "session": "a", "age_ms": 2000}


def test_processes_and_losses() -> None:
    live = LiveState()
    live.observe(status("camera", T0, state="missing", modality="vision", reason="no such device"))
    live.observe(
        status(
            "engine",
            T0,
            state="ready",
            counts={"ticks": 9, "vision": {"late": 2, "late_joined": 5}, "lost": 7},
        )
    )
    live.observe(envelope("clock", T0, seq=5))
    live.observe(envelope("clock", T0, seq=9))
    snap = live.snapshot(T0 + S)
    assert snap["ticks"] == 9
    vision = snap["streams"]["feature/vision"]
    assert (vision["state"], vision["reason"]) == ("missing", "no such device")
    assert snap["nodes"]["engine"]["state"] == "ready"
    assert not snap["nodes"]["engine"]["silent"]
    assert [(x["node"], x["what"], x["count"]) for x in snap["losses"]] == [
        ("engine", "lost", 7),
        ("engine", "vision.late", 2),
        ("this view", "lost.clock", 3),
    ]
    assert live.snapshot(T0 + 9 * S)["nodes"]["engine"]["silent"]


GARBAGE = [
    b"",
    b"{",
    b"null",
    b"[]",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"state": 3}',
    b'{"tick": 1, "heads": {"vap": "x"}}',
    b'{"state": "ready", "detail": {"spec": {"heads": 3}}}',
    b'{"state": "ready", "detail": 3}',
    b'{"state": "ready", "counts": []}',
    b"x" * 300_000,
]


@pytest.mark.parametrize("payload", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_counted(payload: bytes) -> None:
    live = LiveState()
    live.observe(envelope("prediction", T0, payload))
    assert live.malformed == 1
    live.observe(envelope("status/engine", T0, payload))
    assert live.malformed == 2
    live.observe(envelope("nonsense", T0, payload))
    live.observe(envelope("raw/text", -(2**63), payload))
    live.observe(envelope("raw/vision", 2**63 - 1, payload))
    json.dumps(live.snapshot(T0))


def test_stamps_beyond_64_bits_are_malformed_and_differences_beyond_them_are_clipped() -> None:
    live = LiveState()
    live.observe(prediction(T0, {"vap": [0.5]}, step_end_ns=10**30))
    assert live.malformed == 1
    assert live.snapshot(T0)["latency"] == {}
    live.observe(prediction(T0, {"vap": [0.5]}, step_start_ns=-(2**63), step_end_ns=2**63 - 1))
    assert live.malformed == 1
    assert live.snapshot(T0 + S)["latency"]["step"]["p50"] == pytest.approx(2**61 / 1e6)


def test_messages_of_our_own_processes_are_read() -> None:
    live = LiveState()
    head = HeadSpec("vap", "activity_projection", 1, ("x",), ((0.0, 0.2),))
    contract = msgspec.to_builtins({"name": "m", "heads": (head,), "modalities": (ModalitySpec("audio", 4),)})
    streams = {"audio": {"late": 2, "late_joined": 1}}
    message = wire.StatusMessage(
        "engine", "ready", counts={"refused": 1}, detail={"spec": contract, "streams": streams}
    )
    live.observe(envelope("status/engine", T0, wire.pack(message), session=topics.EVERYONE))
    camera = wire.StatusMessage("vision", "missing", 1, "vision", "no such device", {"queue_dropped": 4})
    live.observe(envelope("status/vision", T0, wire.pack(camera), session=topics.EVERYONE))
    stamps = Stamps(T0, T0 + MS, T0 + 2 * MS, T0 + 3 * MS, "feature/audio")
    tick = Tick("a", 7, T0, {}, {"audio": True}, {"audio": 0}, stamps)
    predicted = Prediction(tick, {"vap": np.array([0.25], np.float32)}, "ab" * 32, T0 + 4 * MS, T0 + 5 * MS)
    live.observe(envelope("prediction", T0 + 6 * MS, wire.pack(wire.prediction_message(predicted)), event_ns=T0))
    live.observe(envelope("clock", T0, session=topics.EVERYONE))
    snap = live.snapshot(T0 + S)
    assert live.malformed == 0
    assert snap["heads"]["vap"]["values"] == [0.25]
    assert snap["heads"]["vap"]["horizons_s"] == [(0.0, 0.2)]
    assert snap["streams"]["feature/vision"]["state"] == "missing"
    assert snap["streams"]["feature/audio"]["present"] is True
    assert snap["latency"]["total"]["p50"] == 6
    assert snap["sessions"]["names"] == ["a"]
    losses = {(x["node"], x["what"]): x["count"] for x in snap["losses"]}
    assert losses == {("vision", "queue_dropped"): 4, ("engine", "audio.late"): 2, ("engine", "refused"): 1}


def test_not_a_number_is_a_gap() -> None:
    live = LiveState()
    live.observe(prediction(T0, {"vap": [None, 0.5]}))  # type: ignore[list-item]
    assert live.snapshot(T0)["heads"]["vap"]["values"] == [None, 0.5]


def test_memory_is_bounded() -> None:
    live = LiveState()
    for i in range(3000):
        live.observe(prediction(T0 + i, {f"h{i}": [0.0] * 100}, session=f"s{i}"))
        live.observe(status(f"n{i}", T0, state="open", counts={f"c{k}": 1 for k in range(100)}))
    snap = live.snapshot(T0 + S)
    assert len(snap["nodes"]) == 64
    assert all(len(n["counts"]) <= 64 for n in snap["nodes"].values())
    assert len(snap["heads"]) <= 8
    assert all(len(h["values"]) <= 32 for h in snap["heads"].values())
    assert snap["sessions"]["count"] == 1024
    assert len(json.dumps(snap)) < 200_000


# --- server


def running_board() -> Iterator[Dashboard]:
    dashboard = Dashboard("127.0.0.1", 0, client_timeout_s=0.3)
    dashboard.start()
    yield dashboard
    dashboard.close()


board = pytest.fixture(running_board)
standing = pytest.fixture(running_board, scope="module")
"""One for all tests that change nothing in it: to close one takes a fifth of a second."""


def port(board: Dashboard) -> int:
    return int(board.address.rstrip("/").rsplit(":", 1)[1])


def ask(board: Dashboard, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port(board), timeout=5)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    finally:
        connection.close()


class Events:
    """A browser that follows the events."""

    def __init__(self, board: Dashboard, receive_buffer: int = 0) -> None:
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(5)
        self.socket.connect(("127.0.0.1", port(board)))
        self.socket.sendall(f"GET /events HTTP/1.1\r\nHost: localhost:{port(board)}\r\n\r\n".encode())
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.socket.close()

    def head(self) -> str:
        return self._file.readline().decode().strip()

    def next(self) -> Any:
        for line in self._file:
            if line.startswith(b"data: "):
                return json.loads(line[6:])
        raise EOFError


def wait_until(what: Any, timeout_s: float = 3.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_the_page_is_complete_and_loads_nothing_from_elsewhere(standing: Dashboard) -> None:
    code, headers, body = ask(standing, "/")
    assert code == 200
    assert headers["content-type"].startswith("text/html")
    assert "script-src 'self'; style-src 'self'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
    assert b"<style" not in body
    assert b"<script>" not in body
    waiting, files = ["/main.js", "/page.css"], {"/": body}
    while waiting:  # every module that a module imports is served, as a script
        path = waiting.pop()
        code, headers, files[path] = ask(standing, path)
        assert (code, headers["x-content-type-options"]) == (200, "nosniff")
        assert headers["content-type"].startswith("text/javascript" if path.endswith(".js") else "text/css")
        found = ["/" + name for name in re.findall(r'from "\./(\w+\.js)"', files[path].decode())]
        waiting += [name for name in found if name not in {*files, *waiting}]
    assert len(files) > 5
    for content in files.values():
        assert b"http://" not in content
        assert b"https://" not in content
    assert ask(standing, "/healthz")[::2] == (200, b"ok\n")


def test_the_page_names_the_features_that_are_on() -> None:
    board = Dashboard(features=("sensors", "controls"))
    board.start()
    try:
        assert b'data-features="controls sensors"' in ask(board, "/")[2]
    finally:
        board.close()


def test_picture(board: Dashboard) -> None:
    assert ask(board, "/picture.jpg")[0] == 204
    board.picture(b"\xff\xd8old")
    board.picture(b"\xff\xd8new")
    code, headers, body = ask(board, "/picture.jpg?7")
    assert (code, headers["content-type"], body) == (200, "image/jpeg", b"\xff\xd8new")


def test_events_carry_the_newest_state_at_ten_a_second(board: Dashboard) -> None:
    board.update({"n": 0})
    with Events(board) as events:
        assert events.head() == "HTTP/1.1 200 OK"
        assert events.next() == {"n": 0}
        start = time.monotonic()
        n, seen = 0, []
        while time.monotonic() - start < 0.5:
            n += 1
            board.update({"n": n, "gap": float("nan")})
            time.sleep(0.002)
        while not seen or seen[-1]["n"] < n:
            seen.append(events.next())
    assert 2 <= len(seen) <= 8
    assert seen[-1] == {"n": n, "gap": None}


@pytest.mark.slow
def test_a_stalled_client_does_not_slow_the_others(board: Dashboard) -> None:
    big = {"text": "x" * 200_000}
    with Events(board, receive_buffer=4096) as stalled, Events(board) as good:
        assert good.head() == "HTTP/1.1 200 OK"
        assert wait_until(lambda: board.clients == 2)
        slowest = 0.0
        for n in range(12):
            start = time.monotonic()
            board.update({"n": n, **big})
            slowest = max(slowest, time.monotonic() - start)
            while good.next()["n"] < n:
                pass
        assert slowest < 0.05
        # the client that does not read is disconnected, the other stays
        assert wait_until(lambda: board.clients == 1)
        assert stalled.socket.fileno() >= 0


def test_too_many_clients_are_refused(board: Dashboard) -> None:
    board.update({})
    many = [Events(board) for _ in range(MAX_CLIENTS)]
    try:
        assert wait_until(lambda: board.clients == MAX_CLIENTS)
        assert ask(board, "/events")[0] == 503
        assert ask(board, "/healthz")[0] == 200
    finally:
        for events in many:
            events.__exit__()
    # disconnected clients are noticed, and new ones are accepted
    assert wait_until(lambda: (board.update({}), board.clients == 0)[1])


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1.example.org", "", "localhost:80:80", "192.0.2.1:80"])
def test_a_foreign_host_is_refused(standing: Dashboard, host: str) -> None:
    for path in ("/", "/events", "/picture.jpg"):
        assert ask(standing, path, Host=host)[0] == 403


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:80", "LOCALHOST:9"])
def test_a_loopback_host_is_served(standing: Dashboard, host: str) -> None:
    assert ask(standing, "/healthz", Host=host)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "HEAD", "NONSENSE"])
def test_only_get(standing: Dashboard, method: str) -> None:
    code, headers, _ = ask(standing, "/", method)
    assert (code, headers["allow"]) == (405, "GET")


@pytest.mark.parametrize("path", ["/nothing", "/../server.py", "/page.html", "/page/main.js", "/sensors", "/events/"])
def test_unknown_paths(standing: Dashboard, path: str) -> None:
    assert ask(standing, path)[0] == 404


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\xff\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"A" * 70_000,
    ],
    ids=["binary", "half", "version", "no host", "long"],
)
def test_garbage_on_the_socket_is_harmless(standing: Dashboard, raw: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_connection(("127.0.0.1", port(standing)), timeout=5) as s:
        s.sendall(raw)
        s.shutdown(socket.SHUT_WR)
        try:
            answer = s.recv(4096)
        except ConnectionError:
            answer = b""
        assert b" 200 " not in answer
    assert ask(standing, "/healthz")[0] == 200
    assert capsys.readouterr().err == ""


def test_close_is_quick_with_connected_clients() -> None:
    board = Dashboard()
    board.start()
    board.update({})
    with Events(board) as events, socket.create_connection(("127.0.0.1", port(board))):
        assert events.next() == {}
        start = time.monotonic()
        board.close()
        assert time.monotonic() - start < 2
        board.close()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port(board)), timeout=1)


def test_close_without_start() -> None:
    Dashboard().close()


def test_wrong_addresses() -> None:
    with pytest.raises(ConfigError, match="needs a token"):
        Dashboard("0.0.0.0")
    board = Dashboard()
    with pytest.raises(ProcessError, match="cannot bind"):
        Dashboard("127.0.0.1", port(board))
    board.close()


# --- access

TOKEN = "0123456789abcdefghij"
PATHS = ("/", "/events", "/picture.jpg", "/healthz", "/nothing")


@pytest.fixture
def guarded() -> Iterator[Dashboard]:
    dashboard = Dashboard("0.0.0.0", 0, client_timeout_s=0.3, token=TOKEN)
    dashboard.picture(b"jpeg")
    dashboard.update({"a": 1})
    dashboard.start()
    yield dashboard
    dashboard.close()


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer "},
        {"Authorization": f"Bearer {TOKEN}x"},
        {"Authorization": f"Bearer {TOKEN[:-1]}"},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer \xff\xfe"},
        {"Cookie": f"stream_mmrnn={TOKEN}"},
        {"Cookie": "stream_mmrnn_PORT="},
        {"Cookie": "\x01;;==" + TOKEN},
    ],
    ids=range(9),
)
def test_without_the_token_the_page_reveals_nothing(guarded: Dashboard, headers: dict[str, str]) -> None:
    asked = [*PATHS, "/?token=", "/events?token=wrong", "/?x&" * 20]
    methods = ["GET", "POST", "PUT", "HEAD", "OPTIONS"]
    for method, path in itertools.product(methods, asked):
        code, answered, body = ask(
            guarded, path, method, **{k: v.replace("PORT", str(port(guarded))) for k, v in headers.items()}
        )
        assert code == 401
        assert answered["www-authenticate"] == "Bearer"
        assert TOKEN not in str(answered)
        assert body in (b"", b"this page needs its token: open it as /?token=TOKEN\n")
    assert guarded.access.denied["token"] == len(methods) * len(asked)


def test_the_token_opens_the_page(guarded: Dashboard) -> None:
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    assert ask(guarded, "/", **bearer)[0] == 200
    assert ask(guarded, "/picture.jpg?12", **bearer)[2] == b"jpeg"
    assert ask(guarded, "/", "POST", **bearer)[0] == 405
    code, headers, body = ask(guarded, f"/?token={TOKEN}")
    assert (code, headers["location"], body) == (303, "/", b"")
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert ask(guarded, "/healthz", Cookie="other=1; " + cookie.split(";")[0])[0] == 200
    assert ask(guarded, f"//example.org/a?token={TOKEN}")[1]["location"] == "/example.org/a"
    assert guarded.access.denied == {}


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Origin": "http://HOST"}, 200),
        ({"Origin": "https://HOST"}, 200),
        ({"Origin": "http://example.org"}, 403),
        ({"Origin": "http://HOST.example.org"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"}, 403),
    ],
)
def test_requests_from_other_sites_are_refused(standing: Dashboard, headers: dict[str, str], code: int) -> None:
    host = f"127.0.0.1:{port(standing)}"
    given = {k: v.replace("HOST", host) for k, v in headers.items()}
    assert ask(standing, "/healthz", **given)[0] == code
    posted = ask(standing, "/", "POST", **given)[0]
    assert posted == 403 if code == 403 or "cross-site" in given.values() else posted == 405


def test_host_names_that_allow_dns_rebinding_are_refused(guarded: Dashboard) -> None:
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    for host in ("192.0.2.1:80", "[2001:db8::1]:80", "127.0.0.1", "localhost", socket.gethostname()):
        assert ask(guarded, "/healthz", Host=host, **bearer)[0] == 200
    for host in ("example.org", "127.0.0.1.example.org", "", "x:y"):
        assert ask(guarded, "/healthz", Host=host, **bearer)[0] == 403


def test_a_token_is_optional_on_loopback_and_required_elsewhere() -> None:
    guarded = Dashboard(token=TOKEN)
    guarded.start()
    assert ask(guarded, "/")[0] == 401
    assert ask(guarded, "/", Authorization=f"Bearer {TOKEN}")[0] == 200
    guarded.close()
    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
        with pytest.raises(ConfigError, match="needs a token"):
            Access(host)
    for host in ("127.0.0.1", "127.1.2.3", "::1", "localhost"):
        Access(host)


# --- for other programs


def test_metrics_and_readiness() -> None:
    why_not_ready = ["the engine is starting"]
    board = Dashboard(metrics=lambda: b"frames_total 3\n", ready=lambda: why_not_ready[0])
    board.start()
    code, headers, body = ask(board, "/metrics")
    assert (code, headers["content-type"], body) == (200, METRICS_TYPE, b"frames_total 3\n")
    assert ask(board, "/readyz")[::2] == (503, b"the engine is starting\n")
    why_not_ready[0] = ""
    assert ask(board, "/readyz")[::2] == (200, b"ready\n")
    assert ask(board, "/healthz")[0] == 200
    board.close()


def test_metrics_are_optional(standing: Dashboard) -> None:
    assert ask(standing, "/metrics")[0] == 404
    assert ask(standing, "/readyz")[0] == 200


def test_a_client_that_does_not_read_its_picture_is_disconnected(board: Dashboard) -> None:
    board.picture(b"\xff\xd8" + bytes(4_000_000))
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.settimeout(10)
        stalled.connect(("127.0.0.1", port(board)))
        stalled.sendall(f"GET /picture.jpg HTTP/1.1\r\nHost: localhost:{port(board)}\r\n\r\n".encode())
        assert wait_until(lambda: board.connections == 1)
        assert wait_until(lambda: board.connections == 0)


def test_a_connection_without_a_request_is_closed() -> None:
    board = Dashboard(idle_timeout_s=0.2)
    board.start()
    for begun in (b"", b"GET / HTTP/1.1\r\nHost:"):
        with socket.create_connection(("127.0.0.1", port(board)), timeout=5) as slow:
            slow.sendall(begun)
            assert slow.recv(1) == b""
    assert wait_until(lambda: board.connections == 0)
    board.close()


def test_connections_beyond_the_limit_are_closed(board: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 3)
    with ExitStack() as many:
        for _ in range(3):
            assert many.enter_context(Events(board)).head() == "HTTP/1.1 200 OK"
        with socket.create_connection(("127.0.0.1", port(board)), timeout=5) as one_more:
            assert one_more.recv(1) == b""
    assert wait_until(lambda: board.connections == 0)
    assert ask(board, "/healthz")[0] == 200


HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "begun",
    [
        b"",
        HEAD,
        HEAD + b"\r\n" + HEAD,
        b"POST /text HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9000\r\n\r\n",
    ],
    ids=["nothing", "a header", "a second header", "a body"],
)
def test_slow_requests_keep_nobody_out(begun: bytes) -> None:
    board = Dashboard(posts={"/text": lambda body: ""})
    board.start()
    with closing(board), Trickle(port(board), begun) as trickle:
        assert wait_until(lambda: trickle.rounds >= 2, 10)
        assert [ask(board, "/healthz")[0] for _ in range(20)] == [200] * 20
        assert board.connections <= MAX_CONNECTIONS + MAX_WAITING


# --- POST


@pytest.fixture
def posting() -> Iterator[tuple[Dashboard, list[bytes]]]:
    """A page, and the bodies that were posted to it."""
    bodies: list[bytes] = []

    def accept(body: bytes) -> str:
        bodies.append(body)
        return "not now" if body == b'"no"' else ""

    board = Dashboard(posts={"/text": accept}, idle_timeout_s=0.2)
    board.start()
    yield board, bodies
    board.close()


def post(board: Dashboard, body: bytes, **headers: str) -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", port(board), timeout=5)
    try:
        connection.request("POST", "/text", body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_a_post_is_accepted_or_refused_with_a_reason(posting: tuple[Dashboard, list[bytes]]) -> None:
    board, bodies = posting
    assert post(board, b'"hello"') == (200, b"done\n")
    assert post(board, b'"no"') == (409, b"not now\n")
    assert post(board, b'"x"', Origin=f"http://127.0.0.1:{port(board)}") == (200, b"done\n")
    assert bodies == [b'"hello"', b'"no"', b'"x"']
    assert ask(board, "/text")[0] == 405
    assert ask(board, "/text")[1]["allow"] == "POST"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Origin": "http://example.org"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}, 403),
        ({"Host": "example.org"}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"Content_Length": "999999"}, 413),
        ({"Content_Length": "00000000000200000000"}, 413),
    ],
)
def test_a_post_from_another_site_or_of_another_type_is_refused(
    posting: tuple[Dashboard, list[bytes]], headers: dict[str, str], code: int
) -> None:
    board, bodies = posting
    assert post(board, b'"hello"', **headers)[0] == code
    assert bodies == []


def test_a_post_that_does_not_arrive_times_out(posting: tuple[Dashboard, list[bytes]]) -> None:
    board, bodies = posting
    head = f"POST /text HTTP/1.1\r\nHost: localhost:{port(board)}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", port(board)), timeout=5) as slow:
        slow.sendall(head.encode() + b'Content-Length: 9\r\n\r\n"h')
        assert slow.recv(4096).startswith(b"HTTP/1.1 408 ")
    with socket.create_connection(("127.0.0.1", port(board)), timeout=5) as endless:
        endless.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
        assert endless.recv(4096).startswith(b"HTTP/1.1 411 ")
    with socket.create_connection(("127.0.0.1", port(board)), timeout=5) as both:
        both.sendall(head.encode() + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
        assert both.recv(4096).startswith((b"HTTP/1.1 411 ", b"HTTP/1.1 400 "))
    assert bodies == []


# --- sound


def tone(hz: float, samples: int, level: float = 0.5, at: int = 0) -> Any:
    t = (at + np.arange(samples)) / topics.AUDIO_RATE_HZ
    return np.rint(level * 32767 * np.sin(2 * np.pi * hz * t)).astype(np.int16)


def test_the_spectrogram_shows_a_tone_where_it_is() -> None:
    peaks = []
    for hz in (200, 1000, 4000):
        sound = Spectrogram()
        for k in range(50):  # 1 s in blocks of 20 ms
            sound.observe(T0 + (k + 1) * 20 * MS, tone(hz, 320, at=320 * k))
        columns = np.frombuffer(sound.columns, np.uint8).reshape(-1, BANDS)
        assert len(columns) == 25
        peaks.append(int(columns[-1].argmax()))
        snap = sound.snapshot(T0 + S)
        assert snap["level_db"] == pytest.approx(-9, abs=0.2)  # RMS of a sine of half the full scale
        assert snap["peak_db"] == pytest.approx(-6, abs=0.2)
        assert snap["newest"] == snap["first"] + 24
        assert snap["age_ms"] <= 40
    assert peaks == sorted(peaks)
    assert len(set(peaks)) == 3


@given(st.lists(st.tuples(st.integers(-5, 60), st.integers(1, 3000)), max_size=60))
def test_the_spectrogram_is_bounded_and_on_its_grid(steps: list[tuple[int, int]]) -> None:
    """Blocks of any length, at times that stand still, jump or go back."""
    sound, at_ns, latest_ns = Spectrogram(), T0, T0
    for seconds, samples in steps:
        at_ns += seconds * S + samples * S // topics.AUDIO_RATE_HZ
        latest_ns = max(latest_ns, at_ns)
        sound.observe(at_ns, np.zeros(samples, np.int16))
        assert len(sound.columns) <= COLUMNS * BANDS
        snap = sound.snapshot(at_ns)
        assert (snap["newest"] - snap["first"] + 1) * BANDS == len(sound.columns)
        assert snap["newest"] <= latest_ns // COLUMN_NS


@pytest.mark.parametrize("payload", [b"x", np.zeros(0, np.int16), np.zeros(10, np.float32), np.zeros(10**6, np.int16)])
def test_payloads_that_are_no_sound_are_ignored(payload: Any) -> None:
    sound = Spectrogram()
    sound.observe(T0, payload)
    assert sound.snapshot(T0)["level_db"] is None
    assert sound.columns == b""


def test_a_browser_requests_only_new_columns(board: Dashboard) -> None:
    columns = bytes(range(3)) * BANDS
    board.sound(7, columns)
    assert ask(board, "/sound")[1:] == (ask(board, "/sound?since=7")[1], columns)
    code, headers, body = ask(board, "/sound?since=9")
    assert (code, headers["x-first"], body) == (200, "9", columns[2 * BANDS :])
    assert ask(board, "/sound?since=99")[2] == b""
    for wrong in ("x", "-1", "9" * 17, "%00", "0" * 16 + "1", "0" * 20 + "9" * 5000):
        assert ask(board, f"/sound?since={wrong}")[0] == 400


# --- typing, labels, deaths


def test_the_page_says_whether_text_can_be_typed() -> None:
    live = LiveState()
    assert live.typing()["why"] == "nothing is known of this session yet; wait a moment"
    live.observe(status("engine", T0, state="ready"))
    assert "start it with --text page" in live.typing()["why"]
    live.observe(status("text", T0, state="starting", modality="text"))
    assert live.typing() == {"possible": False, "why": "the text source is starting"}
    live.observe(status("text", T0, state="open", modality="text", detail={"source": "stdin"}))
    assert live.snapshot(T0)["typing"] == {"possible": True, "why": ""}
    live.observe(status("text", T0, state="missing", modality="text", reason="port 5 is taken"))
    assert live.typing()["why"] == "the text source is missing: port 5 is taken"
    live.observe(status("text", T0, state="ended", modality="text", detail={"source": "stdin"}))
    assert live.typing()["why"].startswith("the text source stdin has ended")


def test_lines_are_typed_into_the_first_text_whatever_its_name() -> None:
    table = stream_table(config.parse({"streams": {"notes": {"source": "page", "kind": "text"}}}))
    live = LiveState(table=table)
    live.observe(status("notes", T0, state="open", modality="notes", detail={"source": "page"}))
    assert live.typing() == {"possible": True, "why": ""}


def test_labels_are_shown() -> None:
    live = LiveState()
    live.observe(envelope("label", T0, b"speaking"))
    assert live.snapshot(T0 + S)["labels"] == [{"text": "speaking", "session": "a", "age_ms": 1000}]


def test_deaths_are_counted_even_if_the_supervisors_status_was_missed() -> None:
    live = LiveState()
    live.observe(status("camera", T0, state="open", pid=1))
    assert live.snapshot(T0)["nodes"]["camera"]["deaths"] is None
    live.observe(status("camera", T0 + S, state="restarting", reason="was killed by SIGKILL"))
    live.observe(status("camera", T0 + S, state="open", pid=2))
    deaths = live.snapshot(T0 + 2 * S)["nodes"]["camera"]["deaths"]
    assert deaths == {"count": 1, "reason": "was killed by SIGKILL", "age_ms": 1000}
    live.observe(status("camera", T0 + 3 * S, state="open", pid=3))
    assert live.snapshot(T0 + 3 * S)["nodes"]["camera"]["deaths"]["count"] == 2


def test_skipped_topics_do_not_count_as_lost() -> None:
    live = LiveState()
    live.observe(envelope("raw/vision", T0, b"", seq=0))
    live.observe(envelope("feature/audio", T0, seq=0))
    live.skip(("raw/vision",))
    live.observe(envelope("raw/vision", T0 + S, b"", seq=50))
    live.observe(envelope("feature/audio", T0 + S, seq=2))
    losses = {x["what"]: x["count"] for x in live.snapshot(T0 + S)["losses"]}
    assert losses == {"lost.feature/audio": 1}
