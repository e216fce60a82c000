"""Compare two tracks: where they differ, by how much, in which head, and which decisions change. Pure: numpy only.

NaN in both is no difference; NaN in one of them is a difference without a size.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.types import FloatArray, HeadSpec
from stream_mmrnn.offline.diff.tracks import PredictionTrack, Times

Numbers = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

MAX_STRETCHES = 32
_MAX_CHANGES = 16


def decisions(spec: HeadSpec | None, values: FloatArray) -> Ints | None:
    """A head's decisions: [T] the class, or [T, size] 1 for yes and 0 for no; -1 for NaN.

    None if the head makes no decisions: a regression, a hazard, a head without a spec.
    """
    if spec is None or spec.kind not in ("classification", "activity_projection"):
        return None
    nothing = np.isnan(values)
    if spec.kind == "classification" and values.shape[1] > 1:
        best: Ints = np.where(nothing, -np.inf, values).argmax(1)
        return np.where(nothing.all(1), -1, best)
    return np.where(nothing, -1, values.astype(np.float64) > spec.threshold).astype(np.int64)


def distance(a: FloatArray, b: FloatArray) -> tuple[Numbers, Bools]:
    """|a - b|, and a mask where it has no size because one of them is not finite; the distance is 0 there."""
    with np.errstate(invalid="ignore"):
        gap = np.abs(a.astype(np.float64) - b.astype(np.float64))
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    unmeasured = ~same & ~np.isfinite(gap)
    return np.where(same | unmeasured, 0.0, gap), unmeasured


def stretches(over: Bools) -> list[tuple[int, int]]:
    """First and last index of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], over, [False]]).astype(np.int8)))
    return [(int(first), int(after) - 1) for first, after in zip(edges[::2], edges[1::2], strict=True)]


def _name(spec: HeadSpec | None, output: int) -> str:
    return spec.labels[output] if spec is not None and output < len(spec.labels) else str(output)


class _Axis:
    """The common ticks, in the form of the report."""

    def __init__(self, ticks: Times, event_ns: Times) -> None:
        self.ticks, self._event_ns = ticks, event_ns

    def at(self, i: int) -> dict[str, Any]:
        """`s`: seconds from the first common tick."""
        since_ns = int(self._event_ns[i] - self._event_ns[0])
        return {"tick": int(self.ticks[i]), "event_ns": int(self._event_ns[i]), "s": round(since_ns / 1e9, 6)}


def _sizes(gap: Numbers) -> dict[str, float]:
    p50, p95, p99 = np.quantile(gap, (0.5, 0.95, 0.99), method="inverted_cdf")
    return {
        "max": float(gap.max()),
        "mean": float(gap.mean()),
        "rms": float(np.sqrt(np.mean(gap**2))),
        "p50": float(p50),
        "p95": float(p95),
        "p99": float(p99),
    }


def head(
    a: FloatArray, b: FloatArray, specs: tuple[HeadSpec | None, HeadSpec | None], axis: _Axis, tolerance: float
) -> dict[str, Any]:
    """The differences of one head over T common ticks, `a` and `b` [T, size]."""
    gap, unmeasured = distance(a, b)
    beyond = (gap > tolerance) | unmeasured
    over: Bools = np.asarray(beyond.any(1))
    found = stretches(over)
    spec = specs[0] or specs[1]
    row: dict[str, Any] = {
        "ticks": len(a),
        "different": int(over.sum()),
        "share": float(over.mean()),
        "not_a_number_in_one": int(unmeasured.sum()),
        **_sizes(gap),
        "outputs": {
            _name(spec, i): {"different": int(beyond[:, i].sum()), **_sizes(gap[:, i])} for i in range(a.shape[1])
        },
        "first": None,
        "max_at": None,
        "where": [
            {"from": axis.at(i), "to": axis.at(j), "max": float(gap[i : j + 1].max())} for i, j in found[:MAX_STRETCHES]
        ],
        "stretches": len(found),
        "decisions": _changed(a, b, specs, axis),
    }
    if found:
        row["first"] = _one(a, b, found[0][0], int(np.argmax(beyond[found[0][0]])), spec, axis)
        worst, output = (int(k) for k in np.unravel_index(int(gap.argmax()), gap.shape))
        row["max_at"] = _one(a, b, worst, output, spec, axis)
    return row


def _one(a: FloatArray, b: FloatArray, i: int, output: int, spec: HeadSpec | None, axis: _Axis) -> dict[str, Any]:
    def number(x: np.float32) -> float | None:
        return float(x) if np.isfinite(x) else None

    return {**axis.at(i), "output": _name(spec, output), "a": number(a[i, output]), "b": number(b[i, output])}


def _changed(
    a: FloatArray, b: FloatArray, specs: tuple[HeadSpec | None, HeadSpec | None], axis: _Axis
) -> dict[str, Any] | None:
    """Decisions that differ; None if the head makes no decisions."""
    # a track without a spec is read with the other one's
    x, y = decisions(specs[0] or specs[1], a), decisions(specs[1] or specs[0], b)
    if x is None or y is None or x.shape != y.shape:
        return None
    changed = x != y
    ticks: Bools = changed if changed.ndim == 1 else changed.any(1)
    kinds: Counter[str] = Counter()
    for index in zip(*np.nonzero(changed), strict=True):
        kinds[f"{_word(specs[0] or specs[1], x, index)} -> {_word(specs[1] or specs[0], y, index)}"] += 1
    first = int(np.argmax(ticks)) if ticks.any() else None
    return {
        "ticks": int(ticks.sum()),
        "share": float(ticks.mean()),
        "first": None if first is None else axis.at(first),
        "changes": dict(kinds.most_common(_MAX_CHANGES)),
    }


def _word(spec: HeadSpec | None, decided: Ints, index: tuple[Any, ...]) -> str:
    value = int(decided[index])
    if value < 0:
        return "nothing"
    if decided.ndim == 1:
        return _name(spec, value)
    word = "yes" if value else "no"
    return f"{_name(spec, int(index[1]))} {word}" if decided.shape[1] > 1 else word


def common(a: PredictionTrack, b: PredictionTrack) -> tuple[Ints, Ints]:
    """The indices, in a and in b, of the ticks that both have: those that end at the same event time."""
    _, i, j = np.intersect1d(a.event_ns, b.event_ns, assume_unique=True, return_indices=True)
    return i, j


def compare(a: PredictionTrack, b: PredictionTrack, tolerance: float = 0.0) -> dict[str, Any]:
    """The whole comparison as one document; `equal`: nothing is missing or differs by more than `tolerance`."""
    i, j = common(a, b)
    axis = _Axis(a.ticks[i], a.event_ns[i])
    heads: dict[str, Any] = {}
    sizes: dict[str, list[int]] = {}
    for name in a.heads.keys() & b.heads.keys() if len(i) else ():
        x, y = a.heads[name][i], b.heads[name][j]
        if x.shape != y.shape:
            sizes[name] = [x.shape[1], y.shape[1]]
        else:
            heads[name] = head(x, y, (a.specs.get(name), b.specs.get(name)), axis, tolerance)
    ordered = {name: heads[name] for name in a.heads if name in heads}
    firsts = [(h["first"]["event_ns"], name) for name, h in ordered.items() if h["first"]]
    ticks = {"common": len(i), "only_a": len(a.ticks) - len(i), "only_b": len(b.ticks) - len(j)}
    only_a, only_b = sorted(a.heads.keys() - b.heads.keys()), sorted(b.heads.keys() - a.heads.keys())
    missing = bool(only_a or only_b or sizes or ticks["only_a"] or ticks["only_b"])
    return {
        "tolerance": tolerance,
        "equal": bool(ordered) and not missing and not firsts,
        "ticks": ticks,
        "max_abs_difference": max((h["max"] for h in ordered.values()), default=0.0),
        "first": {"head": min(firsts)[1], **ordered[min(firsts)[1]]["first"]} if firsts else None,
        "heads": ordered,
        "only_a": only_a,
        "only_b": only_b,
        "sizes_differ": sizes,
    }
