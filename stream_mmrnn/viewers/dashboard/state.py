"""What a viewer shows of a session, gathered from the envelopes of the bus: streams, heads, text, latency, processes.

Pure and bounded: it is given envelopes and the time, and keeps the last seconds of them. Malformed payloads are
counted, never raised. Knows nothing about browsers, terminals, sockets or clocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from stream_mmrnn.core import streams, topics, wire
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.latency import stages
from stream_mmrnn.core.prediction_decoder import PredictionDecoder
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.viewers.dashboard import sayings, verdict
from stream_mmrnn.viewers.dashboard.heads import HISTORY_NS, HeadMeaning, HeadView, Silence
from stream_mmrnn.viewers.dashboard.latencies import Latencies
from stream_mmrnn.viewers.dashboard.limits import MAX_HEADS, MAX_MODALITIES, MAX_SESSIONS, clean, ms
from stream_mmrnn.viewers.dashboard.nodes import Nodes, NodeView, Spec
from stream_mmrnn.viewers.dashboard.sound import Spectrogram
from stream_mmrnn.viewers.dashboard.streams import RATE_NS, Streams

_MAX_TEXTS = 64
_OLD_TEXTS = 8
"""The newest lines are shown however old they are."""
_MAX_TEXT_CHARS = 240

_SHOWN = frozenset({topics.CLOCK, topics.PREDICTION, topics.LABEL})
"""Beside the topics of streams."""
_MAX_STREAMS = 64


def _line_time(line: tuple[int, str, str]) -> int:
    return line[0]


class LiveState:
    """The newest of everything a viewer shows: `observe` every envelope, `snapshot` when it is to be drawn.

    With many sessions the heads of one are shown: of the first, until it is silent for 2 s and another is not.
    """

    def __init__(
        self, decoder: PredictionDecoder | None = None, table: Mapping[str, streams.Stream] | None = None
    ) -> None:
        """`decoder`: one to share with other consumers of the same envelopes. `table`: the session's streams by name;
        without it, the usual ones.
        """
        self._table = table = streams.usual() if table is None else table
        first: dict[tuple[str, bool], str] = {}
        for row in sorted(table.values(), key=lambda row: row.source == "none"):  # what is captured goes first
            first.setdefault((row.kind, row.person == streams.SELF), topics.raw(row.name))
        self.picture_topic = first.get(("vision", True), "")
        """Raw topic of the pictures that are shown."""
        self.sound_topic = first.get(("audio", True), "")
        self._text_topic = first.get(("text", True), "")
        self._typed_stream = streams.first_text(table.values()) or "text"
        self._sensors = [
            {"stream": row.name, "kind": row.kind} for row in table.values() if streams.is_sensor(row.source, row.kind)
        ]
        """Streams that browsers give."""
        self._texts: dict[str, deque[tuple[int, str, str]]] = {
            t: deque(maxlen=_MAX_TEXTS) for t in (*streams.text_topics(table.values()), topics.LABEL)
        }
        self._decoder = decoder or PredictionDecoder(MAX_SESSIONS)
        self._malformed = 0
        self.session = ""
        self._session_ns = 0
        self._sessions: dict[str, None] = {}
        self._streams = Streams()
        self._nodes = Nodes()
        self._heads: dict[str, HeadView] = {}
        self._meaning: dict[str, HeadMeaning] = {}
        self._modalities: list[str] = []
        self._model = {"name": "", "sha256": ""}
        self.began_ns = 0
        """When the session began: times and ticks count from here. 0: not known."""
        self.recorded = False
        """Whether it is a recording: its processes are not running, so only its data say how it was."""
        self._tick_ns = 0
        self._tick = -1
        self._predicted_ns: int | None = None
        self._silence = Silence()
        self._doubts = verdict.Doubts()
        self._doubt = ""
        self._present: dict[str, bool] = {}
        self._latencies = Latencies()
        self._pictures = 0
        self.sound = Spectrogram()

    @property
    def malformed(self) -> int:
        """Payloads that could not be read, and names beyond the limits."""
        return self._malformed + self._nodes.malformed

    def skip(self, names: Collection[str]) -> None:
        """These topics were not read for a while: the gap in their sequence numbers is no loss."""
        self._streams.skip(names)

    def observe(self, envelope: Envelope) -> None:
        topic = envelope.topic
        at_ns = envelope.received_ns or envelope.publish_ns
        if topic.startswith(topics.STATUS):
            spec = self._nodes.observe(topic[len(topics.STATUS) :], envelope.payload, at_ns)
            if spec is not None:
                self._observe_spec(spec)
        elif topic == topics.PREDICTION:
            self._observe_prediction(envelope, at_ns)
        elif topic in _SHOWN or self._is_stream(topic):
            self._observe_stream(envelope, at_ns)
            if topic in self._texts:
                self._observe_text(envelope)
            elif topic == self.picture_topic:
                self._pictures += 1
            elif topic == self.sound_topic:
                self.sound.observe(envelope.event_ns, envelope.payload)

    def _is_stream(self, topic: str) -> bool:
        """Whether it is a stream's, and there is room for one more that the table does not have."""
        name = topics.stream_of(topic)
        known = name in self._table or topic in self._streams.views
        return bool(name) and (known or len(self._streams.views) < _MAX_STREAMS)

    def _observe_stream(self, envelope: Envelope, at_ns: int) -> None:
        self._streams.observe(envelope, at_ns)
        if envelope.session != topics.EVERYONE and len(self._sessions) < MAX_SESSIONS:
            self._sessions[envelope.session] = None

    def _observe_prediction(self, envelope: Envelope, at_ns: int) -> None:
        try:
            prediction = self._decoder.decode(envelope)
        except WireError:
            self._malformed += 1
            self._observe_stream(envelope, at_ns)
            return
        if prediction is None:
            return
        self._observe_stream(envelope, at_ns)
        self._latencies.add(
            at_ns,
            stages(
                envelope.event_ns,
                prediction.closed,
                prediction.step_start_ns,
                prediction.step_end_ns,
                envelope.publish_ns,
            ),
        )
        if self._is_shown(envelope.session, at_ns):
            self._predicted_ns = at_ns
            self._show(prediction, envelope.event_ns)

    def _is_shown(self, session: str, at_ns: int) -> bool:
        """Whether the heads of this session are shown; it replaces one that is silent."""
        if session != self.session:
            if self.session and at_ns - self._session_ns < RATE_NS:
                return False
            self.session = session
            self._heads = {}
        self._session_ns = at_ns
        return True

    def _show(self, prediction: wire.PredictionMessage, event_ns: int) -> None:
        self._tick = prediction.tick
        meanings = self._meaning.values()
        self._silence.observe(event_ns, prediction.heads, meanings, prediction.age_ns)
        self._doubt = verdict.missing_inputs(self._table, prediction.present, prediction.age_ns)
        self._doubts.observe(event_ns, self._doubt)
        self._present = {clean(name): here for name, here in list(prediction.present.items())[:MAX_MODALITIES]}
        self._model["sha256"] = clean(prediction.model)
        for name, values in list(prediction.heads.items())[:MAX_HEADS]:
            head = clean(name)
            if head not in self._heads and len(self._heads) >= MAX_HEADS:
                self._heads = {}  # other names than before: another model
            meaning = self._meaning.get(head)
            readable = meaning is None or not self._silence.why_not(meaning)
            self._heads.setdefault(head, HeadView()).observe(event_ns, values, readable)

    def _observe_text(self, envelope: Envelope) -> None:
        if not isinstance(envelope.payload, bytes):
            self._malformed += 1
            return
        # a character has four bytes at most; one that is cut in the middle becomes a replacement character
        text = envelope.payload[: 4 * _MAX_TEXT_CHARS].decode("utf-8", "replace")
        self._texts[envelope.topic].append((envelope.event_ns, clean(text, _MAX_TEXT_CHARS), envelope.session))

    def _observe_spec(self, spec: Spec) -> None:
        self._meaning = {clean(h.name): h.cleaned() for h in spec.heads[:MAX_HEADS]}
        self._modalities = spec.modality_names(MAX_MODALITIES)
        self._model["name"] = clean(spec.name)
        self._tick_ns = spec.tick_ns

    def snapshot(self, now_ns: int) -> dict[str, Any]:
        """Everything a viewer shows at `now_ns`, ready for JSON. Ages and latencies are in ms."""
        predictions = self._streams.views.get(topics.PREDICTION)
        nodes = Nodes() if self.recorded else self._nodes
        rows = verdict.inputs(self._table, self._modalities, nodes, self._streams, now_ns)
        engine = verdict.engine_trouble(nodes, self._predicted_ns, now_ns)
        ahead = verdict.forecast(engine, self._doubt, rows)
        return {
            "seconds": round(max(0, now_ns - self.began_ns) / 1e9, 1) if self.began_ns else None,
            "overall": verdict.overall(engine, ahead, rows, nodes, now_ns),
            "forecast": ahead,
            "doubts": self._doubts.snapshot(now_ns),
            "inputs": [msgspec.to_builtins(row) for row in rows],
            "next": self._next(),
            "session": self.session,
            "sessions": {"count": len(self._sessions), "names": sorted(self._sessions)[:16]},
            "model": dict(self._model),
            "tick": self._tick,
            "ticks": self._ticks(),
            "predictions_per_s": round(predictions.rate.per_s(now_ns), 1) if predictions else 0.0,
            "streams": {t: self._stream(t, now_ns) for t in self._stream_names()},
            "heads": {
                name: head.snapshot(self._meaning.get(name) or HeadMeaning(name, unit=""), now_ns)
                for name, head in self._heads.items()
            },
            "texts": self._lines([self._text_topic], now_ns),
            "other_texts": self._lines([t for t in self._texts if t not in (self._text_topic, topics.LABEL)], now_ns),
            "labels": self._lines([topics.LABEL], now_ns),
            "typing": self.typing(),
            "sensors": self._sensors,
            "sound": self.sound.snapshot(now_ns),
            "picture": {"number": self._pictures, "age_ms": self._streams.age_ms(self.picture_topic, now_ns)},
            "latency": self._latencies.table(now_ns),
            "nodes": self._nodes.snapshot(now_ns),
            "losses": self._nodes.losses() + self._own_losses(),
            "repeated": self._decoder.repeated,
            "malformed": self.malformed,
        }

    def _next(self) -> list[dict[str, Any]]:
        """What the heads say, in words, in the order of the model."""
        order = [name for name in self._meaning if name in self._heads]
        order += [name for name in self._heads if name not in self._meaning]
        return [
            line
            for name in order
            for meaning in [self._meaning.get(name) or HeadMeaning(name, unit="")]
            for line in sayings.lines(
                meaning, self._heads[name].values, self._silence.why_not(meaning), self._silence.unheard
            )
        ]

    def _ticks(self) -> int | None:
        """Number of ticks since the session's start; None without an engine."""
        engine = self._nodes.views.get("engine")
        if engine is not None and self.began_ns and self._tick_ns > 0 and self._tick >= 0:
            return max(0, self._tick - self.began_ns // self._tick_ns)  # an engine that was restarted counts anew
        return engine.counts.get("ticks") if engine else None

    def recording(self) -> dict[str, Any]:
        """Whether the session is being recorded, and into which file."""
        return self._nodes.recorder()

    def ending(self) -> dict[str, Any]:
        """What there is to say at the session's end: why it had to end, if it had to, and where its recording is."""
        failed = [f"{name}: {n.reason}" for name, n in self._nodes.views.items() if n.state == "failed"]
        return {"recording": self._nodes.recording, "why": "; ".join(failed[:2])}

    def typing(self) -> dict[str, Any]:
        """Whether a line typed on the page can become a text event, and if not, why."""
        return self._nodes.typing(self._typed_stream)

    def _lines(self, names: Collection[str], now_ns: int) -> list[dict[str, Any]]:
        """The lines of some topics of the last 30 s, and the newest of the older ones; newest first."""
        newest_first = sorted((line for t in names for line in self._texts.get(t, ())), key=_line_time, reverse=True)
        recent = sum(now_ns - at <= HISTORY_NS for at, _, _ in newest_first)
        return [
            {"text": text, "session": session, "age_ms": ms(now_ns - at)}
            for at, text, session in newest_first[: max(recent, _OLD_TEXTS)]
        ]

    def _stream_names(self) -> list[str]:
        """Topics that were seen, and those that a process or the model names: streams in the table's order first."""
        expected = {topics.feature(m) for m in self._modalities}
        expected |= {topics.feature(n.modality) for n in self._nodes.views.values() if n.modality}
        order = {name: rank for rank, name in enumerate(self._table)}
        found = [t for t in {**self._streams.views, **dict.fromkeys(sorted(expected))} if topics.stream_of(t)]
        found.sort(key=lambda t: (not t.startswith(topics.RAW), order.get(topics.stream_of(t), len(order))))
        return found + [t for t in topics.TOPICS if t in _SHOWN and t in self._streams.views]

    def _stream(self, topic: str, now_ns: int) -> dict[str, Any]:
        stream = self._streams.views.get(topic)
        modality = topics.stream_of(topic)
        age_ms = self._streams.age_ms(topic, now_ns)
        row = self._table.get(modality)
        sparse = bool(modality) and not (row or streams.Stream.of(modality)).dense
        owner = self._owner(topic, modality)
        return {
            "modality": topic.removeprefix(topics.RAW).removeprefix(topics.FEATURE) if modality else "",
            "state": owner.state if owner else "",
            "reason": owner.reason if owner else "",
            "rate_hz": round(stream.rate.per_s(now_ns), 1) if stream else 0.0,
            "age_ms": age_ms,
            "silent": not sparse and (age_ms is None or age_ms > ms(verdict.SILENT_NS)),
            "present": self._used(topic, modality) if topic.startswith(topics.FEATURE) else None,
        }

    def _used(self, topic: str, stream: str) -> bool | None:
        """Whether the last tick had this stream; None if the model does not take it."""
        row = self._table.get(stream)
        features = topic.removeprefix(topics.FEATURE)
        return self._present.get(row.modality_of(features) if row else features)

    def _owner(self, topic: str, modality: str) -> NodeView | None:
        """The process whose state is the stream's."""
        if modality:
            return self._nodes.of_modality(modality)
        return self._nodes.views.get("engine" if topic == topics.PREDICTION else topic)

    def _own_losses(self) -> list[dict[str, Any]]:
        """What this viewer itself missed."""
        rows: list[dict[str, Any]] = [
            {"node": "this view", "what": f"lost.{topic}", "count": s.lost}
            for topic, s in self._streams.views.items()
            if s.lost
        ]
        if self.malformed:
            rows.append({"node": "this view", "what": "unreadable", "count": self.malformed})
        return rows
