"""The WebSocket of programs that push samples into a stream whose source is `push`. Knows nothing about the samples."""

from __future__ import annotations

from collections.abc import Callable

from starlette.responses import PlainTextResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

MAX_PUSHERS = 16
Push = Callable[[str, bytes, str], str]
"""Takes a stream, a sample (b"" only asks) and the query of the request; returns "", or why it is refused."""


class PushSocket:
    """All such connections; `serve` runs one: each message is a sample, and a refused one closes it."""

    def __init__(self, push: Push) -> None:
        self._push = push
        self._pushers = 0

    async def serve(self, websocket: WebSocket) -> None:
        stream, query = websocket.path_params["stream"], websocket.url.query
        why = self._push(stream, b"", query)
        if not why and self._pushers >= MAX_PUSHERS:
            why = "too many programs push over WebSocket; close one of them"
        if why:
            await websocket.send_denial_response(PlainTextResponse(f"{why}\n", 409))
            return
        await websocket.accept()
        self._pushers += 1
        try:
            while not why:
                message = await websocket.receive()
                if message["type"] == "websocket.disconnect":
                    return
                why = self._push(stream, message.get("bytes") or (message.get("text") or "").encode(), query)
            await websocket.close(1008, why[:120])
        except (WebSocketDisconnect, OSError):
            pass  # the client has disconnected
        finally:
            self._pushers -= 1
