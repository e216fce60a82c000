"""The web application of the page: what is answered to whom, and how long a client is waited for.

Starlette and uvicorn, which take a while to import: `server` does so in a thread of its own, when it is started. Knows
nothing about the bus, predictions or what a state holds.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any

import h11
import msgspec
import uvicorn
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, Router, WebSocketRoute
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from stream_mmrnn.viewers.dashboard.access import Access
from stream_mmrnn.viewers.dashboard.board import Board
from stream_mmrnn.viewers.dashboard.feed import Feed
from stream_mmrnn.viewers.dashboard.sound import BANDS

PERIOD_S = 0.1
"""A client gets at most one state in this time."""
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
_PREDICTIONS = "/predictions"
_MAX_SAID = 4096
"""Bytes of a message from a listener; nothing that it says is looked at."""


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


class _Impatient(asyncio.Protocol):
    """An end to the patience with who reads nothing: it is cut off, which frees what waits to be sent to it."""

    loop: asyncio.AbstractEventLoop
    transport: Any

    def __init__(self, *args: Any, patience_s: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self._patience_s = patience_s
        self._stall: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(self._patience_s, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._stall is not None:
            self._stall.cancel()
        super().connection_lost(exc)


class _Connection(_Impatient, H11Protocol):
    """uvicorn's; who connects and asks nothing is cut off, too."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._arrival: asyncio.TimerHandle | None = None
        self._upgraded = False

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._upgraded = True
        super().handle_websocket_upgrade(event)

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
        answering = self._upgraded or (self.cycle is not None and not self.cycle.response_complete)
        if answering and self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None
        elif not answering and self._arrival is None:
            self._arrival = self.loop.call_later(IDLE_S, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
        super().connection_lost(exc)


class _WebSocket(_Impatient, WebSocketsSansIOProtocol):
    """uvicorn's; a refusal is no error to it."""

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
            self.handshake_complete = True  # else it logs that there was none


_COMMON = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Server": "stream-mmrnn",
}


class Offer(msgspec.Struct, frozen=True):
    """What is served, to whom."""

    access: Access
    page: bytes
    policy: str
    """The content security policy that goes with the page."""
    metrics: Callable[[], bytes] | None
    ready: Callable[[], str]
    posts: Mapping[str, Callable[[bytes], str]]
    port: int
    client_timeout_s: float


class Application:
    """Serves an offer over a listening socket until it is told to end, by `end` in the loop that runs it."""

    def __init__(self, offer: Offer, board: Board) -> None:
        self._offer, self._board = offer, board
        self.feed = Feed()
        self._routes = {
            "/": self._get_page,
            "/events": self._get_events,
            "/picture.jpg": self._get_picture,
            "/sound": self._get_sound,
            "/healthz": self._get_health,
            "/readyz": self._get_readiness,
        } | ({"/metrics": self._get_metrics} if offer.metrics else {})
        self._router = Router(
            [
                *(Route(path, endpoint) for path, endpoint in self._routes.items()),
                *(Route(path, self._post, methods=["POST"]) for path in offer.posts),
                WebSocketRoute(_PREDICTIONS, self.feed.serve),
            ],
            redirect_slashes=False,
            default=self._nothing,
        )
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._app,
                http=partial(_Connection, patience_s=offer.client_timeout_s),  # type: ignore[arg-type]
                interface="asgi3",
                loop="none",
                ws=partial(_WebSocket, patience_s=offer.client_timeout_s),  # type: ignore[arg-type]
                ws_max_size=_MAX_SAID,
                ws_per_message_deflate=False,
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

    @property
    def connections(self) -> int:
        return len(self._server.server_state.connections)

    async def serve(self, listening: socket.socket) -> None:
        await self._server.serve([listening])

    def end(self) -> None:
        """Cut every connection, and let `serve` return."""
        self._server.should_exit = True
        self._board.closing = True
        self._board.wake()
        self.feed.close()
        for connection in list(self._server.server_state.connections):
            connection.transport.abort()

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Every request: who may, then what is asked for, and what every answer says of itself."""

        async def answer(message: Message) -> None:
            if message["type"].endswith("http.response.start"):
                message["headers"] += [(k.lower().encode(), v.encode()) for k, v in _COMMON.items()]
            await send(message)

        response = self._refusal(scope) or self._router
        await response(scope, receive, answer)

    def _refusal(self, scope: Scope) -> Response | None:
        offer, headers = self._offer, Headers(scope=scope)
        # a WebSocket begins with a GET
        method, query = scope.get("method", "GET"), scope["query_string"].decode("latin-1")
        # a GET with a body is not ours
        if method == "GET" and (headers.get("content-length", "0") != "0" or "transfer-encoding" in headers):
            return PlainTextResponse("a GET has no body here\n", 400, {"Connection": "close"})
        target = scope["raw_path"].decode("latin-1") + (f"?{query}" if query else "")
        denied = offer.access.judge(method, target, headers.getlist, offer.port)
        if denied is not None:
            return PlainTextResponse(denied.words, denied.code, denied.headers)
        allowed = "POST" if scope["path"] in offer.posts else "GET"
        if method != allowed:
            return PlainTextResponse(f"only {allowed} is served here\n", 405, {"Allow": allowed})
        return None

    async def _nothing(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = PlainTextResponse(f"there is {', '.join(self._routes)}\n", 404)
        await answer(scope, receive, send)

    async def _get_page(self, _: Request) -> Response:
        return Response(
            self._offer.page, headers={"Content-Security-Policy": self._offer.policy}, media_type="text/html"
        )

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
        why_not = self._offer.posts[request.url.path](body)
        return PlainTextResponse(f"{why_not or 'done'}\n", 409 if why_not else 200)

    async def _get_health(self, _: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _get_readiness(self, _: Request) -> Response:
        why_not = self._offer.ready()
        return PlainTextResponse(f"{why_not or 'ready'}\n", 503 if why_not else 200)

    async def _get_metrics(self, _: Request) -> Response:
        return Response(self._offer.metrics() if self._offer.metrics else b"", headers={"Content-Type": METRICS_TYPE})
