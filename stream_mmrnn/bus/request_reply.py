"""Request and reply over ZeroMQ: a server that answers many clients, and two kinds of clients.

Messages are bytes; the protocol is the caller's. It does not use the bus.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import zmq

from stream_mmrnn.bus.address import Keys, secure
from stream_mmrnn.bus.broker import Authenticator
from stream_mmrnn.core import config
from stream_mmrnn.core.errors import ProcessError

if TYPE_CHECKING:
    import asyncio

_HEARTBEAT_MS, _DEAD_AFTER_MS = 2000, 6000
"""A peer whose machine is gone is noticed by this, not only by what cannot be sent."""
_AT_ONCE = 256
"""Messages that are read before others have their turn in an event loop."""
Fate = Literal["sent", "gone", "slow"]
"""Of a message: on its way, its peer has gone, or its peer does not read and its queue is full."""


class Router:
    """Binds one place; receives from all peers, answers one."""

    def __init__(
        self,
        host: str,
        port: int,
        queue: int,
        max_bytes: int,
        authenticator: Authenticator | None = None,
        *,
        unread: int = 0,
    ) -> None:
        """`port` 0: any free one. `queue`: messages of a peer that may wait here. `unread`: those to a peer that may
        wait before `slow`, as many as `queue` if not given.

        Raises:
            ProcessError: the address is in use, or others could reach it and there is no authenticator.

        """
        if authenticator is None and not config.is_loopback(host):
            raise ProcessError(f"the server does not bind {host} without keys: others could reach it; set serve.keys")
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._over = threading.Event()
        self._doorkeeper: threading.Thread | None = None
        secure(self._socket, None)
        self._socket.setsockopt(zmq.RCVHWM, queue)
        self._socket.setsockopt(zmq.SNDHWM, unread or queue)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
        _watch_peers(self._socket)
        if authenticator is not None:
            authenticator.guard(self._socket, "write")
            self._doorkeeper = authenticator.open(self._context, self._over)
        place = f"tcp://{f'[{host}]' if ':' in host else host}"
        try:
            self.port = port or self._socket.bind_to_random_port(place)
            if port:
                self._socket.bind(f"{place}:{port}")
        except zmq.ZMQError as e:
            self.close(0)
            raise ProcessError(f"the server cannot bind {place}:{port}: {e}; give serve.port or serve.host") from e
        self.address = f"{place}:{self.port}"

    def receive(self, timeout_ms: int) -> tuple[bytes, bytes] | None:
        """Who, and what; None after the time. What has not two parts is given with the first and the last."""
        try:
            frames = self._socket.recv_multipart(zmq.DONTWAIT)  # where much comes, to ask first costs as much again
        except zmq.Again:
            if not timeout_ms or not self._socket.poll(timeout_ms, zmq.POLLIN):
                return None
            frames = self._socket.recv_multipart()
        return frames[0], frames[-1] if len(frames) == 2 else b""

    def send(self, peer: bytes, content: bytes) -> Fate:
        try:
            self._socket.send_multipart((peer, content), zmq.DONTWAIT)
        except zmq.Again:
            return "slow"
        except zmq.ZMQError:
            return "gone"
        return "sent"

    def close(self, linger_ms: int = 500) -> None:
        self._over.set()
        if self._doorkeeper is not None:
            self._doorkeeper.join()
        self._context.destroy(linger=linger_ms)


def _watch_peers(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _DEAD_AFTER_MS)


def _connected(
    context: zmq.Context[zmq.Socket[bytes]], address: str, queue: int, max_bytes: int, keys: Keys | None
) -> zmq.Socket[bytes]:
    """A DEALER; where the address is none, the context is ended, too."""
    socket = context.socket(zmq.DEALER)
    secure(socket, keys)
    socket.set_hwm(queue)
    socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    _watch_peers(socket)
    try:
        socket.connect(address)
    except zmq.ZMQError as e:
        context.destroy(linger=0)
        raise ProcessError(f"{address!r} is no address to connect to ({e}); expected tcp://HOST:PORT") from e
    return socket


class Dealer:
    """A connection to a `Router`; comes back by itself where the server does."""

    def __init__(self, address: str, queue: int, max_bytes: int, keys: Keys | None = None) -> None:
        self._context = zmq.Context()
        self._socket = _connected(self._context, address, queue, max_bytes, keys)

    def receive(self, timeout_ms: int) -> bytes | None:
        return self._socket.recv_multipart()[-1] if self._socket.poll(timeout_ms, zmq.POLLIN) else None

    def send(self, content: bytes) -> bool:
        """False if the queue is full: the other end does not read."""
        try:
            self._socket.send(content, zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        self._socket.close(linger=500)
        self._context.term()


class Dealers:
    """Many connections to one `Router`, for who plays many clients: read together, each its own peer there."""

    def __init__(self, address: str, count: int, queue: int, max_bytes: int) -> None:
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, count + 16)
        self._poller = zmq.Poller()
        self._sockets = [_connected(self._context, address, queue, max_bytes, None) for _ in range(count)]
        self._which = {socket: i for i, socket in enumerate(self._sockets)}
        for socket in self._sockets:
            self._poller.register(socket, zmq.POLLIN)

    def send(self, which: int, content: bytes) -> None:
        """Raises ProcessError if the other end does not read."""
        try:
            self._sockets[which].send(content, zmq.DONTWAIT)
        except zmq.Again:
            raise ProcessError("the server does not read what it is sent") from None

    def receive(self, timeout_ms: int) -> list[tuple[int, bytes]]:
        """All that has come, as soon as something has: whose connection, and what."""
        found: list[tuple[int, bytes]] = []
        for socket, _ in self._poller.poll(timeout_ms):
            while True:
                try:
                    found.append((self._which[socket], socket.recv(zmq.DONTWAIT)))
                except zmq.Again:
                    break
        return found

    def close(self) -> None:
        self._context.destroy(linger=0)


class AsyncDealer:
    """The same for an event loop: what comes is given to a function.

    (pyzmq's own asyncio sockets make futures and timers for each message, and cost more than all else here: measured,
    200 clients at 25 Hz kept a core busy with them.)
    """

    def __init__(
        self, address: str, queue: int, max_bytes: int, hear: Callable[[bytes], None], keys: Keys | None = None
    ) -> None:
        self._context = zmq.Context()
        self._socket = _connected(self._context, address, queue, max_bytes, keys)
        self._hear = hear
        self._unsent: deque[bytes] = deque()
        import asyncio  # here: none of our own processes wants it

        self._loop = asyncio.get_running_loop()
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._timer: asyncio.TimerHandle | None = None
        try:
            self._loop.add_reader(self._fd, self._poll)
        except NotImplementedError:  # Windows' own loop
            self._fd = -1
            self._often()

    def _often(self) -> None:
        self._poll()
        self._timer = self._loop.call_later(0.001, self._often)

    def _poll(self) -> None:
        """Read what is there. The descriptor tells of changes alone: one look reads all, or asks to look again."""
        socket = self._socket
        for _ in range(_AT_ONCE):
            if socket.closed:
                return
            if self._unsent:
                self._flush()
            try:
                frames = socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            self._hear(frames[-1])
        self._loop.call_soon(self._poll)

    def _flush(self) -> None:
        try:
            while self._unsent:
                self._socket.send(self._unsent[0], zmq.DONTWAIT)
                self._unsent.popleft()
        except zmq.Again:
            pass

    def send(self, content: bytes) -> None:
        """At once, or in its order when there is room again."""
        self._unsent.append(content)
        self._flush()
        # sending may have swallowed the sign that something has come
        self._loop.call_soon(self._poll)

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
        if self._timer is not None:
            self._timer.cancel()
        self._socket.close(linger=500)
        self._context.term()
