"""Aligner: envelopes -> ticks. Pure: no clock, no I/O, no model; the same sequence in gives the same ticks out.

Tick k covers ((k-1)T, kT] of event time, one grid for all sessions. It closes when the watermark reaches kT:

    watermark = min over the dense streams of max(newest event time of the stream, clock - its lateness)

which, with one lateness for all, is DESIGN's max(oldest of the newest, clock - lateness). "Newest" counts only messages
before the first gap in the sequence numbers, so the aligner also waits for a message that arrives out of order. The
clock is a topic: the time is that of the last clock message.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from stream_mmrnn.core import streams, topics
from stream_mmrnn.core.errors import SessionError
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.stream_table import stream_table
from stream_mmrnn.core.types import FEATURE_BOUND, Envelope, FloatArray, ModalitySpec, Stamps, Tick
from stream_mmrnn.predict.align_session import AlignedSession, SessionState
from stream_mmrnn.predict.align_stream import FLOAT32, MAX_PENDING, NEVER, AlignedStream, OpenSample, StreamCounts

_MAX_PER_TICK, _MOST_PER_TICK, _USUAL_TICK_NS = 4096, 131_072, 40_000_000
"""Limit on the samples of one stream in one open tick of 40 ms; it grows with the tick, up to the second number."""
_MAX_JUMP_NS, _MAX_JUMP_TICKS = 600_000_000_000, 15_000
"""Ten minutes, or so many ticks if these are longer: a longer clock jump needs a second message that confirms it, and
the ticks in between are skipped."""
_absolute, _less = np.absolute, np.less
_BOUND = np.array(FEATURE_BOUND, np.float32)


def _event_order(sample: OpenSample) -> tuple[int, int]:
    return sample[0], sample[1]


class AlignerState(msgspec.Struct, frozen=True):
    """Serializable state of an aligner (msgspec): see `Aligner.snapshot` and `Aligner.restore`."""

    sessions: dict[str, SessionState]
    counts: dict[str, StreamCounts]
    malformed: int
    misfits: dict[str, str]


class Aligner:
    """Turns the messages of any number of sessions into ticks."""

    def __init__(
        self,
        modalities: Sequence[ModalitySpec],
        tick_ns: int,
        lateness_ns: Mapping[str, int],
        max_ahead_ns: int = 500_000_000,
        max_behind_ns: int = 10_000_000_000,
        table: Mapping[str, streams.Stream] | None = None,
    ) -> None:
        """`modalities`: those of the model's contract; `lateness_ns`: by modality.

        `table`: the session's streams by name, which say what feeds each modality and how it behaves in time; without
        one, each is fed by the stream of its own name.
        """
        self.tick_ns = tick_ns
        self.counts = {m.name: StreamCounts() for m in modalities}
        self.malformed = 0
        """Session messages that could not be decoded, and unconfirmed clock jumps."""
        self.misfits: dict[str, str] = {}
        """By modality, the reason of its first quarantined message."""
        self.modalities = tuple(modalities)
        self._specs = {m.name: m for m in modalities}
        self._lateness_ns = dict(lateness_ns)
        self.max_ahead_ns, self.max_behind_ns = max_ahead_ns, max_behind_ns
        self.max_jump_ns = max(_MAX_JUMP_NS, _MAX_JUMP_TICKS * tick_ns)
        self.max_per_tick = max(_MAX_PER_TICK, min(_MOST_PER_TICK, _MAX_PER_TICK * tick_ns // _USUAL_TICK_NS))
        self.sessions: dict[str, AlignedSession] = {}
        table = table or {}
        self.feeding = {m.name: streams.feeding(m.name, m.encoder, table) for m in modalities}
        """By modality, the name of the feature vectors that feed it, and their stream."""
        self.feature_topics = {topics.FEATURE + name: m for m, (name, _) in self.feeding.items()}
        self._zeros: dict[str, FloatArray] = {}
        for m in modalities:
            self._zeros[m.name] = np.zeros(m.size, np.float32)
            self._zeros[m.name].setflags(write=False)

    @classmethod
    def of(cls, modalities: Sequence[ModalitySpec], tick_ns: int, settings: Settings) -> Aligner:
        """An aligner for a model, with the streams and the limits of a session."""
        table = stream_table(settings)
        lateness_ns = {}
        for m in modalities:
            stream = streams.feeding(m.name, m.encoder, table)[1]
            known = stream.name in table
            usual_ns = settings.align.lateness_ns(stream.kind) if stream.dense else 0
            lateness_ns[m.name] = stream.lateness_ns if known else usual_ns
        return cls(
            modalities,
            tick_ns,
            lateness_ns,
            round(settings.align.max_ahead_ms * 1e6),
            round(settings.align.max_behind_ms * 1e6),
            table,
        )

    def __contains__(self, session: str) -> bool:
        return session in self.sessions

    def open(self, session: str, event_ns: int, expected: Sequence[str] | None = None) -> None:
        """Begin a session; its first tick contains `event_ns`. A session that is open already starts over."""
        if session in self.sessions:
            self._discard(session)
        self.sessions[session] = self._new(session, event_ns)
        if expected is not None:
            self.expect(session, expected)

    def _new(self, session: str, event_ns: int) -> AlignedSession:
        streams = [
            AlignedStream(
                spec, *self.feeding[name], self._lateness_ns.get(name, 0), self.counts[name], self._zeros[name]
            )
            for name, spec in self._specs.items()
        ]
        return AlignedSession(session, streams, event_ns // self.tick_ns, self.tick_ns, event_ns)

    def snapshot(self) -> AlignerState:
        """The full state between two messages: after `restore`, the same messages give the same ticks and counts."""
        return AlignerState(
            {name: session.state() for name, session in self.sessions.items()},
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
        self.sessions = sessions
        self.malformed, self.misfits = state.malformed, dict(state.misfits)

    def expect(self, session: str, expected: Sequence[str]) -> None:
        """Set the streams that the session has now; the watermark does not wait for others."""
        if session in self.sessions:
            self.sessions[session].expect(expected)

    def close(self, session: str, event_ns: int, closed: Stamps) -> list[Tick]:
        """End a session: the ticks up to `event_ns` close with the data that they have."""
        if session not in self.sessions:
            return []
        open_session = self.sessions[session]
        until_ns = min(event_ns, open_session.clock_ns + self.max_jump_ns)
        ticks = self._close_until(open_session, until_ns // self.tick_ns, closed)
        self._discard(session)
        return ticks

    def _discard(self, session: str) -> None:
        for stream in self.sessions.pop(session).streams:
            stream.counts.unclosed += sum(len(s) for s in stream.open.values())

    def push(self, envelope: Envelope) -> list[Tick]:
        """Process one message; returns the ticks that it closes, in order."""
        topic, event_ns = envelope.topic, envelope.event_ns
        if topic == topics.CLOCK:
            ticks: list[Tick] = []
            for session in self.sessions.values():
                if event_ns > session.clock_ns:
                    if event_ns - session.clock_ns > self.max_jump_ns and not self._leap(session, event_ns):
                        continue
                    session.clock_ns = event_ns
                if session.clock_ns >= session.due_ns:
                    ticks += self._advance(session, envelope)
            return ticks
        open_session = self.sessions.get(envelope.session)
        if open_session is None:
            if topic in self.feature_topics:
                counts = self.counts[self.feature_topics[topic]]
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

    def _leap(self, session: AlignedSession, event_ns: int) -> bool:
        """Whether to accept a clock jump: yes if the message before jumped to about the same time.

        A machine may have been suspended for an hour, but a single wrong value must not create a million ticks.
        """
        confirmed = 0 <= event_ns - session.leapt_ns <= self.max_ahead_ns
        session.leapt_ns = event_ns
        if confirmed:
            session.skip_to((event_ns - self.max_jump_ns) // self.tick_ns, self.tick_ns)
        else:
            self.malformed += 1
        return confirmed

    def _accept(self, session: AlignedSession, stream: AlignedStream, envelope: Envelope, event_ns: int) -> bool:
        """Put a feature vector into its tick; False if it was dropped."""
        counts = stream.counts
        counts.received += 1
        payload, seq = envelope.payload, envelope.seq
        if (
            isinstance(payload, bytes)
            or payload.dtype != FLOAT32
            or payload.shape != stream.shape
            # comparing bytes takes a quarter of the time of all()
            or _less(_absolute(payload, stream.magnitudes), _BOUND, stream.in_range).tobytes() != stream.all_true
            or (stream.encoder and envelope.origin != stream.encoder)
            or not -self.max_behind_ns <= event_ns - session.clock_ns <= self.max_ahead_ns
        ):
            counts.quarantined += 1
            if stream.name not in self.misfits:
                self.misfits[stream.name] = self.misfit(stream, envelope, session.clock_ns)
            return False
        if seq == stream.next_seq and event_ns > stream.head_ns and not stream.pending:
            # in order: the usual case
            stream.next_seq = seq + 1
            stream.head_ns = stream.newest_ns = event_ns
            stream.seen.add(seq)
            if not seq % MAX_PENDING:
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
        elif len(samples) >= self.max_per_tick:
            counts.quarantined += 1
            self.misfits.setdefault(stream.name, f"more than {self.max_per_tick} samples came for one tick")
            return False
        else:
            samples.append((event_ns, seq, payload))
            if event_ns <= samples[-2][0]:
                samples.sort(key=_event_order)
        return True

    @staticmethod
    def misfit(stream: AlignedStream, envelope: Envelope, clock_ns: int) -> str:
        """The reason why a message is quarantined; `clock_ns`: the session's clock."""
        payload, spec = envelope.payload, stream.spec
        if isinstance(payload, bytes) or payload.dtype != FLOAT32 or payload.ndim != 1:
            return f"its features are no vector of float32, the model takes {stream.shape[0]} numbers"
        if payload.shape != stream.shape:
            return f"its features have {len(payload)} numbers, the model takes {stream.shape[0]}"
        if not np.isfinite(payload).all():
            return "its features hold a number that is not finite"
        if not (np.absolute(payload) < _BOUND).all():
            return f"its features hold a number beyond {FEATURE_BOUND:g}"
        if spec.encoder and envelope.origin != spec.encoder:
            return f"its encoder is {envelope.origin or 'not named'}, the model was trained with {spec.encoder}"
        return f"its stamp is {(envelope.event_ns - clock_ns) / 1e9:+.3f} s from the clock"

    def _advance(self, session: AlignedSession, cause: Envelope) -> list[Tick]:
        index = session.watermark_ns() // self.tick_ns
        if index <= session.closed:
            return []
        return self._close_until(session, index, stamps_of(cause))

    def _close_until(self, session: AlignedSession, index: int, closed: Stamps) -> list[Tick]:
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
                age_ns[name] = end_ns - stream.last_used_ns if stream.last_used_ns != NEVER else -1
            ticks.append(Tick(session.name, k, end_ns, features, present, age_ns, closed))
        if index > session.closed:
            session.closed = index
            session.until((index + 1) * self.tick_ns)
        return ticks


def stamps_of(envelope: Envelope) -> Stamps:
    """The times of a message, for the tick that it closes."""
    return Stamps(envelope.event_ns, envelope.capture_ns, envelope.publish_ns, envelope.received_ns, envelope.topic)
