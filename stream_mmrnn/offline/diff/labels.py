"""Score a track against the labels of the recording, typed or given afterwards: accuracy, and the delay after a change.

A head is scored if it has labels of the recording. A head with a single yes/no output is scored if its label (or, if it
has none, its name) was given: from the first label on, that label means yes, and any other label or `none` means no. If
there are several tiers, a head is scored by the one of its own name, else by the first that has its labels.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.types import HeadSpec
from stream_mmrnn.offline.diff.compare import Bools, Ints, decisions
from stream_mmrnn.offline.diff.tracks import PredictionTrack
from stream_mmrnn.recording.label_file import NOTHING
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.training import metrics
from stream_mmrnn.training.recipe import HeadRecipe
from stream_mmrnn.training.tasks.recordings import TypedEvents, ahead_ns_of, classes_at

YES_NO = ("no", "yes")
Labels = list[tuple[int, str]]
"""Of one tier, by time."""


def labels_of(path: Path) -> TypedEvents:
    """The labels; raises FileError if there are none."""
    events = TypedEvents.of(Recording(path))
    if not _given(events, events.tiers):
        raise FileError(
            f"{path} holds no labels; type `/label NAME` into the text source while recording, or give them afterwards "
            "with stream-mmrnn label"
        )
    return events


def _given(events: TypedEvents, tiers: Iterable[str]) -> set[str]:
    """The labels of some tiers."""
    return {name for tier in tiers for _, name in events.tiers[tier]} - set(NOTHING)


def _tier_for(spec: HeadSpec, events: TypedEvents) -> str:
    """The tier that a head is scored by; "" if none has labels of it."""
    names = set(_names(spec))
    fitting = [tier for tier in events.tiers if names & _given(events, [tier])]
    own = [tier for tier in fitting if tier.lower().replace("-", "_") == spec.name]
    return next(iter(own + fitting), "")


def _names(spec: HeadSpec) -> tuple[str, ...]:
    """The labels that a head can predict."""
    if spec.kind != "classification":
        return ()
    return spec.labels if spec.size > 1 else (spec.labels[:1] or (spec.name,))


def _targets(
    spec: HeadSpec, track: PredictionTrack, events: TypedEvents, tier: str, ahead_ns: int
) -> tuple[Ints, Bools]:
    """The true class [T] at each tick, and whether it is known."""
    times = track.event_ns
    target, known = classes_at(_names(spec), ahead_ns, times, events, tier)
    if spec.size > 1:
        return target.astype(np.int64), known > 0
    yes = known > 0
    started = (events.tiers[tier][0][0] <= times + ahead_ns) & (times + ahead_ns <= times[-1])
    return yes.astype(np.int64), started


def score(track: PredictionTrack, events: TypedEvents) -> dict[str, Any]:
    """By head: accuracy, balanced accuracy, confusion matrix, and the delay after changes of label.

    Raises:
        UsageError: no head has one of the labels.

    """
    heads = {}
    for name, outputs in track.heads.items():
        spec = track.specs.get(name)
        if spec is None or not (tier := _tier_for(spec, events)):
            continue
        ahead_ns = ahead_ns_of(spec.horizons_s)
        target, known = _targets(spec, track, events, tier, ahead_ns)
        decided = decisions(spec, outputs)
        assert decided is not None  # a classification has decisions
        decided = decided.reshape(len(outputs))
        counts = known & (decided >= 0)
        head = HeadRecipe(name=name, kind="classification", size=spec.size, labels=spec.labels)
        figures = metrics.score(head, outputs[counts], target[counts], spec.threshold)
        figures.pop("reliability", None)
        names = spec.labels if spec.size > 1 else YES_NO
        figures["confusion"] = {
            "labels": list(names),
            "true_by_said": metrics.confusion(decided[counts], target[counts], len(names)).tolist(),
        }
        heads[name] = {
            **metrics.clean(figures),
            "unknown": int((~known).sum()),
            "not_a_number": int((known & (decided < 0)).sum()),
            "changes": _changes(track, decided, target, known, events.tiers[tier], ahead_ns),
        }
    if not heads:
        offered = "; ".join(f"{s.name}: {', '.join(_names(s))}" for s in track.specs.values() if _names(s)) or "none"
        raise UsageError(
            f"{track.name} has no head for the labels {', '.join(sorted(_given(events, events.tiers)))}; "
            f"the heads that take labels are {offered}"
        )
    return heads


def _changes(
    track: PredictionTrack, decided: Ints, target: Ints, known: Bools, labels: Labels, ahead_ns: int
) -> dict[str, Any]:
    """The delay between a change of label and the head's first right decision before the next change; ms of event time.

    A head that predicts the future may be right before the label was typed: its delay is then negative.
    """
    typed_ns = [at_ns for at_ns, _ in labels]
    changed = np.flatnonzero(known[1:] & known[:-1] & (target[1:] != target[:-1])) + 1
    ends = [*changed.tolist(), len(target)][1:]
    delays = []
    for begin, end in zip(changed.tolist(), ends, strict=True):
        right = np.flatnonzero(decided[begin:end] == target[begin])
        if len(right):
            label_ns = typed_ns[bisect_right(typed_ns, int(track.event_ns[begin]) + ahead_ns) - 1]
            delays.append((int(track.event_ns[begin + right[0]]) - label_ns) / 1e6)
    row: dict[str, Any] = {"count": len(changed), "followed": len(delays), "missed": len(changed) - len(delays)}
    if delays:
        p50, p95 = np.quantile(delays, (0.5, 0.95), method="inverted_cdf")
        row |= {"p50_ms": float(p50), "p95_ms": float(p95), "max_ms": max(delays)}
    return row
