"""Bytes that are no ZMTP 3, such as a web page's HTTP request, never become messages.

ZMTP 1.0 has no greeting: its frames are a length, flags and that many bytes, so a page can send them in a POST.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from stream_mmrnn.bus import Address, Publisher, Subscriber, run_broker
from stream_mmrnn.bus.line_socket import LineSocket
from stream_mmrnn.bus.request_reply import Router
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.serve import protocol

ANONYMOUS = b"\x01\x00"
"""The identity of a peer of ZMTP 1.0."""


def frame(content: bytes, more: bool = False) -> bytes:
    assert len(content) < 254
    return bytes([len(content) + 1, more]) + content


def attack(port: int, frames: bytes) -> None:
    """The frames as they are, and as the body of a POST whose head ends where a frame ends."""
    line = b"POST / HTTP/1.1\r\n"  # its first byte is a length: 80, flags and 79 bytes
    # the padding is a header of a length that makes the head one frame of 80 bytes and one of 10
    head = line + b"X: " + b"y" * (80 - len(line) - 4) + b"\r\n" + b"\x0a:12345\r\n\r\n"
    for content in (ANONYMOUS + frames, head + frames, head[:81] + frames):
        with socket.create_connection(("127.0.0.1", port), 5) as page:
            page.sendall(content)
            page.settimeout(0.5)
            try:
                while page.recv(100):
                    pass
            except OSError:
                pass


def test_lines_of_an_old_peer_are_not_read() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lines = LineSocket(port, 4096)
    try:
        attack(port, frame(b"hacked words"))
        assert lines.receive(300) is None
    finally:
        lines.close()


def test_a_server_of_sessions_does_not_read_an_old_peer() -> None:
    router = Router("127.0.0.1", 0, 16, protocol.MAX_BYTES)
    try:
        attack(router.port, frame(protocol.encode(protocol.Open(session="stolen"))))
        assert router.receive(500) is None
    finally:
        router.close()


@pytest.fixture
def bus() -> Iterator[Address]:
    address = Address.create("tcp")
    ready, going = threading.Event(), threading.Event()
    broker = threading.Thread(
        target=run_broker, args=(address, 1000, ready.set, lambda: not going.wait(0.05)), daemon=True
    )
    broker.start()
    assert ready.wait(10)
    yield address
    going.set()
    broker.join(10)
    address.remove()


def test_the_bus_does_not_forward_an_old_peer(bus: Address) -> None:
    subscriber, publisher = Subscriber(bus, [topics.LABEL], 100), Publisher(bus, 100)
    try:
        assert publisher.wait_for_reader(topics.LABEL, 10)
        forged = wire.encode(Envelope(topics.LABEL, "live", 0, 1, 1, 1, b"forged"))
        frames = b"".join(frame(bytes(part), more=i < 2) for i, part in enumerate(forged))
        attack(int(bus.publish.rpartition(":")[2]), frames)
        time.sleep(0.2)
        publisher.publish(topics.LABEL, "live", 1, 1, b"ours")
        envelope = subscriber.receive(5000)
        assert envelope is not None
        assert envelope.payload == b"ours"
        assert subscriber.receive(200) is None
    finally:
        subscriber.close()
        publisher.close()
