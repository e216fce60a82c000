"""OriginGate: a port of this machine in front of a WebSocket server that lets in every web page.

A browser says in `Origin` which page opens a WebSocket; Foxglove's server does not look at it. The gate reads the
handshake, refuses pages of other sites, and then only copies bytes. Knows nothing about what is sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
from collections import Counter
from collections.abc import Collection

from stream_mmrnn.core.settings import LOOPBACK
from stream_mmrnn.viewers.dashboard.access import LOOPBACK_NAMES

_NAMES = "|".join(map(re.escape, sorted(LOOPBACK_NAMES)))
_LOOPBACK = re.compile(rf"https?://({_NAMES})(:\d{{1,5}})?")
_HOST = re.compile(rf"({_NAMES})(:\d{{1,5}})?", re.IGNORECASE)
_MAX_HEAD_BYTES = 16 * 1024
_HEAD_S = 5.0
"""A handshake arrives within so long, or the connection is closed."""
_MAX_CONNECTIONS = 64
_MAX_WAITING = 64
"""Connections whose handshake has not arrived. Beyond it, the one that has waited longest is closed."""
_PIECE_BYTES = 64 * 1024


def refusal(head: bytes, allowed: Collection[str]) -> str:
    """Why a handshake is refused: `handshake`, `host` or `origin`; "" if it is let in.

    `head`: the request up to its empty line. `allowed`: origins beside those of loopback. A program sends no Origin.
    """
    try:
        request, *lines = head.decode("ascii").removesuffix("\r\n\r\n").split("\r\n")
    except UnicodeDecodeError:
        return "handshake"
    if not re.fullmatch(r"GET \S+ HTTP/1\.1", request) or any(line[:1] in (" ", "\t", "") for line in lines):
        return "handshake"
    headers: dict[str, list[str]] = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers.setdefault(name.lower(), []).append(value.strip())
    if [value.lower() for value in headers.get("upgrade", [])] != ["websocket"]:
        return "handshake"
    # a name that resolves to this machine (DNS rebinding) is no name of it
    if len(headers.get("host", [])) != 1 or not _HOST.fullmatch(headers["host"][0]):
        return "host"
    origins = headers.get("origin", [])
    if any(origin not in allowed and not _LOOPBACK.fullmatch(origin) for origin in origins):
        return "origin"
    return ""


class OriginGate:
    """Listens on loopback from its creation on; serves in a thread of its own until `close`."""

    def __init__(self, port: int, server: tuple[str, int], allowed: Collection[str]) -> None:
        """`port`: 0 is any free one. `server`: host and port that are behind it. Raises OSError where it is taken."""
        self._server, self._allowed = server, frozenset(allowed)
        self._socket = socket.create_server((LOOPBACK, port))
        self.port: int = self._socket.getsockname()[1]
        self.denied: Counter[str] = Counter()
        """Refused connections by reason."""
        self._waiting: dict[asyncio.Task[None], None] = {}
        """Connections whose handshake has not arrived, the oldest first."""
        self._connections: set[asyncio.Task[None]] = set()
        """The others."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended: asyncio.Event | None = None
        ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main(ready)), name="origin-gate", daemon=True)
        self._thread.start()
        ready.wait()

    async def _main(self, ready: threading.Event) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        async with await asyncio.start_server(self._connected, sock=self._socket, limit=_MAX_HEAD_BYTES):
            ready.set()
            await self._ended.wait()
            for task in (*self._waiting, *self._connections):
                task.cancel()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._waiting) >= _MAX_WAITING:
            oldest = next(iter(self._waiting))
            del self._waiting[oldest]
            oldest.cancel()
            self.denied["unfinished"] += 1
        self._waiting[task] = None
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _HEAD_S)
            self._waiting.pop(task, None)
            self._connections.add(task)
            await self._serve(head, reader, writer)
        except (OSError, EOFError, TimeoutError, asyncio.LimitOverrunError):
            pass  # one side is gone, or sent no handshake
        finally:
            self._waiting.pop(task, None)
            self._connections.discard(task)
            writer.close()

    async def _serve(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) > _MAX_CONNECTIONS:
            self.denied["connections"] += 1
            return
        why = refusal(head, self._allowed)
        if why:
            self.denied[why] += 1
            writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            await writer.drain()
            return
        behind, forward = await asyncio.open_connection(*self._server, limit=_PIECE_BYTES)
        try:
            forward.write(head)
            copies = [asyncio.create_task(_copy(reader, forward)), asyncio.create_task(_copy(behind, writer))]
            try:
                await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for copy in copies:
                    copy.cancel()
                await asyncio.gather(*copies, return_exceptions=True)
        finally:
            forward.close()

    def close(self) -> None:
        """Close the port and all connections."""
        assert self._loop is not None
        assert self._ended is not None
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(2.0)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until one side is gone. A reader that is slow slows the sender: nothing is kept here but one piece."""
    with contextlib.suppress(OSError):
        while piece := await reader.read(_PIECE_BYTES):
            writer.write(piece)
            await writer.drain()
