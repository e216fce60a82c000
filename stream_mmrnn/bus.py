"""The bus: one broker, so that all readers see one order; publishers and subscribers that count.

The only file that speaks ZeroMQ. Knows nothing about what messages mean, beyond a clock that says we are heard.
"""

from __future__ import annotations

import contextlib
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

    def __init__(self, publish: str, subscribe: str, folder: str = "", journal: str = "") -> None:
        self.publish, self.subscribe, self.folder, self.journal = publish, subscribe, folder, journal

    @classmethod
    def create(cls, transport: str) -> Address:
        """Fresh addresses: ipc in a private folder (0700), or loopback tcp ports that were free just now."""
        if transport == "ipc":
            folder = tempfile.mkdtemp(prefix="stream-mmrnn-")
            return cls(f"ipc://{folder}/publish", f"ipc://{folder}/subscribe", folder, f"ipc://{folder}/journal")
        context = zmq.Context()
        sockets = [context.socket(zmq.PUB) for _ in range(3)]
        try:
            ports = [s.bind_to_random_port("tcp://127.0.0.1") for s in sockets]
        finally:
            context.destroy(linger=0)
        publish, subscribe, journal = (f"tcp://127.0.0.1:{p}" for p in ports)
        return cls(publish, subscribe, journal=journal)

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
_NOBODY = b"nobody"
"""A topic that nobody reads."""

Numbers = list[tuple[str, str, int]]
"""Topic, session, the next sequence number."""


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
        self._newest: Envelope | None = None
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

    def prewarm(self) -> None:
        """Send the newest message once more, to nobody: code and buffers are in the caches for the next one."""
        if self._newest is not None and not any(_NOBODY.startswith(prefix) for prefix in self._wanted):
            with contextlib.suppress(zmq.Again):
                self._socket.send_multipart([_NOBODY, *wire.encode(self._newest)[1:]], zmq.DONTWAIT)

    def numbers(self) -> Numbers:
        """The next number of each stream."""
        return [(topic, session, seq) for (topic, session), seq in self._seq.items()]

    def go_on(self, numbers: Numbers) -> None:
        """Number as the publisher did that said `numbers`."""
        self._seq = {(topic, session): seq for topic, session, seq in numbers}

    def close(self, linger_ms: int = 500) -> None:
        self._socket.close(linger=linger_ms)
        self._context.term()


class Gaps:
    """Counts, per stream, what a reader got and what its sequence numbers say is missing."""

    def __init__(self) -> None:
        self._next: dict[tuple[str, str], int] = {}
        self.received: dict[str, int] = {}
        self.lost: dict[str, int] = {}

    def see(self, envelope: Envelope) -> None:
        key = (envelope.topic, envelope.session)
        seq = envelope.seq
        # what belongs to no session has begun before we listened; a session's streams begin with it, at 0
        expected = self._next.get(key, seq if envelope.session == topics.EVERYONE else 0)
        self.received[envelope.topic] = self.received.get(envelope.topic, 0) + 1
        if seq > expected:
            self.lost[envelope.topic] = self.lost.get(envelope.topic, 0) + seq - expected
        # a seq below the expected one is a publisher that began anew
        self._next[key] = seq + 1

    def snapshot(self) -> tuple[Numbers, dict[str, int], dict[str, int]]:
        """All of it as a value: the next number of each stream; received; lost."""
        return [(topic, session, seq) for (topic, session), seq in self._next.items()], self.received, self.lost

    def restore(self, numbers: Numbers, received: dict[str, int], lost: dict[str, int]) -> None:
        self._next = {(topic, session): seq for topic, session, seq in numbers}
        self.received, self.lost = dict(received), dict(lost)


class Subscriber:
    """Reads envelopes of some topics in the broker's order; counts gaps and garbage."""

    def __init__(self, address: Address, topics: list[str], queue: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.set_hwm(queue)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_PAYLOAD_BYTES)
        _subscribe(self._socket, address, topics)
        self.gaps = Gaps()
        self.garbage = 0
        self._next: Envelope | None = None
        self._timeout_ms = -1
        self._newest: list[bytes] = []

    def receive(self, timeout_ms: int) -> Envelope | None:
        """The next envelope, or None after `timeout_ms` without one."""
        if self._next is not None:
            envelope, self._next = self._next, None
            return envelope
        if timeout_ms != self._timeout_ms:
            self._timeout_ms = self._socket.rcvtimeo = timeout_ms
        # to wait in the call that reads spares a poll between a message and its reader
        return self._read(0)

    def _read(self, flags: int) -> Envelope | None:
        try:
            frames = self._socket.recv_multipart(flags)
        except zmq.Again:
            return None
        self._newest = frames
        try:
            envelope = wire.decode(frames, now_ns())
        except WireError:
            self.garbage += 1
            return None
        self.gaps.see(envelope)
        return envelope

    def prewarm(self) -> None:
        """Read the newest message once more, for nobody: code and what is known of streams are in the caches."""
        with contextlib.suppress(WireError):
            wire.decode(self._newest, now_ns())

    def waiting(self) -> bool:
        """Whether an envelope is there already: the next `receive` gives it at once."""
        while self._next is None and self._socket.poll(0, zmq.POLLIN):
            self._next = self._read(zmq.DONTWAIT)
        return self._next is not None

    @property
    def ahead(self) -> bool:
        """Whether `gaps` has seen an envelope that `receive` has not given yet."""
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


def _subscribe(socket: zmq.Socket[bytes], address: Address, wanted: list[str]) -> None:
    """Connect, and ask for `wanted`; for the clock last, so that hearing it proves that the others are heard, too."""
    first = [topic for topic in wanted if topic != topics.CLOCK]
    for topic in first:
        socket.setsockopt(zmq.SUBSCRIBE, topic.encode())
    socket.connect(address.subscribe)
    if len(first) < len(wanted):
        socket.setsockopt(zmq.SUBSCRIBE, topics.CLOCK.encode())


class Tap:
    """The journal's side: messages of some topics as they are on the wire, and requests of an engine."""

    def __init__(self, address: Address, wanted: list[str], queue: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.set_hwm(queue)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_PAYLOAD_BYTES)
        _subscribe(self._socket, address, wanted)
        self._requests = self._context.socket(zmq.ROUTER)
        try:
            self._requests.bind(address.journal)
        except zmq.ZMQError as e:
            self.close()
            raise ProcessError(f"the journal cannot bind {address.journal}: {e}") from e

    def messages(self) -> Iterator[list[bytes]]:
        """What has come, without waiting."""
        while self._socket.poll(0, zmq.POLLIN):
            yield self._socket.recv_multipart()

    def request(self, timeout_ms: int) -> tuple[bytes, bytes] | None:
        """Who asks, and what; None after `timeout_ms` without."""
        if not self._requests.poll(timeout_ms, zmq.POLLIN):
            return None
        who, *frames = self._requests.recv_multipart()
        return who, b"".join(frames)

    def answer(self, who: bytes, content: bytes) -> None:
        """To one that is gone meanwhile it is dropped."""
        self._requests.send_multipart([who, content])

    def close(self) -> None:
        for socket in (self._socket, self._requests):
            socket.close(linger=0)
        self._context.term()


class Caller:
    """The engine's side of the journal's requests."""

    def __init__(self, address: Address) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(2)
        self._socket.connect(address.journal)

    def send(self, content: bytes) -> bool:
        """At once; False where the one before it has not been taken yet, or nobody is there."""
        try:
            self._socket.send(content, zmq.DONTWAIT)
        except zmq.Again:
            return False
        return True

    def ask(self, content: bytes, timeout_ms: int) -> bytes | None:
        """The answer; None after `timeout_ms` without."""
        if not self.send(content) or not self._socket.poll(timeout_ms, zmq.POLLIN):
            return None
        return self._socket.recv()

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
