"""The page's web server: the page, a stream of states, the newest picture and sound, what is typed or pressed there,
and what other programs ask for.

Starlette and uvicorn on a thread of their own. It hands out what it was given last and keeps nothing else, so a slow
browser costs nobody's time but its own, and one that stops reading is cut off. Who may ask is `access`'s to say.
Knows nothing about the bus, predictions or what a state holds.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import re
import socket
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import uvicorn
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from stream_mmrnn.config import LOOPBACK
from stream_mmrnn.dashboard.access import Access
from stream_mmrnn.dashboard.sound import BANDS
from stream_mmrnn.errors import ProcessError

PERIOD_S = 0.1
"""A client gets at most one state in this time."""
HEARTBEAT_S = 1.0
"""How often a silent stream is written to, so that a client who left is noticed."""
IDLE_S = 5.0
"""How long a connection may wait between requests, and how long a request may take to arrive."""
MAX_CLIENTS = 16
"""Streams of events at once."""
MAX_CONNECTIONS = 64
"""A browser opens up to six a page."""
SEND_BUFFER = 64 * 1024
"""Small, so that what waits in the kernel for a slow browser is a moment old, not minutes."""

MAX_BODY = 16 * 1024
"""Of what is posted."""
MAX_SINCE = 2**53

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Prometheus' text format."""
_CLOSE_S = 2.0


class Board:
    """The newest state and picture, and how many are looking. Given from any thread, read in the server's."""

    def __init__(self) -> None:
        self._newest = (0, b"")
        self._changed = asyncio.Event()
        self.picture = b""
        self.sound = (0, b"")
        self.clients = 0
        self.closing = False

    def put(self, state: bytes) -> None:
        self._newest = (self._newest[0] + 1, state)

    def wake(self) -> None:
        """Tell those who wait; in the server's thread."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, seen: int) -> tuple[int, bytes]:
        """The newest state and its number: at once if it is not the one seen, else after `HEARTBEAT_S` at most."""
        if self._newest[0] == seen and not self.closing:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), HEARTBEAT_S)
        return self._newest


class _States(StreamingResponse):
    """Server-sent events: the newest state, whenever it is another one, at most every `PERIOD_S`."""

    def __init__(self, board: Board) -> None:
        super().__init__(self._lines(), media_type="text/event-stream", headers={"Connection": "close"})
        self._board = board

    async def _lines(self) -> AsyncIterator[bytes]:
        yield b"retry: 1000\n\n"
        seen = 0
        while not self._board.closing:
            number, state = await self._board.wait(seen)
            # a state is one line: the encoder writes no line breaks
            yield b"data: %b\n\n" % state if number != seen else b": alive\n\n"
            seen = number
            await asyncio.sleep(PERIOD_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._board.clients += 1
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._board.clients -= 1


class _Connection(H11Protocol):
    """uvicorn's, with an end to all patience: with who connects and asks nothing, and with who asks and reads nothing.

    Such a one is cut off, which frees what waits to be sent to it.
    """

    def __init__(self, *args: Any, patience_s: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self._patience_s = patience_s
        self._arrival: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if len(self.connections) >= MAX_CONNECTIONS:
            self.transport = transport
            transport.abort()
            return
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        # whatever the kernel does not take at once is for a browser that is slow
        transport.set_write_buffer_limits(high=0)
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_request()

    def _expect_request(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None
        elif not answering and self._arrival is None:
            self._arrival = self.loop.call_later(IDLE_S, self.transport.abort)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(self._patience_s, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._arrival, self._stall):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)


def _page() -> bytes:
    """The page in one piece: its style and its script are in it, so that the policy can name what is in them."""
    parts = {name: Path(__file__).with_name(name).read_bytes() for name in ("page.html", "page.css", "page.js")}
    page = parts["page.html"].replace(
        b'<link rel="stylesheet" href="page.css">', b"<style>%b</style>" % parts["page.css"]
    )
    return page.replace(b'<script src="page.js"></script>', b"<script>%b</script>" % parts["page.js"])


def _policy(page: bytes) -> str:
    """A policy under which only the page's own script and style count, and nothing is fetched from elsewhere."""

    def own(tag: bytes) -> str:
        found = re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s).digest()).decode()}'" for s in found)

    return (
        f"default-src 'none'; script-src {own(b'script')}; style-src {own(b'style')}; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


_COMMON = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Server": "stream-mmrnn",
}


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket; raises OSError."""
    s = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        # on Windows the option would let another program take over a port in use
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, int(os.name != "nt"))
        s.bind((LOOPBACK if host == "localhost" else host, port))
        s.listen(32)
    except OSError:
        s.close()
        raise
    return s


class Dashboard:
    """Serves the live page; `update` and `picture` never wait for a browser.

    `metrics` gives what /metrics answers, in Prometheus' text format. `ready` gives what keeps the system from being
    ready, "" where nothing does: /readyz answers 200 or 503; /healthz is 200 while the server lives. Both are called
    in the server's thread and must be quick.

    `posts`: by path, who takes the body of a POST of JSON and answers "" or, as one sentence, why it cannot be done.
    They are called in the server's thread, too.

    Raises:
        ConfigError: others can reach the host, and there is no token.
        ProcessError: the port cannot be had.

    """

    def __init__(
        self,
        host: str = LOOPBACK,
        port: int = 0,
        client_timeout_s: float = 2.0,
        token: str = "",
        metrics: Callable[[], bytes] | None = None,
        ready: Callable[[], str] = lambda: "",
        posts: Mapping[str, Callable[[bytes], str]] = MappingProxyType({}),
    ) -> None:
        self.access = Access(host, token, (socket.gethostname(),))
        self._page = _page()
        self._policy = _policy(self._page)
        self._metrics, self._ready, self._posts = metrics, ready, posts
        self._board = Board()
        try:
            self._socket = _bind(host, port)
        except OSError as e:
            raise ProcessError(f"the dashboard cannot bind {host} port {port}: {e.strerror or e}") from e
        self._port = int(self._socket.getsockname()[1])
        self._host = f"[{host}]" if ":" in host else host
        self._routes = {
            "/": self._get_page,
            "/events": self._get_events,
            "/picture.jpg": self._get_picture,
            "/sound": self._get_sound,
            "/healthz": self._get_health,
            "/readyz": self._get_readiness,
        } | ({"/metrics": self._get_metrics} if metrics else {})
        self._router = Router(
            [
                *(Route(path, endpoint) for path, endpoint in self._routes.items()),
                *(Route(path, self._post, methods=["POST"]) for path in posts),
            ],
            redirect_slashes=False,
            default=self._nothing,
        )
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._app,
                http=partial(_Connection, patience_s=client_timeout_s),  # type: ignore[arg-type]
                interface="asgi3",
                loop="none",
                ws="none",
                lifespan="off",
                proxy_headers=False,
                server_header=False,
                access_log=False,
                log_config=None,
                log_level="error",  # what clients get wrong is their business, and counted
                timeout_keep_alive=int(IDLE_S),
                timeout_graceful_shutdown=1,
            )
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        return f"http://{self._host}:{self._port}/"

    @property
    def clients(self) -> int:
        """How many browsers follow the events."""
        return self._board.clients

    @property
    def connections(self) -> int:
        return len(self._server.server_state.connections)

    def update(self, state: dict[str, Any]) -> None:
        """Replace the state; NaN and infinity become null, as JSON wants."""
        self._board.put(msgspec.json.encode(state))
        self._call(self._board.wake)

    def picture(self, jpeg: bytes) -> None:
        self._board.picture = jpeg

    def sound(self, first: int, columns: bytes) -> None:
        """The spectrogram, `BANDS` bytes a column, and the number of the first."""
        self._board.sound = (first, columns)

    def start(self) -> None:
        if self._thread is None:
            self._loop = asyncio.new_event_loop()
            self._thread = threading.Thread(target=self._run, args=(self._loop,), name="dashboard", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Cut every connection and give the port back; within some tenths of a second."""
        self._call(self._end)
        if self._thread is not None:
            self._thread.join(_CLOSE_S)
            self._thread = None
        self._socket.close()

    def _call(self, what: Callable[[], None]) -> None:
        """Have it called in the server's thread; not at all where that does not run."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # closed
                self._loop.call_soon_threadsafe(what)

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            loop.run_until_complete(self._server.serve([self._socket]))
        finally:
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.close()

    def _end(self) -> None:
        self._server.should_exit = True
        self._board.closing = True
        self._board.wake()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Every request: who may, then what is asked for, and what every answer says of itself."""

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] += [(k.lower().encode(), v.encode()) for k, v in _COMMON.items()]
            await send(message)

        response = self._refusal(scope) or self._router
        await response(scope, receive, answer)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        method, query = scope["method"], scope["query_string"].decode("latin-1")
        # a GET with a body is not ours
        if method == "GET" and (headers.get("content-length", "0") != "0" or "transfer-encoding" in headers):
            return PlainTextResponse("a GET has no body here\n", 400, {"Connection": "close"})
        target = scope["raw_path"].decode("latin-1") + (f"?{query}" if query else "")
        denied = self.access.judge(method, target, headers.getlist, self._port)
        if denied is not None:
            return PlainTextResponse(denied.words, denied.code, denied.headers)
        allowed = "POST" if scope["path"] in self._posts else "GET"
        if method != allowed:
            return PlainTextResponse(f"only {allowed} is served here\n", 405, {"Allow": allowed})
        return None

    async def _nothing(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = PlainTextResponse(f"there is {', '.join(self._routes)}\n", 404)
        await answer(scope, receive, send)

    async def _get_page(self, _: Request) -> Response:
        return Response(self._page, headers={"Content-Security-Policy": self._policy}, media_type="text/html")

    async def _get_events(self, _: Request) -> Response:
        if self._board.clients >= MAX_CLIENTS:
            return PlainTextResponse("too many open pages\n", 503, {"Retry-After": "2"})
        return _States(self._board)

    async def _get_picture(self, _: Request) -> Response:
        picture = self._board.picture
        return Response(picture, media_type="image/jpeg") if picture else Response(status_code=204)

    async def _get_sound(self, request: Request) -> Response:
        """The columns from number `since` on, with the number of the first of them in `X-First`."""
        since = request.query_params.get("since", "0")
        if not (since.isascii() and since.isdigit() and int(since[:16]) < MAX_SINCE):
            return PlainTextResponse("since is the number of a column\n", 400)
        first, columns = self._board.sound
        begin = max(first, int(since))
        body = columns[(begin - first) * BANDS :]
        return Response(body, headers={"X-First": str(begin)}, media_type="application/octet-stream")

    async def _post(self, request: Request) -> Response:
        """200, or 409 and why not. JSON alone is taken: a form of another site cannot send it without asking first."""
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return PlainTextResponse("this wants application/json\n", 415)
        length = request.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()):
            return PlainTextResponse("how long is it? a Content-Length is missing\n", 411)
        if int(length[:9]) > MAX_BODY:
            return PlainTextResponse(f"at most {MAX_BODY} bytes are taken\n", 413, {"Connection": "close"})
        try:
            body = await asyncio.wait_for(request.body(), IDLE_S)
        except (TimeoutError, ClientDisconnect):
            return PlainTextResponse("it did not arrive in time\n", 408, {"Connection": "close"})
        why_not = self._posts[request.url.path](body)
        return PlainTextResponse(f"{why_not or 'done'}\n", 409 if why_not else 200)

    async def _get_health(self, _: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _get_readiness(self, _: Request) -> Response:
        why_not = self._ready()
        return PlainTextResponse(f"{why_not or 'ready'}\n", 503 if why_not else 200)

    async def _get_metrics(self, _: Request) -> Response:
        return Response(self._metrics() if self._metrics else b"", headers={"Content-Type": METRICS_TYPE})
