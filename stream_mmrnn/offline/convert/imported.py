"""What all imports share: the numbered messages of one session, and the recording they go to."""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from stream_mmrnn.capture.encoders import encoders_of
from stream_mmrnn.capture.pipeline import Outgoing, capture
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import FileError, WireError
from stream_mmrnn.core.settings import SessionSettings, Settings, SourcesSettings, StreamSettings
from stream_mmrnn.core.stream_table import stream_table
from stream_mmrnn.core.streams import SHORT_FORMS, Stream
from stream_mmrnn.core.types import Envelope, Sample
from stream_mmrnn.recording.recorder import Recorder

TAIL_NS = 500_000_000
"""How long the clock continues after the last sample, so that its tick closes."""
JUMP_NS = 600_000_000_000
"""After a longer pause the clock says twice what time it is: aligners of short ticks need that (`predict.align`)."""
CONFIRM_NS = 1_000_000
"""How long before a jump's end the clock says so for the first time."""
FIRST_NS = 1_000_000_000
"""Event times must not be negative."""
_CLOCK_NS = 10_000_000
_GAP_NS = 60_000_000_000
"""In a longer time without a sample the clock jumps, instead of counting on."""


class Messages:
    """Makes the messages of a session, numbered by topic as one publisher does."""

    def __init__(self, session: str) -> None:
        self._session = session
        self._seq: dict[str, int] = {}

    def session(self, op: Literal["open", "close"], at_ns: int, streams: Sequence[str]) -> Envelope:
        payload = wire.pack(wire.SessionMessage(op, at_ns, tuple(streams)))
        return self.of(topics.SESSION, Sample(at_ns, at_ns, payload), at_ns)

    def clock(self, at_ns: int) -> Envelope:
        return self.of(topics.CLOCK, Sample(at_ns, at_ns, b""), at_ns)

    def of(self, topic: str, sample: Sample, arrival_ns: int, origin: str = "") -> Envelope:
        number = self._seq[topic] = self._seq.get(topic, -1) + 1
        owner = topics.EVERYONE if topic == topics.CLOCK else self._session
        return Envelope(topic, owner, number, sample.event_ns, arrival_ns, arrival_ns, sample.data, origin, arrival_ns)


class Imported(NamedTuple):
    """A stream of another program's file."""

    row: Stream
    origin: str
    samples: Iterable[Sample]
    """In the order of their arrival (`capture_ns`)."""


class SampledMessages:
    """The messages that the bus would have carried, in order: samples as their encoders see them, and the clock."""

    def __init__(
        self,
        session: str,
        span_ns: tuple[int, int],
        streams: Iterable[Imported],
        labels: Iterable[Outgoing] = (),
    ) -> None:
        """`span_ns`: the first and the last arrival."""
        self._made = Messages(session)
        self._begin_ns, self._end_ns = span_ns[0], span_ns[1] + TAIL_NS
        self._streams, self._labels = sorted(streams, key=lambda of: _in_order(of.row.name)), labels
        self.undecodable = 0
        """Samples that an encoder refused: not finite, or no text."""
        self.gaps: list[tuple[int, int]] = []
        """Times without any sample over which the clock jumped: after how long, and how long, in nanoseconds."""

    def __iter__(self) -> Iterator[Envelope]:
        names = [of.row.name for of in self._streams]
        pieces = [self._pieces(0, self._labels)]
        pieces += [self._pieces(1 + i, self._captured(of)) for i, of in enumerate(self._streams)]
        yield self._made.session("open", self._begin_ns - 1, names)
        clock_ns = self._begin_ns
        for arrival_ns, _, out in heapq.merge(*pieces, key=lambda piece: piece[:2]):
            clock_ns = yield from self._clock(clock_ns, arrival_ns)
            yield self._made.of(out.topic, out.sample, arrival_ns, out.origin)
        yield from self._clock(clock_ns, self._end_ns)
        yield self._made.session("close", self._end_ns, names)

    def _clock(self, from_ns: int, until_ns: int) -> Generator[Envelope, None, int]:
        """The clock's messages before `until_ns`; returns when the next one is due."""
        if until_ns - from_ns > _GAP_NS:
            self.gaps.append((from_ns - self._begin_ns, until_ns - from_ns))
            yield from self._clock(from_ns, from_ns + TAIL_NS)  # what came before is complete
            jumped_ns = until_ns - 1 - (until_ns - 1 - from_ns) % _CLOCK_NS
            if until_ns - from_ns > JUMP_NS - TAIL_NS:
                yield self._made.clock(jumped_ns - CONFIRM_NS)
            from_ns = jumped_ns
        for at_ns in range(from_ns, until_ns, _CLOCK_NS):
            yield self._made.clock(at_ns)
        return max(from_ns, from_ns - (from_ns - until_ns) // _CLOCK_NS * _CLOCK_NS)

    @staticmethod
    def _pieces(order: int, outgoing: Iterable[Outgoing]) -> Iterator[tuple[int, int, Outgoing]]:
        """Arrival time, a number that orders messages of equal arrival time, and the message."""
        # a sample and its features arrive together
        yield from ((out.sample.capture_ns, order, out) for out in outgoing)

    def _captured(self, of: Imported) -> Iterator[Outgoing]:
        return capture(of.samples, of.row, of.origin, encoders_of(of.row), self._on_undecodable)

    def _on_undecodable(self, _: WireError) -> None:
        self.undecodable += 1


def _in_order(name: str) -> tuple[int, str]:
    """The usual streams come first."""
    usual = list(SHORT_FORMS)
    return (usual.index(name) if name in usual else len(usual), name)


def without_devices(session: str, streams: Mapping[str, StreamSettings] | None = None) -> Settings:
    """The settings of an imported session: no devices, and these streams."""
    none = dict.fromkeys(SourcesSettings.__struct_fields__, "none")
    return Settings(session=SessionSettings(session), sources=SourcesSettings(**none), streams=dict(streams or {}))


def write(
    out: Path,
    settings: Settings,
    envelopes: Iterable[Envelope],
    span_ns: tuple[int, int],
    about: Mapping[str, str],
    wall_offset_ns: int,
    progress: Callable[[float], None],
) -> dict[str, int]:
    """Write a recording; returns its messages by topic. `about`: further metadata.

    Raises:
        FileError: `out` exists already or cannot be written; nothing is left of it then.

    """
    begin_ns, end_ns = span_ns
    recorder = Recorder(
        out,
        settings.session.name,
        {
            "part": "1",
            "raw": "true",
            "slots": "1",
            "model": "",
            "model_sha256": "",
            "config": msgspec.json.encode(settings).decode(),
            "platform": sys.platform,
            "started_ns": str(begin_ns),
            **about,
        },
        wall_offset_ns=wall_offset_ns if wall_offset_ns + begin_ns > 0 else 0,
        table=stream_table(settings),
    )
    try:
        for envelope in envelopes:
            recorder.write(envelope)
            recorder.flush_due(now_ns())
            if recorder.trouble:
                raise _unwritable(out, recorder)
            if envelope.topic == topics.CLOCK:
                progress((envelope.event_ns - begin_ns) / (end_ns + TAIL_NS - begin_ns))
        if not recorder.close({"ended": "imported", "lost": "{}", "statuses": "{}"}):
            raise _unwritable(out, recorder)
    except BaseException:
        recorder.abandon()
        out.unlink(missing_ok=True)
        raise
    return recorder.counts


def _unwritable(out: Path, recorder: Recorder) -> FileError:
    return FileError(f"{out} cannot be written: {recorder.trouble}; make room, or choose another place")


def described(out: Path, path: Path, settings: Settings, span_ns: tuple[int, int]) -> dict[str, Any]:
    """What every import says of itself."""
    return {
        "recording": str(out),
        "of": str(path),
        "session": settings.session.name,
        "seconds": round((span_ns[1] - span_ns[0]) / 1e9, 3),
    }
