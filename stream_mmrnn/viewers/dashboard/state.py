"""What a viewer shows, gathered from the envelopes of the bus: rates, ages, heads, text, latency, processes.

Pure and bounded: it is given envelopes and the time, and keeps the last seconds of them. What it cannot
read is counted, never raised. Knows nothing about browsers, terminals, sockets or clocks.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np

from stream_mmrnn.core import topics
from stream_mmrnn.core.dedup import TickDeduplicator
from stream_mmrnn.core.latency import STAGES, stages
from stream_mmrnn.core.types import Envelope, Stamps
from stream_mmrnn.viewers.dashboard.sound import Sound

HISTORY_NS = 30_000_000_000
"""Of heads, and of what was said."""
HISTORY_POINTS = 375
_STEP_NS = HISTORY_NS // HISTORY_POINTS
_BUCKET_NS = 50_000_000
_BUCKETS = 40
"""Rates are over 40 buckets of 50 ms: 2 s."""
_SILENT_MS = {"stream": 1000.0, "node": 3000.0}
"""A dense stream or a process that said nothing for so long is called silent."""
_LATENCY_NS = 10_000_000_000
"""Percentiles are of so long."""
_MAX_TEXTS = 64
_OLD_TEXTS = 8
"""So many are shown, however old they are."""
_MAX_TEXT_CHARS = 240
_MAX_HEADS = 8
_MAX_OUTPUTS = 32
_MAX_NODES = 64
_MAX_SESSIONS = 1024
_MAX_COUNTS = 64
_MAX_LOSSES = 32
_MAX_LATENCIES = 4096
_MAX_JSON_BYTES = 256 * 1024
_LONGEST_NS = 2**61
"""Of a stage: what two stamps from outside are apart need not fit 64 bits."""
_LATENCY_EVERY_NS = 250_000_000
"""Percentiles are worked out anew at most this often."""
_LOST_WORDS = ("dropped", "lost", "refused", "garbage", "overflow", "rejected", "undecodable")
_LOST_REASONS = frozenset({"late", "duplicate", "quarantined", "superseded", "unclosed", "outside", "oldest", "stale"})
"""The reasons of the aligner and of readers, each a loss of its own."""

_SHOWN = frozenset({topics.CLOCK, topics.PREDICTION, topics.LABEL}) | {
    t for m in topics.MODALITIES for t in (topics.raw(m), topics.feature(m))
}

_Stamp = Annotated[int, msgspec.Meta(ge=-(2**61), le=2**61)]


class _Closed(msgspec.Struct):
    event_ns: _Stamp
    capture_ns: _Stamp
    publish_ns: _Stamp
    received_ns: _Stamp
    by: str = ""


class _Prediction(msgspec.Struct):
    tick: int
    heads: dict[str, list[float | None]]
    closed: _Closed
    step_start_ns: _Stamp
    step_end_ns: _Stamp
    present: dict[str, bool] = {}
    model: str = ""


class _Status(msgspec.Struct):
    state: str
    pid: int = 0
    modality: str = ""
    reason: str = ""
    counts: dict[str, Any] = {}
    detail: msgspec.Raw = msgspec.Raw(b"{}")
    """Read apart, so that one that makes no sense does not cost the state."""


class _Head(msgspec.Struct):
    name: str
    kind: str = ""
    labels: list[str] = []
    horizons_s: list[tuple[float, float]] = []
    unit: str = "probability"
    threshold: float = 0.5


class _Named(msgspec.Struct):
    name: str


class _Spec(msgspec.Struct):
    heads: list[_Head] = []
    modalities: list[str | _Named] = []
    name: str = ""


class _Detail(msgspec.Struct):
    """What of a status's detail is shown: the engine's contract and how each stream fared at its door."""

    spec: _Spec | None = None
    streams: dict[str, Any] = {}
    source: str = ""


_T = TypeVar("_T")
_read_prediction = msgspec.json.Decoder(_Prediction).decode
_read_status = msgspec.json.Decoder(_Status).decode
_read_detail = msgspec.json.Decoder(_Detail).decode


class Rate:
    """Events a second over the last 2 s, in a fixed number of buckets."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._first = 0
        self.total = 0

    def observe(self, at_ns: int) -> None:
        bucket = at_ns // _BUCKET_NS
        if self.total == 0:
            self._first = bucket
        self.total += 1
        self._counts[bucket] = self._counts.get(bucket, 0) + 1
        if len(self._counts) > _BUCKETS + 2:
            del self._counts[min(self._counts)]

    def per_s(self, now_ns: int) -> float:
        """Over the whole buckets before now: 2 s of them, or fewer in the first seconds."""
        current = now_ns // _BUCKET_NS
        since = max(current - _BUCKETS, min(self._first, current - 1))
        seen = sum(n for bucket, n in self._counts.items() if since <= bucket < current)
        return seen / ((current - since) * _BUCKET_NS / 1e9)


class _StreamView:
    def __init__(self) -> None:
        self.rate = Rate()
        self.newest_ns: int | None = None
        self.lost = 0


class _HeadView:
    """A head's newest values and its last 30 s, one point in 80 ms."""

    def __init__(self) -> None:
        self.values: list[float | None] = []
        self._points: deque[tuple[int, list[float | None]]] = deque(maxlen=HISTORY_POINTS)

    def observe(self, event_ns: int, values: list[float | None]) -> None:
        self.values = [_short(v) for v in values[:_MAX_OUTPUTS]]
        if self._points:
            newest_ns, before = self._points[-1]
            if event_ns < newest_ns or len(before) != len(self.values):
                self._points.clear()  # another run, or another model
            elif event_ns // _STEP_NS == newest_ns // _STEP_NS:
                self._points.pop()
        self._points.append((event_ns, self.values))

    def history(self, now_ns: int) -> dict[str, list[Any]]:
        """`age_ms`, oldest first, and one series for each output."""
        recent = [(at, v) for at, v in self._points if now_ns - at <= HISTORY_NS]
        return {
            "age_ms": [round((now_ns - at) / 1e6) for at, _ in recent],
            "series": [[v[i] for _, v in recent] for i in range(len(self.values))],
        }


class _Latencies:
    """The stages of the predictions of the last 10 s, in a ring; of the newest 4096 where there were more."""

    def __init__(self) -> None:
        self._rows = np.zeros((_MAX_LATENCIES, len(STAGES)), np.int64)
        self._at = np.full(_MAX_LATENCIES, -(2**62), np.int64)
        self._next = 0
        self._worked_out_ns = -(2**62)
        self._table: dict[str, dict[str, float]] = {}

    def add(self, at_ns: int, took: dict[str, int]) -> None:
        i = self._next % _MAX_LATENCIES
        self._rows[i] = [max(-_LONGEST_NS, min(took[s], _LONGEST_NS)) for s in STAGES]
        self._at[i] = at_ns
        self._next += 1

    def table(self, now_ns: int) -> dict[str, dict[str, float]]:
        """By stage, p50 and p99 in ms; empty where there were no predictions."""
        if 0 <= now_ns - self._worked_out_ns < _LATENCY_EVERY_NS:
            return self._table
        self._worked_out_ns = now_ns
        rows = self._rows[self._at >= now_ns - _LATENCY_NS]
        self._table = {}
        if len(rows):
            p50, p99 = np.percentile(rows, (50, 99), axis=0) / 1e6
            for i, stage in enumerate(STAGES):
                self._table[stage] = {"p50": round(float(p50[i]), 3), "p99": round(float(p99[i]), 3)}
        return self._table


class _Node(msgspec.Struct):
    state: str
    modality: str
    reason: str
    counts: dict[str, int]
    at_ns: int
    source: str = ""
    pid: int = 0


class _Deaths(msgspec.Struct):
    count: int
    reason: str
    at_ns: int
    """Of the last one."""


class LiveState:
    """The newest of everything a viewer shows: `see` every envelope, `snapshot` when it is to be shown.

    With many sessions the heads are those of one: the first seen, until it is silent for 2 s and another
    is not.
    """

    def __init__(self) -> None:
        self.malformed = 0
        """Payloads that could not be read, and names beyond what is kept."""
        self._deduplicator = TickDeduplicator(_MAX_SESSIONS)
        """What an engine says again that went on after a crash is passed over."""
        self.session = ""
        self._session_ns = 0
        self._sessions: dict[str, None] = {}
        self._streams: dict[str, _StreamView] = {}
        self._next_seq: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._heads: dict[str, _HeadView] = {}
        self._meaning: dict[str, _Head] = {}
        self._modalities: list[str] = []
        self._model = {"name": "", "sha256": ""}
        self._tick = -1
        self._present: dict[str, bool] = {}
        self._latencies = _Latencies()
        self._texts: dict[str, deque[tuple[int, str, str]]] = {
            t: deque(maxlen=_MAX_TEXTS) for t in (*topics.raws("text"), topics.LABEL)
        }
        self._pictures = 0
        self._nodes: dict[str, _Node] = {}
        self._deaths: dict[str, _Deaths] = {}
        self.sound = Sound()

    def skip(self, names: Collection[str]) -> None:
        """Nobody looked at these topics for a while: what came meanwhile was not lost."""
        for key in [k for k in self._next_seq if k[0] in names]:
            del self._next_seq[key]

    def observe(self, envelope: Envelope) -> None:
        topic = envelope.topic
        at_ns = envelope.received_ns or envelope.publish_ns
        if topic.startswith(topics.STATUS):
            self._see_status(topic[len(topics.STATUS) :], envelope.payload, at_ns)
            return
        if topic not in _SHOWN:
            return
        if topic == topics.PREDICTION:
            p = self._read(_read_prediction, envelope.payload)
            if p is not None and not self._deduplicator.first(envelope.session, p.tick):
                return
            self._see_stream(envelope, at_ns)
            if p is not None:
                self._see_prediction(envelope, p, at_ns)
            return
        self._see_stream(envelope, at_ns)
        if topic in self._texts:
            self._see_text(envelope)
        elif topic == topics.raw("vision"):
            self._pictures += 1
        elif topic == topics.raw("audio"):
            self.sound.observe(envelope.event_ns, envelope.payload)

    def _see_stream(self, envelope: Envelope, at_ns: int) -> None:
        stream = self._streams.setdefault(envelope.topic, _StreamView())
        stream.rate.observe(at_ns)
        stream.newest_ns = envelope.event_ns
        key = (envelope.topic, envelope.session)
        # the first number seen is where this viewer began; one below the expected is a publisher's new start
        expected = self._next_seq.pop(key, envelope.seq)
        stream.lost += max(0, envelope.seq - expected)
        self._next_seq[key] = envelope.seq + 1
        if len(self._next_seq) > _MAX_SESSIONS:
            self._next_seq.popitem(last=False)
        if envelope.session != topics.EVERYONE and len(self._sessions) < _MAX_SESSIONS:
            self._sessions[envelope.session] = None

    def _see_prediction(self, envelope: Envelope, p: _Prediction, at_ns: int) -> None:
        c = p.closed
        closed = Stamps(c.event_ns, c.capture_ns, c.publish_ns, c.received_ns, c.by)
        self._latencies.add(
            at_ns, stages(envelope.event_ns, closed, p.step_start_ns, p.step_end_ns, envelope.publish_ns)
        )
        if envelope.session != self.session:
            if self.session and at_ns - self._session_ns < _BUCKETS * _BUCKET_NS:
                return
            self.session = envelope.session
            self._heads = {}
        self._session_ns = at_ns
        self._tick = p.tick
        self._present = {_clean(name): here for name, here in list(p.present.items())[:_MAX_HEADS]}
        self._model["sha256"] = _clean(p.model)
        for said, values in list(p.heads.items())[:_MAX_HEADS]:
            name = _clean(said)
            if name not in self._heads and len(self._heads) >= _MAX_HEADS:
                self._heads = {}  # other names than before: another model
            self._heads.setdefault(name, _HeadView()).observe(envelope.event_ns, values)

    def _see_text(self, envelope: Envelope) -> None:
        if not isinstance(envelope.payload, bytes):
            self.malformed += 1
            return
        # four bytes a character at most; what is cut in the middle becomes a replacement mark
        text = envelope.payload[: 4 * _MAX_TEXT_CHARS].decode("utf-8", "replace")
        self._texts[envelope.topic].append((envelope.event_ns, _clean(text, _MAX_TEXT_CHARS), envelope.session))

    def _see_status(self, name: str, payload: Any, at_ns: int) -> None:
        s = self._read(_read_status, payload)
        if s is None:
            return
        name = _clean(name)
        if not name or (name not in self._nodes and len(self._nodes) >= _MAX_NODES):
            self.malformed += 1
            return
        detail = self._read(_read_detail, bytes(s.detail)) or _Detail()
        counts = dict(list(_flat({**s.counts, **detail.streams}))[:_MAX_COUNTS])
        node = _Node(
            _clean(s.state), _clean(s.modality), _clean(s.reason, 200), counts, at_ns, _clean(detail.source), s.pid
        )
        before = self._nodes.get(name)
        self._nodes[name] = node
        if s.state in ("restarting", "failed"):
            self._see_death(name, node.reason, at_ns)
        elif before is not None and before.pid and s.pid not in (0, before.pid):
            # a viewer that is slow may miss the word of its death, not that it is another process
            self._see_death(name, "started again", at_ns)
        spec = detail.spec
        if spec is not None:
            self._meaning = {_clean(h.name): _cleaned(h) for h in spec.heads[:_MAX_HEADS]}
            names = [m if isinstance(m, str) else m.name for m in spec.modalities[:_MAX_HEADS]]
            self._modalities = [_clean(name) for name in names]
            self._model["name"] = _clean(spec.name)

    def _see_death(self, name: str, reason: str, at_ns: int) -> None:
        before = self._deaths.get(name)
        self._deaths[name] = _Deaths(1 + (before.count if before else 0), reason, at_ns)

    def _read(self, decode: Callable[[bytes], _T], payload: Any) -> _T | None:
        """None, and counted, where the payload is not what it should be."""
        if isinstance(payload, bytes) and len(payload) <= _MAX_JSON_BYTES:
            try:
                return decode(payload)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                pass
        self.malformed += 1
        return None

    def snapshot(self, now_ns: int) -> dict[str, Any]:
        """Everything a viewer shows at `now_ns`, ready for JSON. Ages and latencies are in ms."""
        prediction = self._streams.get(topics.PREDICTION)
        return {
            "session": self.session,
            "sessions": {"count": len(self._sessions), "names": sorted(self._sessions)[:16]},
            "model": dict(self._model),
            "tick": self._tick,
            "predictions_per_s": round(prediction.rate.per_s(now_ns), 1) if prediction else 0.0,
            "streams": {t: self._stream(t, now_ns) for t in self._stream_names()},
            "heads": {name: self._head(name, view, now_ns) for name, view in self._heads.items()},
            "texts": self._lines(topics.raw("text"), now_ns),
            "other_texts": self._lines(topics.raw("other_text"), now_ns),
            "labels": self._lines(topics.LABEL, now_ns),
            "typing": self.typing(),
            "sound": self.sound.snapshot(now_ns),
            "picture": {"number": self._pictures, "age_ms": self._age_ms(topics.raw("vision"), now_ns)},
            "latency": self._latencies.table(now_ns),
            "nodes": {name: _node(node, self._deaths.get(name), now_ns) for name, node in sorted(self._nodes.items())},
            "losses": self._losses(),
            "repeated": self._deduplicator.count,
            "malformed": self.malformed,
        }

    def typing(self) -> dict[str, Any]:
        """Whether a line typed on the page would become a text event, and why not, as one sentence."""
        worker = self._nodes.get("text")
        if worker is None:
            why = "this session takes no text; start it with --text page, and type here"
        elif worker.state in ("open", "stale"):
            why = ""
        elif worker.state in ("ended", "closed"):
            why = f"the text source {worker.source} has ended; start with --text page, which does not"
        else:
            why = f"the text source is {worker.state}" + (f": {worker.reason}" if worker.reason else "")
        return {"possible": not why, "why": why}

    def _lines(self, topic: str, now_ns: int) -> list[dict[str, Any]]:
        """What one person said or marked in the last 30 s, and the newest that is older; newest first."""
        found = list(reversed(self._texts[topic]))
        recent = sum(now_ns - at <= HISTORY_NS for at, _, _ in found)
        return [
            {"text": text, "session": session, "age_ms": _ms(now_ns - at)}
            for at, text, session in found[: max(recent, _OLD_TEXTS)]
        ]

    def _stream_names(self) -> list[str]:
        """In the table's order: those seen, and those that a process or the model names but never came."""
        expected = {topics.feature(m) for m in self._modalities}
        expected |= {topics.feature(n.modality) for n in self._nodes.values() if n.modality}
        return [t for t in topics.TOPICS if t in _SHOWN and (t in self._streams or t in expected)]

    def _age_ms(self, topic: str, now_ns: int) -> float | None:
        stream = self._streams.get(topic)
        return None if stream is None or stream.newest_ns is None else _ms(now_ns - stream.newest_ns)

    def _stream(self, topic: str, now_ns: int) -> dict[str, Any]:
        stream = self._streams.get(topic)
        modality = topics.TOPICS[topic].modality
        age_ms = self._age_ms(topic, now_ns)
        sparse = bool(modality) and not topics.MODALITIES[modality].dense
        owner = self._owner(topic, modality)
        return {
            "modality": modality,
            "state": owner.state if owner else "",
            "reason": owner.reason if owner else "",
            "rate_hz": round(stream.rate.per_s(now_ns), 1) if stream else 0.0,
            "age_ms": age_ms,
            "silent": not sparse and (age_ms is None or age_ms > _SILENT_MS["stream"]),
            "present": self._present.get(modality) if topic.startswith(topics.FEATURE) else None,
        }

    def _owner(self, topic: str, modality: str) -> _Node | None:
        """The process whose state is the stream's."""
        if modality:
            named = self._nodes.get(modality)
            return next((n for n in self._nodes.values() if n.modality == modality), named)
        return self._nodes.get("engine" if topic == topics.PREDICTION else topic)

    def _head(self, name: str, view: _HeadView, now_ns: int) -> dict[str, Any]:
        meaning = self._meaning.get(name) or _Head(name, unit="")
        return {
            "kind": meaning.kind,
            "unit": meaning.unit,
            "labels": meaning.labels,
            "horizons_s": meaning.horizons_s,
            # what says yes or no says it by one number
            "threshold": meaning.threshold if meaning.kind == "classification" and len(view.values) == 1 else None,
            "values": view.values,
            "history": view.history(now_ns),
        }

    def _losses(self) -> list[dict[str, Any]]:
        """What was lost, by process and reason, the most first; then what this viewer itself missed."""
        rows: list[dict[str, Any]] = [
            {"node": name, "what": what, "count": count}
            for name, node in self._nodes.items()
            for what, count in node.counts.items()
            if count > 0 and _is_loss(what)
        ]
        rows.sort(key=lambda r: -r["count"])
        own: list[dict[str, Any]] = [
            {"node": "this view", "what": f"lost.{topic}", "count": s.lost}
            for topic, s in self._streams.items()
            if s.lost
        ]
        if self.malformed:
            own.append({"node": "this view", "what": "unreadable", "count": self.malformed})
        return rows[:_MAX_LOSSES] + own


def _node(node: _Node, deaths: _Deaths | None, now_ns: int) -> dict[str, Any]:
    age_ms = _ms(now_ns - node.at_ns)
    return {
        "state": node.state,
        "modality": node.modality,
        "reason": node.reason,
        "age_ms": age_ms,
        "silent": node.state not in ("closed", "ended", "failed") and age_ms > _SILENT_MS["node"],
        "counts": node.counts,
        "deaths": None
        if deaths is None
        else {"count": deaths.count, "reason": deaths.reason, "age_ms": _ms(now_ns - deaths.at_ns)},
    }


def _is_loss(what: str) -> bool:
    parts = what.split(".")
    return parts[-1] in _LOST_REASONS or any(word in part for part in parts for word in _LOST_WORDS)


def _flat(counts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """`{"vision": {"late": 2}}` -> `vision.late`, 2; what is not a count is left out."""
    for key, value in counts.items():
        name = _clean(f"{prefix}{key}", 80)
        if isinstance(value, dict) and not prefix.count("."):
            yield from _flat(value, name + ".")
        elif isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
            yield name, value


def _clean(text: str, most: int = 64) -> str:
    """Words from outside as a view may show them: printable, and no longer than there is room for."""
    return "".join(c if c.isprintable() else " " for c in text[:most])


def _cleaned(head: _Head) -> _Head:
    labels = [_clean(label) for label in head.labels[:_MAX_OUTPUTS]]
    return _Head(
        head.name, _clean(head.kind), labels, head.horizons_s[:_MAX_OUTPUTS], _clean(head.unit), head.threshold
    )


def _short(value: float | None) -> float | None:
    """Four digits are more than a view shows; what is not a number is a gap in the line."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _ms(ns: int) -> float:
    return round(ns / 1e6, 1)
