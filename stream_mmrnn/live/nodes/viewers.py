"""The read-only consumers of a session as processes: the live page, traces, Foxglove, an outlet of Lab Streaming Layer.

Each reads the bus through a queue that drops the oldest message, so a slow viewer delays no other process.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import msgspec

from stream_mmrnn.bus import Subscriber
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import now_ns, wall_offset_ns
from stream_mmrnn.core.dedup import TickDeduplicator
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.numbers import whole_number
from stream_mmrnn.core.prediction_decoder import PredictionDecoder
from stream_mmrnn.core.stream_table import stream_table
from stream_mmrnn.core.streams import text_topics
from stream_mmrnn.core.types import Envelope, Sample
from stream_mmrnn.live.nodes.process import Context, Node, wait_for_clock
from stream_mmrnn.viewers.dashboard.sensors import Reading, Sensors, sensor_specs

if TYPE_CHECKING:
    from stream_mmrnn.viewers.lsl_outlet import Outlet

_MAX_PUSHED = 256
"""Samples of WebSocket clients that wait for the bus."""
_PAGE_PERIOD_NS = 100_000_000
"""How often the page gets a new state."""


class _ViewerNode(Node):
    """A node whose subscriber drops the oldest messages."""

    def __init__(self, context: Context, wanted: list[str]) -> None:
        super().__init__(context)
        queue = self.settings.bus.view_queue
        self.subscriber = Subscriber(context.address, wanted, queue, "drop_oldest")
        self.reporter.counts = lambda: _totals(self.subscriber.tally())

    def ready(self) -> None:
        wait_for_clock(self.context, self.subscriber)
        self.reporter.report("ready")
        self.context.ready.set()

    def follow(self) -> Iterator[Envelope | None]:
        """Each message, and None when none came for a while, until this process must end; reports what was missed."""
        while self.context.alive():
            envelope = self.subscriber.receive(100)
            self.reporter.report_due()
            if missed := self.subscriber.report():
                self.reporter.report("ready", missed)
            yield envelope

    def close(self) -> None:
        self.subscriber.close()
        self.publisher.close()


class DashboardNode(_ViewerNode):
    """The live page's server, with a view of the bus of its own."""

    def __init__(self, context: Context) -> None:
        from stream_mmrnn.bus import keys as keys
        from stream_mmrnn.bus.prediction_reader import PredictionReader
        from stream_mmrnn.bus.registry import began
        from stream_mmrnn.viewers.dashboard.controls import Controls
        from stream_mmrnn.viewers.dashboard.hub import Hub
        from stream_mmrnn.viewers.dashboard.raw_streams import RawStreams
        from stream_mmrnn.viewers.dashboard.server import Dashboard
        from stream_mmrnn.viewers.dashboard.state import LiveState
        from stream_mmrnn.viewers.dashboard.typed_lines import TypedLines
        from stream_mmrnn.viewers.prometheus import Metrics

        table = stream_table(context.settings)
        words = text_topics(table.values())
        super().__init__(
            context, [topics.FEATURE, *words, topics.LABEL, topics.CLOCK, topics.PREDICTION, topics.STATUS]
        )
        decoder = PredictionDecoder()  # shared, so that each prediction is decoded once
        self.view = LiveState(decoder, table)
        raw = [t for t in (self.view.picture_topic, self.view.sound_topic) if t]
        self.raw_streams = RawStreams(context.address, self.settings.bus.view_queue, raw)
        self.reading = PredictionReader(decoder=decoder)
        self.metrics = Metrics(decoder)
        self.typed = TypedLines(self.view, self.settings.text.max_line_bytes)
        self._pushed: deque[tuple[str, Sample]] = deque()
        """Samples of WebSocket clients, as messages for a topic."""
        self._push_streams = {name for name, row in table.items() if row.source == "push"}
        self.sensors = Sensors(sensor_specs(table.values(), self.settings), self._take_reading)
        self._said: list[str] = []
        """Why browsers give no streams, as it was reported."""
        self._explained: Any = None
        self._started = False
        self._next_ns = 0
        self._ops: deque[Any] = deque(maxlen=16)
        """What was asked of the supervisor on the page."""
        supervisor = multiprocessing.parent_process()
        pid = supervisor.pid if supervisor is not None and supervisor.pid else 0
        self.controls = Controls(self.settings.page, own=(f"{pid}-{began(pid) or 0}", self._ops.append))
        self.controls.observe_own(self.view)
        page = self.settings.dashboard
        token = keys.token(Path(page.token_file))[0] if page.token_file else ""
        self.page = Dashboard(
            page.host,
            page.port,
            token=token,
            posts={"/text": self.typed.take, **self.controls.posts},
            metrics=lambda: self.metrics.text(now_ns()),
            ready=lambda: self.metrics.why_not_ready(now_ns()),
            push=self._take_sample,
            features=("controls", "sensors") if self.sensors.names else ("controls",),
            sensors=self.sensors if self.sensors.names else None,
            cert=page.cert,
            key=page.key,
            views=lambda key, again: self.controls.hub.view(key, again),
        )
        self.controls.hub = Hub(self.page.show, self.controls.state, self.settings.text.max_line_bytes)
        self.reporter.counts = lambda: {
            **_totals(self.subscriber.tally(), self.raw_streams.tally()),
            "denied": sum(self.page.access.denied.values()),
            **(self.sensors.losses() if self.sensors.names else {}),
        }
        self.reporter.detail = lambda: {
            "address": self.page.address,
            "denied": dict(self.page.access.denied),
            "sensors": self.sensors.status(),
        }

    def run(self) -> None:
        self.ready()
        for envelope in self.follow():
            self._start_page()
            self.typed.publish(self.publisher, self.settings.session.name)
            self._report_sensors()
            self._publish_pushed()
            self._publish_ops()
            if envelope is not None:
                self._observe(envelope)
            self._observe_raw()
            self._update_page()
        self._end_page()
        self.controls.hub.close()
        self.raw_streams.close()
        self.close()

    def _take_sample(self, stream: str, content: bytes, query: str) -> str:
        """Queue a sample of a WebSocket client; why not, or "". Runs in the server's thread, which has no socket."""
        if stream not in self._push_streams:
            return f"the session has no stream {stream!r} with the source push"
        rate_hz = whole_number(parse_qs(query).get("rate_hz", [str(topics.AUDIO_RATE_HZ)])[0], 1000, 384_000)
        if rate_hz is None:
            return "rate_hz is 1000 to 384000 samples a second"
        if len(self._pushed) >= _MAX_PUSHED:
            return "more was pushed than could be sent; send no faster than the samples are made"
        if content:
            at_ns = now_ns()
            self._push(stream, Sample(at_ns, at_ns, content), rate_hz)
        return ""

    def _take_reading(self, reading: Reading) -> bool:
        """Queue a sample of a browser's sensor; whether there was room. Runs in the server's thread, too."""
        if len(self._pushed) >= _MAX_PUSHED:
            return False
        self._push(reading.stream, reading.sample, reading.rate_hz)
        return True

    def _push(self, stream: str, sample: Sample, rate_hz: int) -> None:
        message = wire.pack_push(wire.PushMessage(bytes(sample.data), rate_hz))
        self._pushed.append((topics.push(stream), msgspec.structs.replace(sample, data=message)))

    def _publish_pushed(self) -> None:
        session = self.settings.session.name
        while self._pushed:
            topic, sample = self._pushed.popleft()
            self.publisher.publish(
                topic, session, sample.event_ns, sample.capture_ns, sample.data, "page", sample.device_ns
            )

    def _report_sensors(self) -> None:
        """Tell the workers at once when a browser begins or ends to give a stream: they read the status."""
        if not self.sensors.names:
            return
        said = [about["why"] for about in self.sensors.status().values()]
        if said != self._said:
            self._said = said
            self.reporter.report("ready")

    def _publish_ops(self) -> None:
        while self._ops:
            at_ns, request = now_ns(), wire.pack(wire.RequestMessage(self._ops.popleft()))
            self.publisher.publish(topics.REQUEST, self.settings.session.name, at_ns, at_ns, request, "page")

    def _start_page(self) -> None:
        if self.context.epoch.value and not self._started:
            self._started = True
            self.controls.hub.start()
            self.view.began_ns = self.context.epoch.value
            self.page.start()  # not before: its imports would take the cores from processes that still start

    def _observe(self, envelope: Envelope) -> None:
        from stream_mmrnn.bus.prediction_reader import document

        self.view.observe(envelope)
        if envelope.topic != topics.PREDICTION or self.page.listeners:
            prediction = self.reading.observe(envelope)
            if self._started and self.reading.model is not self._explained:
                self._explained = self.reading.model
                self.page.explain(msgspec.to_builtins(self._explained))
            if prediction is not None:
                self.page.predict(document(prediction))
        else:
            self.reading.skip()
        self.metrics.observe(envelope)

    def _observe_raw(self) -> None:
        for envelope in self.raw_streams.read(self.page.clients > 0):
            self.view.observe(envelope)
            if envelope.topic == self.view.picture_topic and isinstance(envelope.payload, bytes):
                self.page.picture(envelope.payload)

    def _update_page(self) -> None:
        if not self.page.clients:
            self.view.skip(self.raw_streams.wanted)
        elif now_ns() >= self._next_ns:
            self._next_ns = now_ns() + _PAGE_PERIOD_NS
            self.page.sound(self.view.sound.first, self.view.sound.columns)
            self.page.update(self._state())

    def _state(self) -> dict[str, Any]:
        return {**self.view.snapshot(now_ns()), **self.controls.state("", self.view)}

    def _end_page(self) -> None:
        """Tell the browsers that this is the end and not a lost connection, then close."""
        if self.page.clients and self.context.stop.is_set():
            while (envelope := self.subscriber.receive(0)) is not None:
                self.view.observe(envelope)
            self.page.update({**self._state(), "ended": self.view.ending()})
            self.page.flush()
        self.page.close()


class TracerNode(_ViewerNode):
    """Predictions as traces, to a collector. A collector that is slow or gone costs spans and nothing else."""

    def __init__(self, context: Context) -> None:
        from stream_mmrnn.viewers.tracing import Tracer

        super().__init__(context, [topics.CLOCK, topics.PREDICTION])
        self.tracer = Tracer(self.settings.trace, wall_offset_ns())
        self.reporter.counts = lambda: {
            **_totals(self.subscriber.tally()),
            "traces": self.tracer.traces,
            "spans_exported": self.tracer.exported,
            "spans_failed": self.tracer.failed,
        }

    def run(self) -> None:
        self.ready()
        reported = False
        for envelope in self.follow():
            if self.tracer.failed and not reported:
                reported = True
                self.reporter.report(
                    "ready", f"the collector at {self.settings.trace.endpoint} does not take spans; they are dropped"
                )
            if envelope is not None and envelope.topic == topics.PREDICTION:
                self.tracer.observe(envelope)
        self.tracer.close()
        self.reporter.report("closed")
        self.close()


class FoxgloveNode(_ViewerNode):
    """A server that Foxglove connects to, with the messages of the bus."""

    def __init__(self, context: Context) -> None:
        from stream_mmrnn.viewers.foxglove import FoxgloveServer, shown

        table = stream_table(context.settings)  # also those without a source: other programs may publish features
        super().__init__(context, shown(table.values()))
        about = self.settings.foxglove
        self.server = FoxgloveServer(about.port, self.settings.bus.view_queue, table, about.origins)
        self.reporter.counts = lambda: {
            **_totals(self.subscriber.tally()),
            "garbage": self.subscriber.garbage + self.server.garbage,
            "denied": sum(self.server.gate.denied.values()),
        }
        self.reporter.detail = lambda: {"address": self.server.address, "denied": dict(self.server.gate.denied)}

    def run(self) -> None:
        self.ready()
        for envelope in self.follow():
            if envelope is not None and envelope.session in (self.settings.session.name, topics.EVERYONE):
                self.server.show(envelope)
        self.server.close()
        self.close()


class LslNode(_ViewerNode):
    """The session's predictions as a stream of Lab Streaming Layer."""

    _ENGINE = topics.STATUS + "engine"

    def __init__(self, context: Context) -> None:
        super().__init__(context, [self._ENGINE, topics.PREDICTION, topics.CLOCK])
        self.outlet: Outlet | None = None
        self.deduplicator = TickDeduplicator()
        """An engine that was restarted publishes some ticks again."""
        self._malformed = 0
        self.reporter.counts = lambda: {
            **_totals(self.subscriber.tally()),
            "pushed": self.outlet.pushed if self.outlet else 0,
            "garbage": self.subscriber.garbage + self._malformed,
        }
        self.reporter.detail = lambda: {"stream": self.outlet.name if self.outlet else ""}

    def run(self) -> None:
        for envelope in self.follow():
            if envelope is not None:
                self._observe(envelope)
        while (envelope := self.subscriber.receive(0)) is not None:
            self._observe(envelope)
        if self.outlet is not None:
            self.outlet.close()
        self.close()

    def _observe(self, envelope: Envelope) -> None:
        try:
            if envelope.topic == self._ENGINE and self.outlet is None:
                self._open(envelope)
            elif envelope.topic == topics.PREDICTION and envelope.session == self.settings.session.name:
                self._push(envelope)
        except WireError:
            self._malformed += 1

    def _open(self, envelope: Envelope) -> None:
        """The outlet is made from the model's contract, which the engine's status carries."""
        from stream_mmrnn.viewers.lsl_outlet import Outlet

        spec = wire.unpack(envelope.payload, wire.StatusMessage).detail.get("spec")
        if spec is not None:
            self.outlet = Outlet(self.settings.lsl, self.settings.session.name, spec)
            self.reporter.report("ready")
            self.context.ready.set()

    def _push(self, envelope: Envelope) -> None:
        if self.outlet is None:
            return
        prediction = wire.unpack(envelope.payload, wire.PredictionMessage)
        if self.deduplicator.first(envelope.session, prediction.tick):
            self.outlet.push(prediction)


def _totals(*tallies: dict[str, dict[str, int]]) -> dict[str, int]:
    """The counts of all topics together: produced = delivered + waiting + the others."""
    totals = dict.fromkeys(("produced", "delivered", "waiting", "lost", "oldest", "superseded", "stale"), 0)
    for counts in (counts for tally in tallies for counts in tally.values()):
        for name, count in counts.items():
            totals[name] += count
    return totals
