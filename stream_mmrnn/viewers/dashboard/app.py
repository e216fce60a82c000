"""The web application of the page: routes, access checks, timeouts and limits for clients.

Starlette and uvicorn take a while to import: `server` imports this module in a thread of its own. Knows nothing about
the bus, predictions or what a state holds.
"""

from __future__ import annotations

import asyncio
import math
import re
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial

import msgspec
import uvicorn
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, Router, WebSocketRoute
from starlette.types import Message, Receive, Scope, Send

from stream_mmrnn.core.numbers import whole_number
from stream_mmrnn.viewers.dashboard.access import Access
from stream_mmrnn.viewers.dashboard.board import Board, View
from stream_mmrnn.viewers.dashboard.connections import HttpConnection, WebSocketConnection
from stream_mmrnn.viewers.dashboard.feed import Feed
from stream_mmrnn.viewers.dashboard.push_socket import Push, PushSocket
from stream_mmrnn.viewers.dashboard.sensor_socket import SensorSocket
from stream_mmrnn.viewers.dashboard.sensors import Sensors
from stream_mmrnn.viewers.dashboard.sound import BANDS

PERIOD_S = 0.1
"""A client gets at most one state in this time."""
MAX_CLIENTS = 16
"""Event streams at the same time."""

MAX_BODY_BYTES = 16 * 1024
"""Of a POST."""
MAX_SINCE = 2**53

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
"""Content security policy: only the page's own files, no inline script or style, requests to this server only."""
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Prometheus' text format."""
_PREDICTIONS = "/predictions"
_PUSH = "/push/{stream}"
_SENSORS = "/sensors"
_VIEW = re.compile(r"/view/([A-Za-z0-9._-]{1,200})(/.*)")
"""The page once more, for another session or a recording: all its paths begin with `/view/KEY`."""
_MAX_CLIENT_MESSAGE_BYTES = 1024 * 1024
"""Of a message from a WebSocket client: a pushed picture, or a second of sound."""


class _EventStream(StreamingResponse):
    """Server-sent events: the newest state whenever it has changed, at most every `PERIOD_S`."""

    def __init__(self, board: Board) -> None:
        super().__init__(self._lines(), media_type="text/event-stream", headers={"Connection": "close"})
        self._board = board

    async def _lines(self) -> AsyncIterator[bytes]:
        yield b"retry: 1000\n\n"
        seen = 0
        while not self._board.closing:
            number, state = await self._board.wait(seen)
            # the encoder writes no line breaks, so a state is one line
            yield b"data: %b\n\n" % state if number != seen else b": alive\n\n"
            self._board.seen[self] = seen = number
            await asyncio.sleep(PERIOD_S)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._board.seen[self] = 0
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._board.seen.pop(self, None)


_COMMON = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Server": "stream-mmrnn",
}


class AppSettings(msgspec.Struct, frozen=True):
    """What the application serves, and its limits."""

    access: Access
    files: Mapping[str, tuple[bytes, str]]
    """By path, the content and media type of the page and its parts."""
    metrics: Callable[[], bytes] | None
    ready: Callable[[], str]
    own: View
    """What is shown unless a path names another view."""
    views: Callable[[str, bool], View | str]
    """Other views by key, or why there is none; called for each of their requests. True lets a view be made that ended
    because nobody looked."""
    push: Push | None
    sensors: Sensors | None
    """Takes what browsers give as cameras and microphones; None where no stream is theirs."""
    port: int
    client_timeout_s: float
    """A client that does not read for so long is disconnected."""
    idle_timeout_s: float
    """The longest time between requests, and for a request to arrive."""
    cert: str
    key: str
    """Files of the TLS certificate and its key; "" serves without TLS."""


class Application:
    """Serves over a listening socket until `end` is called in its event loop."""

    def __init__(self, settings: AppSettings) -> None:
        self._settings = settings
        self.feed = Feed()
        self._routes = {
            **dict.fromkeys(settings.files, self._get_file),
            "/events": self._get_events,
            "/picture.jpg": self._get_picture,
            "/sound": self._get_sound,
            "/healthz": self._get_health,
            "/readyz": self._get_readiness,
        } | ({"/metrics": self._get_metrics} if settings.metrics else {})
        self._listed = [path for path in self._routes if path == "/" or path not in settings.files]
        self._router = Router(
            [
                *(Route(path, endpoint) for path, endpoint in self._routes.items()),
                WebSocketRoute(_PREDICTIONS, self.feed.serve),
                *([WebSocketRoute(_PUSH, PushSocket(settings.push).serve)] if settings.push else []),
                *([WebSocketRoute(_SENSORS, SensorSocket(settings.sensors).serve)] if settings.sensors else []),
            ],
            redirect_slashes=False,
            default=self._get_unknown,
        )
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._app,
                http=partial(  # type: ignore[arg-type]
                    HttpConnection,
                    write_timeout_s=settings.client_timeout_s,
                    idle_timeout_s=settings.idle_timeout_s,
                ),
                interface="asgi3",
                loop="none",
                ws=partial(  # type: ignore[arg-type]
                    WebSocketConnection, write_timeout_s=settings.client_timeout_s
                ),
                ws_max_size=_MAX_CLIENT_MESSAGE_BYTES,
                ws_per_message_deflate=False,
                ssl_certfile=settings.cert or None,
                ssl_keyfile=settings.key or None,
                lifespan="off",
                proxy_headers=False,
                server_header=False,
                access_log=False,
                log_config=None,
                log_level="error",  # mistakes of clients are counted, not logged
                timeout_keep_alive=math.ceil(settings.idle_timeout_s),
                timeout_graceful_shutdown=1,
            )
        )

    @property
    def connections(self) -> int:
        return len(self._server.server_state.connections)

    async def serve(self, listening: socket.socket) -> None:
        await self._server.serve([listening])

    def end(self) -> None:
        """Close every connection, and make `serve` return."""
        self._server.should_exit = True
        self._settings.own.board.closing = True
        self._settings.own.board.wake()
        self.feed.close()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Every request: check access, route it, add the common headers to the response."""

        async def send_with_headers(message: Message) -> None:
            if message["type"].endswith("http.response.start"):
                message["headers"] += [(k.lower().encode(), v.encode()) for k, v in _COMMON.items()]
            await send(message)

        denied = self._denial(scope)
        view, path = self._settings.own, scope["path"]
        if denied is None and (found := _VIEW.fullmatch(path)):
            # what is posted is meant for what the browser shows, not for a view that begins anew
            other = self._settings.views(found[1], scope.get("method") != "POST")
            if isinstance(other, str):
                denied = PlainTextResponse(f"{other}\n", 404)
            else:
                view, path = other, found[2]
        scope = {**scope, "path": path, "view": view}
        served = self._post if scope.get("method") == "POST" else self._router
        response = denied or self._wrong_method(scope) or served
        await response(scope, receive, send_with_headers)

    def _denial(self, scope: Scope) -> Response | None:
        settings, headers = self._settings, Headers(scope=scope)
        # a WebSocket begins with a GET
        method, query = scope.get("method", "GET"), scope["query_string"].decode("latin-1")
        if method == "GET" and (headers.get("content-length", "0") != "0" or "transfer-encoding" in headers):
            return PlainTextResponse("a GET request must have no body\n", 400, {"Connection": "close"})
        target = scope["raw_path"].decode("latin-1") + (f"?{query}" if query else "")
        denied = settings.access.check(method, target, headers.getlist, settings.port)
        if denied is not None:
            return PlainTextResponse(denied.text, denied.code, denied.headers)
        return None

    def _wrong_method(self, scope: Scope) -> Response | None:
        allowed = "POST" if scope["path"] in scope["view"].posts else "GET"
        if scope.get("method", "GET") != allowed:
            return PlainTextResponse(f"this path takes {allowed} requests only\n", 405, {"Allow": allowed})
        return None

    async def _get_unknown(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = PlainTextResponse(f"no such path; use one of {', '.join(self._listed)}\n", 404)
        await response(scope, receive, send)

    async def _get_file(self, request: Request) -> Response:
        content, kind = self._settings.files[request.scope["path"]]
        return Response(content, headers={"Content-Security-Policy": POLICY}, media_type=kind)

    async def _get_events(self, request: Request) -> Response:
        board: Board = request.scope["view"].board
        if board.clients >= MAX_CLIENTS:
            return PlainTextResponse("too many open pages\n", 503, {"Retry-After": "2"})
        return _EventStream(board)

    async def _get_picture(self, request: Request) -> Response:
        picture = request.scope["view"].board.picture
        return Response(picture, media_type="image/jpeg") if picture else Response(status_code=204)

    async def _get_sound(self, request: Request) -> Response:
        """The columns of the spectrogram from number `since` on; `X-First` is the number of the first."""
        since = whole_number(request.query_params.get("since", "0"), 0, MAX_SINCE - 1)
        if since is None:
            return PlainTextResponse("since must be the number of a column\n", 400)
        first, columns = request.scope["view"].board.sound
        begin = max(first, since)
        body = columns[(begin - first) * BANDS :]
        return Response(body, headers={"X-First": str(begin)}, media_type="application/octet-stream")

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        await (await self._answer_post(Request(scope, receive)))(scope, receive, send)

    async def _answer_post(self, request: Request) -> Response:
        """200, or 409 and the reason. Only JSON: a form on another site cannot send it without a CORS preflight."""
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            return PlainTextResponse("the content type must be application/json\n", 415)
        length = request.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()) or "transfer-encoding" in request.headers:
            return PlainTextResponse("a Content-Length header is required, and no Transfer-Encoding\n", 411)
        if whole_number(length, 0, MAX_BODY_BYTES) is None:
            return PlainTextResponse(
                f"the body may have at most {MAX_BODY_BYTES} bytes\n", 413, {"Connection": "close"}
            )
        try:
            body = await asyncio.wait_for(request.body(), self._settings.idle_timeout_s)
        except (TimeoutError, ClientDisconnect):
            return PlainTextResponse("the body did not arrive in time\n", 408, {"Connection": "close"})
        why_not = request.scope["view"].posts[request.scope["path"]](body)
        return PlainTextResponse(f"{why_not or 'done'}\n", 409 if why_not else 200)

    async def _get_health(self, _: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _get_readiness(self, _: Request) -> Response:
        why_not = self._settings.ready()
        return PlainTextResponse(f"{why_not or 'ready'}\n", 503 if why_not else 200)

    async def _get_metrics(self, _: Request) -> Response:
        metrics = self._settings.metrics
        return Response(metrics() if metrics else b"", headers={"Content-Type": METRICS_TYPE})
