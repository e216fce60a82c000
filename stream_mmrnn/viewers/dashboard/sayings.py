"""What a model predicts, in words: a few short lines for each head.

Pure: it is given a head's meaning and its newest values. Knows nothing about sessions, inputs or browsers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from stream_mmrnn.viewers.dashboard.heads import SPEECH, HeadMeaning, Target, person

_MOST_VALUES = 3
"""Values of a regression that are said; the picture has all."""


class Step(msgspec.Struct, frozen=True):
    """The probability for one interval of the future."""

    end_s: float
    p: float | None


class Line(msgspec.Struct, frozen=True):
    """One line: `You keep talking`, 92 %."""

    text: str
    p: float | None = None
    """The probability that belongs to it, if it has one."""
    why: str = ""
    """A few words beside it, for example why it says nothing now."""
    steps: list[Step] = []


def lines(
    meaning: HeadMeaning, values: list[float | None], why_not: str = "", unheard: Collection[str] = ()
) -> list[dict[str, Any]]:
    """What a head says; `why_not`: why it may not be read now; `unheard`: persons whose sound does not come."""
    name = _plain(meaning.name)
    if why_not:
        said = [Line(f"{name}?", None, why_not)]
    elif meaning.kind == SPEECH and meaning.targets():
        said = [_speech(meaning, target, values, target.name in unheard) for target in meaning.targets()]
    elif meaning.kind == "hazard" and meaning.horizons_s:
        said = [_hazard(name, meaning, values)]
    elif meaning.kind == "classification" and len(values) == 1:
        said = [_yes_or_no(name, meaning, values[0])]
    elif meaning.kind == "classification":
        said = [_class(name, meaning, values)]
    else:
        said = [_numbers(name, meaning, values)]
    return [{"head": meaning.name, **msgspec.to_builtins(line)} for line in said]


def cumulative(hazard: list[float | None]) -> list[float | None]:
    """The probability that the event has come by the end of each interval.

    A hazard is the probability that it comes in an interval, given that it did not come before.
    """
    found: list[float | None] = []
    not_yet: float | None = 1.0
    for h in hazard:
        not_yet = None if h is None or not_yet is None else not_yet * (1 - min(1.0, max(0.0, h)))
        found.append(None if not_yet is None else round(1 - not_yet, 4))
    return found


def _plain(name: str) -> str:
    words = name.replace("_", " ").replace("-", " ").strip()
    return words[:1].upper() + words[1:]


def _number(v: float) -> str:
    return f"{v:.2f}" if 0.01 <= abs(v) < 100 or v == 0 else f"{v:.3g}"


def _percent(p: float) -> str:
    return f"{100 * p:.0f} %"


def _at(values: list[float | None], i: int) -> float | None:
    return values[i] if i < len(values) else None


def _speech(meaning: HeadMeaning, target: Target, values: list[float | None], unheard: bool) -> Line:
    steps = [Step(meaning.horizons_s[i][1], _at(values, i)) for i in target.outputs]
    who = person(target.name)
    name, is_you = _plain(who), who == "you"
    now, later = steps[0].p, steps[-1].p
    if now is None or later is None:
        return Line(f"{name}: no prediction", steps=steps)
    likely = later >= 0.5
    word = {(True, True): "keep", (True, False): "stop", (False, True): "start", (False, False): "stay"}[
        now >= 0.5, likely
    ]
    rest = "silent" if word == "stay" else "talking"
    return Line(
        f"{name} {word if is_you else word + 's'} {rest}",
        later if likely else 1 - later,
        "not heard: as usual" if unheard else "",
        steps,
    )


def _hazard(name: str, meaning: HeadMeaning, values: list[float | None]) -> Line:
    so_far = cumulative(values)
    steps = [Step(end, _at(so_far, i)) for i, (_, end) in enumerate(meaning.horizons_s)]
    return Line(f"{name} within {steps[-1].end_s:g} s", steps[-1].p, "", steps)


def _yes_or_no(name: str, meaning: HeadMeaning, value: float | None) -> Line:
    if value is None:
        return Line(f"{name}?", None, "no prediction")
    return Line(
        f"{name}? {'Yes' if value > meaning.threshold else 'No'}", value, f"yes above {_percent(meaning.threshold)}"
    )


def _class(name: str, meaning: HeadMeaning, values: list[float | None]) -> Line:
    ranked = sorted(((v, i) for i, v in enumerate(values) if v is not None), reverse=True)
    ahead = f" in {meaning.horizons_s[0][1]:g} s" if meaning.horizons_s else ""
    if not ranked:
        return Line(f"{name}{ahead}: no prediction")

    def label(i: int) -> str:
        return meaning.labels[i].replace("_", " ") if i < len(meaning.labels) else str(i)

    second = f"else {label(ranked[1][1])} {_percent(ranked[1][0])}" if len(ranked) > 1 else ""
    return Line(f"{name}{ahead}: {label(ranked[0][1])}", ranked[0][0], second)


def _numbers(name: str, meaning: HeadMeaning, values: list[float | None]) -> Line:
    """The values at the last horizon, or now."""
    targets = [(t.name, t.outputs[-1]) for t in meaning.targets()]
    if not targets:
        targets = [(meaning.labels[i] if i < len(meaning.labels) else "", i) for i in range(len(values))]
    known = [(label, v) for label, i in targets if (v := _at(values, i)) is not None]
    if not known:
        return Line(f"{name}: no prediction")
    said = ", ".join(f"{label.replace('_', ' ')} {_number(v)}".strip() for label, v in known[:_MOST_VALUES])
    more = f" and {len(known) - _MOST_VALUES} more" if len(known) > _MOST_VALUES else ""
    ahead = f" in {max(end for _, end in meaning.horizons_s):g} s" if meaning.horizons_s else ""
    unit = "" if meaning.unit == "probability" else meaning.unit
    return Line(f"{name}{ahead}: {said}{more}", None, unit)
