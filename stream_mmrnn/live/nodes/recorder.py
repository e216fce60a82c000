"""The recorder as a process: what is on the bus, into a file. Knows nothing about what messages mean."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from stream_mmrnn.bus import Publisher, Subscriber
from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core.clock import WallClock, now_ns
from stream_mmrnn.core.dedup import TickDeduplicator
from stream_mmrnn.core.errors import StreamError, WireError
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.live.nodes.process import Context, Reporter, hear_clock
from stream_mmrnn.recording.append_file import part

_CLOSE_S = 0.4
"""How long what waits for the disk is still written at the end: the supervisor waits a little longer."""
_MAX_NODES = 64
"""Processes whose last status a recording keeps."""


def recorder(context: Context) -> None:
    """Everything of the session, as it comes, into a file. Reading the bus never waits for the disk."""
    from stream_mmrnn.recording.mcap_file import Recorder, Recording
    from stream_mmrnn.recording.write_queue import WriteQueue

    settings = context.settings
    publisher = Publisher(context.address, settings.bus.queue)
    wanted = [topics.FEATURE, topics.CLOCK, topics.SESSION, topics.TICK, topics.PREDICTION, topics.STATUS]
    wanted += [topics.CONTROL, topics.LABEL, *([topics.RAW] if settings.record.raw else [])]
    subscriber = Subscriber(context.address, wanted, settings.bus.queue)
    reporter = Reporter(context, publisher)
    if not context.alive():
        return  # told to end before it began: no file is better than an empty one
    path, wall_offset_ns = Path(settings.record.path), None
    if context.restarts:
        with contextlib.suppress(StreamError):  # one that died at once has left no head
            wall_offset_ns = int(Recording(path).metadata["wall_offset_ns"])
    file = Recorder(
        part(path, context.restarts),
        settings.session.name,
        {
            "part": str(context.restarts + 1),
            "raw": str(settings.record.raw).lower(),
            "slots": str(settings.engine.slots),
            "model": settings.engine.model,
            "model_sha256": _model_sha256(settings.engine.model),
            "config": msgspec.json.encode(settings).decode(),
            "platform": sys.platform,
        },
        settings.record.chunk_ms,
        wall_offset_ns,
    )
    write_queue = WriteQueue(
        file,
        int(settings.record.queue_mb * 1e6),
        settings.record.policy,
        settings.record.fsync_ms,
        later_part=context.restarts > 0,
    )
    statuses: dict[str, Any] = {}
    # an engine that went on after a crash says again what is in the file already
    deduplicator = {topic: TickDeduplicator() for topic in (topics.TICK, topics.PREDICTION)}

    def again(envelope: Envelope) -> bool:
        if envelope.topic not in deduplicator:
            return False
        try:
            return not deduplicator[envelope.topic].first(envelope.session, wire.tick_index(envelope.payload))
        except WireError:
            return False  # the file says what was sent

    wall = WallClock()
    reporter.counts = lambda: {
        **write_queue.counts,
        "wall_steps": wall.steps,
        "repeated": sum(r.count for r in deduplicator.values()),
        "garbage": subscriber.garbage,
    }
    reporter.detail = lambda: {"path": str(file.path), "messages": file.counts.copy()}
    if hear_clock(context, subscriber) is not None:
        reporter.report("ready")
    context.ready.set()
    opened = context.restarts > 0
    how, trouble = "the recorder was ended before the session", ""
    while context.alive():
        envelope = subscriber.receive(50)
        at_ns = now_ns()
        if step_ns := wall.poll(at_ns):
            write_queue.note_wall_step(at_ns, step_ns)
            reporter.report(
                "ready",
                f"the wall clock was set by {step_ns / 1e9:+.3f} s; the recording's dates count on from its beginning",
            )
        reporter.report_due()
        if trouble != write_queue.trouble:
            trouble = write_queue.trouble
            reporter.report("ready", trouble)
        if envelope is None:
            continue
        if envelope.topic.startswith(topics.STATUS):
            with contextlib.suppress(WireError):
                if envelope.topic not in statuses and len(statuses) >= _MAX_NODES:
                    continue
                statuses[envelope.topic] = wire.unpack(envelope.payload, wire.StatusMessage)
        elif envelope.topic == topics.CONTROL:
            how = "clean"
            break
        elif envelope.session in (file.session, topics.EVERYONE):
            opened = opened or envelope.topic == topics.SESSION
            if opened and not again(envelope):  # asked once: whoever waits for room is no repetition of itself
                while not write_queue.put(envelope) and context.alive():
                    reporter.report_due()
                    time.sleep(0.005)
    end = {
        "ended": how,
        "repeated": msgspec.json.encode({t: r.count for t, r in deduplicator.items() if r.count}).decode(),
        "statuses": msgspec.json.encode(statuses).decode(),
    }
    if not write_queue.close(end, _CLOSE_S):
        reporter.report("ready", f"{file.path.name} has no end, because the disk did not take it")
    reporter.report("closed")
    subscriber.close()
    publisher.close()


def _model_sha256(name: str) -> str:
    """Of the model that predicts in this session; "" where there is none (a recording may be made without one)."""
    with contextlib.suppress(StreamError, OSError):
        return hashlib.sha256(config.find_model(name).read_bytes()).hexdigest()
    return ""
