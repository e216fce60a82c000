"""One end of a transport under test, in a process of its own: a sender or a reader that takes orders.

Orders come as JSON lines over a loopback connection to whoever started it; what is measured goes another way, which
`send` and `receive` know. `python -m tools.bench.peer` is our own bus: broker, sender and reader. Peers of
other transports use `serve_sender` and `serve_reader` from scripts of their own.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from stream_mmrnn.bench.measure import sleep_until
from stream_mmrnn.bus import Address, Publisher, Subscriber, run_broker
from stream_mmrnn.core import topics
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.settings import BusSettings
from stream_mmrnn.core.types import Payload

Stamps = tuple[int, int]
"""When a message was meant to be sent, and when that really began: nanoseconds of the host's monotonic clock."""

_SILENCE_MS = 200
_VECTOR_AT_MOST_BYTES = 4096


def _serve(port: int, role: str, orders: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Obey until the other side is gone."""
    with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile("rw") as lines:

        def say(answer: dict[str, Any]) -> None:
            lines.write(json.dumps(answer) + "\n")
            lines.flush()

        say({"role": role})
        for line in lines:
            order = json.loads(line)
            say(orders[order["do"]](order))


def serve_sender(port: int, send: Callable[[int, int, int], None]) -> None:
    """`send(size_bytes, intended_ns, sent_ns)` sends one message that carries both stamps."""

    def run(order: dict[str, Any]) -> dict[str, Any]:
        period_ns = int(1e9 / order["rate_hz"])
        due_ns = now_ns() + 20_000_000
        for _ in range(order["count"]):
            sleep_until(due_ns, now_ns)
            send(order["bytes"], due_ns, now_ns())
            due_ns += period_ns
        return {"sent": order["count"]}

    _serve(port, "send", {"send": run})


def serve_reader(port: int, receive: Callable[[int], Stamps | None]) -> None:
    """`receive(timeout_ms)` gives the stamps of one message as soon as all of it can be used, or None."""

    def run(order: dict[str, Any]) -> dict[str, Any]:
        latencies_ns: list[int] = []
        paths_ns: list[int] = []
        while len(latencies_ns) < order["count"] and (stamps := receive(order["timeout_ms"])) is not None:
            read_ns = now_ns()
            latencies_ns.append(read_ns - stamps[0])
            paths_ns.append(read_ns - stamps[1])
        return {"latency_ns": latencies_ns, "path_ns": paths_ns}

    def drain(_: dict[str, Any]) -> dict[str, Any]:
        drained = 0
        while receive(_SILENCE_MS) is not None:
            drained += 1
        return {"drained": drained}

    _serve(port, "read", {"read": run, "drain": drain})


def _send(port: int, address: Address, queue: int) -> None:
    """Vectors go as features do, what is larger as pictures do."""
    publisher = Publisher(address, queue)
    payloads: dict[int, tuple[str, Payload]] = {}

    def send(size_bytes: int, intended_ns: int, sent_ns: int) -> None:
        if size_bytes not in payloads:
            rng = np.random.default_rng(0)
            payloads[size_bytes] = (
                (topics.feature("vision"), rng.standard_normal(size_bytes // 4).astype(np.float32))
                if size_bytes <= _VECTOR_AT_MOST_BYTES
                else (topics.raw("vision"), rng.bytes(size_bytes))
            )
        topic, payload = payloads[size_bytes]
        publisher.publish(topic, "bench", intended_ns, sent_ns, payload)

    serve_sender(port, send)
    publisher.close(0)


def _read(port: int, address: Address, queue: int) -> None:
    subscriber = Subscriber(address, [topics.raw("vision"), topics.feature("vision")], queue)

    def receive(timeout_ms: int) -> Stamps | None:
        envelope = subscriber.receive(timeout_ms)
        return None if envelope is None else (envelope.event_ns, envelope.capture_ns)

    serve_reader(port, receive)
    subscriber.close()


def main(role: str, port: str, publish: str, subscribe: str) -> None:
    address, queue = Address(publish, subscribe), BusSettings().queue
    if role == "broker":
        # it lives as long as its standard input: whoever started it holds the other end
        run_broker(address, queue, lambda: print("ready", flush=True), lambda: bool(sys.stdin.read(1)))
    elif role == "send":
        _send(int(port), address, queue)
    else:
        _read(int(port), address, queue)


if __name__ == "__main__":
    main(*sys.argv[1:])
