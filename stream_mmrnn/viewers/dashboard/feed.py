"""Predictions on their way to WebSockets: a bounded queue each, and a number of what was missed in the next message.

Who reads slowly misses the oldest; who does not read at all is cut off by the server. Knows nothing about the bus or
about what a prediction holds, but for `missed`.
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
"""Predictions that wait for one listener; two and a half seconds at 25 a second."""
MAX_LISTENERS = 16


class _Listener:
    """One WebSocket's queue."""

    def __init__(self) -> None:
        self._waiting: deque[dict[str, Any]] = deque()
        self._missed = 0
        self.model: bytes | None = None
        """What the listener is to be told of the model before anything else."""
        self._came = asyncio.Event()

    def put(self, prediction: dict[str, Any]) -> None:
        if len(self._waiting) >= QUEUE:
            self._missed += 1 + int(self._waiting.popleft()["missed"])
            # what the next one says was missed is counted from the one that was sent last
        self._waiting.append(prediction)
        self._came.set()

    def wake(self) -> None:
        self._came.set()

    async def pop(self) -> bytes | None:
        """The next message; None where it was woken for nothing."""
        if self.model is None and not self._waiting:
            self._came.clear()
            await self._came.wait()
        if self.model is not None:
            model, self.model = self.model, None
            return model
        if not self._waiting:
            return None
        prediction = self._waiting.popleft()
        missed, self._missed = int(prediction["missed"]) + self._missed, 0
        return msgspec.json.encode({**prediction, "missed": missed})


class Feed:
    """All listeners. Everything but `listeners` is for the server's thread."""

    def __init__(self) -> None:
        self._listeners: set[_Listener] = set()
        self._model: bytes | None = None
        self._closing = False

    @property
    def listeners(self) -> int:
        return len(self._listeners)

    def put(self, prediction: dict[str, Any]) -> None:
        for listener in self._listeners:
            listener.put(prediction)

    def put_model(self, model: dict[str, Any]) -> None:
        """What the predictions from here on mean: the first message to each listener, and again when it changes."""
        self._model = msgspec.json.encode({"model": model})
        for listener in self._listeners:
            listener.model = self._model
            listener.wake()

    def close(self) -> None:
        self._closing = True
        for listener in self._listeners:
            listener.wake()

    async def serve(self, websocket: WebSocket) -> None:
        """One listener, from its handshake until it or the server goes. What it sends is not looked at."""
        if len(self._listeners) >= MAX_LISTENERS:
            await websocket.send_denial_response(PlainTextResponse("too many listeners\n", 503, {"Retry-After": "2"}))
            return
        await websocket.accept()
        listener = _Listener()
        listener.model = self._model
        self._listeners.add(listener)
        hearing = asyncio.ensure_future(self._receive(websocket, listener))
        try:
            while not (self._closing or hearing.done()):
                message = await listener.pop()
                if message is not None:
                    await websocket.send_text(message.decode())
        except (WebSocketDisconnect, OSError):
            pass  # it has left, or was cut off
        finally:
            self._listeners.discard(listener)
            hearing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await hearing

    @staticmethod
    async def _receive(websocket: WebSocket, listener: _Listener) -> None:
        """Until it leaves."""
        try:
            while (await websocket.receive())["type"] != "websocket.disconnect":
                pass
        finally:
            listener.wake()
