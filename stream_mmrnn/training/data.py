"""Sequences of ticks with targets, and the lanes that make batches of them.

A `Task` gives sequences for training (anew for every epoch, so that noise can be fresh), validation and test. A lane
reads one sequence after another; a batch is the next stretch of all lanes side by side, with `reset` where a sequence
begins. State is carried from stretch to stretch, so a sequence may be longer than what is back-propagated through.
Knows nothing about torch or about what the targets mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.errors import FileError
from stream_mmrnn.core.types import FloatArray
from stream_mmrnn.training.recipe import Recipe

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Ticks:
    """One sequence of T ticks of M modalities."""

    features: dict[str, FloatArray]
    """By modality, [T, size]; zeros where absent. A modality that never was may be left out."""
    present: FloatArray
    """[T, M] of 0 and 1, in the recipe's order of modalities."""
    age_s: FloatArray
    """[T, M] seconds, as the engine gives them to the model: clipped at `columns.MAX_AGE_S`, which is also "never"."""
    targets: dict[str, Array]
    """By head, [T] or [T, size]; what they are depends on the head's kind (see `heads.loss`)."""
    weights: dict[str, FloatArray]
    """By head, [T]: how much a tick counts, 0 where there is nothing to learn."""
    name: str = ""
    groups: dict[str, str] = field(default_factory=dict)
    """What a report may be split by, such as the speaker."""

    def __len__(self) -> int:
        return len(self.present)


class Made(Sequence[Ticks]):
    """Sequences that are made when they are asked for: more of them than memory holds."""

    def __init__(self, count: int, make: Callable[[int], Ticks]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, at: int) -> Ticks: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Ticks]: ...
    def __getitem__(self, at: int | slice) -> Ticks | Sequence[Ticks]:
        chosen = range(self._count)[at]
        return Made(len(chosen), lambda i: self._make(chosen[i])) if isinstance(chosen, range) else self._make(chosen)


@dataclass(frozen=True)
class Task:
    """What a recipe learns from."""

    train: Callable[[np.random.Generator], Iterable[Ticks]]
    """The sequences of one epoch, in the order in which they are to be seen."""
    validation: Sequence[Ticks]
    test: Sequence[Ticks]
    origins: dict[str, str] = field(default_factory=dict)
    """The encoder of each modality, `name@sha256`, where the features came from one."""
    about: str = ""
    """One paragraph for the model card: what the data is, its licence and source, how it was split."""
    epoch_ticks: int = 0
    """About how many an epoch has, for the schedule and the time left of the first one; 0 where nobody knows."""
    sets: tuple[tuple[str, ...], ...] = ()
    """The sets of modalities that a report tells apart; none named is every set of those that there are."""


@dataclass(frozen=True)
class Batch:
    """The next stretch of all lanes: arrays [B, L, ...]; `features` only of what some lane has."""

    features: dict[str, FloatArray]
    present: FloatArray
    age_s: FloatArray
    reset: npt.NDArray[np.bool_]
    place: npt.NDArray[np.int32]
    """Which tick of its sequence each one is, from 0."""
    targets: dict[str, Array]
    weights: dict[str, FloatArray]


def cut(s: Ticks, a: int, b: int) -> Ticks:
    """Ticks a to b of a sequence."""
    return Ticks(
        {k: v[a:b] for k, v in s.features.items()},
        s.present[a:b],
        s.age_s[a:b],
        {k: v[a:b] for k, v in s.targets.items()},
        {k: v[a:b] for k, v in s.weights.items()},
        s.name,
        s.groups,
    )


def check(ticks: Ticks, recipe: Recipe) -> None:
    """Say what of a sequence does not fit the recipe; raises FileError."""
    count = len(ticks)
    for name, m in recipe.modalities.items():
        if name not in ticks.features:
            if ticks.present[:, list(recipe.modalities).index(name)].any():
                raise FileError(f"{ticks.name}: {name} is said to be present, and has no features")
            continue
        got = ticks.features[name].shape
        if got != (count, m.size):
            raise FileError(f"{ticks.name}: {name} has shape {got}, the recipe says {m.size} numbers for {count} ticks")
        if not np.isfinite(ticks.features[name]).all():
            raise FileError(f"{ticks.name}: {name} holds numbers that are not finite")
    for head in recipe.heads:
        if head.name not in ticks.targets or len(ticks.targets[head.name]) != count:
            raise FileError(f"{ticks.name} has no target for each of its {count} ticks for the head {head.name!r}")


def batches(sequences: Iterable[Ticks], recipe: Recipe, batch: int, length: int) -> Iterator[Batch]:
    """Stretches of `length` ticks of `batch` lanes, until every sequence was read; what is left over weighs nothing."""
    waiting = iter(sequences)
    lanes: list[tuple[Ticks, int] | None] = [None] * batch
    count = len(recipe.modalities)
    shapes: dict[str, tuple[tuple[int, ...], np.dtype[np.generic]]] = {}
    while True:
        features: dict[str, FloatArray] = {}
        present = np.zeros((batch, length, count), np.float32)
        age_s = np.zeros((batch, length, count), np.float32)
        reset = np.zeros((batch, length), np.bool_)
        place = np.zeros((batch, length), np.int32)
        weights = {h.name: np.zeros((batch, length), np.float32) for h in recipe.heads}
        targets: dict[str, Array] = {}
        empty = True
        for row in range(batch):
            at = 0
            while at < length:
                lane = lanes[row]
                if lane is None:
                    fresh = next(waiting, None)
                    if fresh is None:
                        reset[row, at] = True
                        break
                    if not shapes:
                        shapes = {h: (t.shape[1:], t.dtype) for h, t in fresh.targets.items()}
                    lane = lanes[row] = (fresh, 0)
                if not targets:
                    targets = {h: np.zeros((batch, length, *s), d) for h, (s, d) in shapes.items()}
                ticks, begin = lane
                n = min(length - at, len(ticks) - begin)
                here, there = slice(at, at + n), slice(begin, begin + n)
                for m, vectors in ticks.features.items():
                    if m not in features:
                        features[m] = np.zeros((batch, length, vectors.shape[1]), np.float32)
                    features[m][row, here] = vectors[there]
                present[row, here] = ticks.present[there]
                age_s[row, here] = ticks.age_s[there]
                for head, target in targets.items():
                    target[row, here] = ticks.targets[head][there]
                    weights[head][row, here] = ticks.weights[head][there]
                reset[row, at] = reset[row, at] or begin == 0
                place[row, here] = np.arange(begin, begin + n)
                at += n
                lanes[row] = (ticks, begin + n) if begin + n < len(ticks) else None
                empty = False
        if empty:
            return
        yield Batch(features, present, age_s, reset, place, targets, weights)
