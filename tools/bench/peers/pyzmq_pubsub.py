"""Peers of `stream-mmrnn bench transport`: plain ZeroMQ PUB/SUB without envelope, one frame a message.

    pyzmq_pubsub.py send|read PORT ADDRESS              one to the other
    pyzmq_pubsub.py broker 0 PUBLISH SUBSCRIBE          ZeroMQ's own proxy and nothing else
    pyzmq_pubsub.py send|read PORT PUBLISH SUBSCRIBE    through it

Floors: what our bus costs more than the first, it costs for one order, numbering and typed messages; what the second
costs more than the first is the price of one order, whoever asks it.
"""

from __future__ import annotations

import struct
import sys

import zmq

from tools.bench.peer import Stamps, serve_reader, serve_sender

_STAMPS = struct.Struct("<qq")


def _broker(publish: str, subscribe: str) -> None:
    context = zmq.Context()
    front, back = context.socket(zmq.XSUB), context.socket(zmq.XPUB)
    front.bind(publish)
    back.bind(subscribe)
    print("ready", flush=True)
    zmq.proxy(front, back)


def main(role: str, port: str, publish: str, subscribe: str = "") -> None:
    if role == "broker":
        _broker(publish, subscribe)
    context = zmq.Context()
    socket = context.socket(zmq.PUB if role == "send" else zmq.SUB)
    socket.set_hwm(20_000)
    if role == "send":
        if subscribe:
            socket.connect(publish)
        else:
            socket.bind(publish)
        bodies: dict[int, bytearray] = {}

        def send(size_bytes: int, intended_ns: int, sent_ns: int) -> None:
            body = bodies.setdefault(size_bytes, bytearray(size_bytes))
            _STAMPS.pack_into(body, 0, intended_ns, sent_ns)
            socket.send(body)

        serve_sender(int(port), send)
    else:
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(subscribe or publish)

        def receive(timeout_ms: int) -> Stamps | None:
            return _STAMPS.unpack_from(socket.recv()) if socket.poll(timeout_ms, zmq.POLLIN) else None

        serve_reader(int(port), receive)
    context.destroy(linger=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
