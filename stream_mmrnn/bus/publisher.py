"""The publisher: sends envelopes, numbered per topic and session."""

from __future__ import annotations

import contextlib

import zmq

from stream_mmrnn.bus.address import Address, Keys, secure
from stream_mmrnn.core import wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.types import Envelope, Payload

_LOOK_EVERY_NS = 50_000_000
MAX_STREAMS = 65_536
"""Maximum number of streams (a topic of a session) whose sequence numbers a reader tracks; the oldest are evicted."""
MAX_ENDED = 256
"""Maximum number of ended sessions whose numbers are kept, because messages of theirs may still be in transit."""
_UNREAD = b"unread"
"""A topic without subscribers."""
Numbers = list[tuple[str, str, int]]
"""(topic, session, next sequence number) of each stream."""


class Publisher:
    """Sends the envelopes of one process, with sequence numbers per topic and session."""

    def __init__(self, address: Address, queue: int, keys: Keys | None = None) -> None:
        """`keys`: None uses those of the address."""
        self._context = zmq.Context()
        # XPUB instead of PUB: it receives subscriptions, which show whether a reader exists
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.setsockopt(zmq.XPUB_NODROP, 1)  # a full queue is an error we count, not a silent loss
        self._socket.set_hwm(queue)
        secure(self._socket, keys or address.keys)
        self._socket.connect(address.publish)
        self._seq: dict[tuple[str, str], int] = {}
        self._topics: set[str] = set()
        """Those that it has published."""
        self._wanted: list[bytes] = []
        self._looked_ns = 0
        self._newest: Envelope | None = None
        self.refused: dict[str, int] = {}
        """Messages not sent because the queue to the broker was full, by topic."""

    def _read_subscriptions(self, timeout_ms: int) -> None:
        while self._socket.poll(timeout_ms, zmq.POLLIN):
            note = self._socket.recv()
            if note[:1] == b"\x01":
                self._wanted.append(note[1:])
            elif note[:1] == b"\x00" and note[1:] in self._wanted:
                self._wanted.remove(note[1:])
            timeout_ms = 0

    def _read_subscriptions_if_due(self, at_ns: int) -> None:
        if at_ns - self._looked_ns > _LOOK_EVERY_NS:
            # reading subscriptions is not urgent, and it costs as much as sending
            self._looked_ns = at_ns
            self._read_subscriptions(0)

    def has_reader(self, topic: str) -> bool:
        """Whether the broker has a reader of exactly this topic, as of the last 50 ms."""
        self._read_subscriptions_if_due(now_ns())
        return topic.encode() in self._wanted

    def wait_for_reader(self, topic: str, timeout_s: float) -> bool:
        """Wait until the broker has a reader of `topic`; False on timeout. Messages sent after that arrive."""
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
        """Add time and sequence number to a message and send it; returns the envelope."""
        key = (topic, session)
        seq = self._seq.get(key, 0)
        if not seq:
            self._topics.add(topic)
        self._seq[key] = seq + 1
        at_ns = now_ns()
        envelope = Envelope(topic, session, seq, event_ns, capture_ns, at_ns, payload, origin, 0, device_ns)
        self._newest = envelope
        try:
            self._socket.send_multipart(wire.encode(envelope), zmq.DONTWAIT)
        except zmq.Again:
            self.refused[topic] = self.refused.get(topic, 0) + 1
        self._read_subscriptions_if_due(at_ns)
        return envelope

    def end(self, session: str) -> None:
        """Forget the sequence numbers of a session that has ended; if it opens again, they begin at 0."""
        for topic in self._topics:
            self._seq.pop((topic, session), None)

    def prewarm(self) -> None:
        """Send the newest message on a topic without readers, to load code and buffers into the CPU caches."""
        if self._newest is not None and not any(_UNREAD.startswith(prefix) for prefix in self._wanted):
            with contextlib.suppress(zmq.Again):
                self._socket.send_multipart([_UNREAD, *wire.encode(self._newest)[1:]], zmq.DONTWAIT)

    def numbers(self) -> Numbers:
        """The next sequence number of each stream."""
        return [(topic, session, seq) for (topic, session), seq in self._seq.items()]

    def restore(self, numbers: Numbers) -> None:
        """Continue the sequence numbers of another publisher."""
        self._seq = {(topic, session): seq for topic, session, seq in numbers}
        self._topics = {topic for topic, _ in self._seq}

    def close(self, linger_ms: int = 500) -> None:
        self._socket.close(linger=linger_ms)
        self._context.term()
