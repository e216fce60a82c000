"""What all imports share: the numbered messages of one session, and the recording they go to."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import FileError
from stream_mmrnn.core.stream_table import stream_table
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


def without_devices(session: str, streams: Mapping[str, config.StreamSettings] | None = None) -> config.Settings:
    """The settings of an imported session: no devices, and these streams."""
    none = dict.fromkeys(config.SourcesSettings.__struct_fields__, "none")
    return config.Settings(
        session=config.SessionSettings(session), sources=config.SourcesSettings(**none), streams=dict(streams or {})
    )


def write(
    out: Path,
    settings: config.Settings,
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


def described(out: Path, path: Path, settings: config.Settings, span_ns: tuple[int, int]) -> dict[str, Any]:
    """What every import says of itself."""
    return {
        "recording": str(out),
        "of": str(path),
        "session": settings.session.name,
        "seconds": round((span_ns[1] - span_ns[0]) / 1e9, 3),
    }
