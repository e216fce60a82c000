"""Request and reply over ZeroMQ: a server that answers many clients, and two kinds of clients.

Messages are bytes; the protocol is the caller's. It does not use the bus.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import zmq

from stream_mmrnn.bus.address import Keys, refuse_old_peers, secure
from stream_mmrnn.bus.broker import Authenticator
from stream_mmrnn.core import config
from stream_mmrnn.core.errors import ProcessError

if TYPE_CHECKING:
    import asyncio

_HEARTBEAT_MS, _DEAD_AFTER_MS = 1000, 3000
"""Heartbeats detect a peer whose machine is gone, also while nothing is sent: after their sum at the latest."""
_AT_ONCE = 256
"""Maximum number of messages read before the event loop runs other tasks."""
_DONTWAIT, _PEER_FIRST, _RCVMORE = int(zmq.DONTWAIT), int(zmq.DONTWAIT | zmq.SNDMORE), int(zmq.RCVMORE)
"""As integers: combining flags of pyzmq costs as much as sending."""
SendResult = Literal["sent", "gone", "slow"]
"""Sent; or the peer has disconnected; or the peer does not read and its queue is full."""


class Router:
    """The server's socket: receives from all peers, answers one."""

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
        """`port`: 0 takes any free one. `queue`: length of the receive queue of each peer. `unread`: length of the send
        queue of each peer, beyond which `send` returns `slow`; 0 means the same as `queue`.

        Raises:
            ProcessError: the address is in use, or others could reach it and there is no authenticator.

        """
        if authenticator is None and not config.is_loopback(host):
            raise ProcessError(f"the server does not bind {host} without keys: others could reach it; set serve.keys")
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._over = threading.Event()
        self._authenticating: threading.Thread | None = None
        secure(self._socket, None)
        self._socket.setsockopt(zmq.RCVHWM, queue)
        self._socket.setsockopt(zmq.SNDHWM, unread or queue)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
        _watch_peers(self._socket)
        self._authenticator, self._disconnected = authenticator, 0
        if authenticator is None:
            self._monitor = self._socket.get_monitor_socket(zmq.Event.DISCONNECTED)
            refuse_old_peers(self._socket)
        else:
            authenticator.guard(self._socket, "write")
            self._authenticating = authenticator.open(self._context, self._over)
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
        """(peer, content) of a message; None on timeout. The content is b"" if the message does not have two frames."""
        socket = self._socket
        try:
            peer = socket.recv(_DONTWAIT)  # under load, a poll before it would double the cost
        except zmq.Again:
            if not timeout_ms or not socket.poll(timeout_ms, zmq.POLLIN):
                return None
            peer = socket.recv()
        content = socket.recv()  # frames of a message arrive together, and a peer's name is followed by one at least
        if socket.get(_RCVMORE):
            while socket.get(_RCVMORE):
                socket.recv()
            content = b""
        return peer, content

    def send(self, peer: bytes, content: bytes) -> SendResult:
        try:
            self._socket.send(peer, _PEER_FIRST)
            self._socket.send(content, _DONTWAIT)
        except zmq.Again:
            return "slow"
        except zmq.ZMQError:
            return "gone"
        return "sent"

    def any_gone(self) -> bool:
        """Whether a peer has disconnected since the last call, or a moment before. `send` says which."""
        before = self._disconnected
        if self._authenticator is not None:
            self._disconnected = self._authenticator.disconnected
            return self._disconnected != before
        while self._monitor.poll(0):
            self._monitor.recv_multipart()
            self._disconnected += 1
        return self._disconnected != before

    def close(self, linger_ms: int = 500) -> None:
        self._over.set()
        if self._authenticating is not None:
            self._authenticating.join()
        self._context.destroy(linger=linger_ms)


def _watch_peers(socket: zmq.Socket[bytes]) -> None:
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _DEAD_AFTER_MS)


def _connected(
    context: zmq.Context[zmq.Socket[bytes]], address: str, queue: int, max_bytes: int, keys: Keys | None
) -> zmq.Socket[bytes]:
    """A connected DEALER socket; destroys the context and raises ProcessError if the address is invalid."""
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
    """A connection to a `Router`; reconnects by itself."""

    def __init__(self, address: str, queue: int, max_bytes: int, keys: Keys | None = None) -> None:
        self._context = zmq.Context()
        self._socket = _connected(self._context, address, queue, max_bytes, keys)

    def receive(self, timeout_ms: int) -> bytes | None:
        return self._socket.recv_multipart()[-1] if self._socket.poll(timeout_ms, zmq.POLLIN) else None

    def send(self, content: bytes) -> bool:
        """False if the queue is full because the server does not read."""
        try:
            self._socket.send(content, zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def close(self) -> None:
        self._socket.close(linger=500)
        self._context.term()


class Dealers:
    """Many connections to one `Router`, read together; for load tests that simulate many clients."""

    def __init__(self, address: str, count: int, queue: int, max_bytes: int) -> None:
        self._context = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, count + 16)
        self._poller = zmq.Poller()
        self._sockets = [_connected(self._context, address, queue, max_bytes, None) for _ in range(count)]
        self._which = {socket: i for i, socket in enumerate(self._sockets)}
        for socket in self._sockets:
            self._poller.register(socket, zmq.POLLIN)

    def send(self, index: int, content: bytes) -> None:
        """Raises ProcessError if the server does not read."""
        try:
            self._sockets[index].send(content, zmq.DONTWAIT)
        except zmq.Again:
            raise ProcessError("the server does not read what it is sent") from None

    def receive(self, timeout_ms: int) -> list[tuple[int, bytes]]:
        """Wait for a message; returns all available ones as (index of the connection, content)."""
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
    """A `Dealer` for an asyncio event loop: received messages are passed to a callback.

    It does not use pyzmq's asyncio sockets: they create futures and timers for each message (measured: 200 clients at
    25 Hz kept a core busy).
    """

    def __init__(
        self, address: str, queue: int, max_bytes: int, on_message: Callable[[bytes], None], keys: Keys | None = None
    ) -> None:
        self._context = zmq.Context()
        self._socket = _connected(self._context, address, queue, max_bytes, keys)
        self._on_message = on_message
        self._unsent: deque[bytes] = deque()
        import asyncio  # imported late: our own processes do not need it

        self._loop = asyncio.get_running_loop()
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._timer: asyncio.TimerHandle | None = None
        try:
            self._loop.add_reader(self._fd, self._poll)
        except NotImplementedError:  # the default event loop of Windows
            self._fd = -1
            self._poll_by_timer()

    def _poll_by_timer(self) -> None:
        self._poll()
        self._timer = self._loop.call_later(0.001, self._poll_by_timer)

    def _poll(self) -> None:
        """Read all available messages. The file descriptor is edge-triggered, so any rest must be scheduled again."""
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
            self._on_message(frames[-1])
        self._loop.call_soon(self._poll)

    def _flush(self) -> None:
        try:
            while self._unsent:
                self._socket.send(self._unsent[0], zmq.DONTWAIT)
                self._unsent.popleft()
        except zmq.Again:
            pass

    def send(self, content: bytes) -> None:
        """Send now, or in order when the queue has room again."""
        self._unsent.append(content)
        self._flush()
        # sending may have consumed the edge-triggered event of a received message
        self._loop.call_soon(self._poll)

    def close(self) -> None:
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
        if self._timer is not None:
            self._timer.cancel()
        self._socket.close(linger=500)
        self._context.term()
