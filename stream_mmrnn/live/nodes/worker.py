"""The worker: a source and its encoders as a process. It knows nothing about ticks."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

from stream_mmrnn.capture import encoders, sources
from stream_mmrnn.capture.pipeline import Outgoing, Pump, capture
from stream_mmrnn.capture.sources.bus_source import BusSource
from stream_mmrnn.capture.stall_detector import StallDetector
from stream_mmrnn.core import topics
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import SourceError, WireError
from stream_mmrnn.core.stream_table import stream_table
from stream_mmrnn.core.streams import first_text
from stream_mmrnn.core.types import Sample
from stream_mmrnn.live.nodes.process import Context, Node
from stream_mmrnn.live.prewarm import Prewarmer

_PREWARM_PERIOD_NS = 200_000_000
"""A stream with a longer period is not prewarmed: the time of its next sample cannot be predicted well."""


class WorkerNode(Node):
    """Captures one stream. A device that is missing is opened again and again; the session does not wait for it."""

    def __init__(self, context: Context) -> None:
        super().__init__(context, context.settings.bus.bulk_queue)
        table = stream_table(self.settings)
        self.stream = table[context.stream]
        self.labels = context.stream == first_text(table.values())
        """Whether labels, and lines that are typed on the page, join this stream."""
        self.encoders = encoders.encoders_of(self.stream)
        self.features = {topics.FEATURE + name: self.stream.counted_as(name) for name in self.encoders}
        """By topic, under which name its messages are counted."""
        self.stall_detector = StallDetector(self.stream.dense)
        stdin_fd = context.stdin.detach() if context.stdin is not None else -1
        self.source = sources.create_source(self.stream, self.settings, stdin_fd, address=context.address)
        self.prewarmer = Prewarmer(self._warm, 0)
        self.pump: Pump | None = None
        self._can_close = True
        self._undecodable = 0
        self._published = dict.fromkeys(self.features, 0)
        self._captured_before = self._dropped_before = 0
        """Of the pumps before this one."""
        self._newest_ns = 0
        self.reporter.counts = self._counts
        self.reporter.detail = self._detail

    def _counts(self) -> dict[str, int]:
        captured, dropped = self._captured_before, self._dropped_before
        if self.pump is not None:
            captured, dropped = captured + self.pump.produced, dropped + self.pump.dropped
        return {
            "captured": captured,
            "queue_dropped": dropped,
            "undecodable": self._undecodable,
            **{self.features[topic]: n for topic, n in self._published.items()},
            "refused": sum(self.publisher.refused.get(feature, 0) for feature in self.features),
            "stale": self.stall_detector.silences,
            "stale_ms": self.stall_detector.stale_ns(now_ns()) // 1_000_000,
        }

    def _detail(self) -> dict[str, Any]:
        origins = [encoder.origin for encoder in self.encoders.values()]
        about = {"kind": self.stream.kind, "person": self.stream.person, "encoders": origins}
        return {"source": self.source.origin, "encoder": origins[0], **about, **self.source.info}

    def run(self) -> None:
        self._wait_for_start()
        final, reason = "closed", ""
        while self.context.alive():
            try:
                self._run_source()
                final, reason = "ended" if self.context.alive() else "closed", self._warnings()
                break
            except SourceError as e:
                reason = str(e)
                self.reporter.report("missing", reason)
                self.context.stop.wait(self.settings.supervisor.reopen_s)
            finally:
                # a device that still reads, because it stalls while the session ends, crashes if it is closed meanwhile
                if self._can_close:
                    self.source.close()
        if isinstance(self.source, BusSource):
            self.source.disconnect()
        self.reporter.report(final, reason)
        self.publisher.close()

    def _wait_for_start(self) -> None:
        # a publisher has no subscription to the clock: that the broker has readers for it proves the connection
        self.publisher.wait_for_reader(topics.STATUS, 2.0)
        if isinstance(self.source, BusSource):
            self.source.connect(self.context.alive, midway=self.context.restarts > 0)
        gc.collect()
        gc.freeze()
        self.context.ready.set()
        while not self.context.epoch.value and self.context.alive():
            time.sleep(0.002)
        self.publisher.wait_for_reader(topics.feature(self.stream.name), 2.0)

    def _run_source(self) -> None:
        """From opening the device to its end; raises SourceError where it cannot be opened or fails."""
        for encoder in self.encoders.values():
            encoder.reset()
        self.source.open()
        self.reporter.report("open")
        pump = self.pump = Pump(
            self.source.samples(self.context.alive, self.context.epoch.value),
            self.stream.policy,
            self.settings.queues.length,
            self.context.alive,
        )
        pump.start()
        typing = self._start_typing(pump)
        self.prewarmer, self._newest_ns = Prewarmer(self._warm, 0), 0
        try:
            samples, origin = self._samples(pump), self.source.origin
            for out in capture(samples, self.stream, origin, self.encoders, self._bad, self.labels):
                self._send(out)
        finally:
            self.stall_detector.stop(now_ns())
            pump.discard()
            self._can_close = pump.join(0.5)
            if typing is not None:
                typing.join(0.5)
            pump.discard()
            self._captured_before += pump.produced
            self._dropped_before += pump.dropped
            self.pump = None

    def _samples(self, pump: Pump) -> Iterator[Sample]:
        """The samples as they come; watches for stalls and reports the status meanwhile."""
        while self.context.alive() and not pump.ended:
            at_ns = now_ns()
            wait_ms = self.prewarmer.wait_ms(at_ns, self.reporter.wait_ms(100))
            sample = pump.read(self.stall_detector.wait_s(at_ns, wait_ms / 1000))
            if sample is None:
                self._idle()
                continue
            self.stall_detector.on_sample(sample.capture_ns)
            self.reporter.report_if_new("open", self._warnings())
            self._expect_next(sample)
            yield sample
            self.reporter.report_due(between_messages=False)

    def _idle(self) -> None:
        if self.stall_detector.check(now_ns()):
            self.reporter.report("stale")
        if not self.prewarmer.run_if_due(now_ns()):
            self.reporter.report_due()

    def _expect_next(self, sample: Sample) -> None:
        # the next sample is expected as long after this one as this one came after its predecessor
        self.prewarmer.period_ns, self._newest_ns = sample.event_ns - self._newest_ns, sample.event_ns
        if self.settings.engine.prewarm and 0 < self.prewarmer.period_ns < _PREWARM_PERIOD_NS:
            self.prewarmer.stepped(sample.event_ns)

    def _warnings(self) -> str:
        """What the source found that a person should know."""
        return "; ".join(self.source.info.get(sources.WARNINGS, ()))

    def _warm(self) -> None:
        for encoder in self.encoders.values():
            encoder.prewarm()
        self.publisher.prewarm()

    def _bad(self, _: WireError) -> None:
        self._undecodable += 1

    def _send(self, out: Outgoing) -> None:
        sample = out.sample
        session = self.settings.session.name
        self.publisher.publish(
            out.topic, session, sample.event_ns, sample.capture_ns, sample.data, out.origin, sample.device_ns
        )
        if out.topic in self.features:
            self._published[out.topic] += 1

    def _start_typing(self, pump: Pump) -> threading.Thread | None:
        """Lines typed on the live page join the lines of the source, in a thread of their own."""
        if not self.labels:
            return None
        thread = threading.Thread(target=self._join_typed, args=(pump,), name="typed", daemon=True)
        thread.start()
        return thread

    def _join_typed(self, pump: Pump) -> None:
        from stream_mmrnn.capture.sources.text import typed

        def going() -> bool:
            return self.context.alive() and not pump.ended

        for sample in typed(self.context.address, self.settings.session.name, self.settings.text, going):
            pump.put(sample)
