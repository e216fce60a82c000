"""Receives lines of text over ZeroMQ from another program."""

from __future__ import annotations

import zmq

from stream_mmrnn.bus.address import refuse_old_peers


class LineSocket:
    """A PULL socket on loopback for the text source; each message is a line of text."""

    def __init__(self, port: int, max_bytes: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
        refuse_old_peers(self._socket)
        try:
            self._socket.bind(f"tcp://127.0.0.1:{port}")
        except zmq.ZMQError as e:
            self.close()
            raise OSError(str(e)) from e

    def receive(self, timeout_ms: int) -> bytes | None:
        return self._socket.recv() if self._socket.poll(timeout_ms, zmq.POLLIN) else None

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()
