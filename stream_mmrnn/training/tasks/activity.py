"""Activity of a person with a phone at the waist, transitions included, and a forecast of the signals.

A tick has two samples of six signals; a sequence is a whole recording.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np

from stream_mmrnn.core.errors import ConfigError, FileError, UsageError
from stream_mmrnn.core.strict_toml import convert
from stream_mmrnn.core.types import FloatArray
from stream_mmrnn.training.data import Array, Task, Ticks
from stream_mmrnn.training.datasets import hapt
from stream_mmrnn.training.recipe import HeadRecipe, Recipe
from stream_mmrnn.training.tasks.common import find, pieces

LABELS = tuple(name.replace(" ", "_") for name in hapt.ACTIVITIES.values())
SIGNALS = len(hapt.SIGNALS)
STACK = 2
TICK_MS = 1000 * STACK / hapt.RATE_HZ
WINDOW = 128
"""Samples of a published window, 2.56 s; windows overlap by half."""


class ActivityOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`data.options`."""

    validation_subjects: tuple[int, ...] = (7, 14, 21, 28)
    """Of the training subjects; the test subjects are the official ones."""
    test: Literal["windows", "ticks"] = "windows"
    """The ticks that the test scores for `activity`: ends of the published windows, or all labelled ticks."""
    noise: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Standard deviation of the noise added to the training signals, in g and rad/s; new in every epoch."""


def window_ends(labels: hapt.LabelArray) -> list[int]:
    """The last sample of each published window: inside one labelled segment, overlapping by half."""
    edges = np.flatnonzero(np.diff(labels)) + 1
    ends: list[int] = []
    for begin, end in zip([0, *edges], [*edges, len(labels)], strict=True):
        if labels[begin] != hapt.NONE:
            ends += range(begin + WINDOW - 1, end, WINDOW // 2)
    return ends


def forecast(head: HeadRecipe, signals: FloatArray, count: int) -> tuple[Array, FloatArray]:
    """For number j of the head: the mean of signal j % 6 over the head's interval j after the tick's end."""
    total = np.concatenate([np.zeros((1, SIGNALS)), np.cumsum(signals, 0, np.float64)])
    now = STACK * np.arange(1, count + 1)
    target = np.zeros((count, head.size), np.float32)
    known = np.ones(count, np.float32)
    for j, (begin_s, end_s) in enumerate(head.horizons_s):
        begin, end = now + round(begin_s * hapt.RATE_HZ), now + round(end_s * hapt.RATE_HZ)
        known *= end <= len(signals)
        a, b = np.minimum(begin, len(signals)), np.minimum(end, len(signals))
        target[:, j] = (total[b, j % SIGNALS] - total[a, j % SIGNALS]) / (end - begin)
    return target, known


def sequence(recording: hapt.HaptRecording, recipe: Recipe, windows: bool) -> Ticks:
    """A whole recording; with `windows` only the ends of published windows are scored for the activity."""
    count = len(recording.labels) // STACK
    signals = recording.signals[: STACK * count]
    targets: dict[str, Array] = {}
    weights: dict[str, FloatArray] = {}
    for head in recipe.heads:
        if head.kind == "regression":
            targets[head.name], weights[head.name] = forecast(head, signals, count)
            continue
        labels = head.labels or LABELS
        classes = {number: labels.index(n) for number, n in enumerate(LABELS, start=1) if n in labels}
        held = recording.labels[STACK - 1 :: STACK][:count].tolist()  # the label at the tick's end
        targets[head.name] = np.array([classes.get(n, 0) for n in held], np.int64)
        weight = np.array([n in classes for n in held], np.float32)
        if windows:
            at_end = np.zeros(count, np.float32)
            # the last tick without a sample after the window
            at_end[[(e + 1) // STACK - 1 for e in window_ends(recording.labels)]] = 1
            weight *= at_end
        weights[head.name] = weight
    return Ticks(
        {"signal": signals.reshape(count, STACK * SIGNALS)},
        np.ones((count, 1), np.float32),
        np.zeros((count, 1), np.float32),
        targets,
        weights,
        f"u{recording.subject:02}_e{recording.index}",
        {"subject": str(recording.subject)},
    )


def _require(recipe: Recipe) -> None:
    m = recipe.modalities.get("signal")
    if len(recipe.modalities) != 1 or m is None or (m.size, m.stack, m.reduction) != (STACK * SIGNALS, STACK, "stack"):
        raise ConfigError(
            f"data.kind `activity` has one modality, signal: give it a size of {STACK * SIGNALS}, "
            f"reduction `stack` and stack {STACK}"
        )
    if recipe.tick_ms != TICK_MS:
        raise ConfigError(f"data.kind `activity` has {STACK} samples a tick: set tick_ms to {TICK_MS:g}")
    for head in recipe.heads:
        if head.kind == "regression":
            if not head.horizons_s or head.size % SIGNALS or any(b <= a or a < 0 for a, b in head.horizons_s):
                raise ConfigError(
                    f"the head {head.name!r} needs horizons_s with one interval per number, and {SIGNALS} numbers, "
                    "one per signal, for each interval"
                )
        elif head.kind != "classification" or head.size != len(head.labels or LABELS):
            raise ConfigError(f"the head {head.name!r} does not fit the data; give it the labels {', '.join(LABELS)}")
        elif unknown := [n for n in head.labels if n not in LABELS]:
            raise ConfigError(f"there is no activity {unknown[0]!r}; use {', '.join(LABELS)}")


def make(recipe: Recipe, places: list[Path]) -> Task:
    """Official split by subject; some training subjects are used for validation."""
    options = convert(recipe.data.options, ActivityOptions)
    _require(recipe)
    place = find(places, "hapt")
    learnt, tested = hapt.official_split(hapt.load(place))
    held = set(options.validation_subjects)
    absent = held - {r.subject for r in learnt}
    if absent:
        raise UsageError(f"subject {min(absent)} for validation is not one of the training subjects; choose another")
    train = [sequence(r, recipe, False) for r in learnt if r.subject not in held]
    if not train or not tested:
        raise FileError(f"{place} has no recording left to {'test' if train else 'train'} on; give all of it")

    def epoch(rng: np.random.Generator) -> Iterator[Ticks]:
        found = [p for s in train for p in pieces(s, 10 * recipe.train.length, rng)]
        for i in rng.permutation(len(found)):
            piece = found[i]
            if options.noise:
                x = piece.features["signal"]
                noisy = x + np.float32(options.noise) * rng.standard_normal(x.shape, np.float32)
                piece = replace(piece, features={"signal": noisy})
            yield piece

    learners, testers = {s.groups["subject"] for s in train}, {r.subject for r in tested}
    scored = "the ends of its 2.56 s windows, half overlapping" if options.test == "windows" else "every labelled tick"
    return Task(
        epoch,
        [sequence(r, recipe, False) for r in learnt if r.subject in held],
        [sequence(r, recipe, options.test == "windows") for r in tested],
        about="UCI HAPT (Reyes-Ortiz, Oneto, Sama, Parra and Anguita 2016, UCI 341; no licence stated: research use): "
        "accelerometer (g) and gyroscope (rad/s) of a phone at the waist, 50 Hz, raw, two samples a tick; twelve "
        "activities, six of them transitions of posture; unlabelled samples do not count. Official split by "
        f"subject: {len(learners)} to train, {len(held)} of the training ones for validation, "
        f"{len(testers)} for the test, where the activity is scored at {scored}. Causal: a tick knows nothing "
        "of what comes after it, where the published windows are classified whole; and the network remembers more "
        "than a window.",
        epoch_ticks=sum(map(len, train)),
    )
