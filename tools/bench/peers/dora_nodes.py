"""Peer of `stream-mmrnn bench transport`: the two nodes of a dora dataflow.

dora_nodes.py send|read PORT      started by `dora run`, never by hand
"""

from __future__ import annotations

import sys
import time

import numpy as np
import pyarrow as pa
from dora import Node

from tools.bench.peer import Stamps, serve_reader, serve_sender


def main(role: str, port: str) -> None:
    node = Node()
    if role == "send":
        bodies: dict[int, np.ndarray] = {}

        def send(size_bytes: int, intended_ns: int, sent_ns: int) -> None:
            body = bodies.setdefault(size_bytes, np.zeros(size_bytes, np.uint8))
            body[:16].view(np.int64)[:] = intended_ns, sent_ns
            node.send_output("data", pa.array(body))

        serve_sender(int(port), send)
        return

    def receive(timeout_ms: int) -> Stamps | None:
        deadline_s = time.monotonic() + timeout_ms / 1000
        while (left_s := deadline_s - time.monotonic()) > 0:
            event = node.next(timeout=left_s)
            if event is not None and event["type"] == "INPUT":
                intended_ns, sent_ns = event["value"].to_numpy()[:16].view(np.int64)
                return int(intended_ns), int(sent_ns)
        return None

    serve_reader(int(port), receive)


if __name__ == "__main__":
    main(*sys.argv[1:])
