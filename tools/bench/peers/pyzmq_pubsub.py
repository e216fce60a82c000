"""Peer of `stream-mmrnn bench transport`: plain ZeroMQ PUB/SUB without broker and envelope, one frame a message.

    pyzmq_pubsub.py send|read PORT ADDRESS

The floor: what our bus costs more than this, it costs for one order, numbering and typed messages.
"""

from __future__ import annotations

import struct
import sys

import zmq

from stream_mmrnn.bench.peer import Stamps, serve_reader, serve_sender

_STAMPS = struct.Struct("<qq")


def main(role: str, port: str, address: str) -> None:
    context = zmq.Context()
    socket = context.socket(zmq.PUB if role == "send" else zmq.SUB)
    socket.set_hwm(20_000)
    if role == "send":
        socket.bind(address)
        bodies: dict[int, bytearray] = {}

        def send(size_bytes: int, intended_ns: int, sent_ns: int) -> None:
            body = bodies.setdefault(size_bytes, bytearray(size_bytes))
            _STAMPS.pack_into(body, 0, intended_ns, sent_ns)
            socket.send(body)

        serve_sender(int(port), send)
    else:
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(address)

        def receive(timeout_ms: int) -> Stamps | None:
            return _STAMPS.unpack_from(socket.recv()) if socket.poll(timeout_ms, zmq.POLLIN) else None

        serve_reader(int(port), receive)
    context.destroy(linger=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
