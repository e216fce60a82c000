"""Scores of a head's predictions against its targets, for reports and cards. Numpy only, no torch.

Every function takes the predictions and targets of the ticks with a weight, in any order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_mmrnn.training.recipe import HeadRecipe

Array = npt.NDArray[Any]
_BINS = 15


def auc(score: Array, positive: Array) -> float:
    """Area under the ROC curve by ranks, ties counted half (Mann and Whitney 1947); NaN where one class is missing."""
    positive = positive.astype(bool)
    n_pos, n_neg = int(positive.sum()), int((~positive).sum())
    if not n_pos or not n_neg:
        return float("nan")
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    rank = (last - (counts - 1) / 2)[inverse]
    return float((rank[positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def balanced_accuracy(predicted: Array, true: Array) -> float:
    """The mean recall over the classes that occur."""
    return float(np.mean([(predicted[true == c] == c).mean() for c in np.unique(true)])) if len(true) else float("nan")


def best_threshold(score: Array, positive: Array) -> float:
    """The threshold on `score` with the best balanced accuracy; use validation data."""
    order = np.argsort(score)
    truth = positive.astype(bool)[order]
    below_pos = np.concatenate([[0], np.cumsum(truth)])
    below_neg = np.concatenate([[0], np.cumsum(~truth)])
    found = 1 - below_pos / max(truth.sum(), 1) + below_neg / max((~truth).sum(), 1)
    values = np.concatenate([[-np.inf], score[order]])
    # candidates are between two different scores: "positive" is score > threshold
    usable = np.concatenate([values[1:] != values[:-1], [True]])
    return float(values[int(np.argmax(np.where(usable, found, -1)))])


def calibration(confidence: Array, correct: Array) -> tuple[float, list[tuple[float, float, int]]]:
    """Expected calibration error (Guo et al. 2017, 15 equal bins) and the curve (predicted, true, count)."""
    place = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    curve, error = [], 0.0
    for b in range(_BINS):
        here = place == b
        n = int(here.sum())
        if n:
            predicted, true = float(confidence[here].mean()), float(correct[here].mean())
            curve.append((predicted, true, n))
            error += n / len(confidence) * abs(predicted - true)
    return error, curve


def confusion(predicted: Array, true: Array, classes: int) -> Array:
    """Counts [true, predicted]."""
    table = np.zeros((classes, classes), np.int64)
    np.add.at(table, (true.astype(int), predicted.astype(int)), 1)
    return table


def score(
    head: HeadRecipe,
    predicted: Array,
    target: Array,
    threshold: float = 0.5,
    baselines: Mapping[str, Array] | None = None,
) -> dict[str, Any]:
    """The figures of one head over N ticks; `predicted` [N, size] as served, `target` [N] or [N, size].

    `threshold`: a binary head means yes above it. `baselines`: what simple rules forecast, [N, size] by the rule's
    name, scored like a regression's own numbers.
    """
    if not len(predicted):
        return {"ticks": 0}
    if head.kind == "classification" and head.size > 1:
        best = predicted.argmax(1)
        error, curve = calibration(predicted.max(1), best == target)
        chosen = np.clip(predicted[np.arange(len(predicted)), target.astype(int)], 1e-12, 1)
        return {
            "ticks": len(predicted),
            "accuracy": float((best == target).mean()),
            "balanced_accuracy": balanced_accuracy(best, target),
            "log_loss": float(-np.log(chosen).mean()),
            "calibration_error": error,
            "reliability": curve,
            "confusion": confusion(best, target, head.size).tolist(),
        }
    if head.kind == "classification":
        score, true = predicted[:, 0], target.reshape(-1) > 0.5
        error, curve = calibration(score, true)
        return {
            "ticks": len(predicted),
            "share": float(true.mean()),
            "threshold": threshold,
            "accuracy": float(((score > threshold) == true).mean()),
            "balanced_accuracy": balanced_accuracy(score > threshold, true),
            "auc": auc(score, true),
            "calibration_error": error,
            "reliability": curve,
        }
    if head.kind == "activity_projection":
        target = target.reshape(predicted.shape)
        error, curve = calibration(predicted.ravel(), target.ravel())
        names = head.labels or tuple(str(i) for i in range(head.size))
        return {
            "ticks": len(predicted),
            "auc": {n: auc(predicted[:, i], target[:, i]) for i, n in enumerate(names)},
            "balanced_accuracy": {
                n: balanced_accuracy(predicted[:, i] > 0.5, target[:, i] > 0.5) for i, n in enumerate(names)
            },
            "accuracy": float(((predicted > 0.5) == (target > 0.5)).mean()),
            "calibration_error": error,
            "reliability": curve,
        }
    if head.kind == "regression":
        found = {"ticks": len(predicted), **errors(head, predicted, target)}
        if baselines:
            found["baselines"] = {name: errors(head, values, target) for name, values in baselines.items()}
        return found
    came = target.astype(int)
    survive = np.cumprod(1 - predicted, 1)
    arrives = 1 - survive
    names = head.labels or tuple(str(i) for i in range(head.size))
    return {
        "ticks": len(predicted),
        "auc": {n: auc(arrives[:, i], came <= i) for i, n in enumerate(names)},
        "log_loss": float(_hazard_loss(predicted, came).mean()),
    }


def errors(head: HeadRecipe, predicted: Array, target: Array) -> dict[str, Any]:
    """The errors of numbers [N, size] over the targets that are known (not NaN), also by label."""
    target = target.reshape(predicted.shape).astype(np.float64)
    some = (~np.isnan(target)).any(0)
    predicted, target = predicted[:, some], target[:, some]
    known = ~np.isnan(target)
    count = known.sum(0)

    def mean(values: Array) -> Array:
        return np.where(known, values, 0).sum(0) / count

    squared, absolute = mean((predicted - target) ** 2), mean(np.abs(predicted - target))
    spread = mean((target - mean(target)) ** 2)
    share = count / max(count.sum(), 1)
    found: dict[str, Any] = {
        "mse": float((squared * share).sum()),
        "mae": float((absolute * share).sum()),
        "r2": float(1 - (squared / np.maximum(spread, 1e-12)).mean()) if some.any() else float("nan"),
    }
    if head.labels:
        labels = [label for label, there in zip(head.labels, some, strict=True) if there]
        found["mae_by_label"] = dict(zip(labels, absolute.tolist(), strict=True))
    return found


def _hazard_loss(hazard: Array, came: Array) -> Array:
    interval = np.arange(hazard.shape[1])
    h = np.clip(hazard, 1e-7, 1 - 1e-7)
    at_risk, happened = interval <= came[:, None], interval == came[:, None]
    return -(np.where(happened, np.log(h), np.log1p(-h)) * at_risk).sum(1)


def primary(head: HeadRecipe, figures: dict[str, Any]) -> float:
    """One number per head, more is better; the study's table and `--quick` compare it."""
    if not figures.get("ticks"):
        return float("nan")
    if head.kind == "classification":
        return float(figures["accuracy" if head.size > 1 else "balanced_accuracy"])
    if head.kind == "regression":
        return float(figures["r2"])
    return float(np.nanmean(list(figures["auc"].values())))


def clean(value: Any) -> Any:
    """Replace NaN and infinity by null, which JSON has not."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
