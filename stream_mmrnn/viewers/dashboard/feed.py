"""Sends predictions to WebSocket clients: one bounded queue per client, which drops the oldest.

The next message to a slow client says in `missed` how many were dropped; a client that does not read at all is
disconnected by the server. Of a prediction only `missed` is read here. Knows nothing about the bus.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from typing import Any

import msgspec
from starlette.responses import PlainTextResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

QUEUE = 64
"""Predictions queued per client: 2.5 s at 25 per second."""
MAX_LISTENERS = 16
_MAX_IGNORED = 4096
"""Length of a message of a client; such messages are ignored."""


class Listener:
    """The queue of one WebSocket client."""

    def __init__(self) -> None:
        self._waiting: deque[dict[str, Any]] = deque()
        self._missed = 0
        self.model: bytes | None = None
        """The message about the model that has to be sent next."""
        self._news = asyncio.Event()

    def put(self, prediction: dict[str, Any]) -> None:
        if len(self._waiting) >= QUEUE:
            # `missed` counts from the message that was sent last
            self._missed += 1 + int(self._waiting.popleft()["missed"])
        self._waiting.append(prediction)
        self._news.set()

    def wake(self) -> None:
        self._news.set()

    async def pop(self) -> bytes | None:
        """The next message; None if it was woken without one."""
        if self.model is None and not self._waiting:
            self._news.clear()
            await self._news.wait()
        if self.model is not None:
            model, self.model = self.model, None
            return model
        if not self._waiting:
            return None
        prediction = self._waiting.popleft()
        missed, self._missed = int(prediction["missed"]) + self._missed, 0
        return msgspec.json.encode({**prediction, "missed": missed})


class Feed:
    """All WebSocket clients. Call everything but `listeners` in the server's thread."""

    def __init__(self) -> None:
        self._listeners: set[Listener] = set()
        self._model: bytes | None = None
        self._closing = False

    @property
    def listeners(self) -> int:
        return len(self._listeners)

    def put(self, prediction: dict[str, Any]) -> None:
        for listener in self._listeners:
            listener.put(prediction)

    def put_model(self, model: dict[str, Any]) -> None:
        """Describe the model of the predictions that follow: each client's first message, repeated if it changes."""
        self._model = msgspec.json.encode({"model": model})
        for listener in self._listeners:
            listener.model = self._model
            listener.wake()

    def close(self) -> None:
        self._closing = True
        for listener in self._listeners:
            listener.wake()

    async def serve(self, websocket: WebSocket) -> None:
        """One client, from its handshake until it or the server closes. What it sends is ignored."""
        if len(self._listeners) >= MAX_LISTENERS:
            await websocket.send_denial_response(
                PlainTextResponse("too many WebSocket clients\n", 503, {"Retry-After": "2"})
            )
            return
        await websocket.accept()
        listener = Listener()
        listener.model = self._model
        self._listeners.add(listener)
        receiver = asyncio.ensure_future(self._receive(websocket, listener))
        try:
            while not (self._closing or receiver.done()):
                message = await listener.pop()
                if message is not None:
                    await websocket.send_text(message.decode())
        except (WebSocketDisconnect, OSError):
            pass  # the client has disconnected, or was disconnected
        finally:
            self._listeners.discard(listener)
            receiver.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await receiver

    @staticmethod
    async def _receive(websocket: WebSocket, listener: Listener) -> None:
        """Return when the client disconnects, or sends too much."""
        try:
            while (message := await websocket.receive())["type"] != "websocket.disconnect":
                if len(message.get("bytes") or message.get("text") or "") > _MAX_IGNORED:
                    await websocket.close(1009)
                    return
        finally:
            listener.wake()
