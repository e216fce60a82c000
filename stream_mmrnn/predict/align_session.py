"""One session for the aligner: its streams, its watermark, and what can close its next tick."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from stream_mmrnn.core.errors import SessionError
from stream_mmrnn.predict.align_stream import NEVER, AlignedStream, StreamState


class SessionState(msgspec.Struct, frozen=True, array_like=True):
    """Serializable state of one session."""

    streams: dict[str, StreamState]
    expected: list[str]
    clock_ns: int
    closed: int
    end_ns: int
    due_ns: int
    unsettled: bool
    leapt_ns: int = NEVER


class AlignedSession:
    """The streams of one session, its open ticks, and the earliest event that can close the next tick.

    Nearly all messages close no tick, and computing the watermark over all streams for each message would be most of
    the aligner's work. So the session caches the condition: a dense stream reaches `end_ns`, or the clock reaches
    `due_ns`. The cache is valid until then, unless the session is `unsettled`.
    """

    __slots__ = (
        "bounds", "by_topic", "clock_ns", "closed", "due_ns", "end_ns", "expected", "leapt_ns", "name", "soonest_ns",
        "streams", "unsettled",
    )  # fmt: skip

    def __init__(self, name: str, streams: list[AlignedStream], closed: int, tick_ns: int, clock_ns: int) -> None:
        self.name = name
        self.streams = streams
        self.by_topic = {s.topic: s for s in streams}
        self.clock_ns = clock_ns
        """Newest clock time. Per session: clock messages from before it opened are not in its recording."""
        self.leapt_ns = NEVER
        """The last clock time that was too far ahead and needs confirmation."""
        self.soonest_ns = min(s.lateness_ns for s in streams)
        """Smallest lateness: the clock cannot close a tick earlier than this after the tick's end."""
        self.closed = closed
        """Index of the last closed tick."""
        self.until((closed + 1) * tick_ns)
        self.expect([s.source for s in streams])

    def expect(self, names: Sequence[str]) -> None:
        """Set the streams that the watermark waits for, by the names that they have in the session."""
        for stream in self.streams:
            stream.expected = stream.source in names
        self.expected = [s for s in self.streams if s.expected]
        self.bounds = [s for s in self.expected if s.dense or s.lateness_ns]
        """The streams that can hold the watermark back."""
        self.unsettle()

    def state(self) -> SessionState:
        return SessionState(
            {s.name: s.state() for s in self.streams},
            [s.source for s in self.expected],
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
