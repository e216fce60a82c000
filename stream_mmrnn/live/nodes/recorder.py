"""The recorder as a process: what is on the bus, into a file. It does not know what messages mean."""

from __future__ import annotations

import contextlib
import hashlib
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from stream_mmrnn.bus import JournalClient
from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core.clock import WallClock, now_ns
from stream_mmrnn.core.dedup import TickDeduplicator
from stream_mmrnn.core.errors import StreamError, WireError
from stream_mmrnn.core.stream_table import stream_table
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.core.wire import encodable
from stream_mmrnn.live.checkpoint import newest
from stream_mmrnn.live.late_recording import LateBeginning
from stream_mmrnn.live.nodes.process import HEARD, Context, Node, wait_for_clock
from stream_mmrnn.recording.append_file import part
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.mcap_format import LATE
from stream_mmrnn.recording.recorder import Recorder
from stream_mmrnn.recording.write_queue import WriteQueue

_CLOSE_S = 0.4
"""How long the end waits for the disk; the supervisor waits a little longer."""
_CHECKPOINT_NS = 4_000_000_000
"""How long a recording that begins in the middle of a session waits for a checkpoint of the engine."""
_ASK_NS, _ANSWER_MS = 250_000_000, 200
_LAST_NS = 1_500_000_000
"""How long a recording that ends before its session waits for the predictions of what it holds."""
_MAX_STATUSES = 64
"""Processes whose last status a recording keeps."""


class RecorderNode(Node):
    """Every message of the session, in the order of the bus, into a file. Reading the bus never waits for the disk."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        record = self.settings.record
        wanted = [topics.FEATURE, topics.CLOCK, topics.SESSION, topics.PREDICTION, topics.STATUS]
        wanted += [topics.CONTROL, topics.LABEL, *([topics.RAW] if record.raw else [])]
        self.subscriber = self.subscribe(wanted)
        self.statuses: dict[str, Any] = {}
        self.deduplicator = TickDeduplicator()
        """An engine that was restarted publishes again what is in the file already."""
        self.late = context.late and not context.restarts
        """Whether it begins in the middle of the session."""
        self.wall = WallClock()
        self._trouble = ""
        self._finished: bool | None = None
        """Whether the disk took the file's end; None until then."""

    def _open(self) -> None:
        settings, restarts = self.settings, self.context.restarts
        path, wall_offset_ns = Path(settings.record.path), None
        if restarts:
            with contextlib.suppress(StreamError):  # a recorder that died at once has left no header
                wall_offset_ns = int(Recording(path).metadata["wall_offset_ns"])
        self.file = Recorder(
            part(path, restarts),
            settings.session.name,
            {
                "part": str(restarts + 1),
                **({LATE: "true"} if self.context.late else {}),
                "raw": str(settings.record.raw).lower(),
                "slots": str(settings.engine.slots),
                "model": encodable(settings.engine.model),
                "model_sha256": _model_sha256(settings.engine.model),
                "config": msgspec.json.encode(encodable(msgspec.to_builtins(settings))).decode(),
                "platform": sys.platform,
            },
            settings.record.chunk_ms,
            wall_offset_ns,
            table=stream_table(settings),
        )
        self.write_queue = WriteQueue(
            self.file,
            int(settings.record.queue_mb * 1e6),
            settings.record.policy,
            settings.record.fsync_ms,
            later_part=restarts > 0 or self.late,
        )
        self.reporter.counts = lambda: {
            **self.write_queue.counts,
            "wall_steps": self.wall.steps,
            "repeated": self.deduplicator.count,
            "garbage": self.subscriber.garbage,
        }
        self.reporter.detail = lambda: {
            "path": str(self.file.path),
            "messages": self.file.counts.copy(),
            "finished": self._finished,
            "refusal": self.file.trouble,
        }

    def run(self) -> None:
        if not self.context.alive():
            return  # told to end before it began: no file is better than an empty one
        self._open()
        if wait_for_clock(self.context, self.subscriber) is not None:
            self.reporter.report("ready")
        self.context.ready.set()
        self._close(self._record())

    def _record(self) -> str:
        """Until the end of the session, or of this recording; how it ended, for the file."""
        opened = self.context.restarts > 0
        ends, last_seq = False, -1
        waiting: deque[Envelope] = deque()
        if self.late:
            waiting.extend(self._beginning())
        while self.context.alive():
            envelope = waiting.popleft() if waiting else self.subscriber.receive(50)
            self._watch(now_ns())
            if envelope is None:
                continue
            if envelope.topic.startswith(topics.STATUS):
                self._keep_status(envelope)
            elif envelope.topic == topics.CONTROL:
                if envelope.payload == topics.END_RECORDING:
                    ends = True
                    continue
                # an engine that the supervisor did not wait for may still have ticks to step
                self._last_predictions(last_seq, chain(waiting, self._messages_for(_LAST_NS)))
                return "clean"
            elif envelope.session in (self.file.session, topics.EVERYONE):
                if envelope.topic == topics.SESSION and envelope.session == self.file.session:
                    opened, last_seq = True, envelope.seq
                    if ends:
                        self._last_predictions(last_seq, chain(waiting, self._messages_for(_LAST_NS)))
                        return "clean"
                if opened and not self._repeated(envelope):
                    self._put(envelope)
        return "the recorder was ended before the session"

    def _last_predictions(self, last_seq: int, envelopes: Iterable[Envelope]) -> None:
        """Record what the engine makes of the messages that are in the file, and nothing else.

        `last_seq`: of the `session` message that ends them. It stands in one order with the inputs: once the engine has
        dealt with it, all predictions are here.
        """
        if self._has_heard(last_seq):
            return
        for envelope in envelopes:
            if envelope.topic.startswith(topics.STATUS):
                self._keep_status(envelope)
                if self._has_heard(last_seq):
                    return
            elif (envelope.topic, envelope.session) == (topics.PREDICTION, self.file.session):
                if self._repeated(envelope):
                    continue
                self._put(envelope)

    def _has_heard(self, seq: int) -> bool:
        """Whether the engine has dealt with this `session` message, or there is none that will."""
        status = self.statuses.get(topics.STATUS + "engine")
        if status is None or status.state == "failed":
            return status is not None or not self.late  # a recorder that came late may not have heard of it yet
        heard = status.detail.get(HEARD)
        return isinstance(heard, int) and heard >= seq

    def _messages_for(self, most_ns: int) -> Iterator[Envelope]:
        until_ns = now_ns() + most_ns
        while self.context.alive() and now_ns() < until_ns:
            envelope = self.subscriber.receive(50)
            self._watch(now_ns())
            if envelope is not None:
                yield envelope

    def _beginning(self) -> list[Envelope]:
        """What a recording that begins in the middle of the session starts with; what comes meanwhile is kept."""
        start, caller = LateBeginning(self.file.session), None
        if self.settings.state.snapshot_every:
            caller = JournalClient(self.context.address)
        until_ns, ask_ns, control = now_ns() + _CHECKPOINT_NS, 0, False
        found: list[Envelope] | None = None
        while found is None and now_ns() < until_ns and not control and self.context.alive():
            envelope = self.subscriber.receive(50)
            self._watch(now_ns())
            if envelope is not None and envelope.topic.startswith(topics.STATUS):
                self._keep_status(envelope)
            elif envelope is not None:
                start.add(envelope)
                control = envelope.topic == topics.CONTROL
            if caller is None and len(start):
                break
            if caller is not None and len(start) and (control or now_ns() >= ask_ns):
                ask_ns = now_ns() + _ASK_NS
                found = start.at(newest(caller, self.file.session, _ANSWER_MS))
        if caller is not None:
            caller.close()
        return start.without_state() if found is None else found

    def _watch(self, at_ns: int) -> None:
        """Report what a person should know: a wall clock that was set, a disk that takes nothing."""
        if step_ns := self.wall.poll(at_ns):
            self.write_queue.note_wall_step(at_ns, step_ns)
            self.reporter.report(
                "ready",
                f"the wall clock was set by {step_ns / 1e9:+.3f} s; the recording's dates count on from its beginning",
            )
        self.reporter.report_due()
        if self._trouble != self.write_queue.trouble:
            self._trouble = self.write_queue.trouble
            self.reporter.report("ready", self._trouble)

    def _keep_status(self, envelope: Envelope) -> None:
        with contextlib.suppress(WireError):
            if envelope.topic in self.statuses or len(self.statuses) < _MAX_STATUSES:
                self.statuses[envelope.topic] = wire.unpack(envelope.payload, wire.StatusMessage)

    def _repeated(self, envelope: Envelope) -> bool:
        if envelope.topic != topics.PREDICTION:
            return False
        try:
            return not self.deduplicator.first(envelope.session, wire.tick_index(envelope.payload))
        except WireError:
            return False  # recorded as it was sent

    def _put(self, envelope: Envelope) -> None:
        while not self.write_queue.put(envelope) and self.context.alive():
            self.reporter.report_due()
            time.sleep(0.005)

    def _close(self, how: str) -> None:
        repeated = {topics.PREDICTION: self.deduplicator.count} if self.deduplicator.count else {}
        end = {
            "ended": how,
            "repeated": msgspec.json.encode(repeated).decode(),
            "statuses": msgspec.json.encode(self.statuses).decode(),
        }
        self._finished = self.write_queue.close(end, _CLOSE_S)
        if not self._finished:
            self.reporter.report("ready", f"{self.file.path.name} has no end, because the disk did not take it")
        self.reporter.report("closed")
        self.subscriber.close()
        self.publisher.close()


def _model_sha256(name: str) -> str:
    """Of the model that predicts in this session; "" where there is none (a recording may be made without one)."""
    with contextlib.suppress(StreamError, OSError):
        return hashlib.sha256(config.find_model(name).read_bytes()).hexdigest()
    return ""
