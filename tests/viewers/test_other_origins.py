"""What a page of another site can do to a session in the same browser: nothing."""

from __future__ import annotations

import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from harness import Running, recording_grows
from hypothesis import given
from hypothesis import strategies as st
from trickle import Trickle

from stream_mmrnn.core.errors import StreamError
from stream_mmrnn.core.settings import FoxgloveSettings
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.viewers.origin_gate import OriginGate, refusal

CHROMIUM = shutil.which("chromium")
APP = FoxgloveSettings().origins


def head(**headers: str) -> bytes:
    lines = {"Host": "127.0.0.1:8765", "Upgrade": "websocket", **headers}
    return "\r\n".join(["GET / HTTP/1.1", *(f"{k}: {v}" for k, v in lines.items() if v), "", ""]).encode()


@pytest.mark.parametrize(
    ("request_head", "why"),
    [
        (head(), ""),
        (head(Origin="http://localhost:8080"), ""),
        (head(Origin="http://[::1]:8080"), ""),
        (head(Origin="https://app.foxglove.dev"), ""),
        (head(Origin="file://"), ""),
        (head(Origin="http://evil.example"), "origin"),
        (head(Origin="null"), "origin"),
        (head(Origin="http://localhost.evil.example"), "origin"),
        (head(Origin="http://127.0.0.1.evil.example:8765"), "origin"),
        (head(Origin="https://app.foxglove.dev.evil.example"), "origin"),
        (head(Host="evil.example:8765"), "host"),
        (head(Host=""), "host"),
        (head(Upgrade=""), "handshake"),
        (head().replace(b"GET", b"POST"), "handshake"),
        (head(Origin="http://localhost").replace(b"Origin", b"X: y\r\n Origin"), "handshake"),
        (head(Origin="http://localhost\r\nOrigin: http://evil.example"), "origin"),
    ],
)
def test_handshakes_of_other_sites_are_refused(request_head: bytes, why: str) -> None:
    assert refusal(request_head, APP) == why


@given(st.binary(max_size=300))
def test_no_bytes_are_let_in_or_raise(data: bytes) -> None:
    assert refusal(data + b"\r\n\r\n", APP)


@pytest.mark.slow
@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nX: "])
def test_slow_handshakes_keep_nobody_out(begun: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as behind:
        threading.Thread(target=_greet, args=(behind,), daemon=True).start()
        gate = OriginGate(0, behind.getsockname(), APP)
        with closing(gate), Trickle(gate.port, begun) as trickle:
            while trickle.rounds < 2:
                time.sleep(0.01)
            for _ in range(20):
                with socket.create_connection(("127.0.0.1", gate.port), timeout=5) as client:
                    client.sendall(head())
                    assert client.recv(2) == b"hi"
        assert gate.denied["unfinished"] > 0
        assert gate.denied["connections"] == 0


def _greet(server: socket.socket) -> None:
    with suppress(OSError):
        while True:
            client, _ = server.accept()
            with client:
                client.recv(1024)
                client.sendall(b"hi")


class Blank(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<html></html>")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def site() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Blank)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


SOCKET = """([address, protocols]) => new Promise(done => {
    const s = new WebSocket(address, protocols);
    s.onopen = () => done("open"); s.onerror = () => done("refused");
    setTimeout(() => done("nothing"), 8000);
})"""
FOXGLOVE = ["foxglove.sdk.v1"]
FETCH = """([address, options]) => fetch(address, options).then(
    async r => r.type === "opaque" ? "sent" : r.status + (await r.text()), () => "failed")"""


def addresses(live: Running) -> tuple[str, str] | None:
    """Of Foxglove's server and of the page, once both have been said."""
    said = " ".join(live.lines)
    found = [re.search(rf"{scheme}://127\.\S+\d", said) for scheme in ("ws", "http")]
    return (found[0][0], found[1][0]) if found[0] and found[1] else None


def texts(path: Path) -> list[bytes]:
    """All words and labels that are recorded so far."""
    try:
        return [e.payload for e in Recording(path).envelopes({"raw/text", "raw/b", "raw/c", "label"})]
    except StreamError:
        return []


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.devices
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: chromium)")
def test_a_page_of_another_site_reaches_no_port(site: int, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    path, file = tmp_path / "a.mcap", tmp_path / "s.toml"
    file.write_text(
        f'[streams.text]\nsource = "tcp:{ports[0]}"\n[streams.b]\nkind = "text"\nsource = "zmq:{ports[1]}"\n'
        '[streams.vision]\nsource = "synthetic"\n[streams.c]\nkind = "text"\nsource = "push"\n[foxglove]\nport = 0\n'
    )
    with closing(Running("--config", file, "--foxglove", "--record", path)) as live:
        foxglove, page = live.wait_for(lambda: addresses(live), 40)
        live.wait_for(lambda: recording_grows(path, 20_000), 40)
        with sync_api.sync_playwright() as playwright:
            rules = "MAP evil.example 127.0.0.1"
            chromium = playwright.chromium.launch(
                executable_path=CHROMIUM, args=["--no-sandbox", f"--host-resolver-rules={rules}"]
            )
            tab = chromium.new_page()
            own = page.replace("http", "ws")
            tab.goto(f"http://evil.example:{site}/")
            for address in (foxglove, f"{own}/predictions", f"{own}/push/c"):
                assert tab.evaluate(SOCKET, [address, FOXGLOVE if address == foxglove else []]) == "refused", address
            for name in ("", "events", "metrics", "sound", "picture.jpg", "healthz"):
                assert tab.evaluate(FETCH, [f"{page}/{name}", {}]) == "failed", name
            line = {"method": "POST", "mode": "no-cors", "body": "/label hacked\nhacked words\n"}
            for port in (*ports, int(foxglove.rpartition(":")[2])):
                tab.evaluate(FETCH, [f"http://127.0.0.1:{port}/", line])
            tab.evaluate(FETCH, [f"{page}/text", line])
            # the same from a page of this machine is let in
            tab.goto(f"http://127.0.0.1:{site}/")
            assert tab.evaluate(SOCKET, [foxglove, FOXGLOVE]) == "open"
            chromium.close()
        with socket.create_connection(("127.0.0.1", ports[0])) as person:
            person.sendall(b"typed by hand\n")
            live.wait_for(lambda: texts(path), 20)
        code, summary, _ = live.end()
    assert code == 0
    assert texts(path) == [b"typed by hand"]
    assert summary["streams"]["text"]["source"]["http"] >= 1
    assert summary["denied"]["foxglove"]["origin"] >= 1
    assert summary["denied"]["dashboard"]
