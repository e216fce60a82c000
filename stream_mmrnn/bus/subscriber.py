"""The subscriber: envelopes in the order of the broker, counts of what is missing, and the queue of a slow reader.

Of messages it understands only the clock, which proves the connection, and the begin and end of sessions.
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
from stream_mmrnn.core.config import Policy
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.sequence import SequenceTracker
from stream_mmrnn.core.types import Envelope, Payload

GapsState = tuple[Numbers, dict[str, dict[str, int]], dict[str, int], dict[str, int]]
"""The next number of each stream; that of the streams of sessions that have ended, by session and topic; received;
lost."""


class Gaps:
    """Per topic, what a reader received and what is missing by the sequence numbers. Bounded; it follows sessions that
    begin and end, so that a new session's streams begin at 0.
    """

    def __init__(self, midway: bool = False) -> None:
        """`midway`: the reader joined while sessions were running; what they had sent before is not lost."""
        self._midway = midway
        self._numbers: SequenceTracker[tuple[str, str]] = SequenceTracker(MAX_STREAMS)
        self._ended: OrderedDict[str, SequenceTracker[str]] = OrderedDict()
        """Of sessions that have ended, by topic: messages may still be on their way."""
        self.received: dict[str, int] = {}
        """By topic; all statuses count as one."""
        self.lost: dict[str, int] = {}

    def observe(self, envelope: Envelope) -> None:
        topic, session, seq = envelope.topic, envelope.session, envelope.seq
        key = (topic, session)
        # a stream without a session began before this reader did; a session's streams begin with it, at 0
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
        """Of sessions that have ended, the numbers of the last `MAX_ENDED` are kept."""
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
            found = {topic: self._numbers.pop((topic, session)) for topic in topics.TOPICS}
            ended.restore({topic: seq for topic, seq in found.items() if seq is not None})
            while len(self._ended) > MAX_ENDED:
                self._ended.popitem(last=False)

    def snapshot(self) -> GapsState:
        """All of it as a value."""
        numbers = [(topic, session, seq) for (topic, session), seq in self._numbers.numbers().items()]
        ended = {session: tracker.numbers() for session, tracker in self._ended.items()}
        return numbers, ended, self.received, self.lost

    def restore(self, state: GapsState) -> None:
        numbers, ended, received, lost = state
        self._numbers.restore({(topic, session): seq for topic, session, seq in numbers})
        self._ended = OrderedDict()
        for session, kept in ended.items():
            self._ended[session] = SequenceTracker()
            self._ended[session].restore(kept)
        self.received, self.lost = dict(received), dict(lost)


_AWAY_NS = 1_000_000_000
"""A reader that did not receive for so long was away."""
_OLD_NS = 200_000_000
"""On its return, messages that are older are skipped."""
_CATCH_UP_NS = 2_000_000_000
"""At the latest then it takes what comes, however old it says it is: its stamps make no sense."""
_TOLD_AFTER_NS = 1_000_000_000
"""By then every stream but the rarest has said what it is at, so that what is missing can be counted."""
_SLOWDOWN = 1000
"""The clock of another machine may be slower than ours by one part in so many."""


class Subscriber:
    """Reads envelopes of some topics in the broker's order; counts gaps and garbage.

    What happens to a reader that is too slow is its policy:

    - `block` takes everything in order: what it has not read waits here (`queue` messages), then in the broker
      (`bus.queue`, or `bus.bulk_queue` where pictures or sound are among it). What comes when both are full is lost,
      and counted as a gap. No process waits for it.
    - `drop_oldest` keeps the newest `queue` messages, `latest` the newest one of each stream; the broker holds
      `bus.view_queue` more. Where it was away for longer than a second, what is from before its return is dropped, so
      that the newest comes first, and `report` says what it missed.
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
        """`keys`: others than those of the address, if any. `midway`: it comes to sessions that may have begun, and
        misses nothing of what was before.
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
        self._way_ns: int | None = None
        """How long a message takes at best, and by how much the sender's clock is off."""
        self._way_at_ns = 0
        self._away_ns = self._returned_ns = 0
        self._catching_up = self._untold = False
        self._before = (0, 0)
        self.absences = 0

    def receive(self, timeout_ms: int) -> Envelope | None:
        """The next envelope, or None after `timeout_ms` without one."""
        if self._backlog is not None:
            self._fetch(self._backlog, 0 if len(self._backlog) else timeout_ms)
            return self._backlog.pop()
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
        self.gaps.observe(envelope)
        return envelope

    def fileno(self) -> int:
        """For an event loop: readable when something may have come. Only after `receive(0)` gave None is a further
        message sure to show here.
        """
        return int(self._socket.getsockopt(zmq.FD))

    def prewarm(self) -> None:
        """Process the newest message again without effect: code and stream tables are then in the caches."""
        with contextlib.suppress(WireError):
            wire.decode(self._newest, now_ns())

    def _fetch(self, backlog: ReaderQueue, timeout_ms: int) -> None:
        """Put what waits into the backlog, and notice where we were away."""
        there = self._socket.poll(timeout_ms, zmq.POLLIN)
        at_ns = now_ns()
        away_ns = at_ns - self._looked_ns
        # who has not had anything yet is starting, not away
        if away_ns > _AWAY_NS + timeout_ms * 1_000_000 and self._way_ns is not None:
            self._return(backlog, at_ns, away_ns)
        # twice what can be in the queue: more is more than we could ever catch up with
        for _ in range(2 * self._queue):
            if not there:
                break
            envelope = self._read(zmq.DONTWAIT)
            if envelope is not None:
                if self._catching_up and self._is_old(envelope):
                    backlog.drop(envelope, "stale")
                else:
                    self._catching_up = False
                    backlog.put(envelope)
                self._measure_way(envelope)
            there = self._socket.poll(0, zmq.POLLIN)
        self._looked_ns = now_ns()
        if self._looked_ns - at_ns > _AWAY_NS and self._way_ns is not None:
            self._return(backlog, self._looked_ns, self._looked_ns - at_ns)  # stopped in the middle of it

    def _return(self, backlog: ReaderQueue, at_ns: int, away_ns: int) -> None:
        if not self._untold:
            self._before = (self._lost(), self._stale())
            self._away_ns = 0
        self._away_ns += away_ns
        self._returned_ns = at_ns
        self._catching_up = self._untold = True
        self.absences += 1
        backlog.clear()

    def _is_old(self, envelope: Envelope) -> bool:
        age_ns = envelope.received_ns - envelope.publish_ns - (self._way_ns or 0)
        return age_ns > _OLD_NS and envelope.received_ns - self._returned_ns < _CATCH_UP_NS

    def _measure_way(self, envelope: Envelope) -> None:
        """The shortest so far; it grows slowly, so that a sender's slow clock does not make all it sends old."""
        took_ns, at_ns = envelope.received_ns - envelope.publish_ns, envelope.received_ns
        if self._way_ns is None:
            self._way_ns = took_ns
        else:
            self._way_ns = min(took_ns, self._way_ns + (at_ns - self._way_at_ns) // _SLOWDOWN)
        self._way_at_ns = at_ns

    def _lost(self) -> int:
        return sum(self.gaps.lost.values())

    def _stale(self) -> int:
        return sum(reasons["stale"] for reasons in self._backlog.dropped.values()) if self._backlog is not None else 0

    def report(self) -> str:
        """Once after each absence, a second after the return: how long it was and what it cost; else ""."""
        if not self._untold or now_ns() - self._returned_ns < _TOLD_AFTER_NS:
            return ""
        self._untold = False
        lost, stale = self._lost() - self._before[0], self._stale() - self._before[1]
        return (
            f"was away for {self._away_ns / 1e9:.1f} s and missed {lost + stale} messages: {lost} were no longer kept "
            f"for it, {stale} old ones it passed over"
        )

    def tally(self) -> dict[str, dict[str, int]]:
        """By topic, in messages: produced = delivered + waiting + each reason for which one was dropped.

        `produced` is what the sequence numbers say was sent; `lost` what never reached us.
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
        """Whether an envelope is there already: the next `receive` gives it at once."""
        if self._backlog is not None:
            if not len(self._backlog):
                self._fetch(self._backlog, 0)
            return bool(len(self._backlog))
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


def subscribe(socket: zmq.Socket[bytes], endpoint: str, wanted: list[str]) -> None:
    """Connect and subscribe to `wanted`; to the clock last, so that a clock message proves the other subscriptions."""
    first = [topic for topic in wanted if topic != topics.CLOCK]
    for topic in first:
        socket.setsockopt(zmq.SUBSCRIBE, topic.encode())
    socket.connect(endpoint)
    if len(first) < len(wanted):
        socket.setsockopt(zmq.SUBSCRIBE, topics.CLOCK.encode())
