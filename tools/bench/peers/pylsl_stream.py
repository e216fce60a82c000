"""Peer of `stream-mmrnn bench transport`: a Lab Streaming Layer outlet and inlet, one sample of doubles a message.

    pylsl_stream.py send|read PORT NAME

All samples of a stream have one size, that of a feature vector here; the reader finds the stream by its name, as LSL
does it, before it says that it is ready.
"""

from __future__ import annotations

import sys

import pylsl

from tools.bench.peer import Stamps, serve_reader, serve_sender
from tools.bench.transport import SIZES_BYTES

_CHANNELS = SIZES_BYTES["2kb"] // 8


def _send(port: int, name: str) -> None:
    outlet = pylsl.StreamOutlet(pylsl.StreamInfo(name, "bench", _CHANNELS, 0, "double64", name))
    body = [0.0] * _CHANNELS

    def send(_: int, intended_ns: int, sent_ns: int) -> None:
        # a double holds nanoseconds exactly for the first 104 days after boot
        body[0], body[1] = float(intended_ns), float(sent_ns)
        outlet.push_sample(body)

    serve_sender(port, send)


def _read(port: int, name: str) -> None:
    found = pylsl.resolve_byprop("name", name, timeout=10.0)
    if not found:
        raise SystemExit(f"no LSL stream {name} was found on this network")
    inlet = pylsl.StreamInlet(found[0])
    inlet.open_stream(timeout=10.0)

    def receive(timeout_ms: int) -> Stamps | None:
        sample, _ = inlet.pull_sample(timeout=timeout_ms / 1000)
        return None if sample is None else (int(sample[0]), int(sample[1]))

    serve_reader(port, receive)


if __name__ == "__main__":
    {"send": _send, "read": _read}[sys.argv[1]](int(sys.argv[2]), sys.argv[3])
