"""Who only looks: the live page, traces, Foxglove, an outlet of Lab Streaming Layer.

Each reads the bus by a queue that drops the oldest, so that a slow one costs nobody anything. Know nothing about how
what they show came to be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path

import msgspec

from stream_mmrnn.bus import Publisher, Subscriber
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.dedup import TickDeduplicator
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.prediction_decoder import PredictionDecoder
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.live.nodes.process import Context, Reporter, hear_clock

_MAX_TYPED = 64
"""Lines typed on the page that wait for the bus."""


def _follow(context: Context, subscriber: Subscriber, reporter: Reporter) -> Iterator[Envelope | None]:
    """What comes, and None where nothing did for a while, until this process shall end; what was missed is said."""
    while context.alive():
        envelope = subscriber.receive(100)
        reporter.report_due()
        if missed := subscriber.report():
            reporter.report("ready", missed)
        yield envelope


def dashboard(context: Context) -> None:
    """The live page's server, over a view of the bus that it owns alone."""
    from stream_mmrnn.bus import keys as keys
    from stream_mmrnn.bus.subscription import Reading, document
    from stream_mmrnn.viewers.dashboard.server import Dashboard
    from stream_mmrnn.viewers.dashboard.state import LiveState
    from stream_mmrnn.viewers.prometheus import Metrics

    settings = context.settings
    publisher = Publisher(context.address, settings.bus.queue)
    subscriber = Subscriber(
        context.address,
        [topics.FEATURE, *topics.raws("text"), topics.LABEL, topics.CLOCK, topics.PREDICTION, topics.STATUS],
        settings.bus.view_queue,
        "drop_oldest",
    )
    looking = _Looking(context)
    decoder = PredictionDecoder()  # shared: each prediction is decoded once
    view = LiveState(decoder)
    typed: deque[bytes] = deque()

    def take_line(body: bytes) -> str:
        """In the server's thread: the bus is ours."""
        if why := view.typing()["why"]:
            return str(why)
        try:
            line = msgspec.json.decode(body, type=str).strip().encode()
        except (msgspec.MsgspecError, UnicodeError):
            return "a line is a JSON string"
        if not line or len(line) > settings.text.max_line_bytes:
            return f"a line has 1 to {settings.text.max_line_bytes} bytes, this one has {len(line)}"
        if len(typed) >= _MAX_TYPED:
            return "more was typed than could be sent; wait a moment"
        typed.append(line)
        return ""

    shown = settings.dashboard
    token = keys.token(Path(shown.token_file))[0] if shown.token_file else ""
    metrics = Metrics(decoder)
    page = Dashboard(
        shown.host,
        shown.port,
        token=token,
        posts={"/text": take_line},
        metrics=lambda: metrics.text(now_ns()),
        ready=lambda: metrics.why_not_ready(now_ns()),
    )
    reporter = Reporter(context, publisher)
    reporter.counts = lambda: {
        **_totals(subscriber.tally(), looking.tally()),
        "denied": sum(page.access.denied.values()),
    }
    reporter.detail = lambda: {"address": page.address, "denied": dict(page.access.denied)}
    hear_clock(context, subscriber)
    reporter.report("ready")
    context.ready.set()
    next_ns = 0
    reading, explained, started = Reading(decoder=decoder), None, False
    for envelope in _follow(context, subscriber, reporter):
        if context.epoch.value and not started:
            started = True
            page.start()  # not before: what it imports would keep the cores from those who are waited for
        while typed:
            at_ns = now_ns()
            publisher.publish(topics.TYPED, settings.session.name, at_ns, at_ns, typed.popleft(), "page")
        if envelope is not None:
            view.observe(envelope)
            if envelope.topic != topics.PREDICTION or page.listeners:
                said = reading.observe(envelope)
                if started and reading.model is not explained:
                    explained = reading.model
                    page.explain(msgspec.to_builtins(explained))
                if said is not None:
                    page.predict(document(said))
            else:
                reading.skip()
            metrics.observe(envelope)
        for heavy in looking.read(page.clients > 0):
            view.observe(heavy)
            if heavy.topic == topics.raw("vision") and isinstance(heavy.payload, bytes):
                page.picture(heavy.payload)
        if not page.clients:
            view.skip(_Looking.TOPICS)
        elif now_ns() >= next_ns:
            next_ns = now_ns() + 100_000_000
            page.sound(view.sound.first, view.sound.columns)
            page.update(view.snapshot(now_ns()))
    page.close()
    looking.close()
    subscriber.close()
    publisher.close()


def tracer(context: Context) -> None:
    """Predictions as traces, to a collector; one that is slow or gone costs nobody else anything."""
    from stream_mmrnn.core.clock import wall_offset_ns
    from stream_mmrnn.viewers.tracing import Tracer

    settings = context.settings
    publisher = Publisher(context.address, settings.bus.queue)
    wanted = [topics.CLOCK, topics.PREDICTION]
    subscriber = Subscriber(context.address, wanted, settings.bus.view_queue, "drop_oldest")
    traces = Tracer(settings.trace, wall_offset_ns())
    reporter = Reporter(context, publisher)
    reporter.counts = lambda: {
        **_totals(subscriber.tally()),
        "traces": traces.traces,
        "spans_exported": traces.exported,
        "spans_failed": traces.failed,
    }
    hear_clock(context, subscriber)
    reporter.report("ready")
    context.ready.set()
    lost = False
    for envelope in _follow(context, subscriber, reporter):
        if traces.failed and not lost:
            lost = True
            reporter.report(
                "ready", f"the collector at {settings.trace.endpoint} does not take spans; they are dropped"
            )
        if envelope is not None and envelope.topic == topics.PREDICTION:
            traces.observe(envelope)
    traces.close()
    reporter.report("closed")
    subscriber.close()
    publisher.close()


def foxglove(context: Context) -> None:
    """What is on the bus, for Foxglove: a server that Foxglove connects to."""
    from stream_mmrnn.viewers.foxglove import SHOWN, FoxgloveServer

    settings = context.settings
    publisher = Publisher(context.address, settings.bus.queue)
    subscriber = Subscriber(context.address, list(SHOWN), settings.bus.view_queue, "drop_oldest")
    server = FoxgloveServer(settings.foxglove.port, settings.bus.view_queue)
    reporter = Reporter(context, publisher)
    reporter.counts = lambda: {**_totals(subscriber.tally()), "garbage": subscriber.garbage + server.garbage}
    reporter.detail = lambda: {"address": server.address}
    hear_clock(context, subscriber)
    reporter.report("ready")
    context.ready.set()
    for envelope in _follow(context, subscriber, reporter):
        if envelope is not None and envelope.session in (settings.session.name, topics.EVERYONE):
            server.show(envelope)
    server.close()
    subscriber.close()
    publisher.close()


def lsl(context: Context) -> None:
    """The session's predictions as a stream of Lab Streaming Layer."""
    from stream_mmrnn.viewers.lsl_outlet import Outlet

    settings = context.settings
    publisher = Publisher(context.address, settings.bus.queue)
    engine_says = topics.STATUS + "engine"
    wanted = [engine_says, topics.PREDICTION, topics.CLOCK]
    subscriber = Subscriber(context.address, wanted, settings.bus.view_queue, "drop_oldest")
    reporter = Reporter(context, publisher)
    outlet: Outlet | None = None
    reporter.counts = lambda: {
        **_totals(subscriber.tally()),
        "pushed": outlet.pushed if outlet else 0,
        "garbage": subscriber.garbage + malformed,
    }
    reporter.detail = lambda: {"stream": outlet.name if outlet else ""}
    deduplicator = TickDeduplicator()  # an engine that went on after a crash says some again
    malformed = 0

    def see(envelope: Envelope) -> None:
        nonlocal outlet, malformed
        try:
            if envelope.topic == engine_says and outlet is None:
                spec = wire.unpack(envelope.payload, wire.StatusMessage).detail.get("spec")
                if spec is not None:
                    outlet = Outlet(settings.lsl, settings.session.name, spec)
                    reporter.report("ready")
                    context.ready.set()
            elif envelope.topic == topics.PREDICTION and envelope.session == settings.session.name and outlet:
                prediction = wire.unpack(envelope.payload, wire.PredictionMessage)
                if deduplicator.first(envelope.session, prediction.tick):
                    outlet.push(prediction)
        except WireError:
            malformed += 1

    for envelope in _follow(context, subscriber, reporter):
        if envelope is not None:
            see(envelope)
    while (envelope := subscriber.receive(0)) is not None:
        see(envelope)
    if outlet is not None:
        outlet.close()
    subscriber.close()
    publisher.close()


class _Looking:
    """Pictures and sound for the page, which are on the way to it only while a browser looks."""

    TOPICS = (topics.raw("vision"), topics.raw("audio"))

    def __init__(self, context: Context) -> None:
        self._address, self._queue = context.address, context.settings.bus.view_queue
        self._subscriber: Subscriber | None = None
        self._before: dict[str, dict[str, int]] = {}

    def read(self, somebody: bool) -> Iterator[Envelope]:
        """What has come, without waiting; nothing where nobody looks."""
        if not somebody:
            self.close()
            return
        if self._subscriber is None:
            self._subscriber = Subscriber(self._address, list(self.TOPICS), self._queue, "drop_oldest", midway=True)
        for _ in range(self._queue):
            envelope = self._subscriber.receive(0)
            if envelope is None:
                return
            yield envelope

    def tally(self) -> dict[str, dict[str, int]]:
        """As `Subscriber.tally`, of all the times that somebody looked."""
        found = {topic: dict(counts) for topic, counts in self._before.items()}
        for topic, counts in (self._subscriber.tally() if self._subscriber else {}).items():
            before = found.setdefault(topic, {})
            for name, count in counts.items():
                before[name] = before.get(name, 0) + count
        return found

    def close(self) -> None:
        if self._subscriber is None:
            return
        while self._subscriber.receive(0) is not None:
            pass  # what waits was delivered, to nobody
        self._before = self.tally()
        self._subscriber.close()
        self._subscriber = None


def _totals(*tallies: dict[str, dict[str, int]]) -> dict[str, int]:
    """What a viewer had of all topics together: produced = delivered + waiting + the others."""
    totals = dict.fromkeys(("produced", "delivered", "waiting", "lost", "oldest", "superseded", "stale"), 0)
    for counts in (counts for tally in tallies for counts in tally.values()):
        for name, count in counts.items():
            totals[name] += count
    return totals
