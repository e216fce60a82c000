"""The heads of a model: their newest values, their last 30 s, and what their numbers mean."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec

from stream_mmrnn.viewers.dashboard.limits import MAX_OUTPUTS, clean, short

HISTORY_NS = 30_000_000_000
"""Of heads and of text."""
HISTORY_POINTS = 375
_STEP_NS = HISTORY_NS // HISTORY_POINTS


class HeadMeaning(msgspec.Struct):
    """What the engine's status says about a head."""

    name: str
    kind: str = ""
    labels: list[str] = []
    horizons_s: list[tuple[float, float]] = []
    unit: str = "probability"
    threshold: float = 0.5

    def cleaned(self) -> HeadMeaning:
        """The same with printable text and no more outputs than are shown."""
        labels = [clean(label) for label in self.labels[:MAX_OUTPUTS]]
        horizons_s = self.horizons_s[:MAX_OUTPUTS]
        return HeadMeaning(self.name, clean(self.kind), labels, horizons_s, clean(self.unit), self.threshold)


class HeadView:
    """A head's newest values and its last 30 s, one point per 80 ms."""

    def __init__(self) -> None:
        self.values: list[float | None] = []
        self._points: deque[tuple[int, list[float | None]]] = deque(maxlen=HISTORY_POINTS)

    def observe(self, event_ns: int, values: list[float | None]) -> None:
        self.values = [short(v) for v in values[:MAX_OUTPUTS]]
        if self._points:
            newest_ns, before = self._points[-1]
            if event_ns < newest_ns or len(before) != len(self.values):
                self._points.clear()  # another run, or another model
            elif event_ns // _STEP_NS == newest_ns // _STEP_NS:
                self._points.pop()
        self._points.append((event_ns, self.values))

    def snapshot(self, meaning: HeadMeaning, now_ns: int) -> dict[str, Any]:
        is_binary = meaning.kind == "classification" and len(self.values) == 1
        return {
            "kind": meaning.kind,
            "unit": meaning.unit,
            "labels": meaning.labels,
            "horizons_s": meaning.horizons_s,
            "threshold": meaning.threshold if is_binary else None,
            "values": self.values,
            "history": self._history(now_ns),
        }

    def _history(self, now_ns: int) -> dict[str, list[Any]]:
        """`age_ms`, oldest first, and one series for each output."""
        recent = [(at, v) for at, v in self._points if now_ns - at <= HISTORY_NS]
        return {
            "age_ms": [round((now_ns - at) / 1e6) for at, _ in recent],
            "series": [[v[i] for _, v in recent] for i in range(len(self.values))],
        }
