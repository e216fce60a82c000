"""The publisher: sends envelopes, numbered per topic and session."""

from __future__ import annotations

import contextlib

import zmq

from stream_mmrnn.bus.address import Address, Keys, secure
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.types import Envelope, Payload

_LOOK_EVERY_NS = 50_000_000
MAX_STREAMS = 65_536
"""Streams, each a topic of a session, whose numbers a reader remembers before it forgets those long silent."""
MAX_ENDED = 256
"""Sessions that have ended, of which it remembers the same: a message of theirs may still be on its way."""
_UNREAD = b"unread"
"""A topic that no reader subscribes to."""
Numbers = list[tuple[str, str, int]]
"""Topic, session, the next sequence number."""


class Publisher:
    """Sends envelopes of one process; numbers them per topic and session."""

    def __init__(self, address: Address, queue: int, keys: Keys | None = None) -> None:
        """`keys`: others than those of the address, if any."""
        self._context = zmq.Context()
        # XPUB instead of PUB: its subscriptions tell when a reader exists
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.setsockopt(zmq.XPUB_NODROP, 1)  # a full queue is an error we count, not a silent loss
        self._socket.set_hwm(queue)
        secure(self._socket, keys or address.keys)
        self._socket.connect(address.publish)
        self._seq: dict[tuple[str, str], int] = {}
        self._wanted: list[bytes] = []
        self._looked_ns = 0
        self._newest: Envelope | None = None
        self.refused: dict[str, int] = {}
        """Messages per topic that the full queue to the broker did not take."""

    def _read_subscriptions(self, timeout_ms: int) -> None:
        while self._socket.poll(timeout_ms, zmq.POLLIN):
            note = self._socket.recv()
            if note[:1] == b"\x01":
                self._wanted.append(note[1:])
            elif note[:1] == b"\x00" and note[1:] in self._wanted:
                self._wanted.remove(note[1:])
            timeout_ms = 0

    def wait_for_reader(self, topic: str, timeout_s: float) -> bool:
        """True as soon as the broker has a reader of `topic`: what is sent from now on arrives."""
        deadline = now_ns() + int(timeout_s * 1e9)
        while not any(topic.encode().startswith(prefix) for prefix in self._wanted):
            left_ms = (deadline - now_ns()) // 1_000_000
            if left_ms <= 0:
                return False
            self._read_subscriptions(int(left_ms))
        return True

    def publish(
        self,
        topic: str,
        session: str,
        event_ns: int,
        capture_ns: int,
        payload: Payload,
        origin: str = "",
        device_ns: int = 0,
    ) -> Envelope:
        """Stamp, number and send one message; the envelope as sent."""
        key = (topic, session)
        seq = self._seq.get(key, 0)
        self._seq[key] = seq + 1
        at_ns = now_ns()
        envelope = Envelope(topic, session, seq, event_ns, capture_ns, at_ns, payload, origin, 0, device_ns)
        self._newest = envelope
        try:
            self._socket.send_multipart(wire.encode(envelope), zmq.DONTWAIT)
        except zmq.Again:
            self.refused[topic] = self.refused.get(topic, 0) + 1
        if at_ns - self._looked_ns > _LOOK_EVERY_NS:
            # who subscribes is of no haste here, and looking costs as much as sending
            self._looked_ns = at_ns
            self._read_subscriptions(0)
        return envelope

    def end(self, session: str) -> None:
        """Forget the numbers of a session that has ended; one that begins again begins at 0."""
        for topic in topics.TOPICS:
            self._seq.pop((topic, session), None)

    def prewarm(self) -> None:
        """Send the newest message again on a topic without readers: code and buffers are then in the caches."""
        if self._newest is not None and not any(_UNREAD.startswith(prefix) for prefix in self._wanted):
            with contextlib.suppress(zmq.Again):
                self._socket.send_multipart([_UNREAD, *wire.encode(self._newest)[1:]], zmq.DONTWAIT)

    def numbers(self) -> Numbers:
        """The next number of each stream."""
        return [(topic, session, seq) for (topic, session), seq in self._seq.items()]

    def go_on(self, numbers: Numbers) -> None:
        """Number as the publisher did that said `numbers`."""
        self._seq = {(topic, session): seq for topic, session, seq in numbers}

    def close(self, linger_ms: int = 500) -> None:
        self._socket.close(linger=linger_ms)
        self._context.term()
