"""SessionRun: many messages of one session into ticks at once, by the same rule as `Aligner.push` one after another.

It covers messages whose numbers follow each other without a gap and whose stamps and vectors are good, with all that
may happen to these: late ones, sparse ones that join the next tick, stamps that go back, vectors of another encoder or
size, any reduction. `until` says how far that holds. Knows nothing about where messages come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.block import Flags, Integers
from stream_mmrnn.core.message_columns import ChannelColumns, MessageColumns
from stream_mmrnn.core.types import FloatArray
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.predict.align_session import AlignedSession
from stream_mmrnn.predict.align_stream import MAX_PENDING, NEVER, AlignedStream
from stream_mmrnn.predict.tick_columns import TickColumns

_FAR_NS = 2**61
"""Beyond this no time is valid, and a difference of times might not fit into 64 bits."""


class Checked(NamedTuple):
    """Messages of one channel, and the places of those with a number that no model takes."""

    columns: ChannelColumns
    bad: Integers


def _first(places: Integers, wrong: Flags, until: int) -> int:
    """The place of the first message that is wrong; `until` if none is before it."""
    at = int(wrong.argmax()) if len(wrong) else 0
    return min(until, int(places[at])) if len(wrong) and wrong[at] else until


def _running(first: int, values: Integers) -> Integers:
    """[N + 1] the largest so far, before and after each of N values."""
    return np.maximum.accumulate(np.concatenate([np.array([first], np.int64), values]))


class SessionRun:
    """What the messages from place `begin` on do to a session; nothing is changed before `commit`."""

    def __init__(
        self,
        aligner: Aligner,
        session: AlignedSession,
        channels: Sequence[Checked],
        clock: ChannelColumns | None,
        begin: int,
        end: int,
    ) -> None:
        """`channels`: of this session, from `begin` on and before `end`."""
        self._aligner, self._session, self._clock = aligner, session, clock
        self._of: dict[str, ChannelColumns] = {}
        self._misfits: list[tuple[AlignedStream, ChannelColumns]] = []
        self.until = self._covered(channels, begin, end)
        """The place up to which the run holds: `begin` if it cannot begin."""

    def _covered(self, channels: Sequence[Checked], begin: int, end: int) -> int:
        session, aligner = self._session, self._aligner
        if not self._is_settled():
            return begin
        until = end
        clock_ns = np.array([session.clock_ns], np.int64)
        clock_places = np.zeros(0, np.int64)
        if self._clock is not None:
            clock_places, event_ns = self._clock.place, self._clock.event_ns
            clock_ns = _running(session.clock_ns, event_ns)
            wrong = (np.abs(event_ns) > _FAR_NS) | (event_ns - clock_ns[:-1] > aligner.max_jump_ns)
            until = _first(clock_places, wrong, until)
        for columns, bad in channels:
            stream = session.by_topic.get(columns.topic)
            if stream is None or columns.values is None:
                continue
            if columns.values.shape[1:] != stream.shape or (stream.encoder and columns.origin != stream.encoder):
                self._misfits.append((stream, columns))
                continue
            if stream.name in self._of:  # two producers: which of their messages follow each other?
                return begin
            self._of[stream.name] = columns
            if len(bad):
                until = min(until, int(bad[0]))
            event_ns, count = columns.event_ns, len(columns)
            ahead_ns = event_ns - clock_ns[np.searchsorted(clock_places, columns.place)]
            wrong = columns.seq != stream.next_seq + np.arange(count)
            wrong |= (ahead_ns < -aligner.max_behind_ns) | (ahead_ns > aligner.max_ahead_ns)
            wrong |= np.abs(event_ns) > _FAR_NS
            until = _first(columns.place, wrong, until)
            if count + sum(map(len, stream.open.values())) > aligner.max_per_tick:
                ticks = -(-event_ns // aligner.tick_ns)
                open_ticks = [np.full(len(samples), k) for k, samples in stream.open.items()]
                most = np.unique(np.concatenate([ticks, *open_ticks]), return_counts=True)[1].max()
                if not stream.dense or most > aligner.max_per_tick:
                    return begin
        return until

    def _is_settled(self) -> bool:
        """Whether only a dense stream or the clock can close the next tick, and none can be closed yet."""
        session = self._session
        if session.unsettled or not session.bounds or abs(session.clock_ns) > _FAR_NS:
            return False
        for stream in session.streams:
            if stream.pending or abs(stream.head_ns) > _FAR_NS * 2:
                return False
            for samples in stream.open.values():
                keys = [sample[:2] for sample in samples]
                if keys != sorted(keys):
                    return False
        return session.watermark_ns() // self._aligner.tick_ns <= session.closed

    def commit(self, until: int, fresh: bool) -> TickColumns:
        """Take in the messages before `until`, which is at most `self.until`; returns the ticks that they close."""
        session, tick_ns = self._session, self._aligner.tick_ns
        clock = None if self._clock is None else self._clock.between(0, until)
        clock_places = np.zeros(0, np.int64) if clock is None else clock.place
        clock_ns = _running(session.clock_ns, np.zeros(0, np.int64) if clock is None else clock.event_ns)
        of = {name: columns.between(0, until) for name, columns in self._of.items()}
        self._quarantine(until, clock_places, clock_ns)
        places, closed = self._closed(of, clock_places, clock_ns)
        first, last = session.closed + 1, int(closed[-1])
        count = last - session.closed
        indices = np.arange(first, last + 1, dtype=np.int64)
        present = np.zeros((count, len(session.streams)), np.bool_)
        age_ns = np.empty((count, len(session.streams)), np.int64)
        features = []
        for i, stream in enumerate(session.streams):
            samples = self._samples(stream, of.get(stream.name), places, closed)
            features.append(_close(stream, samples, first, last, present[:, i], age_ns[:, i]))
        session.clock_ns = int(clock_ns[-1])
        if count:
            session.closed = last
            session.until((last + 1) * tick_ns)
        end_ns = indices * tick_ns
        age_ns = np.where(age_ns == NEVER, -1, end_ns[:, None] - age_ns)
        return TickColumns(session.name, fresh, indices, end_ns, present, age_ns, tuple(features))

    def _quarantine(self, until: int, clock_places: Integers, clock_ns: Integers) -> None:
        for stream, every in self._misfits:
            columns = every.between(0, until)
            stream.counts.received += len(columns)
            stream.counts.quarantined += len(columns)
            if len(columns) and stream.name not in self._aligner.misfits:
                place = int(columns.place[0])
                (envelope,) = MessageColumns(place, place + 1, [columns.take(slice(0, 1))], []).envelopes()
                at_ns = int(clock_ns[np.searchsorted(clock_places, place)])
                self._aligner.misfits[stream.name] = self._aligner.misfit(stream, envelope, at_ns)

    def _closed(
        self, of: dict[str, ChannelColumns], clock_places: Integers, clock_ns: Integers
    ) -> tuple[Integers, Integers]:
        """Places [K] of the messages that may close ticks, and the last closed tick before and after each [K + 1]."""
        session = self._session
        dense = [(s, of[s.name]) for s in session.bounds if s.dense and s.name in of]
        places = np.sort(np.concatenate([clock_places, *(columns.place for _, columns in dense)]))
        clock_ns = clock_ns[np.searchsorted(clock_places, places, "right")]
        watermark_ns = np.full(len(places), 2**63 - 1, np.int64)
        for stream in session.bounds:
            reached_ns = clock_ns - stream.lateness_ns
            if stream.dense:
                newest_ns = np.array([stream.newest_ns], np.int64)
                if stream.name in of:
                    columns = of[stream.name]
                    newest_ns = _running(stream.newest_ns, columns.event_ns)
                    newest_ns = newest_ns[np.searchsorted(columns.place, places, "right")]
                reached_ns = np.maximum(reached_ns, newest_ns)
            watermark_ns = np.minimum(watermark_ns, reached_ns)
        return places, _running(session.closed, watermark_ns // self._aligner.tick_ns)

    def _samples(
        self, stream: AlignedStream, columns: ChannelColumns | None, places: Integers, closed: Integers
    ) -> _Samples:
        """The samples of a stream's open ticks, and what its messages add; its order and counts go on."""
        samples = _Samples.of(stream)
        if columns is None or not len(columns):
            return samples
        counts, event_ns, count = stream.counts, columns.event_ns, len(columns)
        head_ns = _running(stream.head_ns, event_ns)
        counts.received += count
        counts.non_monotonic += int(np.count_nonzero(event_ns <= head_ns[:-1]))
        stream.head_ns = int(head_ns[-1])
        stream.newest_ns = max(stream.newest_ns, int(event_ns.max()))
        stream.next_seq += count
        stream.seen.update(range(max(stream.next_seq - min(count, MAX_PENDING), 0), stream.next_seq))
        stream.forget()
        tick = -(-event_ns // self._aligner.tick_ns)
        closed = closed[np.searchsorted(places, columns.place)]
        late = tick <= closed
        some = int(np.count_nonzero(late))
        assert columns.values is not None
        if not some:
            return samples.with_more(tick, columns.seq, event_ns, columns.values)
        if stream.dense:
            counts.late += some
            kept = np.flatnonzero(~late)
            return samples.with_more(tick[kept], columns.seq[kept], event_ns[kept], columns.values[kept])
        counts.late_joined += some
        return samples.with_more(np.where(late, closed + 1, tick), columns.seq, event_ns, columns.values)


class _Samples(NamedTuple):
    """The samples of one stream's open ticks, by tick, then time."""

    tick: Integers
    event_ns: Integers
    seq: Integers
    rows: Integers
    """Where the vector of each is: in `before` if the number is below its length, else after it in `values`."""
    before: list[FloatArray]
    values: FloatArray

    @classmethod
    def of(cls, stream: AlignedStream) -> _Samples:
        """What is open already."""
        found = [(k, *sample) for k in sorted(stream.open) for sample in stream.open[k]]
        tick, event_ns, seq = (np.array([sample[i] for sample in found], np.int64) for i in range(3))
        none = np.zeros((0, *stream.shape), np.float32)
        return cls(tick, event_ns, seq, np.arange(len(found)), [sample[3] for sample in found], none)

    def with_more(self, tick: Integers, seq: Integers, event_ns: Integers, values: FloatArray) -> _Samples:
        tick, event_ns, seq = (
            np.concatenate([mine, more])
            for mine, more in ((self.tick, tick), (self.event_ns, event_ns), (self.seq, seq))
        )
        rows = np.arange(len(tick))
        if not ((tick[1:] >= tick[:-1]).all() and (event_ns[1:] > event_ns[:-1]).all()):
            rows = np.lexsort((seq, event_ns, tick))
            tick, event_ns, seq = tick[rows], event_ns[rows], seq[rows]
        return _Samples(tick, event_ns, seq, rows, self.before, values)

    def vectors(self, which: npt.NDArray[np.intp]) -> FloatArray:
        """The vectors of the samples at `which`, as a new matrix."""
        rows, old = self.rows[which], len(self.before)
        if not len(self.values):
            return np.array([self.before[row] for row in rows], np.float32).reshape(len(rows), self.values.shape[1])
        out = self.values.take(rows - old, axis=0, mode="clip")
        for at in np.flatnonzero(rows < old):
            out[at] = self.before[rows[at]]
        return out


def _close(
    stream: AlignedStream, samples: _Samples, first: int, last: int, present: Flags, used_ns: Integers
) -> FloatArray:
    """Close ticks `first` to `last` of a stream: returns the vectors of those that have one [P, size].

    Fills `present` [N], and `used_ns` [N] with the time of the newest sample that was used up to each tick.
    """
    done = int(np.searchsorted(samples.tick, last, "right"))
    stream.open = {}
    for at in range(done, len(samples.tick)):
        sample = (int(samples.event_ns[at]), int(samples.seq[at]), samples.vectors(np.array([at]))[0])
        stream.open.setdefault(int(samples.tick[at]), []).append(sample)
    tick = samples.tick[:done]
    begins = np.flatnonzero(np.diff(tick, prepend=first - 1))
    ends = np.append(begins[1:], done)[: len(begins)]
    at_tick = tick[begins] - first
    present[at_tick] = True
    used_ns[:] = NEVER
    used_ns[at_tick] = samples.event_ns[ends - 1]
    used_ns[:] = _running(stream.last_used_ns, used_ns)[1:]
    if len(used_ns):
        stream.last_used_ns = int(used_ns[-1])
    return _reduced(stream, samples, begins, ends)


def _reduced(
    stream: AlignedStream, samples: _Samples, begins: npt.NDArray[np.intp], ends: npt.NDArray[np.intp]
) -> FloatArray:
    """One vector from the samples `begins` to `ends` of each tick, as `AlignedStream.reduce`, in its order."""
    counts, lengths = stream.counts, ends - begins
    total = int(lengths.sum())
    if stream.reduction == "last":
        counts.used += len(ends)
        counts.superseded += total - len(ends)
        return samples.vectors(ends - 1)
    if stream.reduction == "stack":
        size, most = stream.shape[0], stream.spec.stack
        out = np.zeros((len(ends), most * size), np.float32)
        for back in range(1, most + 1):
            some = lengths >= back
            out[some, (most - back) * size : (most - back + 1) * size] = samples.vectors(ends[some] - back)
        kept = int(np.minimum(lengths, most).sum())
        counts.used += kept
        counts.superseded += total - kept
        return out
    counts.used += total
    out = samples.vectors(begins)
    for more in range(1, int(lengths.max(initial=1))):
        which = np.flatnonzero(lengths > more)
        out[which] += samples.vectors(begins[which] + more)  # one after the other: the order of additions counts
    if stream.reduction == "mean":
        out /= lengths[:, None].astype(np.float32)
    return out
