"""ColumnAligner: messages as columns -> ticks as columns, by the rule of `Aligner` and with its state.

Most messages are taken many at once (`SessionRun`); where that does not hold, for example at a gap or a bad stamp, they
go through `Aligner.push` one by one. After each call the aligner is as if it had got every message by itself, so both
ways give the same ticks, counts and snapshots. Knows nothing about files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.message_columns import ChannelColumns, MessageColumns
from stream_mmrnn.core.types import FEATURE_BOUND, Envelope, FloatArray, Tick
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.predict.align_run import Checked, SessionRun
from stream_mmrnn.predict.pipeline import NoEngine, on_session_message
from stream_mmrnn.predict.tick_columns import TickColumns

_LEAST = 8
"""So many messages are pushed one by one before a run is tried again; twice as many after each run that was shorter."""


class _Opened(NoEngine):
    """The sessions that were opened, or opened again, and have no tick since."""

    def __init__(self) -> None:
        super().__init__()
        self.fresh: set[str] = set()

    def open(self, session: str) -> None:
        super().open(session)
        self.fresh.add(session)

    def reset(self, session: str) -> None:
        self.fresh.add(session)


class ColumnAligner:
    """Feeds an aligner with messages as columns."""

    def __init__(self, aligner: Aligner) -> None:
        self.aligner = aligner
        self.pushed = 0
        """How many messages went through `Aligner.push`."""
        self._opened = _Opened()
        self._wanted = {topics.CLOCK, topics.SESSION, *aligner.feature_topics}

    def push(self, messages: MessageColumns) -> list[TickColumns]:
        """The ticks that the messages close: of each session in order, in one part or more."""
        checked = [_checked(c) for c in messages.channels if c.topic in self._wanted]
        out: list[TickColumns] = []
        begin = messages.begin
        for place, envelope in messages.others:
            if envelope.topic not in self._wanted:
                continue
            self._run(messages, checked, begin, place, out)
            if envelope.topic == topics.SESSION:
                self._on_session(envelope, out)
            else:
                self._push([envelope], out)
            begin = place + 1
        self._run(messages, checked, begin, messages.end, out)
        return out

    def _run(
        self, messages: MessageColumns, checked: Sequence[Checked], begin: int, end: int, out: list[TickColumns]
    ) -> None:
        """The messages from place `begin` on and before `end`, all of them in columns."""
        some = _LEAST
        while begin < end:
            until = self._run_together(checked, begin, end, out)
            some = some * 2 if until - begin < some else _LEAST
            begin = min(until + some, end)
            if until < begin:
                channels = [c.columns for c in checked]
                self._push(MessageColumns(until, begin, channels, []).between(until, begin).envelopes(), out)

    def _run_together(self, checked: Sequence[Checked], begin: int, end: int, out: list[TickColumns]) -> int:
        """Take in as many messages as possible at once; returns the place after the last one."""
        here = [Checked(c.columns.between(begin, end), c.bad[c.bad >= begin]) for c in checked]
        clocks = [c.columns for c in here if c.columns.topic == topics.CLOCK and len(c.columns)]
        if len(clocks) > 1 or not self.aligner.sessions:
            return begin
        by_session: dict[str, list[Checked]] = {}
        for channel in here:
            if channel.columns.topic != topics.CLOCK and len(channel.columns):
                by_session.setdefault(channel.columns.session, []).append(channel)
        clock = clocks[0] if clocks else None
        runs = {
            name: SessionRun(self.aligner, session, by_session.get(name, ()), clock, begin, end)
            for name, session in self.aligner.sessions.items()
        }
        until = min(run.until for run in runs.values())
        if until == begin:
            return begin
        for name, run in runs.items():
            ticks = run.commit(until, name in self._opened.fresh)
            if len(ticks):
                self._opened.fresh.discard(name)
                out.append(ticks)
        for name in by_session.keys() - runs.keys():
            for channel in by_session[name]:
                counts = self.aligner.counts[self.aligner.feature_topics[channel.columns.topic]]
                count = len(channel.columns.between(begin, until))
                counts.received += count
                counts.outside += count
        return until

    def _push(self, envelopes: Iterable[Envelope], out: list[TickColumns]) -> None:
        ticks: list[Tick] = []
        for envelope in envelopes:
            self.pushed += 1
            ticks += self.aligner.push(envelope)
        self._add(ticks, out)

    def _on_session(self, envelope: Envelope, out: list[TickColumns]) -> None:
        try:
            ticks = on_session_message(envelope, self.aligner, self._opened, None)
        except WireError:
            self.aligner.malformed += 1
            return
        self._add(ticks, out)
        if envelope.session not in self.aligner and envelope.session in self._opened:
            self._opened.close(envelope.session)

    def _add(self, ticks: Sequence[Tick], out: list[TickColumns]) -> None:
        by_session: dict[str, list[Tick]] = {}
        for tick in ticks:
            by_session.setdefault(tick.session, []).append(tick)
        for name, mine in by_session.items():
            out.append(TickColumns.of(mine, name in self._opened.fresh, self.aligner.modalities))
            self._opened.fresh.discard(name)


def align_columns(batches: Iterable[MessageColumns], aligner: Aligner) -> Iterator[TickColumns]:
    """The ticks of all messages, as `predict` would step them; of each session in order."""
    columns = ColumnAligner(aligner)
    for messages in batches:
        yield from columns.push(messages)


def _checked(columns: ChannelColumns) -> Checked:
    values = columns.values
    bad = np.zeros(0, np.int64)
    if values is not None and values.size and not _fits(values):
        bad = columns.place[~(np.absolute(values) < np.float32(FEATURE_BOUND)).all(axis=1)]
    return Checked(columns, bad)


def _fits(values: FloatArray) -> bool:
    """Whether all numbers are finite and within the bound. Two reductions take half the time of a mask."""
    bound = np.float32(FEATURE_BOUND)
    return bool(values.max() < bound and values.min() > -bound)  # NaN compares false
