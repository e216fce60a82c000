"""Lines of text as events: from standard input, a pipe, a TCP port, a ZeroMQ socket on this machine, or the page.

Every line is one event, stamped when it is read.
"""

from __future__ import annotations

import os
import re
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
from stream_mmrnn.core.errors import SourceError, SourceSpecError
from stream_mmrnn.core.settings import TextSettings
from stream_mmrnn.core.types import Sample

_POLL_S = 0.05
_READ_BYTES = 65536
_MAX_CLIENTS = 64
_MAX_TYPED = 64
"""Queue length for lines from the page."""


_HTTP = re.compile(rb"[A-Z]{3,10} \S+ HTTP/\d(\.\d)?\r?")
"""The first line of an HTTP request."""
_HTTP_BEGIN = re.compile(rb"[A-Z]{3,10} /")
"""Its beginning, where it is too long to be read whole."""


class _Lines:
    """Splits the bytes of one connection into lines; drops and counts lines that are too long or not UTF-8."""

    def __init__(self, max_bytes: int, info: dict[str, Any]) -> None:
        self._max, self._info = max_bytes, info
        self._rest = b""
        self._skipping = False  # inside a line that is too long
        self._first = True
        self.is_http = False
        """The first line is one of HTTP: a web page sends it, and no person."""

    def feed(self, data: bytes) -> list[Sample]:
        if self.is_http:
            return []
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._first:
            too_long = len(self._rest) > self._max
            self.is_http = bool(_HTTP.fullmatch(lines[0]) if lines else too_long and _HTTP_BEGIN.match(self._rest))
            self._first = not (lines or too_long)
            if self.is_http:
                self._rest = b""
                return []
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
        """The last line, if it has no newline."""
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
    """The lines of a file descriptor that the parent process has passed; the stream ends with it."""

    def __init__(self, fd: int, settings: TextSettings) -> None:
        super().__init__("stdin", settings)
        self._fd = fd

    def open(self) -> None:
        if sys.platform == "win32":
            # select works only for sockets there, and a thread that blocks in read() could not be stopped
            raise SourceError("stdin cannot be read as a text source on Windows; use tcp:PORT")
        try:
            os.fstat(self._fd)
        except OSError as e:
            raise SourceError("stdin is not open: expected standard input; use tcp:PORT or pipe:PATH") from e

    def samples(self, alive: Callable[[], bool], epoch_ns: int) -> Iterator[Sample]:
        lines = _Lines(self._max, self.info)
        while alive():
            try:
                if not select.select([self._fd], [], [], _POLL_S)[0]:
                    continue
                data = os.read(self._fd, _READ_BYTES)
            except (OSError, ValueError) as e:
                raise SourceError(f"stdin is lost: {e}; start again with standard input open") from e
            yield from lines.feed(data) if data else lines.end()
            if not data:
                return

    def close(self) -> None:
        """Does nothing: the descriptor belongs to the process."""


class Pipe(_Text):
    """The lines of a FIFO, from one writer after another, or of a plain file once."""

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
                if not select.select([self._fd], [], [], _POLL_S)[0]:
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
            # the last writer has closed, and this descriptor would be at its end for ever: open a new one for the next
            # writer, before the old one is closed, so that the pipe always has a reader
            reopened = self._opened()
            os.close(self._fd)
            self._fd = reopened

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Tcp(_Text):
    """A line server on loopback for several clients; a bad line is dropped and its client stays connected. One whose
    first line is an HTTP request is disconnected.
    """

    def __init__(self, port: int, settings: TextSettings) -> None:
        super().__init__(f"tcp:{port}", settings)
        self.info |= {"clients": 0, "refused": 0, "http": 0}
        self._port = port
        self._server: socket.socket | None = None
        self._clients: dict[socket.socket, None] = {}
        """The least recently active one first."""

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
                    for key, _ in ready.select(_POLL_S):
                        if key.fileobj is server:
                            self._accept(server, ready)
                        else:
                            yield from self._read(key, ready)
            finally:
                for key in list(ready.get_map().values()):
                    if isinstance(key.fileobj, socket.socket) and key.fileobj is not server:
                        key.fileobj.close()
                self._clients.clear()
                self.info["clients"] = 0

    def _accept(self, server: socket.socket, ready: selectors.BaseSelector) -> None:
        try:
            client, _ = server.accept()
        except OSError:  # it has disconnected already
            return
        if len(self._clients) >= _MAX_CLIENTS:
            # evict the longest idle client, so that idle connections cannot block new ones
            self.info["refused"] += 1
            self._leave(next(iter(self._clients)), ready)
        client.setblocking(False)
        ready.register(client, selectors.EVENT_READ, _Lines(self._max, self.info))
        self._clients[client] = None
        self.info["clients"] = len(self._clients)

    def _leave(self, client: socket.socket, ready: selectors.BaseSelector) -> None:
        ready.unregister(client)
        client.close()
        del self._clients[client]
        self.info["clients"] = len(self._clients)

    def _read(self, key: selectors.SelectorKey, ready: selectors.BaseSelector) -> list[Sample]:
        client = key.fileobj
        assert isinstance(client, socket.socket)
        if client not in self._clients:  # evicted since it was found ready
            return []
        lines: _Lines = key.data
        try:
            data = client.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:  # reset by the peer
            data = b""
        if data:
            self._clients[client] = self._clients.pop(client)
            samples = lines.feed(data)
            if lines.is_http:
                # a web page in a browser could make the words and labels of this session
                self.info["http"] += 1
                self._leave(client, ready)
            return samples
        self._leave(client, ready)
        return lines.end()

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


class Zmq(_Text):
    """A PULL socket on loopback; ZeroMQ itself disconnects peers that send more than `max_line_bytes` at once."""

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
            message = self._socket.receive(round(_POLL_S * 1000))
            if message is not None:
                yield from lines.feed(message + b"\n")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


class Page(_Text):
    """Gives no lines of its own: text typed on the page is added to every source of text (see `typed`)."""

    def __init__(self, settings: TextSettings) -> None:
        super().__init__("page", settings)

    def open(self) -> None:
        """Does nothing."""

    def samples(self, alive: Callable[[], bool], epoch_ns: int) -> Iterator[Sample]:
        while alive():
            time.sleep(_POLL_S)
        yield from ()

    def close(self) -> None:
        """Does nothing."""


def typed(address: Address, session: str, settings: TextSettings, alive: Callable[[], bool]) -> Iterator[Sample]:
    """The lines that are typed on the page, from the bus, until `alive` is false."""
    lines = _Lines(settings.max_line_bytes, {"too_long": 0, "garbage": 0})
    subscriber = Subscriber(address, [topics.TYPED], _MAX_TYPED)
    try:
        for envelope in subscriber.stream(alive, round(_POLL_S * 1000)):
            if envelope.topic == topics.TYPED and envelope.session == session and isinstance(envelope.payload, bytes):
                yield from lines.feed(envelope.payload + b"\n")
    finally:
        subscriber.close()


def create(kind: str, rest: str, settings: TextSettings, stdin_fd: int) -> Stdin | Pipe | Tcp | Zmq | Page:
    """The text source of that kind, not yet open."""
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
