"""How a session is doing, in words that need no manual: each input, the engine, and the worst of all.

Pure: it is given the newest statuses and predictions. What is said of a prediction is said of its inputs: one from an
input that is gone is `doubtful`, one that is old because the engine is late or gone is `old`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import msgspec

from stream_mmrnn.core.streams import Stream
from stream_mmrnn.viewers.dashboard.heads import HISTORY_NS
from stream_mmrnn.viewers.dashboard.limits import ms
from stream_mmrnn.viewers.dashboard.nodes import MISSED, Nodes, NodeView
from stream_mmrnn.viewers.dashboard.streams import Streams

Tone = Literal["good", "warn", "bad", "none"]
SILENT_NS = 1_000_000_000
"""A dense stream whose newest message is older is silent; an engine whose newest prediction is older is late."""
_MISSED_STATUSES_NS = 2_000_000_000
"""A process says how it is twice a second."""
_MAX_SPANS = 64
_RANK: dict[Tone, int] = {"good": 0, "none": 0, "warn": 1, "bad": 2}
_DEAD = frozenset({"restarting", "failed", "missing"})
_OVER = frozenset({"ended", "closed"})
_WORDS: dict[str, tuple[str, Tone]] = {
    "starting": ("starts", "warn"),
    "stale": ("late (stale)", "warn"),
    "missing": ("not there (missing)", "bad"),
    "ended": ("ended", "none"),
    "closed": ("ended", "none"),
    "restarting": ("died, starts again", "bad"),
    "failed": ("given up", "bad"),
}
"""By the state of its process; every other one is `working`."""
_LABELS = {
    "vision": "Camera",
    "audio": "Microphone",
    "text": "Words",
    "other_audio": "The other's sound",
    "other_text": "The other's words",
    "turn_end": "Turn end",
    "other_turn_end": "The other's turn end",
    "signal": "Signal",
}


class Input(msgspec.Struct, frozen=True):
    """One stream as a reader sees it."""

    name: str
    label: str
    kind: str
    tone: Tone
    word: str
    why: str = ""
    rate_hz: float | None = None
    age_ms: float | None = None
    connected: bool = True
    used: bool = True
    """Whether the model takes it."""

    @property
    def trouble(self) -> str:
        return f"{self.label}: {self.word}" + (f", {self.why}" if self.why else "")


class Doubts:
    """When predictions were made without an input that the session has: spans of the last 30 s, with the reason."""

    def __init__(self) -> None:
        self._spans: deque[tuple[int, int, str]] = deque(maxlen=_MAX_SPANS)

    def observe(self, event_ns: int, why: str) -> None:
        """`why`: what was wrong with this prediction, or ""."""
        if self._spans and event_ns < self._spans[-1][1]:
            self._spans.clear()  # another run
        if self._spans and self._spans[-1][2] == why:
            self._spans[-1] = (self._spans[-1][0], event_ns, why)
        else:
            self._spans.append((event_ns, event_ns, why))

    def snapshot(self, now_ns: int) -> list[dict[str, Any]]:
        return [
            {"from_ms": ms(now_ns - begin), "to_ms": ms(now_ns - end), "why": why}
            for begin, end, why in self._spans
            if why and now_ns - end <= HISTORY_NS
        ]


def label_of(name: str) -> str:
    words = name.replace("_", " ").replace("-", " ")
    return _LABELS.get(name, words[:1].upper() + words[1:])


def missing_inputs(table: Mapping[str, Stream], present: Mapping[str, bool], age_ns: Mapping[str, int]) -> str:
    """Which dense inputs of the session a prediction had to do without for longer than a moment; "" if none."""
    without = [
        label_of(row.name)
        for row in table.values()
        if row.dense and row.source != "none"
        for modality in map(row.modality_of, row.features())
        if present.get(modality) is False and not 0 <= age_ns.get(modality, -1) <= SILENT_NS
    ]
    return f"without {', '.join(dict.fromkeys(without)).lower()}" if without else ""


def inputs(
    table: Mapping[str, Stream], modalities: Iterable[str], nodes: Nodes, seen: Streams, now_ns: int
) -> list[Input]:
    """All streams that the session captures, others publish, or the model asks for."""
    wanted = set(modalities)
    rows = {**{m.partition(".")[0]: Stream.of(m.partition(".")[0]) for m in modalities}, **table}
    order = list(table) + [name for name in rows if name not in table]
    found = [_input(rows[name], wanted, nodes, seen, now_ns) for name in order]
    return [row for row in found if row is not None]


def _input(row: Stream, wanted: set[str], nodes: Nodes, seen: Streams, now_ns: int) -> Input | None:
    feeds = [row.modality_of(f) for f in row.features()]
    feeds += [m for m in wanted if m.partition(".")[0] == row.modality]
    used = not wanted or any(m in wanted for m in feeds)
    views = [v for t in row.topics() if (v := seen.views.get(t)) is not None]
    newest = max((v.newest_ns for v in views if v.newest_ns is not None), default=None)
    age_ms = None if newest is None else ms(now_ns - newest)
    owner, label = nodes.of_modality(row.name), label_of(row.name)
    if row.source == "none" and owner is None and newest is None:
        return Input(row.name, label, row.kind, "none", "not connected", connected=False) if used and wanted else None
    rate_hz = round(max((v.rate.per_s(now_ns) for v in views), default=0.0), 1)
    word, tone, why = _state(owner, row, newest, now_ns, bool(nodes.views))
    misfit = next(filter(None, (nodes.misfit(m, now_ns) for m in feeds)), "")
    if misfit and tone != "bad":
        word, tone, why = "refused (quarantined)", "bad", misfit
    elif not used and tone != "bad":
        word, tone, why = "not used", "none", "this model does not take it"
    return Input(row.name, label, row.kind, tone, word, why, rate_hz, age_ms, used=used)


def _state(
    owner: NodeView | None, row: Stream, newest_ns: int | None, now_ns: int, running: bool
) -> tuple[str, Tone, str]:
    """`running`: whether there are processes, and not only a recording."""
    if owner is None and newest_ns is None:
        return ("starts", "warn", "") if running else ("no data yet", "none", "")
    word, tone = _WORDS.get(owner.state, ("working", "good")) if owner else ("working", "good")
    if not row.dense and tone == "warn" and owner is not None and owner.state == "stale":
        word, tone = "working", "good"  # nothing is due
    if tone == "good" and row.dense and newest_ns is not None and now_ns - newest_ns > SILENT_NS:
        return "silent", "warn", f"no data for {(now_ns - newest_ns) / 1e9:.0f} s"
    return word, tone, owner.reason if owner and tone != "good" else ""


def engine_trouble(nodes: Nodes, predicted_ns: int | None, now_ns: int) -> tuple[Tone, str]:
    """Why predictions are old or do not come, and how bad that is; ("good", "") if they come. `predicted_ns`: when the
    newest one came.
    """
    engine = nodes.views.get("engine")
    if engine is None:
        return "good", ""
    if engine.state in _DEAD:
        what = "was given up" if engine.state == "failed" else "died and starts again"
        return "bad", f"the engine {what}" + (f": it {engine.reason}" if engine.reason else "")
    if engine.state in _OVER:
        return "none", "the session has ended"
    if now_ns - engine.at_ns > _MISSED_STATUSES_NS:
        return "bad", f"the engine has said nothing for {(now_ns - engine.at_ns) / 1e9:.0f} s"
    if engine.state == "starting" or predicted_ns is None:
        return "warn", "the engine starts"
    if now_ns - predicted_ns > SILENT_NS:
        return "bad", f"no new prediction for {(now_ns - predicted_ns) / 1e9:.0f} s"
    return "good", ""


def overall(
    engine: tuple[Tone, str], ahead: Mapping[str, str], rows: Sequence[Input], nodes: Nodes, now_ns: int
) -> dict[str, str]:
    """The worst of the engine, the inputs and the other processes; `ahead`: as from `forecast`."""
    troubles: list[tuple[Tone, str]] = [engine] if engine[1] else []
    troubles += [(row.tone, row.trouble) for row in rows if row.tone in ("warn", "bad")]
    inputs_of = {row.name for row in rows}
    for name, node in nodes.views.items():
        if name == "engine" or node.modality in inputs_of:
            continue
        if node.state in _DEAD:
            troubles.append(("bad", f"{name}: {_WORDS[node.state][0]}" + (f", {node.reason}" if node.reason else "")))
        elif node.state not in _OVER and now_ns - node.at_ns > 2 * _MISSED_STATUSES_NS:
            troubles.append(("warn", f"{name}: no word for {(now_ns - node.at_ns) / 1e9:.0f} s"))
    labels = {nodes.name_of(row.name): row.label for row in rows}
    for name, (ago_s, reason) in nodes.recent_deaths(now_ns).items():
        what = labels.get(name, "the " + name)
        why = f": it {reason}" if reason and reason != MISSED else ""
        troubles.append(("warn", f"{what} died {ago_s:.0f} s ago and runs again{why}"))
    if not troubles and ahead["state"] == "doubtful":
        troubles.append(("warn", f"the predictions are less sure: {ahead['why']}"))
    if not troubles:
        return {"tone": "good", "what": ""}
    tone = max((t for t, _ in troubles), key=_RANK.__getitem__)
    worst = [what for t, what in troubles if t == tone]
    return {"tone": tone, "what": "; ".join(worst[:2]) + (f"; and {len(worst) - 2} more" if len(worst) > 2 else "")}


def forecast(engine: tuple[Tone, str], doubt: str, rows: Iterable[Input]) -> dict[str, str]:
    """Whether what the heads say now may be believed: `good`, `doubtful` or `old`, and why."""
    if engine[1]:
        return {"state": "old", "why": engine[1]}
    gone: dict[str, list[str]] = {}
    for row in rows:
        if row.used and row.connected and _is_gone(row):
            gone.setdefault(row.word, []).append(row.label.lower())
    why = "; ".join(f"{', '.join(labels)}: {word}" for word, labels in gone.items()) or doubt
    return {"state": "doubtful" if why else "good", "why": why}


def _is_gone(row: Input) -> bool:
    return row.tone == "bad" or row.word in ("silent", "ended")
