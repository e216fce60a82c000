"""Lines of text as events: from standard input, a pipe, a TCP port, a ZeroMQ socket on this machine, or the page.

Every line is one event at the moment we read it. Knows nothing about words or encoders.
"""

from __future__ import annotations

import os
import select
import selectors
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stream_mmrnn.bus import Address, LineSocket, Subscriber
from stream_mmrnn.core import topics
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.config import Text as TextSettings
from stream_mmrnn.core.errors import SourceError, SourceSpecError
from stream_mmrnn.core.types import Sample

_LOOK_S = 0.05
_READ_BYTES = 65536
_MAX_CLIENTS = 64
_MAX_TYPED = 64
"""Lines from the page that wait to be read."""


class _Lines:
    """Cuts the bytes of one connection into lines; drops and counts what is too long or no UTF-8."""

    def __init__(self, max_bytes: int, info: dict[str, Any]) -> None:
        self._max, self._info = max_bytes, info
        self._rest = b""
        self._skipping = False  # inside a line that is too long already

    def feed(self, data: bytes) -> list[Sample]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        samples = []
        for line in lines:
            if self._skipping:
                self._skipping = False
            elif len(line) > self._max:
                self._info["too_long"] += 1
            else:
                samples += self._sample(line)
        if len(self._rest) > self._max:
            self._info["too_long"] += not self._skipping
            self._skipping = True
        if self._skipping:
            self._rest = b""
        return samples

    def end(self) -> list[Sample]:
        """The last line, where the writer left without a newline."""
        rest, self._rest = self._rest, b""
        skipping, self._skipping = self._skipping, False
        return [] if skipping else self._sample(rest)

    def _sample(self, line: bytes) -> list[Sample]:
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            self._info["garbage"] += 1
            return []
        now = now_ns()
        return [Sample(now, now, text.encode())] if text else []


class _Text:
    def __init__(self, origin: str, settings: TextSettings) -> None:
        self.origin = origin
        self.info: dict[str, Any] = {"too_long": 0, "garbage": 0}
        self._max = settings.max_line_bytes


class Stdin(_Text):
    """The lines of a file descriptor that the parent process handed over; the stream ends with it."""

    def __init__(self, fd: int, settings: TextSettings) -> None:
        super().__init__("stdin", settings)
        self._fd = fd

    def open(self) -> None:
        if sys.platform == "win32":
            # select knows only sockets there, and a thread that sits in read() could not be stopped
            raise SourceError("stdin cannot be read as a text source on Windows; use tcp:PORT")
        try:
            os.fstat(self._fd)
        except OSError as e:
            raise SourceError("stdin is not open: expected standard input; use tcp:PORT or pipe:PATH") from e

    def samples(self, alive: Callable[[], bool], epoch_ns: int) -> Iterator[Sample]:
        lines = _Lines(self._max, self.info)
        while alive():
            try:
                if not select.select([self._fd], [], [], _LOOK_S)[0]:
                    continue
                data = os.read(self._fd, _READ_BYTES)
            except (OSError, ValueError) as e:
                raise SourceError(f"stdin is lost: {e}; start again with standard input open") from e
            yield from lines.feed(data) if data else lines.end()
            if not data:
                return

    def close(self) -> None:
        """Nothing: the descriptor belongs to the process."""


class Pipe(_Text):
    """The lines of a FIFO, across writers that come and go, or of a plain file once."""

    def __init__(self, path: Path, settings: TextSettings) -> None:
        super().__init__(f"pipe:{path}", settings)
        self._path = path
        self._fd = -1
        self._fifo = False

    def open(self) -> None:
        self.close()
        self._fd = self._opened()
        mode = os.fstat(self._fd).st_mode
        if not (stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISCHR(mode)):
            self.close()
            raise SourceError(f"{self.origin} is neither a pipe nor a file; make one with `mkfifo {self._path}`")
        self._fifo = stat.S_ISFIFO(mode)

    def _opened(self) -> int:
        try:
            return os.open(self._path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except OSError as e:
            raise SourceError(f"{self.origin} cannot be read: {e.strerror}; make it with `mkfifo {self._path}`") from e

    def samples(self, alive: Callable[[], bool], epoch_ns: int) -> Iterator[Sample]:
        lines = _Lines(self._max, self.info)
        while alive():
            try:
                if not select.select([self._fd], [], [], _LOOK_S)[0]:
                    continue
                data = os.read(self._fd, _READ_BYTES)
            except BlockingIOError:
                continue
            except (OSError, ValueError) as e:
                raise SourceError(f"{self.origin} is lost: {e}; start its writer again") from e
            yield from lines.feed(data) if data else lines.end()
            if data:
                continue
            if not self._fifo:
                return
            # the last writer is gone, and this end would say so for ever: a fresh one waits for the next. It is
            # opened before the old one is closed: a writer that comes just now never finds a pipe without reader
            fresh = self._opened()
            os.close(self._fd)
            self._fd = fresh

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Tcp(_Text):
    """A line server on loopback for several clients; a bad line costs its client nothing but that line."""

    def __init__(self, port: int, settings: TextSettings) -> None:
        super().__init__(f"tcp:{port}", settings)
        self.info |= {"clients": 0, "refused": 0}
        self._port = port
        self._server: socket.socket | None = None
        self._heard: dict[socket.socket, None] = {}
        """Clients, the one that was silent for the longest first."""

    def open(self) -> None:
        self.close()
        server = socket.socket()
        try:
            if sys.platform != "win32":  # there it would let two servers share a port
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", self._port))
            server.listen(_MAX_CLIENTS)
            server.setblocking(False)
        except OSError as e:
            server.close()
            raise SourceError(f"{self.origin} cannot be served: {e.strerror}; choose a port that is free") from e
        self.info["port"] = server.getsockname()[1]
        self._server = server

    def samples(self, alive: Callable[[], bool], epoch_ns: int) -> Iterator[Sample]:
        server = self._server
        if server is None:
            raise SourceError(f"{self.origin} is not open: call open() before samples()")
        with selectors.DefaultSelector() as ready:
            ready.register(server, selectors.EVENT_READ)
            try:
                while alive():
                    for key, _ in ready.select(_LOOK_S):
                        if key.fileobj is server:
                            self._accept(server, ready)
                        else:
                            yield from self._read(key, ready)
            finally:
                for key in list(ready.get_map().values()):
                    if isinstance(key.fileobj, socket.socket) and key.fileobj is not server:
                        key.fileobj.close()
                self._heard.clear()
                self.info["clients"] = 0

    def _accept(self, server: socket.socket, ready: selectors.BaseSelector) -> None:
        try:
            client, _ = server.accept()
        except OSError:  # gone before we looked
            return
        if len(self._heard) >= _MAX_CLIENTS:
            # who holds many connections and says nothing shall not shut the others out
            self.info["refused"] += 1
            self._leave(next(iter(self._heard)), ready)
        client.setblocking(False)
        ready.register(client, selectors.EVENT_READ, _Lines(self._max, self.info))
        self._heard[client] = None
        self.info["clients"] = len(self._heard)

    def _leave(self, client: socket.socket, ready: selectors.BaseSelector) -> None:
        ready.unregister(client)
        client.close()
        del self._heard[client]
        self.info["clients"] = len(self._heard)

    def _read(self, key: selectors.SelectorKey, ready: selectors.BaseSelector) -> list[Sample]:
        client = key.fileobj
        assert isinstance(client, socket.socket)
        if client not in self._heard:  # it had to leave since it was found ready
            return []
        lines: _Lines = key.data
        try:
            data = client.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:  # reset by its peer: the end, less politely
            data = b""
        if data:
            self._heard[client] = self._heard.pop(client)
            return lines.feed(data)
        self._leave(client, ready)
        return lines.end()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


class Zmq(_Text):
    """A PULL socket on loopback; ZeroMQ itself shuts out who sends a message beyond `max_line_bytes`."""

    def __init__(self, port: int, settings: TextSettings) -> None:
        super().__init__(f"zmq:{port}", settings)
        self._port = port
        self._socket: LineSocket | None = None

    def open(self) -> None:
        self.close()
        try:
            self._socket = LineSocket(self._port, self._max)
        except OSError as e:
            raise SourceError(f"{self.origin} cannot be served: {e}; choose a port that is free") from e

    def samples(self, alive: Callable[[], bool], epoch_ns: int) -> Iterator[Sample]:
        if self._socket is None:
            raise SourceError(f"{self.origin} is not open: call open() before samples()")
        lines = _Lines(self._max, self.info)
        while alive():
            message = self._socket.receive(round(_LOOK_S * 1000))
            if message is not None:
                yield from lines.feed(message + b"\n")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Page(_Text):
    """No lines of its own: only what is typed on the page, which joins every source of text (see `typed`)."""

    def __init__(self, settings: TextSettings) -> None:
        super().__init__("page", settings)

    def open(self) -> None:
        """Nothing to take."""

    def samples(self, alive: Callable[[], bool], epoch_ns: int) -> Iterator[Sample]:
        while alive():
            time.sleep(_LOOK_S)
        yield from ()

    def close(self) -> None:
        """Nothing to give back."""


def typed(address: Address, session: str, settings: TextSettings, alive: Callable[[], bool]) -> Iterator[Sample]:
    """The lines that are typed on the page, as they come over the bus, until `alive` says no."""
    lines = _Lines(settings.max_line_bytes, {"too_long": 0, "garbage": 0})
    subscriber = Subscriber(address, [topics.TYPED], _MAX_TYPED)
    try:
        for envelope in subscriber.stream(alive, round(_LOOK_S * 1000)):
            if envelope.topic == topics.TYPED and envelope.session == session and isinstance(envelope.payload, bytes):
                yield from lines.feed(envelope.payload + b"\n")
    finally:
        subscriber.close()


def create(kind: str, rest: str, settings: TextSettings, stdin_fd: int) -> Stdin | Pipe | Tcp | Zmq | Page:
    """The text source of that kind; nothing is opened yet."""
    if kind == "stdin":
        return Stdin(stdin_fd, settings)
    if kind == "pipe":
        return Pipe(Path(rest), settings)
    if kind == "tcp":
        return Tcp(int(rest), settings)
    if kind == "zmq":
        return Zmq(int(rest), settings)
    if kind == "page":
        return Page(settings)
    raise SourceSpecError(f"{kind!r} is no source of text; use stdin, pipe:PATH, tcp:PORT, zmq:PORT or page")
