"""uvicorn's connections with the page's limits: slow readers, idle connections, how many there may be."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

MAX_CONNECTIONS = 64
"""Connections with a request that is being answered. A browser opens up to six per page."""
MAX_WAITING = 64
"""Connections whose next request has not arrived in full. Beyond it, the one that has waited longest is closed: who
sends a request slowly, or none, keeps nobody else out."""
SEND_BUFFER_BYTES = 64 * 1024
"""Small, so that the kernel holds little that is out of date for a slow browser."""


class _WriteTimeout(asyncio.Protocol):
    """Closes the connection of a client that does not read for `write_timeout_s`, which frees its send buffer."""

    loop: asyncio.AbstractEventLoop
    transport: Any

    def __init__(self, *args: Any, write_timeout_s: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self._write_timeout_s = write_timeout_s
        self._stall: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(self._write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._stall is not None:
            self._stall.cancel()
        super().connection_lost(exc)


class HttpConnection(_WriteTimeout, H11Protocol):
    """uvicorn's HTTP connection with limits: it is closed, too, if no request arrives within `idle_timeout_s`.

    One that waits for a request, or for the rest of one, is counted apart from those that are being answered.
    """

    def __init__(self, *args: Any, idle_timeout_s: float, **more: Any) -> None:
        super().__init__(*args, **more)
        self._idle_timeout_s = idle_timeout_s
        self._arrival: asyncio.TimerHandle | None = None
        self._upgraded = self._aborted = False
        self.waits_since = self.loop.time()
        """When the connection was made, or its newest request answered."""

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        self._upgraded = True
        super().handle_websocket_upgrade(event)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        others = [c for c in self.connections if not (isinstance(c, HttpConnection) and c._aborted)]
        waiting = [c for c in others if isinstance(c, HttpConnection) and c.waits]
        if len(others) - len(waiting) >= MAX_CONNECTIONS:
            self.transport = transport
            transport.abort()
            return
        if len(waiting) >= MAX_WAITING:
            min(waiting, key=lambda c: c.waits_since).abort()
        super().connection_made(transport)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        # the write timeout starts as soon as the kernel's buffer is full; at 0, TLS would wait for ever for its start
        transport.set_write_buffer_limits(high=1)
        self._expect_request()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_request()

    @property
    def waits(self) -> bool:
        """Whether its next request has not arrived in full."""
        answered = self.cycle is None or self.cycle.response_complete
        return not self._upgraded and (answered or self.conn.their_state is h11.SEND_BODY)

    def abort(self) -> None:
        """Close it at once; from now on it counts no more."""
        self._aborted = True
        self.transport.abort()

    def on_response_complete(self) -> None:
        self.waits_since = self.loop.time()
        super().on_response_complete()

    def _expect_request(self) -> None:
        answering = self._upgraded or (self.cycle is not None and not self.cycle.response_complete)
        if answering and self._arrival is not None:
            self._arrival.cancel()
            self._arrival = None
        elif not answering and self._arrival is None:
            self._arrival = self.loop.call_later(self._idle_timeout_s, self.transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._arrival is not None:
            self._arrival.cancel()
        super().connection_lost(exc)


class WebSocketConnection(_WriteTimeout, WebSocketsSansIOProtocol):
    """uvicorn's WebSocket connection; a refused handshake is not logged as an error."""

    async def send(self, message: Any) -> None:
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body"):
            self.handshake_complete = True  # otherwise uvicorn logs an error
