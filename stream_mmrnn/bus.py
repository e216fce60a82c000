"""The bus: one broker, so that all readers see one order; publishers and subscribers that count.

The only file that speaks ZeroMQ. Knows nothing about what messages mean, beyond a clock that says we are heard.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator

import zmq

from stream_mmrnn import topics, wire
from stream_mmrnn.clock import now_ns
from stream_mmrnn.errors import ProcessError, WireError
from stream_mmrnn.types import Envelope, Payload

_STOP = b"TERMINATE"


class Address:
    """Where the broker's two sockets are. Made once by the supervisor, given to every process."""

    def __init__(self, publish: str, subscribe: str, folder: str = "") -> None:
        self.publish, self.subscribe, self.folder = publish, subscribe, folder

    @classmethod
    def create(cls, transport: str) -> Address:
        """Fresh addresses: ipc in a private folder (0700), or loopback tcp ports that were free just now."""
        if transport == "ipc":
            folder = tempfile.mkdtemp(prefix="stream-mmrnn-")
            return cls(f"ipc://{folder}/publish", f"ipc://{folder}/subscribe", folder)
        context = zmq.Context()
        sockets = [context.socket(zmq.PUB) for _ in range(2)]
        try:
            ports = [s.bind_to_random_port("tcp://127.0.0.1") for s in sockets]
        finally:
            context.destroy(linger=0)
        return cls(*(f"tcp://127.0.0.1:{p}" for p in ports))

    def remove(self) -> None:
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def run_broker(address: Address, queue: int, ready: Callable[[], None], alive: Callable[[], bool]) -> None:
    """Forward every message from publishers to subscribers in one order until told to stop.

    The loop is ZeroMQ's own (`zmq_proxy_steerable`), in C and without the GIL.
    """
    context = zmq.Context()
    front, back, control = context.socket(zmq.XSUB), context.socket(zmq.XPUB), context.socket(zmq.PAIR)
    steer = context.socket(zmq.PAIR)
    for socket in (front, back):
        socket.set_hwm(queue)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_PAYLOAD_BYTES)
    try:
        front.bind(address.publish)
        back.bind(address.subscribe)
    except zmq.ZMQError as e:
        context.destroy(linger=0)
        raise ProcessError(f"the broker cannot bind {address.publish} or {address.subscribe}: {e}") from e
    control.bind("inproc://control")
    steer.connect("inproc://control")

    def watch() -> None:
        while alive():
            pass
        steer.send(_STOP)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    ready()
    zmq.proxy_steerable(front, back, None, control)
    watcher.join()
    context.destroy(linger=0)


_LOOK_EVERY_NS = 50_000_000
_MAX_STREAMS = 65_536
"""Streams, each a topic of a session, whose numbers a reader remembers before it forgets those long silent."""
_MAX_ENDED = 1024
"""The same of sessions that have ended: a message of theirs may still be on its way."""


class Publisher:
    """Sends envelopes of one process; numbers them per topic and session."""

    def __init__(self, address: Address, queue: int) -> None:
        self._context = zmq.Context()
        # XPUB instead of PUB: the subscriptions that reach us say when somebody listens
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.setsockopt(zmq.XPUB_NODROP, 1)  # a full queue is an error we count, not a silent loss
        self._socket.set_hwm(queue)
        self._socket.connect(address.publish)
        self._seq: dict[tuple[str, str], int] = {}
        self._wanted: list[bytes] = []
        self._looked_ns = 0
        self.refused: dict[str, int] = {}
        """Messages per topic that the full queue to the broker did not take."""

    def _read_subscriptions(self, timeout_ms: int) -> None:
        while self._socket.poll(timeout_ms, zmq.POLLIN):
            note = self._socket.recv()
            if note[:1] == b"\x01":
                self._wanted.append(note[1:])
            elif note[1:] in self._wanted:
                self._wanted.remove(note[1:])
            timeout_ms = 0

    def wait_for_reader(self, topic: str, timeout_s: float) -> bool:
        """True as soon as the broker forwards `topic` to somebody: what is sent from now on arrives."""
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
    ) -> Envelope:
        """Stamp, number and send one message; the envelope as sent."""
        key = (topic, session)
        seq = self._seq.get(key, 0)
        self._seq[key] = seq + 1
        at_ns = now_ns()
        envelope = Envelope(topic, session, seq, event_ns, capture_ns, at_ns, payload, origin)
        if at_ns - self._looked_ns > _LOOK_EVERY_NS:
            # who subscribes is of no haste here, and looking costs as much as sending
            self._looked_ns = at_ns
            self._read_subscriptions(0)
        try:
            self._socket.send_multipart(wire.encode(envelope), zmq.DONTWAIT)
        except zmq.Again:
            self.refused[topic] = self.refused.get(topic, 0) + 1
        return envelope

    def end(self, session: str) -> None:
        """Forget the numbers of a session that has ended; one that begins again begins at 0."""
        for topic in topics.TOPICS:
            self._seq.pop((topic, session), None)

    def close(self, linger_ms: int = 500) -> None:
        self._socket.close(linger=linger_ms)
        self._context.term()


class Gaps:
    """Counts, per stream, what a reader got and what its sequence numbers say is missing. Bounded."""

    def __init__(self) -> None:
        self._next: dict[tuple[str, str], int] = {}
        self._before: dict[tuple[str, str], int] = {}
        """Of streams that were silent since the others filled `_next`, or whose sessions have ended."""
        self.received: dict[str, int] = {}
        """By topic; all statuses are one."""
        self.lost: dict[str, int] = {}

    def see(self, envelope: Envelope) -> None:
        topic, seq = envelope.topic, envelope.seq
        key = (topic, envelope.session)
        expected = self._next.get(key)
        if expected is None:
            expected = self._unseen(key, seq)
        if topic not in topics.TOPICS:
            topic = topics.STATUS  # whatever follows the prefix is the sender's to choose
        self.received[topic] = self.received.get(topic, 0) + 1
        if seq > expected:
            self.lost[topic] = self.lost.get(topic, 0) + seq - expected
        # a seq below the expected one is a publisher that began anew
        self._next[key] = seq + 1

    def _unseen(self, key: tuple[str, str], seq: int) -> int:
        """The number that is expected of a stream that is not among those heard of late."""
        if len(self._next) >= _MAX_STREAMS:
            self._before, self._next = self._next, {}
        # what belongs to no session has begun before we listened; a session's streams begin with it, at 0
        return self._before.pop(key, seq if key[1] == topics.EVERYONE else 0)

    def end(self, session: str) -> None:
        """A session has ended: its numbers are kept a while, for what is still on its way."""
        for key in ((topic, session) for topic in topics.TOPICS):
            if key in self._next:
                self._before[key] = self._next.pop(key)
        while len(self._before) > _MAX_ENDED:
            del self._before[next(iter(self._before))]


class Subscriber:
    """Reads envelopes of some topics in the broker's order; counts gaps and garbage."""

    def __init__(self, address: Address, topics: list[str], queue: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.set_hwm(queue)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_PAYLOAD_BYTES)
        for topic in topics:
            self._socket.setsockopt(zmq.SUBSCRIBE, topic.encode())
        self._socket.connect(address.subscribe)
        self.gaps = Gaps()
        self.garbage = 0
        self._next: Envelope | None = None

    def receive(self, timeout_ms: int) -> Envelope | None:
        """The next envelope, or None after `timeout_ms` without one."""
        if self._next is not None:
            envelope, self._next = self._next, None
            return envelope
        return self._read() if self._socket.poll(timeout_ms, zmq.POLLIN) else None

    def _read(self) -> Envelope | None:
        frames = self._socket.recv_multipart()
        try:
            envelope = wire.decode(frames, now_ns())
        except WireError:
            self.garbage += 1
            return None
        self.gaps.see(envelope)
        return envelope

    def waiting(self) -> bool:
        """Whether an envelope is there already: the next `receive` gives it at once."""
        while self._next is None and self._socket.poll(0, zmq.POLLIN):
            self._next = self._read()
        return self._next is not None

    def stream(self, alive: Callable[[], bool], timeout_ms: int = 100) -> Iterator[Envelope]:
        """Envelopes as they come, until `alive()` says no."""
        while alive():
            envelope = self.receive(timeout_ms)
            if envelope is not None:
                yield envelope

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


class LineSocket:
    """A PULL socket on loopback whose every message is a line of text, for the text source."""

    def __init__(self, port: int, max_bytes: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.MAXMSGSIZE, max_bytes)
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
