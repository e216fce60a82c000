"""WriteQueue: messages between the bus and a recording; a thread writes them, so a slow disk never blocks the bus.

The queue is bounded in bytes. When it is full, `drop_oldest` drops the oldest messages of the lowest priority: first
raw streams, then the rest, never a session's open and close; a recording that lost only raw streams still replays.
`block` drops nothing and lets the bus's own queue overflow. Drops are counted by topic and reason. The counts are
written into the file every two seconds, and after the next chunk when they changed.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Mapping
from typing import Literal

from stream_mmrnn.core import topics
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.sequence import SequenceTracker
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.recording.message_counts import CLOSING, LOST, REFUSED, SLOW, UNWRITABLE, MessageCounts
from stream_mmrnn.recording.recorder import Recorder

Policy = Literal["drop_oldest", "block"]

_ENVELOPE_BYTES = 400
"""Approximate memory of a message without its payload."""
_BATCH = 256
_WAKE_S = 0.02
_RETRY_S = 0.2
_NOTE_NS = 2_000_000_000


class WriteQueue:
    """A bounded queue before a recorder, and two threads: one writes, one calls fsync."""

    def __init__(
        self,
        recorder: Recorder,
        limit_bytes: int,
        policy: Policy = "drop_oldest",
        fsync_ms: float = 1000.0,
        later_part: bool = False,
    ) -> None:
        """`later_part`: the streams began before this file, so their first sequence numbers do not indicate loss."""
        self.recorder = recorder
        self._limit, self._policy, self._later_part = limit_bytes, policy, later_part
        self._lock = threading.Lock()
        # by drop priority: raw streams, other messages, session messages (never dropped); written in arrival order
        self._lanes: tuple[deque[tuple[int, int, Envelope]], ...] = (deque(), deque(), deque())
        self._order = 0
        self._bytes = 0
        self._numbers: SequenceTracker[tuple[str, str]] = SequenceTracker()
        self._came: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()
        self._given_up: dict[str, Counter[str]] = {r: Counter() for r in (SLOW, REFUSED, CLOSING)}
        self._wall_steps: list[tuple[int, int]] = []
        self._noted = (0, 0)
        """When counts were last written into the file, and the total loss in them."""
        self._sync_trouble = ""
        self._end: Mapping[str, str] = {}
        self._deadline_ns = 0
        """Deadline of `close` for writing the rest of the queue; 0 before `close`."""
        self._finished = threading.Event()
        self._failure: BaseException | None = None
        self._whole = False
        self._fsync_s = fsync_ms / 1000
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._write_all, self._sync_now_and_then)]
        for thread in self._threads:
            thread.start()

    # ---- called by the recorder node (reads the bus) -------------------------------------------------------------

    def put(self, envelope: Envelope) -> bool:
        """Add one message, without blocking. False if the queue is full and the policy is `block`: try again.

        Raises the writer thread's exception if it failed, which is a bug of this program.
        """
        if self._failure is not None:
            raise self._failure
        payload, topic = envelope.payload, envelope.topic
        size = _ENVELOPE_BYTES + (len(payload) if isinstance(payload, bytes) else payload.nbytes)
        lane = 2 if topic in (topics.SESSION, topics.CHECKPOINT) else 0 if topic.startswith(topics.RAW) else 1
        with self._lock:
            if self._policy == "block" and self._bytes and self._bytes + size > self._limit:
                return False
            self._number(envelope)
            self._came[topic] += 1
            self._lanes[lane].append((self._order, size, envelope))
            self._order += 1
            self._bytes += size
            while self._bytes > self._limit and (old := self._lanes[0] or self._lanes[1]):
                self._give_up(old, REFUSED if self.recorder.trouble else SLOW)
        return True

    def _number(self, envelope: Envelope) -> None:
        """Count messages missing by their sequence numbers."""
        began = self._later_part or envelope.session == topics.EVERYONE
        first = envelope.seq if began else 0
        missing = self._numbers.observe((envelope.topic, envelope.session), envelope.seq, first)
        if missing:
            self._lost[envelope.topic] += missing

    def _give_up(self, lane: deque[tuple[int, int, Envelope]], reason: str) -> None:
        _, size, envelope = lane.popleft()
        self._bytes -= size
        self._given_up[reason][envelope.topic] += 1

    def note_wall_step(self, at_ns: int, step_ns: int) -> None:
        """Record that the wall clock was set."""
        with self._lock:
            self._wall_steps.append((at_ns, step_ns))

    @property
    def counts(self) -> dict[str, int]:
        """Totals for the status message."""
        with self._lock:
            return {
                "messages": self.recorder.messages,
                "bytes": self.recorder.bytes,
                "lost": self._lost.total(),
                "dropped": sum(c.total() for c in self._given_up.values()),
                "refused": self.recorder.unwritable,
            }

    @property
    def trouble(self) -> str:
        """One sentence about a problem with the disk, unchanged while it lasts; "" without one."""
        name = self.recorder.path.name
        if why := self.recorder.trouble:
            return (
                f"{name} cannot be written ({why}) and ends here for now; it goes on when the disk takes more, what "
                "waits too long is dropped and counted"
            )
        if self._sync_trouble:
            return f"the disk may lose what is in {name} ({self._sync_trouble}); record to another disk"
        if any(self._given_up.values()):
            return f"the disk did not keep up: {name} lacks messages, and says which"
        return ""

    def close(self, end: Mapping[str, str], timeout_s: float) -> bool:
        """Write the rest of the queue, for at most `timeout_s`, and finish the file with `end`. False if the disk
        refused to write the end.
        """
        self._end = end
        self._deadline_ns = now_ns() + int(timeout_s * 1e9)
        self._threads[0].join()
        self._finished.set()
        if self._failure is not None:
            raise self._failure
        return self._whole

    # ---- the threads ---------------------------------------------------------------------------------------------

    def _write_all(self) -> None:
        try:
            while not self._finished.is_set():
                self._finished.wait(_RETRY_S if self.recorder.trouble else _WAKE_S)
                ending = self._deadline_ns > 0  # read before the queue is emptied: no message is added after it is set
                while not self.recorder.trouble and self._write_some():
                    pass
                self._flush()
                if ending and (now_ns() > self._deadline_ns or not (self.recorder.trouble or self._bytes)):
                    self._finish()
                    return
        except BaseException as e:
            self._failure = e

    def _write_some(self) -> bool:
        """Write a batch of messages; False if the queue was empty."""
        batch: list[Envelope] = []
        first, second, third = self._lanes
        with self._lock:
            while len(batch) < _BATCH:
                lane = min((q for q in (first, second, third) if q), key=_order_of, default=None)
                if lane is None:
                    break
                _, size, envelope = lane.popleft()
                self._bytes -= size
                batch.append(envelope)
        for envelope in batch:
            self.recorder.write(envelope)
        self._flush()
        return bool(batch)

    def _flush(self) -> None:
        at_ns = now_ns()
        if not self.recorder.flush_due(at_ns) or self.recorder.trouble:
            return
        with self._lock:
            steps, self._wall_steps = self._wall_steps, []
        for step in steps:
            self.recorder.note_wall_step(*step)
        counts = self.message_counts()
        noted_ns, noted_lost = self._noted
        if at_ns - noted_ns >= _NOTE_NS or counts.lost != noted_lost or self.recorder.news:
            self._noted = (at_ns, counts.lost)
            self.recorder.note(counts.as_metadata(), at_ns)

    def message_counts(self) -> MessageCounts:
        """Current counts. Exact when the writer thread calls it, between two messages."""
        with self._lock:
            recorded, refused = dict(self.recorder.counts), dict(self.recorder.refused)
            reasons = {LOST: self._lost, UNWRITABLE: refused, **self._given_up}
            dropped: dict[str, dict[str, int]] = {}
            for reason, topics_lost in reasons.items():
                for topic, n in topics_lost.items():
                    if n:
                        dropped.setdefault(topic, {})[reason] = n
            produced = dict(self._came + self._lost)
            waiting = Counter(e.topic for lane in self._lanes for _, _, e in lane)
        return MessageCounts(produced, recorded, dict(waiting), dropped)

    def _finish(self) -> None:
        with self._lock:
            for lane in self._lanes:
                while lane:
                    self._give_up(lane, CLOSING)
        self._whole = self.recorder.close({**self.message_counts().as_metadata(), **self._end})

    def _sync_now_and_then(self) -> None:
        while not self._finished.wait(self._fsync_s):
            try:
                self.recorder.sync()
                self._sync_trouble = ""
            except ValueError:  # the file is closed
                return
            except OSError as e:
                self._sync_trouble = e.strerror or str(e)


def _order_of(lane: deque[tuple[int, int, Envelope]]) -> int:
    return lane[0][0]
