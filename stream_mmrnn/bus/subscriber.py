"""The subscriber: envelopes in the order of the broker, counts of lost messages, and the queue of a slow reader.

It decodes only session messages (open and close). The clock topic is special, because it proves the connection.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping

import zmq

from stream_mmrnn.bus.address import Address, Keys, secure
from stream_mmrnn.bus.broker import VIEW_BUFFER_BYTES
from stream_mmrnn.bus.publisher import MAX_ENDED, MAX_STREAMS, Numbers
from stream_mmrnn.bus.reader_queue import ReaderQueue
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.sequence import SequenceTracker
from stream_mmrnn.core.settings import Policy
from stream_mmrnn.core.types import Envelope, Payload

GapsState = tuple[Numbers, dict[str, dict[str, int]], dict[str, int], dict[str, int]]
"""Next number of each stream; next numbers of ended sessions by session and topic; received and lost by topic."""


class Gaps:
    """Counts received and lost messages by topic, from the sequence numbers. Memory is bounded. It follows session
    messages, because a new session's streams begin at 0.
    """

    def __init__(self, midway: bool = False) -> None:
        """`midway`: the reader joined running sessions; earlier messages do not count as lost."""
        self._midway = midway
        self._numbers: SequenceTracker[tuple[str, str]] = SequenceTracker(MAX_STREAMS)
        self._ended: OrderedDict[str, SequenceTracker[str]] = OrderedDict()
        """Trackers of ended sessions, whose messages may still be in transit."""
        self.received: dict[str, int] = {}
        """By topic; all status topics count as one."""
        self.lost: dict[str, int] = {}

    def observe(self, envelope: Envelope) -> None:
        topic, session, seq = envelope.topic, envelope.session, envelope.seq
        key = (topic, session)
        # streams without a session began before this reader; a session's streams begin at 0
        first = seq if self._midway or session == topics.EVERYONE else 0
        if session in self._ended and key not in self._numbers:
            missing = self._ended[session].observe(topic, seq, first)
        else:
            missing = self._numbers.observe(key, seq, first)
        counted = topics.counted_as(topic)
        self.received[counted] = self.received.get(counted, 0) + 1
        if missing:
            self.lost[counted] = self.lost.get(counted, 0) + missing
        if topic == topics.SESSION:
            self._session_changed(session, envelope.payload)

    def _session_changed(self, session: str, payload: Payload) -> None:
        """Move a closed session's trackers to `_ended` (at most `MAX_ENDED`), and back when it opens again."""
        try:
            op = wire.unpack(payload, wire.SessionMessage).op
        except WireError:
            return
        if op == "open":
            ended = self._ended.pop(session, None)
            for topic, seq in (ended.numbers() if ended else {}).items():
                self._numbers.observe((topic, session), seq - 1, seq - 1)
        elif op == "close" and session not in self._ended:
            ended = self._ended[session] = SequenceTracker()
            found = {topic: self._numbers.pop((topic, session)) for topic in self.received}
            ended.restore({topic: seq for topic, seq in found.items() if seq is not None})
            while len(self._ended) > MAX_ENDED:
                self._ended.popitem(last=False)

    def snapshot(self) -> GapsState:
        """The full state as a value."""
        numbers = [(topic, session, seq) for (topic, session), seq in self._numbers.numbers().items()]
        ended = {session: tracker.numbers() for session, tracker in self._ended.items()}
        return numbers, ended, self.received, self.lost

    def restore(self, state: GapsState) -> None:
        numbers, ended, received, lost = state
        self._numbers.restore({(topic, session): seq for topic, session, seq in numbers})
        self._ended = OrderedDict()
        for session, its_numbers in ended.items():
            self._ended[session] = SequenceTracker()
            self._ended[session].restore(its_numbers)
        self.received, self.lost = dict(received), dict(lost)


_PAUSE_NS = 1_000_000_000
"""A reader that did not call `receive` for this long has paused."""
_OLD_NS = 200_000_000
"""After a pause, messages older than this are dropped as stale."""
_CATCH_UP_NS = 2_000_000_000
"""After this time it accepts messages of any age, because their times are then implausible."""
_REPORT_AFTER_NS = 1_000_000_000
"""Delay of the report after a pause: by then nearly every stream has sent a new number, so that losses are counted."""
_SLOWDOWN = 1000
"""Another machine's clock may be slower than ours by 1 / `_SLOWDOWN`."""


class Subscriber:
    """Reads envelopes of some topics in the broker's order; counts gaps and messages that cannot be decoded (garbage).

    The policy defines what happens to a reader that is too slow:

    - `block` delivers everything in order. Unread messages wait here (`queue` messages), then in the broker
      (`bus.queue`, or `bus.bulk_queue` for pictures and sound). When both are full, new messages are lost and counted
      as a gap. The broker never waits for the reader.
    - `drop_oldest` keeps the newest `queue` messages, `latest` the newest one of each stream; the broker queues
      `bus.view_queue` more. After a pause of more than a second, older messages are dropped as stale, so that the
      newest come first, and `report` says what was missed.
    """

    def __init__(
        self,
        address: Address,
        topics: list[str],
        queue: int,
        policy: Policy = "block",
        keys: Keys | None = None,
        midway: bool = False,
    ) -> None:
        """`keys`: None uses those of the address. `midway`: the reader joins sessions that may be running already;
        earlier messages do not count as lost.
        """
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.SUB)
        self._socket.set_hwm(queue)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_PAYLOAD_BYTES)
        self._backlog = ReaderQueue(policy, queue) if policy != "block" else None
        if self._backlog is not None:
            self._socket.setsockopt(zmq.RCVBUF, VIEW_BUFFER_BYTES)
        secure(self._socket, keys or address.keys)
        subscribe(self._socket, address.lane(policy, topics), topics)
        self._timeout_ms = -1
        self._newest: list[bytes] = []
        self.gaps = Gaps(midway)
        self.garbage = 0
        self._next: Envelope | None = None
        self._queue = queue
        self._looked_ns = now_ns()
        self._transit_ns: int | None = None
        """Minimum transit time of a message, including the offset of the sender's clock."""
        self._transit_at_ns = 0
        self._away_ns = self._returned_ns = 0
        self._catching_up = self._unreported = False
        self._before = (0, 0)
        self.absences = 0

    def receive(self, timeout_ms: int) -> Envelope | None:
        """The next envelope; None on timeout."""
        if self._backlog is not None:
            self._fetch(self._backlog, 0 if len(self._backlog) else timeout_ms)
            return self._backlog.pop()
        if self._next is not None:
            envelope, self._next = self._next, None
            return envelope
        if timeout_ms != self._timeout_ms:
            self._timeout_ms = self._socket.rcvtimeo = timeout_ms
        # block in recv itself: this saves a poll per message
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
        self.gaps.observe(envelope)
        return envelope

    def fileno(self) -> int:
        """The file descriptor for an event loop. It is edge-triggered: call `receive(0)` until it returns None, else
        further messages do not make it readable.
        """
        return int(self._socket.getsockopt(zmq.FD))

    def prewarm(self) -> None:
        """Decode the newest message again without effect, to load code and tables into the CPU caches."""
        with contextlib.suppress(WireError):
            wire.decode(self._newest, now_ns())

    def _fetch(self, backlog: ReaderQueue, timeout_ms: int) -> None:
        """Move available messages into the backlog, and detect pauses of this reader."""
        available = self._socket.poll(timeout_ms, zmq.POLLIN)
        at_ns = now_ns()
        away_ns = at_ns - self._looked_ns
        # without any message yet, the reader is starting, not returning from a pause
        if away_ns > _PAUSE_NS + timeout_ms * 1_000_000 and self._transit_ns is not None:
            self._return(backlog, at_ns, away_ns)
        # bounded to twice the queue, so that a fast sender cannot keep us in this loop
        for _ in range(2 * self._queue):
            if not available:
                break
            envelope = self._read(zmq.DONTWAIT)
            if envelope is not None:
                if self._catching_up and self._is_old(envelope):
                    backlog.drop(envelope, "stale")
                else:
                    self._catching_up = False
                    backlog.put(envelope)
                self._measure_transit(envelope)
            available = self._socket.poll(0, zmq.POLLIN)
        self._looked_ns = now_ns()
        if self._looked_ns - at_ns > _PAUSE_NS and self._transit_ns is not None:
            self._return(backlog, self._looked_ns, self._looked_ns - at_ns)  # paused inside the loop

    def _return(self, backlog: ReaderQueue, at_ns: int, away_ns: int) -> None:
        if not self._unreported:
            self._before = (self._lost(), self._stale())
            self._away_ns = 0
        self._away_ns += away_ns
        self._returned_ns = at_ns
        self._catching_up = self._unreported = True
        self.absences += 1
        backlog.clear()

    def _is_old(self, envelope: Envelope) -> bool:
        age_ns = envelope.received_ns - envelope.publish_ns - (self._transit_ns or 0)
        return age_ns > _OLD_NS and envelope.received_ns - self._returned_ns < _CATCH_UP_NS

    def _measure_transit(self, envelope: Envelope) -> None:
        """Track the minimum; it may grow slowly, so that a slow sender clock does not make all messages look old."""
        took_ns, at_ns = envelope.received_ns - envelope.publish_ns, envelope.received_ns
        if self._transit_ns is None:
            self._transit_ns = took_ns
        else:
            self._transit_ns = min(took_ns, self._transit_ns + (at_ns - self._transit_at_ns) // _SLOWDOWN)
        self._transit_at_ns = at_ns

    def _lost(self) -> int:
        return sum(self.gaps.lost.values())

    def _stale(self) -> int:
        return sum(reasons["stale"] for reasons in self._backlog.dropped.values()) if self._backlog is not None else 0

    def report(self) -> str:
        """One sentence per pause, a second after its end: its duration and the messages missed; else ""."""
        if not self._unreported or now_ns() - self._returned_ns < _REPORT_AFTER_NS:
            return ""
        self._unreported = False
        lost, stale = self._lost() - self._before[0], self._stale() - self._before[1]
        return (
            f"was away for {self._away_ns / 1e9:.1f} s and missed {lost + stale} messages: {lost} were no longer kept "
            f"for it, {stale} old ones it passed over"
        )

    def tally(self) -> dict[str, dict[str, int]]:
        """Message counts by topic: produced = delivered + waiting + the sum of the drop reasons.

        `produced` is computed from the sequence numbers; `lost` counts messages that never arrived.
        """
        backlog = self._backlog
        waiting: Mapping[str, int] = {}
        if backlog is not None:
            waiting = backlog.waiting()
        elif self._next is not None:
            waiting = {topics.counted_as(self._next.topic): 1}
        found: dict[str, dict[str, int]] = {}
        for topic, received in self.gaps.received.items():
            lost, waits = self.gaps.lost.get(topic, 0), waiting.get(topic, 0)
            found[topic] = {
                "produced": received + lost,
                "delivered": backlog.delivered[topic] if backlog is not None else received - waits,
                "waiting": waits,
                "lost": lost,
                **(backlog.dropped.get(topic, {}) if backlog is not None else {}),
            }
        return found

    def waiting(self) -> bool:
        """Whether an envelope is available: the next `receive` returns it without blocking."""
        if self._backlog is not None:
            if not len(self._backlog):
                self._fetch(self._backlog, 0)
            return bool(len(self._backlog))
        while self._next is None and self._socket.poll(0, zmq.POLLIN):
            self._next = self._read(zmq.DONTWAIT)
        return self._next is not None

    @property
    def ahead(self) -> bool:
        """Whether `gaps` has counted an envelope that `receive` has not returned yet."""
        return self._next is not None

    def stream(self, alive: Callable[[], bool], timeout_ms: int = 100) -> Iterator[Envelope]:
        """Envelopes as they arrive, until `alive()` returns False."""
        while alive():
            envelope = self.receive(timeout_ms)
            if envelope is not None:
                yield envelope

    def close(self) -> None:
        self._socket.close(linger=0)
        self._context.term()


def subscribe(socket: zmq.Socket[bytes], endpoint: str, wanted: list[str]) -> None:
    """Connect and subscribe to `wanted`, the clock last: a clock message then proves all other subscriptions."""
    first = [topic for topic in wanted if topic != topics.CLOCK]
    for topic in first:
        socket.setsockopt(zmq.SUBSCRIBE, topic.encode())
    socket.connect(endpoint)
    if len(first) < len(wanted):
        socket.setsockopt(zmq.SUBSCRIBE, topics.CLOCK.encode())
