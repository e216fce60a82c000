"""A source and its encoder as a process. Knows nothing about ticks."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from stream_mmrnn.bus import Publisher
from stream_mmrnn.core import topics
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import SourceError, WireError

if TYPE_CHECKING:
    from stream_mmrnn.capture.pipeline import Pump
from stream_mmrnn.live.nodes.process import Context, Reporter

_PREWARM_PERIOD_NS = 200_000_000
"""What comes less often than this is not expected at a time that could be named."""


def _join_typed(context: Context, pump: Pump) -> None:
    """What is typed on the page, joined to the lines of the source: from there on it is a line like any other."""
    from stream_mmrnn.capture.sources.text import typed

    settings = context.settings

    def going() -> bool:
        return context.alive() and not pump.ended

    for sample in typed(context.address, settings.session.name, settings.text, going):
        pump.put(sample)


def worker(context: Context, modality: str, spec: str) -> None:
    """A source and its encoder. A device that is not there is asked for again; the session does not wait for it."""
    from stream_mmrnn.capture import encoders, sources
    from stream_mmrnn.capture.pipeline import Outgoing, Pump, capture
    from stream_mmrnn.capture.stall_detector import StallDetector
    from stream_mmrnn.live.prewarm import Prewarmer

    settings = context.settings
    publisher = Publisher(context.address, settings.bus.bulk_queue)
    reporter = Reporter(context, publisher, modality)
    stall_detector = StallDetector(topics.MODALITIES[modality].dense)
    encoder = encoders.create_encoder(modality)
    stdin_fd = context.stdin.detach() if context.stdin is not None else -1
    source = sources.create_source(spec, modality, settings, stdin_fd)
    counts = dict.fromkeys(("captured", "queue_dropped", "undecodable", "published"), 0)
    session, feature = settings.session.name, topics.feature(modality)
    state: dict[str, Any] = {"pump": None, "before": (0, 0)}

    def tally() -> dict[str, int]:
        pump: Pump | None = state["pump"]
        produced, dropped = state["before"]
        if pump is not None:
            produced, dropped = produced + pump.produced, dropped + pump.dropped
        refused = publisher.refused.get(feature, 0)
        stale = {"stale": stall_detector.silences, "stale_ms": stall_detector.stale_ns(now_ns()) // 1_000_000}
        return {**counts, "captured": produced, "queue_dropped": dropped, "refused": refused, **stale}

    def bad(_: WireError) -> None:
        counts["undecodable"] += 1

    reporter.counts = tally
    reporter.detail = lambda: {"source": source.origin, "encoder": encoder.origin, **source.info}
    # a publisher hears the clock by being heard: the broker tells it who listens
    publisher.wait_for_reader(topics.STATUS, 2.0)
    gc.collect()
    gc.freeze()
    context.ready.set()
    while not context.epoch.value and context.alive():
        time.sleep(0.002)
    publisher.wait_for_reader(feature, 2.0)

    def send(out: Outgoing) -> None:
        sample = out.sample
        publisher.publish(
            out.topic, session, sample.event_ns, sample.capture_ns, sample.data, out.origin, sample.device_ns
        )
        if out.topic == feature:
            counts["published"] += 1

    def run_once() -> None:
        encoder.reset()
        source.open()
        reporter.report("open")
        pump = state["pump"] = Pump(
            source.samples(context.alive, context.epoch.value),
            settings.queues.policy(modality),
            settings.queues.length,
            context.alive,
        )
        pump.start()
        typing = threading.Thread(target=_join_typed, args=(context, pump), name="typed", daemon=True)
        if modality == "text" and settings.dashboard.enabled:
            typing.start()

        def warm() -> None:
            encoder.prewarm()
            publisher.prewarm()

        prewarmer, newest_ns = Prewarmer(warm, 0), 0

        def arriving() -> Iterator[Any]:
            nonlocal newest_ns
            while context.alive() and not pump.ended:
                at_ns = now_ns()
                wait_ms = prewarmer.wait_ms(at_ns, reporter.wait_ms(100))
                sample = pump.read(stall_detector.wait_s(at_ns, wait_ms / 1000))
                if sample is None:
                    if stall_detector.check(now_ns()):
                        reporter.report("stale")
                    if not prewarmer.run_if_due(now_ns()):
                        reporter.report_due()
                    continue
                if stall_detector.on_sample(sample.capture_ns):
                    reporter.report("open")
                # the next is expected as long after this one as this one came after its predecessor
                prewarmer.period_ns, newest_ns = sample.event_ns - newest_ns, sample.event_ns
                if settings.engine.prewarm and 0 < prewarmer.period_ns < _PREWARM_PERIOD_NS:
                    prewarmer.stepped(sample.event_ns)
                yield sample
                reporter.report_due(housekeeping=False)

        try:
            for out in capture(arriving(), modality, source.origin, encoder, bad):
                send(out)
        finally:
            stall_detector.stop(now_ns())
            pump.discard()
            pump.join(0.5)
            if typing.ident is not None:
                typing.join(0.5)
            pump.discard()
            produced, dropped = state["before"]
            state.update(pump=None, before=(produced + pump.produced, dropped + pump.dropped))

    final, reason = "closed", ""
    while context.alive():
        try:
            run_once()
            final, reason = "ended" if context.alive() else "closed", ""
            break
        except SourceError as e:
            reason = str(e)
            reporter.report("missing", reason)
            context.stop.wait(settings.supervisor.reopen_s)
        finally:
            source.close()
    reporter.report(final, reason)
    publisher.close()
