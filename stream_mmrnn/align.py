"""Aligner: envelopes -> ticks. Pure: no clock, no I/O, no model; the same sequence in gives the same ticks out.

Tick k covers ((k-1)T, kT] of event time, one grid for all sessions. It closes when the watermark reaches kT:

    watermark = min over the dense streams of max(newest event time of the stream, clock - its lateness)

which, with one lateness for all, is DESIGN's max(oldest of the newest, clock - lateness). "Newest" counts only what
came without a gap in the sequence numbers, so a message that was overtaken on its way is waited for like any other.
The clock is a topic: it is whatever the last clock message said.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from stream_mmrnn import config, topics
from stream_mmrnn.types import Envelope, FloatArray, ModalitySpec, Stamps, Tick

_MAX_PENDING = 1024
_NEVER = -(2**62)
_FLOAT32 = np.dtype(np.float32)


class StreamCounts(msgspec.Struct):
    """Where every received feature message of a stream went: received = used + the reasons below + waiting."""

    received: int = 0
    used: int = 0
    late: int = 0
    """Dense, after its tick had closed: dropped."""
    duplicate: int = 0
    quarantined: int = 0
    """A stamp too far from the clock, a wrong size, a number that is not finite, or another encoder."""
    superseded: int = 0
    """A newer sample of the same tick took its place (reduction `last`, or more than `stack`)."""
    unclosed: int = 0
    """Its tick was still open when the session ended."""
    outside: int = 0
    """Its session was not open."""
    late_joined: int = 0
    """Sparse and late: joined the next open tick; among `used`, not a loss."""
    non_monotonic: int = 0
    """Its stamp was not newer than its predecessor's; not a loss by itself."""

    def dropped(self) -> dict[str, int]:
        """The reasons, each with its count where it is not 0."""
        names = ("late", "duplicate", "quarantined", "superseded", "unclosed", "outside")
        return {n: getattr(self, n) for n in names if getattr(self, n)}


class _Stream:
    """One modality of one session."""

    def __init__(self, spec: ModalitySpec, modality: topics.Modality, lateness_ns: int) -> None:
        self.spec = spec
        self.dense = modality.dense
        self.reduction = spec.reduction or modality.reduction
        self.sample_size = spec.size // spec.stack
        self.lateness_ns = lateness_ns
        self.expected = True
        self.next_seq = 0
        self.pending: list[tuple[int, int]] = []
        """Heap of (seq, event_ns) beyond a gap."""
        self.seen: set[int] = set()
        """Sequence numbers of this publisher, as far back as a duplicate is told from a straggler."""
        self.newest_ns = _NEVER
        """Newest event time without a gap before it."""
        self.head_ns = _NEVER
        """Newest event time of all."""
        self.last_used_ns = _NEVER
        self.open: dict[int, list[tuple[int, int, FloatArray]]] = {}

    def order(self, seq: int, event_ns: int) -> bool:
        """Take note of a sequence number; False for a duplicate."""
        if seq < self.next_seq and event_ns > self.head_ns:
            # a publisher that began anew: its numbers restart, its time does not
            self.next_seq = seq
            self.pending.clear()
            self.seen.clear()
        if seq in self.seen or seq < self.next_seq - _MAX_PENDING:
            return False
        self.seen.add(seq)
        if len(self.seen) > 4 * _MAX_PENDING:
            self.seen = {s for s in self.seen if s >= self.next_seq - _MAX_PENDING}
        self.head_ns = max(self.head_ns, event_ns)
        if seq == self.next_seq and not self.pending:
            self.next_seq = seq + 1  # in order, as nearly always
            self.newest_ns = max(self.newest_ns, event_ns)
        elif seq >= self.next_seq:
            heapq.heappush(self.pending, (seq, event_ns))
            if len(self.pending) > _MAX_PENDING:
                self.next_seq = self.pending[0][0]
            self._advance()
        return True

    def _advance(self) -> None:
        while self.pending and self.pending[0][0] <= self.next_seq:
            seq, event_ns = heapq.heappop(self.pending)
            self.next_seq = seq + 1
            self.newest_ns = max(self.newest_ns, event_ns)

    def give_up_gaps(self, horizon_ns: int) -> None:
        """Stop waiting for missing numbers whose successors are older than `horizon_ns`."""
        while self.pending and self.pending[0][1] <= horizon_ns:
            self.next_seq = self.pending[0][0]
            self._advance()

    def reduce(self, index: int, counts: StreamCounts) -> FloatArray | None:
        """One vector from the samples of tick `index`, in event order whatever order they came in."""
        samples = self.open.pop(index, None)
        if samples is None:
            return None
        if len(samples) > 1:
            samples.sort(key=lambda s: (s[0], s[1]))
        self.last_used_ns = max(self.last_used_ns, samples[-1][0])
        if self.reduction == "last":
            counts.used += 1
            counts.superseded += len(samples) - 1
            return samples[-1][2]
        if self.reduction == "stack":
            kept = samples[-self.spec.stack :]
            counts.used += len(kept)
            counts.superseded += len(samples) - len(kept)
            out = np.zeros(self.spec.size, np.float32)
            out[self.spec.size - len(kept) * self.sample_size :] = np.concatenate([s[2] for s in kept])
            return out
        counts.used += len(samples)
        if len(samples) == 1:
            return samples[0][2]
        total = samples[0][2].copy()
        for sample in samples[1:]:
            total += sample[2]
        return total / np.float32(len(samples)) if self.reduction == "mean" else total


class _Session:
    def __init__(self, streams: dict[str, _Stream], closed: int, clock_ns: int) -> None:
        self.streams = streams
        self.clock_ns = clock_ns
        """What the session has heard of the clock. Not shared: what came before it opened is not in its recording."""
        self.soonest_ns = min(s.lateness_ns for s in streams.values())
        """No clock closes a tick before it is this far past the tick's end."""
        self.closed = closed
        """Index of the last closed tick."""


class Aligner:
    """Turns the messages of any number of sessions into their ticks."""

    def __init__(
        self,
        modalities: Sequence[ModalitySpec],
        tick_ns: int,
        lateness_ns: Mapping[str, int],
        max_ahead_ns: int = 500_000_000,
        max_behind_ns: int = 10_000_000_000,
    ) -> None:
        """`modalities`: what a tick holds, as the model's contract says; `lateness_ns`: per modality."""
        self.tick_ns = tick_ns
        self.counts = {m.name: StreamCounts() for m in modalities}
        self.malformed = 0
        """Session messages that could not be read."""
        self.misfits: dict[str, str] = {}
        """By modality, why its first quarantined message was."""
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
        """The aligner of a model's ticks with the settings of a session."""
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
        """Begin a session; its first tick is the one that `event_ns` falls in. An open one begins anew."""
        if session in self._sessions:
            self._discard(session)
        streams = {
            name: _Stream(spec, topics.MODALITIES[name], self._lateness_ns.get(name, 0))
            for name, spec in self._specs.items()
        }
        self._sessions[session] = _Session(streams, event_ns // self.tick_ns, event_ns)
        if expected is not None:
            self.expect(session, expected)

    def expect(self, session: str, expected: Sequence[str]) -> None:
        """Say which streams the session has now: the others are not waited for."""
        if session in self._sessions:
            for name, stream in self._sessions[session].streams.items():
                stream.expected = name in expected

    def close(self, session: str, event_ns: int, closed: Stamps) -> list[Tick]:
        """End a session: the ticks up to `event_ns` close with what they have."""
        if session not in self._sessions:
            return []
        ticks = self._close_until(session, event_ns // self.tick_ns, closed)
        self._discard(session)
        return ticks

    def _discard(self, session: str) -> None:
        for name, stream in self._sessions.pop(session).streams.items():
            self.counts[name].unclosed += sum(len(s) for s in stream.open.values())

    def push(self, envelope: Envelope) -> list[Tick]:
        """Take one message; the ticks that it closes, in order."""
        if envelope.topic == topics.CLOCK:
            ticks: list[Tick] = []
            for name, session in self._sessions.items():
                session.clock_ns = max(session.clock_ns, envelope.event_ns)
                # most clock messages come too early to close anything: some stream is still being waited for
                if session.clock_ns - session.soonest_ns >= (session.closed + 1) * self.tick_ns:
                    ticks += self._advance(name, envelope)
            return ticks
        modality = self._feature_topics.get(envelope.topic)
        if modality is None:
            return []
        if not self._take(modality, envelope):
            return []
        session = self._sessions[envelope.session]
        stream = session.streams[modality]
        if stream.dense and stream.newest_ns >= (session.closed + 1) * self.tick_ns:
            return self._advance(envelope.session, envelope)
        return []

    def _take(self, name: str, envelope: Envelope) -> bool:
        """Put a feature vector where it belongs; False if it is not in any tick."""
        counts = self.counts[name]
        counts.received += 1
        session = self._sessions.get(envelope.session)
        if session is None:
            counts.outside += 1
            return False
        stream = session.streams[name]
        payload, event_ns = envelope.payload, envelope.event_ns
        if (
            isinstance(payload, bytes)
            or payload.dtype != _FLOAT32
            or payload.shape != (stream.sample_size,)
            or not math.isfinite(payload.sum())
            or (stream.spec.encoder and envelope.origin != stream.spec.encoder)
            or not -self._max_behind_ns <= event_ns - session.clock_ns <= self._max_ahead_ns
        ):
            counts.quarantined += 1
            if name not in self.misfits:
                self.misfits[name] = self._misfit(stream, envelope, session.clock_ns)
            return False
        previous_ns = stream.head_ns
        if not stream.order(envelope.seq, event_ns):
            counts.duplicate += 1
            return False
        if event_ns <= previous_ns:
            counts.non_monotonic += 1
        index = -(-event_ns // self.tick_ns)
        if index <= session.closed:
            if stream.dense:
                counts.late += 1
                return False
            counts.late_joined += 1
            index = session.closed + 1
        stream.open.setdefault(index, []).append((event_ns, envelope.seq, payload))
        return True

    @staticmethod
    def _misfit(stream: _Stream, envelope: Envelope, clock_ns: int) -> str:
        """Why such a message is in no tick."""
        payload, spec = envelope.payload, stream.spec
        if isinstance(payload, bytes) or payload.dtype != _FLOAT32 or payload.ndim != 1:
            return f"its features are no vector of float32, the model takes {stream.sample_size} numbers"
        if len(payload) != stream.sample_size:
            return f"its features have {len(payload)} numbers, the model takes {stream.sample_size}"
        if not math.isfinite(payload.sum()):
            return "its features hold a number that is not finite"
        if spec.encoder and envelope.origin != spec.encoder:
            return f"its encoder is {envelope.origin or 'not named'}, the model was trained with {spec.encoder}"
        return f"its stamp is {(envelope.event_ns - clock_ns) / 1e9:+.3f} s from the clock"

    def _watermark(self, session: _Session) -> int:
        watermark: int | None = None
        for stream in session.streams.values():
            if not stream.expected:
                continue
            horizon_ns = session.clock_ns - stream.lateness_ns
            if stream.pending:
                stream.give_up_gaps(horizon_ns)
            if stream.dense:
                reached = max(stream.newest_ns, horizon_ns)
            elif stream.lateness_ns:
                reached = horizon_ns
            else:
                continue
            watermark = reached if watermark is None else min(watermark, reached)
        return session.clock_ns if watermark is None else watermark

    def _advance(self, name: str, cause: Envelope) -> list[Tick]:
        session = self._sessions[name]
        index = self._watermark(session) // self.tick_ns
        if index <= session.closed:
            return []
        return self._close_until(name, index, stamps_of(cause))

    def _close_until(self, name: str, index: int, closed: Stamps) -> list[Tick]:
        session = self._sessions[name]
        ticks = []
        for k in range(session.closed + 1, index + 1):
            end_ns = k * self.tick_ns
            features, present, age_ns = {}, {}, {}
            for modality, stream in session.streams.items():
                vector = stream.reduce(k, self.counts[modality])
                present[modality] = vector is not None
                features[modality] = self._zeros[modality] if vector is None else vector
                age_ns[modality] = end_ns - stream.last_used_ns if stream.last_used_ns != _NEVER else -1
            ticks.append(Tick(name, k, end_ns, features, present, age_ns, closed))
        session.closed = max(session.closed, index)
        return ticks


def stamps_of(envelope: Envelope) -> Stamps:
    """The times of a message, as a tick that it closes carries them."""
    return Stamps(envelope.event_ns, envelope.capture_ns, envelope.publish_ns, envelope.received_ns, envelope.topic)
