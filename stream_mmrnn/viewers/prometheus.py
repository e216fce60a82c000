"""Metrics of a session for Prometheus: `observe` every envelope, `text` for each scrape.

They are made of the status messages and predictions that the page reads anyway, so they cost the other processes
nothing. Labels have few values: none is a session, and no label value is taken from untrusted input unchecked. Counters
are those of the processes; a restarted process counts from 0, which `rate()` handles. Knows nothing about sockets,
servers or clocks.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, get_args, get_type_hints

import msgspec
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stream_mmrnn.core import processes, topics, wire
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.latency import STAGES, stages
from stream_mmrnn.core.prediction_decoder import PredictionDecoder
from stream_mmrnn.core.types import Envelope

PREFIX = "stream_mmrnn_"
_SILENT_NS = 3_000_000_000
"""A process that has sent no status for so long is not up."""
_MAX_NODES = 64
_MAX_STREAMS = 64
_NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}")
_STATES: tuple[str, ...] = get_args(get_type_hints(wire.StatusMessage)["state"])
_OVER = ("restarting", "failed", "closed", "ended")
_BUCKETS_S = (
    *(1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.02, 0.03),
    *(0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5),
)
_ALIGNED = ("lost", "late", "duplicate", "quarantined", "superseded", "unclosed", "outside")
"""Reasons for which the aligner drops a feature vector."""
_CAPTURED = ("queue_dropped", "undecodable")
_VIEWED = ("lost", "oldest", "superseded", "stale")
_RECORDED = ("lost", "dropped", "refused")
_CONNECTIONS = ("key_not_allowed", "no_key", "wrong_server_key", "unfinished")
_REQUESTS = ("host", "origin", "token")


class Family(msgspec.Struct, frozen=True):
    """One metric."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        Family("process_up", "gauge", "1 if the process is running and has sent a status in the last 3 s.", ("node",)),
        Family("process_state", "gauge", "1 for the current state of the process, else 0.", ("node", "state")),
        Family("process_restarts_total", "counter", "Restarts by the supervisor.", ("node",)),
        Family("samples_captured_total", "counter", "Samples from the device.", ("stream",)),
        Family(
            "samples_dropped_total",
            "counter",
            "Samples that were not encoded: replaced by a newer one (queue_dropped), or undecodable.",
            ("stream", "reason"),
        ),
        Family("features_published_total", "counter", "Feature vectors that the worker published.", ("stream",)),
        Family("features_delivered_total", "counter", "Feature vectors that became part of a tick.", ("stream",)),
        Family(
            "features_dropped_total",
            "counter",
            "Feature vectors that became part of no tick; published = delivered + dropped at a session's end.",
            ("stream", "reason"),
        ),
        Family("stream_stale_total", "counter", "Times that a device sent nothing for twice its period.", ("stream",)),
        Family("stream_stale_seconds_total", "counter", "Seconds for which it sent nothing then.", ("stream",)),
        Family("stream_age_seconds", "gauge", "Time since the event time of the newest feature vector.", ("stream",)),
        Family("engine_sessions", "gauge", "Open sessions."),
        Family("engine_ticks_total", "counter", "Ticks that the engine stepped."),
        Family("engine_predictions_total", "counter", "Predictions that the engine published."),
        Family("engine_refused_sessions_total", "counter", "Refused sessions."),
        Family("engine_unreadable_messages_total", "counter", "Messages that the engine could not read."),
        Family(
            "prediction_stage_seconds",
            "histogram",
            "Duration of each stage of a prediction, from the tick's end; total is their sum.",
            ("stage",),
        ),
        Family("recorder_messages_total", "counter", "Messages in the recording."),
        Family("recorder_written_bytes_total", "counter", "Size of the recording."),
        Family(
            "recorder_dropped_messages_total",
            "counter",
            "Messages missing from the recording: lost on the bus, dropped by its queue, refused by the file.",
            ("reason",),
        ),
        Family(
            "bus_refused_messages_total",
            "counter",
            "Messages dropped by the full queue to the broker.",
            ("node",),
        ),
        Family("bus_denied_connections_total", "counter", "Connections refused by key authentication.", ("reason",)),
        Family("page_denied_requests_total", "counter", "Requests that the page refused.", ("reason",)),
        Family("viewer_delivered_messages_total", "counter", "Messages that the viewer received.", ("node",)),
        Family("viewer_dropped_messages_total", "counter", "Messages that a slow viewer missed.", ("node", "reason")),
        Family("unreadable_messages_total", "counter", "Malformed status messages and predictions."),
    )
}


class _NodeStatus(msgspec.Struct):
    message: wire.StatusMessage
    at_ns: int


class Metrics(Collector):
    """The newest values of all metrics. `observe` and `text` may be called from two threads."""

    def __init__(self, decoder: PredictionDecoder | None = None) -> None:
        """`decoder`: one to share with other consumers of the same envelopes."""
        self._registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._nodes: dict[str, _NodeStatus] = {}
        self._restarts: dict[str, int] = {}
        self._newest_ns: dict[str, int] = {}
        self._unreadable = 0
        self._decoder = decoder or PredictionDecoder()
        self._now_ns = 0
        self._clock_ns: int | None = None
        stage = FAMILIES["prediction_stage_seconds"]
        histogram = Histogram(stage.full_name, stage.help, stage.labels, buckets=_BUCKETS_S, registry=self._registry)
        self._stages = {name: histogram.labels(name) for name in STAGES}
        self._registry.register(self)

    def observe(self, envelope: Envelope) -> None:
        """Take a status, a prediction, a feature vector's time or a clock message; others are ignored."""
        topic, at_ns = envelope.topic, envelope.received_ns or envelope.publish_ns
        with self._lock:
            if topic == topics.CLOCK:
                self._clock_ns = at_ns
            elif topic.startswith(topics.FEATURE):
                features = topic[len(topics.FEATURE) :]
                if features in self._newest_ns or len(self._newest_ns) < _MAX_STREAMS:
                    self._newest_ns[features] = envelope.event_ns
            elif topic == topics.PREDICTION or topic.startswith(topics.STATUS):
                try:
                    if topic == topics.PREDICTION:
                        self._observe_prediction(envelope)
                    else:
                        self._observe_status(topic[len(topics.STATUS) :], envelope, at_ns)
                except WireError:
                    self._unreadable += 1

    def _observe_prediction(self, envelope: Envelope) -> None:
        p = self._decoder.decode(envelope)
        if p is None:
            return
        took = stages(envelope.event_ns, p.closed, p.step_start_ns, p.step_end_ns, envelope.publish_ns)
        for name, histogram in self._stages.items():
            histogram.observe(max(took[name], 0) / 1e9)

    def _observe_status(self, name: str, envelope: Envelope, at_ns: int) -> None:
        if not _NODE.fullmatch(name) or (name not in self._nodes and len(self._nodes) >= _MAX_NODES):
            raise WireError("the process has no valid name")
        message = wire.unpack(envelope.payload, wire.StatusMessage)
        if message.state == "restarting":
            self._restarts[name] = self._restarts.get(name, 0) + 1
            # keep the counts of the dead process until the new one sends its own
            before = self._nodes.get(name)
            counts = before.message.counts if before else {}
            message = msgspec.structs.replace(message, counts=counts, detail=before.message.detail if before else {})
        self._nodes[name] = _NodeStatus(message, at_ns)

    def text(self, now_ns: int) -> bytes:
        """All metrics in Prometheus' text format."""
        with self._lock:
            self._now_ns = now_ns
            return generate_latest(self._registry)

    def why_not_ready(self, now_ns: int) -> str:
        """Why the session cannot predict or record, in one sentence; "" if it can.

        A missing device does not count: its stream is masked.
        """
        with self._lock:
            if self._clock_ns is None or now_ns - self._clock_ns > _SILENT_NS:
                return "the clock is silent"
            for name in processes.VITAL:
                node = self._nodes.get(name)
                if node is not None and not self._up(node, now_ns):
                    return f"the {name} is {node.message.state if node.message.state in _OVER else 'silent'}"
        return ""

    @staticmethod
    def _up(node: _NodeStatus, now_ns: int) -> bool:
        return node.message.state not in _OVER and now_ns - node.at_ns <= _SILENT_NS

    def describe(self) -> Iterable[Metric]:
        """Nothing, so that the registry does not collect everything once at registration."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Every family except the histogram, which is registered itself."""
        rows: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in FAMILIES}

        def put(name: str, value: float, *labels: str) -> None:
            rows[name][labels] = value

        for name in sorted(self._nodes):
            self._collect_node(name, self._nodes[name], put)
        if self._clock_ns is not None:
            put("process_up", float(self._now_ns - self._clock_ns <= _SILENT_NS), "clock")
        for modality, event_ns in self._newest_ns.items():
            put("stream_age_seconds", max(self._now_ns - event_ns, 0) / 1e9, modality)
        put("unreadable_messages_total", self._unreadable)
        for name, family in FAMILIES.items():
            if family.kind == "histogram":
                continue
            kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
            metric = kind(family.full_name, family.help, labels=family.labels)
            for labels, value in rows[name].items():
                metric.add_metric(labels, value)
            yield metric

    def _collect_node(self, name: str, node: _NodeStatus, put: Callable[..., None]) -> None:
        message = node.message
        counts = message.counts
        put("process_up", float(self._up(node, self._now_ns)), name)
        put("process_restarts_total", self._restarts.get(name, 0), name)
        for state in _STATES:
            put("process_state", float(state == message.state), name, state)
        if topics.stream_of(topics.RAW + message.modality):
            self._collect_worker(message, put)
            put("bus_refused_messages_total", _number(counts, "refused"), name)
        elif name == "engine":
            self._collect_engine(message, put)
        elif name == "recorder":
            put("recorder_messages_total", _number(counts, "messages"))
            put("recorder_written_bytes_total", _number(counts, "bytes"))
            for reason in _RECORDED:
                put("recorder_dropped_messages_total", _number(counts, reason), reason)
        elif name == "broker":
            for reason in _CONNECTIONS:
                put("bus_denied_connections_total", _number(message.detail.get("denied"), reason), reason)
        elif "delivered" in counts:
            put("viewer_delivered_messages_total", _number(counts, "delivered"), name)
            for reason in _VIEWED:
                put("viewer_dropped_messages_total", _number(counts, reason), name, reason)
            if name == "dashboard":
                for reason in _REQUESTS:
                    put("page_denied_requests_total", _number(message.detail.get("denied"), reason), reason)

    def _collect_worker(self, message: wire.StatusMessage, put: Callable[..., None]) -> None:
        counts, stream = message.counts, message.modality
        put("samples_captured_total", _number(counts, "captured"), stream)
        put("features_published_total", _number(counts, "published"), stream)
        put("stream_stale_total", _number(counts, "stale"), stream)
        put("stream_stale_seconds_total", _number(counts, "stale_ms") / 1000, stream)
        for reason in _CAPTURED:
            put("samples_dropped_total", _number(counts, reason), stream, reason)

    def _collect_engine(self, message: wire.StatusMessage, put: Callable[..., None]) -> None:
        counts = message.counts
        put("engine_sessions", _number(counts, "sessions"))
        put("engine_ticks_total", _number(counts, "ticks"))
        put("engine_predictions_total", _number(counts, "predictions"))
        put("engine_refused_sessions_total", _number(counts, "refused"))
        put("engine_unreadable_messages_total", _number(counts, "garbage"))
        streams = message.detail.get("streams")
        for stream, aligned in list(streams.items())[:_MAX_STREAMS] if isinstance(streams, dict) else ():
            if topics.stream_of(f"{topics.FEATURE}{stream}") and isinstance(aligned, dict):
                put("features_delivered_total", _number(aligned, "used"), stream)
                for reason in _ALIGNED:
                    put("features_dropped_total", _number(aligned, reason), stream, reason)


def _number(table: Any, key: str) -> float:
    """A count in a status message, which is untrusted input; 0 if it is no count."""
    value = table.get(key) if isinstance(table, dict) else None
    return float(value) if isinstance(value, int) and 0 <= value < 2**63 else 0.0


def table() -> str:
    """The metrics as a table in Markdown, for the documentation."""
    lines = ["| metric | kind | labels | what |", "| --- | --- | --- | --- |"]
    for f in FAMILIES.values():
        labels = ", ".join(f"`{label}`" for label in f.labels)
        lines.append(f"| `{f.full_name}` | {f.kind} | {labels} | {f.help} |")
    return "\n".join(lines) + "\n"
