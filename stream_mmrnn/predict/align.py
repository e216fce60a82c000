"""Aligner: envelopes -> ticks. Pure: no clock, no I/O, no model; the same sequence in gives the same ticks out.

Tick k covers ((k-1)T, kT] of event time, one grid for all sessions. It closes when the watermark reaches kT:

    watermark = min over the dense streams of max(newest event time of the stream, clock - its lateness)

which, with one lateness for all, is DESIGN's max(oldest of the newest, clock - lateness). "Newest" counts only messages
before the first gap in the sequence numbers, so the aligner also waits for a message that arrives out of order. The
clock is a topic: the time is that of the last clock message.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from stream_mmrnn.core import config, topics
from stream_mmrnn.core.errors import SessionError
from stream_mmrnn.core.types import Envelope, FloatArray, ModalitySpec, Stamps, Tick

_MAX_PENDING = 1024
_MAX_PER_TICK = 4096
"""Limit on the samples of one stream in one open tick."""
_MAX_JUMP_NS = 600_000_000_000
"""Ten minutes: a longer clock jump needs a second message that confirms it, and the ticks in between are skipped."""
_NEVER = -(2**62)
_FLOAT32 = np.dtype(np.float32)
_absolute, _less, _add, _divide = np.absolute, np.less, np.add, np.divide
_LARGEST = np.array(1e12, np.float32)
"""Larger values are quarantined: a finite value near the float32 limit turns a recurrent state into NaN for good."""
_COUNTS = tuple(np.array(n, np.float32) for n in range(64))
"""Divisors as 0-d arrays: numpy handles them twice as fast as its own scalars."""

OpenSample = tuple[int, int, FloatArray]
"""A sample in an open tick: event time, sequence number, features."""


def _event_order(sample: OpenSample) -> tuple[int, int]:
    return sample[0], sample[1]


class StreamCounts(msgspec.Struct):
    """Account of a stream's feature messages: received = used + dropped (by the reasons below) + in open ticks."""

    received: int = 0
    used: int = 0
    late: int = 0
    """Dense stream, arrived after its tick had closed: dropped."""
    duplicate: int = 0
    quarantined: int = 0
    """Event time too far from the clock, wrong size, a value that is not finite or too large, or another encoder."""
    superseded: int = 0
    """Replaced by a newer sample of the same tick (reduction `last`, or more than `stack` samples)."""
    unclosed: int = 0
    """Its tick was still open when the session ended."""
    outside: int = 0
    """Its session was not open."""
    late_joined: int = 0
    """Sparse stream, late: joined the next open tick. Counted in `used`; not a loss."""
    non_monotonic: int = 0
    """Its event time was not newer than the one before; not a loss by itself."""

    def dropped(self) -> dict[str, int]:
        """Counts by reason, without zeros."""
        names = ("late", "duplicate", "quarantined", "superseded", "unclosed", "outside")
        return {n: getattr(self, n) for n in names if getattr(self, n)}


class StreamState(msgspec.Struct, frozen=True, array_like=True):
    """Serializable state of one stream of a session."""

    next_seq: int
    pending: list[tuple[int, int]]
    seen: list[int]
    newest_ns: int
    head_ns: int
    last_used_ns: int
    open: dict[int, list[tuple[int, int, bytes]]]


class SessionState(msgspec.Struct, frozen=True, array_like=True):
    """Serializable state of one session."""

    streams: dict[str, StreamState]
    expected: list[str]
    clock_ns: int
    closed: int
    end_ns: int
    due_ns: int
    unsettled: bool
    leapt_ns: int = _NEVER


class AlignerState(msgspec.Struct, frozen=True):
    """Serializable state of an aligner (msgspec): see `Aligner.snapshot` and `Aligner.restore`."""

    sessions: dict[str, SessionState]
    counts: dict[str, StreamCounts]
    malformed: int
    misfits: dict[str, str]


class _Stream:
    """One modality of one session."""

    __slots__ = (
        "all_true",
        "counts",
        "dense",
        "encoder",
        "expected",
        "head_ns",
        "in_range",
        "last_used_ns",
        "lateness_ns",
        "magnitudes",
        "name",
        "newest_ns",
        "next_seq",
        "open",
        "pending",
        "reduction",
        "seen",
        "shape",
        "spec",
        "zeros",
    )

    def __init__(
        self, spec: ModalitySpec, modality: topics.Modality, lateness_ns: int, counts: StreamCounts, zeros: FloatArray
    ) -> None:
        self.spec, self.name, self.encoder = spec, spec.name, spec.encoder
        self.counts, self.zeros = counts, zeros
        self.dense = modality.dense
        self.reduction = spec.reduction or modality.reduction
        self.shape = (spec.size // spec.stack,)
        self.lateness_ns = lateness_ns
        self.expected = True
        self.next_seq = 0
        self.pending: list[tuple[int, int]] = []
        """Heap of (seq, event_ns) after a gap in the sequence numbers."""
        self.seen: set[int] = set()
        """Recent sequence numbers of this publisher: they distinguish a duplicate from a message out of order."""
        self.newest_ns = _NEVER
        """Newest event time before the first gap."""
        self.head_ns = _NEVER
        """Newest event time of all."""
        self.last_used_ns = _NEVER
        self.open: dict[int, list[OpenSample]] = {}
        """Samples by tick index, in event order."""
        self.magnitudes = np.empty(self.shape, np.float32)
        """Scratch buffer: absolute values of the last sample."""
        self.in_range = np.ones(self.shape, np.bool_)
        """Scratch buffer: which of them are below the limit."""
        self.all_true = self.in_range.tobytes()

    def order(self, seq: int, event_ns: int) -> bool:
        """Record a sequence number; False for a duplicate."""
        if seq < self.next_seq and event_ns > self.head_ns:
            # the publisher restarted: its numbers begin again at 0, its time goes on
            self.next_seq = seq
            self.pending.clear()
            self.seen.clear()
        if seq in self.seen or seq < self.next_seq - _MAX_PENDING:
            return False
        self.seen.add(seq)
        self.forget()
        self.head_ns = max(self.head_ns, event_ns)
        if seq == self.next_seq and not self.pending:
            self.next_seq = seq + 1  # in order: the usual case
            self.newest_ns = max(self.newest_ns, event_ns)
        elif seq >= self.next_seq:
            heapq.heappush(self.pending, (seq, event_ns))
            if len(self.pending) > _MAX_PENDING:
                self.next_seq = self.pending[0][0]
            self._advance()
        return True

    def state(self) -> StreamState:
        return StreamState(
            self.next_seq,
            list(self.pending),
            sorted(self.seen),  # the same state gives the same bytes
            self.newest_ns,
            self.head_ns,
            self.last_used_ns,
            {k: [(at, seq, values.tobytes()) for at, seq, values in samples] for k, samples in self.open.items()},
        )

    def restore(self, state: StreamState) -> None:
        """Continue from `state`; raises SessionError if its vectors have another size."""
        size = self.shape[0] * _FLOAT32.itemsize
        if any(len(values) != size for samples in state.open.values() for _, _, values in samples):
            raise SessionError(f"the aligner's state holds no vectors of {self.shape[0]} numbers for {self.name!r}")
        self.next_seq, self.newest_ns, self.head_ns = state.next_seq, state.newest_ns, state.head_ns
        self.last_used_ns = state.last_used_ns
        self.pending = list(state.pending)
        heapq.heapify(self.pending)  # the snapshot may come from outside: do not rely on its order
        self.seen = set(state.seen)
        self.open = {
            k: [(at, seq, np.frombuffer(values, _FLOAT32)) for at, seq, values in samples]
            for k, samples in state.open.items()
        }

    def forget(self) -> None:
        """Bound the set of sequence numbers: `order` refuses numbers far behind anyway."""
        if len(self.seen) > 4 * _MAX_PENDING:
            self.seen = {s for s in self.seen if s >= self.next_seq - _MAX_PENDING}

    def _advance(self) -> None:
        while self.pending and self.pending[0][0] <= self.next_seq:
            seq, event_ns = heapq.heappop(self.pending)
            self.next_seq = seq + 1
            self.newest_ns = max(self.newest_ns, event_ns)

    def give_up_gaps(self, horizon_ns: int) -> None:
        """Stop waiting for missing messages whose successors are older than `horizon_ns`."""
        while self.pending and self.pending[0][1] <= horizon_ns:
            self.next_seq = self.pending[0][0]
            self._advance()

    def reduce(self, samples: list[OpenSample]) -> FloatArray:
        """One vector from the samples of a tick."""
        count, counts = len(samples), self.counts
        newest_ns, _, newest = samples[-1]
        if newest_ns > self.last_used_ns:
            self.last_used_ns = newest_ns
        reduction = self.reduction
        if reduction == "last":
            counts.used += 1
            counts.superseded += count - 1
            return newest
        if reduction == "stack":
            kept = samples[-self.spec.stack :]
            counts.used += len(kept)
            counts.superseded += count - len(kept)
            out = np.zeros(self.spec.size, np.float32)
            out[self.spec.size - len(kept) * self.shape[0] :] = np.concatenate([s[2] for s in kept])
            return out
        counts.used += count
        if count == 1:
            return newest
        total: FloatArray = _add(samples[0][2], samples[1][2])
        for sample in samples[2:]:
            _add(total, sample[2], total)
        if reduction == "mean":
            _divide(total, _COUNTS[count] if count < len(_COUNTS) else np.array(count, np.float32), total)
        return total


class _Session:
    """The streams of one session, its open ticks, and the earliest event that can close the next tick.

    Nearly all messages close no tick, and computing the watermark over all streams for each message would be most of
    the aligner's work. So the session caches the condition: a dense stream reaches `end_ns`, or the clock reaches
    `due_ns`. The cache is valid until then, unless the session is `unsettled`.
    """

    __slots__ = (
        "bounds", "by_topic", "clock_ns", "closed", "due_ns", "end_ns", "expected", "leapt_ns", "name", "soonest_ns",
        "streams", "unsettled",
    )  # fmt: skip

    def __init__(self, name: str, streams: list[_Stream], closed: int, tick_ns: int, clock_ns: int) -> None:
        self.name = name
        self.streams = streams
        self.by_topic = {topics.feature(s.name): s for s in streams}
        self.clock_ns = clock_ns
        """Newest clock time. Per session: clock messages from before it opened are not in its recording."""
        self.leapt_ns = _NEVER
        """The last clock time that was too far ahead and needs confirmation."""
        self.soonest_ns = min(s.lateness_ns for s in streams)
        """Smallest lateness: the clock cannot close a tick earlier than this after the tick's end."""
        self.closed = closed
        """Index of the last closed tick."""
        self.until((closed + 1) * tick_ns)
        self.expect([s.name for s in streams])

    def expect(self, names: Sequence[str]) -> None:
        """Set the streams that the watermark waits for."""
        for stream in self.streams:
            stream.expected = stream.name in names
        self.expected = [s for s in self.streams if s.expected]
        self.bounds = [s for s in self.expected if s.dense or s.lateness_ns]
        """The streams that can hold the watermark back."""
        self.unsettle()

    def state(self) -> SessionState:
        return SessionState(
            {s.name: s.state() for s in self.streams},
            [s.name for s in self.expected],
            self.clock_ns,
            self.closed,
            self.end_ns,
            self.due_ns,
            self.unsettled,
            self.leapt_ns,
        )

    def restore(self, state: SessionState) -> None:
        """Continue from `state`; raises SessionError if it has other streams."""
        if state.streams.keys() != {s.name for s in self.streams}:
            raise SessionError(
                f"the aligner's state of {self.name!r} is of {', '.join(state.streams)}, "
                f"the model takes {', '.join(s.name for s in self.streams)}"
            )
        for stream in self.streams:
            stream.restore(state.streams[stream.name])
        self.expect(state.expected)
        self.clock_ns, self.closed = state.clock_ns, state.closed
        self.end_ns, self.due_ns, self.unsettled = state.end_ns, state.due_ns, state.unsettled
        self.leapt_ns = state.leapt_ns

    def unsettle(self) -> None:
        """Invalidate the cache (a gap, or the expected streams changed): any message may close a tick."""
        self.unsettled = True
        self.until(self.end_ns)

    def skip_to(self, index: int, tick_ns: int) -> None:
        """Skip the ticks up to `index`; their samples go into the next tick."""
        if index <= self.closed:
            return
        self.closed = index
        self.until((index + 1) * tick_ns)
        for stream in self.streams:
            skipped = [sample for k in sorted(stream.open) if k <= index for sample in stream.open.pop(k)]
            if skipped:
                stream.open[index + 1] = skipped + stream.open.get(index + 1, [])

    def until(self, end_ns: int) -> None:
        """Set the end of the next tick to close."""
        self.end_ns = end_ns
        self.due_ns = end_ns + self.soonest_ns

    def watermark_ns(self) -> int:
        """How far event time is complete. Updates the cached condition if the next tick cannot close yet."""
        clock_ns, end_ns = self.clock_ns, self.end_ns
        if self.unsettled:
            self.unsettled = not self.bounds
            for stream in self.expected:
                if stream.pending:
                    stream.give_up_gaps(clock_ns - stream.lateness_ns)
                    if stream.pending:
                        self.unsettled = True
        if not self.bounds:
            return clock_ns
        watermark_ns, due_ns = 2**63, end_ns + self.soonest_ns
        for stream in self.bounds:
            reached_ns = clock_ns - stream.lateness_ns
            if stream.dense and stream.newest_ns > reached_ns:
                reached_ns = stream.newest_ns
            if reached_ns < watermark_ns:
                watermark_ns = reached_ns
            if reached_ns < end_ns and end_ns + stream.lateness_ns > due_ns:
                due_ns = end_ns + stream.lateness_ns
        self.due_ns = end_ns + self.soonest_ns if self.unsettled else due_ns
        return watermark_ns


class Aligner:
    """Turns the messages of any number of sessions into ticks."""

    def __init__(
        self,
        modalities: Sequence[ModalitySpec],
        tick_ns: int,
        lateness_ns: Mapping[str, int],
        max_ahead_ns: int = 500_000_000,
        max_behind_ns: int = 10_000_000_000,
    ) -> None:
        """`modalities`: those of the model's contract; `lateness_ns`: by modality."""
        self.tick_ns = tick_ns
        self.counts = {m.name: StreamCounts() for m in modalities}
        self.malformed = 0
        """Session messages that could not be decoded, and unconfirmed clock jumps."""
        self.misfits: dict[str, str] = {}
        """By modality, the reason of its first quarantined message."""
        self._specs = {m.name: m for m in modalities}
        self._lateness_ns = dict(lateness_ns)
        self._max_ahead_ns, self._max_behind_ns = max_ahead_ns, max_behind_ns
        self._sessions: dict[str, _Session] = {}
        self._feature_topics = {topics.feature(name): name for name in self._specs}
        self._zeros: dict[str, FloatArray] = {}
        for m in modalities:
            self._zeros[m.name] = np.zeros(m.size, np.float32)
            self._zeros[m.name].setflags(write=False)

    @classmethod
    def of(cls, modalities: Sequence[ModalitySpec], tick_ns: int, settings: config.Align) -> Aligner:
        """An aligner for a model, with the settings of a session."""
        return cls(
            modalities,
            tick_ns,
            settings.lateness_ns(),
            round(settings.max_ahead_ms * 1e6),
            round(settings.max_behind_ms * 1e6),
        )

    def __contains__(self, session: str) -> bool:
        return session in self._sessions

    def open(self, session: str, event_ns: int, expected: Sequence[str] | None = None) -> None:
        """Begin a session; its first tick contains `event_ns`. A session that is open already starts over."""
        if session in self._sessions:
            self._discard(session)
        self._sessions[session] = self._new(session, event_ns)
        if expected is not None:
            self.expect(session, expected)

    def _new(self, session: str, event_ns: int) -> _Session:
        streams = [
            _Stream(spec, topics.MODALITIES[name], self._lateness_ns.get(name, 0), self.counts[name], self._zeros[name])
            for name, spec in self._specs.items()
        ]
        return _Session(session, streams, event_ns // self.tick_ns, self.tick_ns, event_ns)

    def snapshot(self) -> AlignerState:
        """The full state between two messages: after `restore`, the same messages give the same ticks and counts."""
        return AlignerState(
            {name: session.state() for name, session in self._sessions.items()},
            {name: msgspec.structs.replace(counts) for name, counts in self.counts.items()},
            self.malformed,
            dict(self.misfits),
        )

    def restore(self, state: AlignerState) -> None:
        """Replace the current state by a snapshot.

        Raises:
            SessionError: it has other modalities; the aligner is unchanged.

        """
        if state.counts.keys() != self.counts.keys():
            raise SessionError(
                f"the aligner's state is of {', '.join(state.counts)}, the model takes {', '.join(self.counts)}"
            )
        before = self.counts
        self.counts = {name: msgspec.structs.replace(state.counts[name]) for name in before}
        try:
            sessions = {name: self._new(name, 0) for name in state.sessions}
            for name, session in sessions.items():
                session.restore(state.sessions[name])
        except SessionError:
            self.counts = before
            raise
        self._sessions = sessions
        self.malformed, self.misfits = state.malformed, dict(state.misfits)

    def expect(self, session: str, expected: Sequence[str]) -> None:
        """Set the streams that the session has now; the watermark does not wait for others."""
        if session in self._sessions:
            self._sessions[session].expect(expected)

    def close(self, session: str, event_ns: int, closed: Stamps) -> list[Tick]:
        """End a session: the ticks up to `event_ns` close with the data that they have."""
        if session not in self._sessions:
            return []
        open_session = self._sessions[session]
        until_ns = min(event_ns, open_session.clock_ns + _MAX_JUMP_NS)
        ticks = self._close_until(open_session, until_ns // self.tick_ns, closed)
        self._discard(session)
        return ticks

    def _discard(self, session: str) -> None:
        for stream in self._sessions.pop(session).streams:
            stream.counts.unclosed += sum(len(s) for s in stream.open.values())

    def push(self, envelope: Envelope) -> list[Tick]:
        """Process one message; returns the ticks that it closes, in order."""
        topic, event_ns = envelope.topic, envelope.event_ns
        if topic == topics.CLOCK:
            ticks: list[Tick] = []
            for session in self._sessions.values():
                if event_ns > session.clock_ns:
                    if event_ns - session.clock_ns > _MAX_JUMP_NS and not self._leap(session, event_ns):
                        continue
                    session.clock_ns = event_ns
                if session.clock_ns >= session.due_ns:
                    ticks += self._advance(session, envelope)
            return ticks
        open_session = self._sessions.get(envelope.session)
        if open_session is None:
            if topic in self._feature_topics:
                counts = self.counts[self._feature_topics[topic]]
                counts.received += 1
                counts.outside += 1
            return []
        stream = open_session.by_topic.get(topic)
        if stream is None:
            return []
        newest_ns, end_ns = stream.newest_ns, open_session.end_ns
        if (
            self._accept(open_session, stream, envelope, event_ns)
            and stream.dense
            and stream.newest_ns >= end_ns
            and (newest_ns < end_ns or open_session.unsettled)
        ):
            return self._advance(open_session, envelope)
        return []

    def _leap(self, session: _Session, event_ns: int) -> bool:
        """Whether to accept a clock jump: yes if the message before jumped to about the same time.

        A machine may have been suspended for an hour, but a single wrong value must not create a million ticks.
        """
        confirmed = 0 <= event_ns - session.leapt_ns <= self._max_ahead_ns
        session.leapt_ns = event_ns
        if confirmed:
            session.skip_to((event_ns - _MAX_JUMP_NS) // self.tick_ns, self.tick_ns)
        else:
            self.malformed += 1
        return confirmed

    def _accept(self, session: _Session, stream: _Stream, envelope: Envelope, event_ns: int) -> bool:
        """Put a feature vector into its tick; False if it was dropped."""
        counts = stream.counts
        counts.received += 1
        payload, seq = envelope.payload, envelope.seq
        if (
            isinstance(payload, bytes)
            or payload.dtype != _FLOAT32
            or payload.shape != stream.shape
            # comparing bytes takes a quarter of the time of all()
            or _less(_absolute(payload, stream.magnitudes), _LARGEST, stream.in_range).tobytes() != stream.all_true
            or (stream.encoder and envelope.origin != stream.encoder)
            or not -self._max_behind_ns <= event_ns - session.clock_ns <= self._max_ahead_ns
        ):
            counts.quarantined += 1
            if stream.name not in self.misfits:
                self.misfits[stream.name] = self._misfit(stream, envelope, session.clock_ns)
            return False
        if seq == stream.next_seq and event_ns > stream.head_ns and not stream.pending:
            # in order: the usual case
            stream.next_seq = seq + 1
            stream.head_ns = stream.newest_ns = event_ns
            stream.seen.add(seq)
            if not seq % _MAX_PENDING:
                stream.forget()
        else:
            previous_ns = stream.head_ns
            if not stream.order(seq, event_ns):
                counts.duplicate += 1
                return False
            if event_ns <= previous_ns:
                counts.non_monotonic += 1
            if stream.pending:
                session.unsettle()
        index = -(-event_ns // self.tick_ns)
        if index <= session.closed:
            if stream.dense:
                counts.late += 1
                return False
            counts.late_joined += 1
            index = session.closed + 1
        samples = stream.open.get(index)
        if samples is None:
            stream.open[index] = [(event_ns, seq, payload)]
        elif len(samples) >= _MAX_PER_TICK:
            counts.quarantined += 1
            self.misfits.setdefault(stream.name, f"more than {_MAX_PER_TICK} samples came for one tick")
            return False
        else:
            samples.append((event_ns, seq, payload))
            if event_ns <= samples[-2][0]:
                samples.sort(key=_event_order)
        return True

    @staticmethod
    def _misfit(stream: _Stream, envelope: Envelope, clock_ns: int) -> str:
        """The reason why a message is quarantined."""
        payload, spec = envelope.payload, stream.spec
        if isinstance(payload, bytes) or payload.dtype != _FLOAT32 or payload.ndim != 1:
            return f"its features are no vector of float32, the model takes {stream.shape[0]} numbers"
        if payload.shape != stream.shape:
            return f"its features have {len(payload)} numbers, the model takes {stream.shape[0]}"
        if not np.isfinite(payload).all():
            return "its features hold a number that is not finite"
        if not (np.absolute(payload) < _LARGEST).all():
            return f"its features hold a number beyond {float(_LARGEST):g}"
        if spec.encoder and envelope.origin != spec.encoder:
            return f"its encoder is {envelope.origin or 'not named'}, the model was trained with {spec.encoder}"
        return f"its stamp is {(envelope.event_ns - clock_ns) / 1e9:+.3f} s from the clock"

    def _advance(self, session: _Session, cause: Envelope) -> list[Tick]:
        index = session.watermark_ns() // self.tick_ns
        if index <= session.closed:
            return []
        return self._close_until(session, index, stamps_of(cause))

    def _close_until(self, session: _Session, index: int, closed: Stamps) -> list[Tick]:
        ticks = []
        for k in range(session.closed + 1, index + 1):
            end_ns = k * self.tick_ns
            features, present, age_ns = {}, {}, {}
            for stream in session.streams:
                name = stream.name
                samples = stream.open.pop(k, None)
                if samples is None:
                    features[name], present[name] = stream.zeros, False
                else:
                    features[name], present[name] = stream.reduce(samples), True
                age_ns[name] = end_ns - stream.last_used_ns if stream.last_used_ns != _NEVER else -1
            ticks.append(Tick(session.name, k, end_ns, features, present, age_ns, closed))
        if index > session.closed:
            session.closed = index
            session.until((index + 1) * self.tick_ns)
        return ticks


def stamps_of(envelope: Envelope) -> Stamps:
    """The times of a message, for the tick that it closes."""
    return Stamps(envelope.event_ns, envelope.capture_ns, envelope.publish_ns, envelope.received_ns, envelope.topic)
