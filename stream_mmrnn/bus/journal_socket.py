"""The journal's sockets: all messages as raw frames, and a request channel for the engine."""

from __future__ import annotations

from collections.abc import Iterator

import zmq

from stream_mmrnn.bus.address import Address, refuse_old_peers, secure
from stream_mmrnn.bus.subscriber import subscribe
from stream_mmrnn.core import wire
from stream_mmrnn.core.errors import ProcessError


class JournalSocket:
    """The journal's side: raw messages of some topics, and requests of an engine."""

    def __init__(self, address: Address, wanted: list[str], queue: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.set_hwm(queue)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_PAYLOAD_BYTES)
        secure(self._socket, address.keys)
        subscribe(self._socket, address.lane("block", wanted), wanted)
        self._requests = self._context.socket(zmq.ROUTER)
        refuse_old_peers(self._requests)
        try:
            self._requests.bind(address.journal)
        except zmq.ZMQError as e:
            self.close()
            raise ProcessError(f"the journal cannot bind {address.journal}: {e}") from e

    def messages(self) -> Iterator[list[bytes]]:
        """The available messages, without blocking."""
        while self._socket.poll(0, zmq.POLLIN):
            yield self._socket.recv_multipart()

    def request(self, timeout_ms: int) -> tuple[bytes, bytes] | None:
        """The sender and content of a request; None on timeout."""
        if not self._requests.poll(timeout_ms, zmq.POLLIN):
            return None
        sender, *frames = self._requests.recv_multipart()
        return sender, b"".join(frames)

    def answer(self, sender: bytes, content: bytes) -> None:
        """Answer a request; dropped if the sender has disconnected."""
        self._requests.send_multipart([sender, content])

    def close(self) -> None:
        for socket in (self._socket, self._requests):
            socket.close(linger=0)
        self._context.term()


class JournalClient:
    """The engine's side of the journal's requests."""

    def __init__(self, address: Address) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(2)
        self._socket.connect(address.journal)

    def send(self, content: bytes) -> bool:
        """Send without blocking; False if the previous message is unread, or there is no journal."""
        try:
            self._socket.send(content, zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def ask(self, content: bytes, timeout_ms: int) -> bytes | None:
        """Send a request and return the answer; None on timeout."""
        if not self.send(content) or not self._socket.poll(timeout_ms, zmq.POLLIN):
            return None
        return self._socket.recv()

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()
