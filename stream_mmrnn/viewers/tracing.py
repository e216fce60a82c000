"""The stages of predictions as OpenTelemetry spans, made from the time stamps in the predictions.

It runs in a process of its own, as every viewer, so it costs the engine nothing. Needs the extra `otel`. Knows nothing
about the bus.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.extras import need
from stream_mmrnn.core.latency import STAGES, stages
from stream_mmrnn.core.prediction_decoder import PredictionDecoder
from stream_mmrnn.core.settings import TraceSettings
from stream_mmrnn.core.types import Envelope

_QUEUE = 4096
_EVERY_MS = 500
_TIMEOUT_S = 1.0
"""For one request to the collector; spans that time out are dropped and counted."""


def require() -> None:
    """Raises UsageError where the extra is not installed."""
    need("trace.ratio", "otel", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


class Tracer:
    """`observe` every prediction; a share of them become traces: a span `prediction` with one child span per stage."""

    def __init__(self, settings: TraceSettings, wall_offset_ns: int) -> None:
        """`wall_offset_ns`: Unix time minus the monotonic clock. Raises UsageError without the extra."""
        require()
        import requests
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import TraceIdRatioBased

        # failed exports are counted here, and the tracer's process reports them
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        session = requests.Session()
        session.trust_env = False  # never use a proxy from the environment
        exporter = OTLPSpanExporter(settings.endpoint, timeout=_TIMEOUT_S, session=session)
        self._exporter = _counting(exporter)
        self._provider = TracerProvider(
            sampler=TraceIdRatioBased(settings.ratio),
            resource=Resource({"service.name": "stream-mmrnn"}),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(self._exporter, max_queue_size=_QUEUE, schedule_delay_millis=_EVERY_MS)
        )
        self._tracer = self._provider.get_tracer("stream_mmrnn")
        self._offset_ns = wall_offset_ns
        self._decoder = PredictionDecoder()
        self.traces = 0
        self.malformed = 0

    @property
    def exported(self) -> int:
        """Spans that the collector accepted."""
        return int(self._exporter.exported)

    @property
    def failed(self) -> int:
        """Spans that could not be exported."""
        return int(self._exporter.failed)

    def observe(self, envelope: Envelope) -> None:
        """Take a prediction; a malformed one is counted."""
        try:
            p = self._decoder.decode(envelope)
        except WireError:
            self.malformed += 1
            return
        if p is None:
            return
        at_ns = p.event_ns + self._offset_ns
        root = self._tracer.start_span("prediction", start_time=at_ns)
        if not root.is_recording():
            return
        from opentelemetry.trace import set_span_in_context

        self.traces += 1
        root.set_attributes(
            {
                "stream_mmrnn.session": envelope.session,
                "stream_mmrnn.tick": p.tick,
                "stream_mmrnn.closed_by": p.closed.by,
                "stream_mmrnn.present": [name for name, here in p.present.items() if here],
                "stream_mmrnn.model": p.model,
            }
        )
        inside = set_span_in_context(root)
        took = stages(p.event_ns, p.closed, p.step_start_ns, p.step_end_ns, envelope.publish_ns)
        for name in STAGES[:-1]:
            # each stage begins where the one before ends; the first is negative if the tick closed before its end
            begin_ns, at_ns = at_ns, at_ns + took[name]
            span = self._tracer.start_span(name, inside, start_time=min(begin_ns, at_ns))
            if took[name] < 0:
                span.set_attribute("stream_mmrnn.negative", True)
            span.end(max(begin_ns, at_ns))
        root.end(at_ns)

    def close(self) -> None:
        """Export the queued spans; waits a short time at most."""
        self._provider.shutdown()


def _counting(inner: Any) -> Any:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class Counting(SpanExporter):
        """Counts exported and failed spans."""

        exported = failed = 0

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            result: SpanExportResult = inner.export(spans)
            if result is SpanExportResult.SUCCESS:
                self.exported += len(spans)
            else:
                self.failed += len(spans)
            return result

        def shutdown(self) -> None:
            inner.shutdown()

    return Counting()
