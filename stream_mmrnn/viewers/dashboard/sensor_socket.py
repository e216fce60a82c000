"""The WebSocket between the page and a browser that is a camera or a microphone. Knows nothing about what is sent."""

from __future__ import annotations

import asyncio
import contextlib

import msgspec
from starlette.responses import PlainTextResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from stream_mmrnn.viewers.dashboard.sensors import Browser, Sensors

MAX_BROWSERS = 16
_FIRST_PINGS = 8
_FIRST_PING_S = 0.04
"""Pings before the first sample, so that its time is known well."""
_PING_S = 0.2


class SensorSocket:
    """All such connections; `serve` runs one, from its handshake until one side closes it."""

    def __init__(self, sensors: Sensors) -> None:
        self._sensors = sensors
        self._browsers = 0

    async def serve(self, websocket: WebSocket) -> None:
        if self._browsers >= MAX_BROWSERS:
            await websocket.send_denial_response(
                PlainTextResponse("too many browsers are sensors; close one of them\n", 503, {"Retry-After": "2"})
            )
            return
        await websocket.accept()
        browser = Browser(self._sensors)
        self._browsers += 1
        pinging = asyncio.ensure_future(_ping(websocket, browser))
        receiving = asyncio.ensure_future(_receive(websocket, browser))
        try:
            await asyncio.wait((pinging, receiving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._browsers -= 1
            browser.close()
            for task in (pinging, receiving):
                task.cancel()
            await asyncio.gather(pinging, receiving, return_exceptions=True)


async def _ping(websocket: WebSocket, browser: Browser) -> None:
    """Measure the browser's clock, then welcome it; return when it is lost."""
    with contextlib.suppress(WebSocketDisconnect, OSError, RuntimeError):
        welcomed = False
        while not browser.lost:
            await websocket.send_text(_json(browser.ping()))
            await asyncio.sleep(_PING_S if welcomed else _FIRST_PING_S)
            if not welcomed and browser.pongs >= _FIRST_PINGS:
                await websocket.send_text(_json(browser.welcome()))
                welcomed = True
        await websocket.close(1001, "the connection was lost")


async def _receive(websocket: WebSocket, browser: Browser) -> None:
    with contextlib.suppress(WebSocketDisconnect, OSError, RuntimeError):
        while (message := await websocket.receive())["type"] != "websocket.disconnect":
            content = message.get("bytes")
            answer = browser.receive(content if content is not None else message.get("text") or "")
            if answer is not None:
                await websocket.send_text(_json(answer))


def _json(message: object) -> str:
    return msgspec.json.encode(message).decode()
