"""A small web server: one page, one stream of states, the newest picture, for those whom `access` lets in.

It hands out what it was given last and keeps nothing else, so a slow browser costs its own thread and no one
else's time. Knows nothing about the bus, predictions or what a state holds.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec

from stream_mmrnn.config import LOOPBACK
from stream_mmrnn.dashboard.access import Access
from stream_mmrnn.errors import ProcessError

PERIOD_S = 0.1
"""A client gets at most one state in this time."""
HEARTBEAT_S = 1.0
"""How often a silent stream is written to, so that a client who left is noticed."""
IDLE_S = 5.0
"""How long a connection may wait between requests."""
MAX_CLIENTS = 16
"""Streams of events at once."""
MAX_CONNECTIONS = 64
"""Threads at once; a browser opens up to six a page."""
SEND_BUFFER = 64 * 1024
"""Small, so that what waits in the kernel for a slow browser is a moment old, not minutes."""
MAX_BODY = 64 * 1024

_HTML = "text/html; charset=utf-8"
_TEXT = "text/plain; charset=utf-8"


class Board:
    """The newest state and picture, and who is looking. Shared by all threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._number = 0
        self._state = b""
        self.picture = b""
        self.clients = 0
        self.closing = threading.Event()

    def put(self, state: bytes) -> None:
        with self._changed:
            self._number += 1
            self._state = state
            self._changed.notify_all()

    def wait(self, seen: int, timeout_s: float) -> tuple[int, bytes]:
        """The newest state and its number: at once if it is not the one seen, else after `timeout_s`."""
        with self._changed:
            self._changed.wait_for(lambda: self._number != seen or self.closing.is_set(), timeout_s)
            return self._number, self._state

    def enter(self) -> bool:
        with self._changed:
            if self.clients >= MAX_CLIENTS:
                return False
            self.clients += 1
            return True

    def leave(self) -> None:
        with self._changed:
            self.clients -= 1

    def close(self) -> None:
        with self._changed:
            self.closing.set()
            self._changed.notify_all()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 32
    # on Windows the option would let another program take over a port in use
    allow_reuse_address = os.name != "nt"

    def __init__(self, host: str, port: int, page: bytes, client_timeout_s: float, access: Access) -> None:
        self.board = Board()
        self.access = access
        self.page = page
        self.policy = _policy(page)
        self.client_timeout_s = client_timeout_s
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        super().__init__((LOOPBACK if host == "localhost" else host, port), _Handler)

    def server_bind(self) -> None:
        # the base class looks up its own name, which can take seconds where DNS does not answer
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(self.allow_reuse_address))
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            full = len(self._open) >= MAX_CONNECTIONS
            if not full:
                self._open.add(request)
        if full:
            self.shutdown_request(request)
            return
        request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error; everything else is, and the base class prints it."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def drop_all(self, timeout_s: float) -> None:
        """Cut every connection and give its thread a moment to end."""
        with self._lock:
            for request in self._open:
                with contextlib.suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + timeout_s
        while self._open and time.monotonic() < deadline:
            time.sleep(0.005)


def _policy(page: bytes) -> str:
    """A policy under which only the page's own script runs, and nothing is fetched from elsewhere."""
    scripts = re.findall(rb"<script>(.*?)</script>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(s).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{d}'" for d in digests) or "'none'"
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = IDLE_S
    server: _Server

    def version_string(self) -> str:
        return "stream-mmrnn"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line a picture would drown what matters."""

    def __getattr__(self, name: str) -> Callable[[], None]:
        # the base class asks for `do_METHOD` and answers 501 where there is none; 405 is the right word
        if name.startswith("do_"):
            return self._wrong_method
        raise AttributeError(name)

    def _reply(self, code: int, body: bytes = b"", kind: str = _TEXT, **more: str) -> None:
        self.send_response(code)
        if code != 204:
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
        self._common()
        for name, value in more.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _common(self) -> None:
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")

    def _admitted(self) -> bool:
        """Whether the request may be served; the answer is given where not."""

        def values(name: str) -> list[str]:
            return self.headers.get_all(name) or []

        answer = self.server.access.judge(self.command, self.path, values, self.server.server_port)
        if answer is None:
            return True
        self._skip_body()
        body = b"" if self.command == "HEAD" else answer.words.encode()
        self._reply(answer.code, body, **{**answer.headers, "Connection": "close"})
        return False

    def _skip_body(self) -> None:
        # an unread body would make the close a reset, and the client lose the answer
        length = self.headers.get("Content-Length", "0")
        if length.isascii() and length.isdigit():
            self.rfile.read(min(int(length[:9]), MAX_BODY))
        self.close_connection = True

    def _wrong_method(self) -> None:
        if not self._admitted():
            return
        self._skip_body()
        body = b"" if self.command == "HEAD" else b"only GET is served here\n"
        self._reply(405, body, Allow="GET", Connection="close")

    def do_GET(self) -> None:
        # a GET with a body is not ours; left unread it would be taken for the next request
        if self.headers.get("Content-Length", "0") != "0" or self.headers.get("Transfer-Encoding"):
            self.close_connection = True
            self._reply(400, b"a GET has no body here\n", Connection="close")
        elif self._admitted():
            path = self.path.split("?", 1)[0]
            if path == "/":
                policy = self.server.policy
                self._reply(200, self.server.page, _HTML, Content_Security_Policy=policy)
            elif path == "/events":
                self._events()
            elif path == "/picture.jpg":
                picture = self.server.board.picture
                self._reply(200 if picture else 204, picture, "image/jpeg")
            elif path == "/healthz":
                self._reply(200, b"ok\n")
            else:
                self._reply(404, b"there is /, /events, /picture.jpg and /healthz\n")

    def _events(self) -> None:
        board = self.server.board
        self.close_connection = True
        if not board.enter():
            self._reply(503, b"too many open pages\n", Retry_After="2", Connection="close")
            return
        try:
            self.connection.settimeout(self.server.client_timeout_s)
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Connection", "close")
            self._common()
            self.end_headers()
            self.wfile.write(b"retry: 1000\n\n")
            seen = 0
            while not board.closing.is_set():
                number, state = board.wait(seen, HEARTBEAT_S)
                # a state is one line: the encoder writes no line breaks
                self.wfile.write(b"data: %b\n\n" % state if number != seen else b": alive\n\n")
                seen = number
                board.closing.wait(PERIOD_S)
        except OSError:
            pass  # gone, or stalled past the timeout: nobody else is to notice
        finally:
            board.leave()


class Dashboard:
    """Serves the live page; `update` and `picture` never wait for a browser.

    Raises:
        ConfigError: others can reach the host, and there is no token.
        ProcessError: the port cannot be had.

    """

    def __init__(self, host: str = LOOPBACK, port: int = 0, client_timeout_s: float = 2.0, token: str = "") -> None:
        self.access = Access(host, token, (socket.gethostname(),))
        page = Path(__file__).with_name("page.html").read_bytes()
        try:
            self._server = _Server(host, port, page, client_timeout_s, self.access)
        except OSError as e:
            raise ProcessError(f"the dashboard cannot bind {host} port {port}: {e.strerror or e}") from e
        self._host = f"[{host}]" if ":" in host else host
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        return f"http://{self._host}:{self._server.server_port}/"

    @property
    def clients(self) -> int:
        """How many browsers follow the events."""
        return self._server.board.clients

    def update(self, state: dict[str, Any]) -> None:
        """Replace the state; NaN and infinity become null, as JSON wants."""
        self._server.board.put(msgspec.json.encode(state))

    def picture(self, jpeg: bytes) -> None:
        self._server.board.picture = jpeg

    def start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._server.serve_forever, args=(0.05,), name="dashboard", daemon=True
            )
            self._thread.start()

    def close(self) -> None:
        self._server.board.close()
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join(0.1)
            self._thread = None
        self._server.drop_all(0.1)
        self._server.server_close()
