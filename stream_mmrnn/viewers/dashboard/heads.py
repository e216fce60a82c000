"""The heads of a model: their newest values, their last 30 s, what their numbers mean, and when they may be read."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any

import msgspec

from stream_mmrnn.viewers.dashboard.limits import MAX_OUTPUTS, clean, short

HISTORY_NS = 30_000_000_000
"""Of heads and of text."""
HISTORY_POINTS = 375
_STEP_NS = HISTORY_NS // HISTORY_POINTS
SPEECH = "activity_projection"
SILENCE_NS = 250_000_000
"""How old a silence is when a head that may be read in a silence is read: models are scored there."""
_HEARD = 0.5
_SELF = "self"
_PERSONS = {_SELF: "you", "other": "the other"}
_SOUNDS = {_SELF: "audio", "other": "other_audio"}
"""By person, the model's input that hears them."""
_NO_SOUND_NS = 300_000_000
"""An older newest sample of sound means that there is none: a microphone that was pulled out is no silence."""


class Target(msgspec.Struct, frozen=True):
    """The outputs of a head that are about one thing, one for each horizon."""

    name: str
    outputs: list[int]


class HeadMeaning(msgspec.Struct):
    """What the engine's status says about a head."""

    name: str
    kind: str = ""
    labels: list[str] = []
    horizons_s: list[tuple[float, float]] = []
    unit: str = "probability"
    threshold: float = 0.5
    readable: str = "always"

    def cleaned(self) -> HeadMeaning:
        """The same with printable text and no more outputs than are shown."""
        labels = [clean(label) for label in self.labels[:MAX_OUTPUTS]]
        horizons_s = self.horizons_s[:MAX_OUTPUTS]
        return HeadMeaning(
            self.name, clean(self.kind), labels, horizons_s, clean(self.unit), self.threshold, clean(self.readable)
        )

    def targets(self) -> list[Target]:
        """Outputs that have the same horizon are about different things: the k-th output of each is about thing k."""
        found: list[list[int]] = []
        seen: dict[tuple[float, float], int] = {}
        for i, span in enumerate(self.horizons_s):
            k = seen[span] = seen.get(span, -1) + 1
            if k == len(found):
                found.append([])
            found[k].append(i)
        return [Target(self._common_name(o) or self._name(k, len(found)), o) for k, o in enumerate(found)]

    def _name(self, k: int, count: int) -> str:
        return f"{self.name} {k + 1}" if count > 1 else self.name

    def _common_name(self, outputs: list[int]) -> str:
        """`self` of `self_200ms` and `self_600ms`; the label itself of a single output."""
        letters = zip(*(self.labels[i] if i < len(self.labels) else "" for i in outputs), strict=False)
        common = "".join(same[0] for same in takewhile(lambda same: len(set(same)) == 1, letters))
        return common.rstrip("0123456789").rstrip("_-. ") if len(outputs) > 1 else common


class HeadView:
    """A head's newest values and its last 30 s, one point per 80 ms."""

    def __init__(self) -> None:
        self.values: list[float | None] = []
        self._points: deque[tuple[int, list[float | None]]] = deque(maxlen=HISTORY_POINTS)

    def observe(self, event_ns: int, values: list[float | None], readable: bool = True) -> None:
        """`readable`: whether the values mean something; if not, they are gaps."""
        self.values = [short(v) if readable else None for v in values[:MAX_OUTPUTS]]
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
            "targets": msgspec.to_builtins(meaning.targets()),
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


class Silence:
    """How long nobody has been heard, as the heads say that project speech."""

    def __init__(self) -> None:
        self._since_ns: int | None = None
        self._newest_ns = 0
        self._has_spoken = False
        self.speaking = ""
        """Who is heard."""
        self.unheard: frozenset[str] = frozenset()
        """Whose sound does not come: of them, the heads tell what is usual in conversations."""

    def observe(
        self,
        event_ns: int,
        heads: Mapping[str, list[float | None]],
        meanings: Iterable[HeadMeaning],
        age_ns: Mapping[str, int],
    ) -> None:
        """`age_ns`: of the newest sample of each of the model's inputs; -1 if none came."""
        if event_ns < self._newest_ns:
            self._since_ns, self._has_spoken = None, False  # another run
        self._newest_ns = event_ns
        self.unheard = frozenset(w for w, m in _SOUNDS.items() if m in age_ns and not 0 <= age_ns[m] <= _NO_SOUND_NS)
        voices = ((name, p) for m in meanings if m.kind == SPEECH for name, p in _nearest(m, heads.get(m.name, [])))
        self.speaking = next((person(n) for n, p in voices if n not in self.unheard and (p or 0.0) >= _HEARD), "")
        if self.speaking:
            self._since_ns, self._has_spoken = None, True
        elif self._since_ns is None:
            self._since_ns = event_ns

    def why_not(self, meaning: HeadMeaning) -> str:
        """Why a head may not be read now; "" if it may."""
        if meaning.readable != "silence":
            return ""
        if _SELF in self.unheard:
            return "no sound comes"
        if self.speaking:
            return f"{self.speaking} {'are' if self.speaking == person(_SELF) else 'is'} speaking"
        if not self._has_spoken or self._since_ns is None:
            return "nobody has spoken yet"
        return "" if self._newest_ns - self._since_ns >= SILENCE_NS else "the silence has just begun"


def person(target: str) -> str:
    """`you` for `self`; the name of the target in words where it is no person."""
    return _PERSONS.get(target, target.replace("_", " "))


def _nearest(meaning: HeadMeaning, values: list[float | None]) -> list[tuple[str, float | None]]:
    """By target, how likely speech is at the nearest horizon."""
    return [(t.name, values[t.outputs[0]]) for t in meaning.targets() if t.outputs[0] < len(values)]
