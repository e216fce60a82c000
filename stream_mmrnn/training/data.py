"""Sequences of ticks with targets, and lanes that make batches of them. Numpy only, no torch.

A `Task` gives sequences for training (new ones for each epoch, so noise can be redrawn), validation and test. A lane
reads one sequence after another; a batch is the next chunk of all lanes, with `reset` where a sequence begins. State is
carried from chunk to chunk, so a sequence may be longer than the back-propagation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

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
    """By modality, [T, size]; zeros where absent. A modality that is never present may be missing."""
    present: FloatArray
    """[T, M] of 0 and 1, in the recipe's order of modalities."""
    age_s: FloatArray
    """[T, M] seconds, as the engine gives them to the model: clipped at `MAX_AGE_S`, which also means "never"."""
    targets: dict[str, Array]
    """By head, [T] or [T, size]; the meaning depends on the head's kind (see `heads.loss`). `HEAD.NAME`: what the
    simple rule NAME forecasts for this head, scored beside the model."""
    weights: dict[str, FloatArray]
    """By head, [T]: the weight of a tick in the loss; 0 where there is no target."""
    name: str = ""
    groups: dict[str, str] = field(default_factory=dict)
    """Attributes by which a report may be split, such as the speaker."""
    warm_up: int = 0
    """Ticks at the beginning that come before the held-out part: they are not scored."""

    def __len__(self) -> int:
        return len(self.present)


def baselines_of(targets: Mapping[str, Array], head: str) -> dict[str, Array]:
    """What simple rules forecast for a head, by the rule's name."""
    return {key.removeprefix(f"{head}."): x for key, x in targets.items() if key.startswith(f"{head}.")}


class LazySequence(Sequence[Ticks]):
    """A lazy sequence: items are made on access, because all of them do not fit in memory."""

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
        return (
            LazySequence(len(chosen), lambda i: self._make(chosen[i]))
            if isinstance(chosen, range)
            else self._make(chosen)
        )


@dataclass(frozen=True)
class Task:
    """The data of a recipe."""

    train: Callable[[np.random.Generator], Iterable[Ticks]]
    """The sequences of one epoch, in training order."""
    validation: Sequence[Ticks]
    test: Sequence[Ticks]
    origins: dict[str, str] = field(default_factory=dict)
    """The encoder of each modality, `name@sha256`, if its features were encoded."""
    about: str = ""
    """One paragraph for the model card: the data, its licence and source, the split."""
    epoch_ticks: int = 0
    """Approximate ticks per epoch, for the schedule and the progress of the first epoch; 0 if unknown."""
    common_tokens: tuple[int, ...] = ()
    """The ids (as features, so id + 1) of the training data's tokens, the most common first."""
    late: Callable[[], tuple[Sequence[Ticks], Sequence[Ticks]]] | None = None
    """Reads what the late fusion of the recipe is fitted on, and what stops the fit in time; None: it says nothing."""
    sets: tuple[tuple[str, ...], ...] = ()
    """Sets of modalities that a report evaluates; empty means all non-empty sets."""
    warnings: tuple[str, ...] = ()
    """Sentences about data that are too few to trust."""


@dataclass(frozen=True)
class Batch:
    """The next chunk of all lanes: arrays [B, L, ...]; `features` only of modalities that some lane has."""

    features: dict[str, FloatArray]
    present: FloatArray
    age_s: FloatArray
    reset: npt.NDArray[np.bool_]
    place: npt.NDArray[np.int32]
    """Index of each tick in its sequence, from 0."""
    targets: dict[str, Array]
    weights: dict[str, FloatArray]

    @classmethod
    def zeros(cls, recipe: Recipe, batch: int, length: int) -> Batch:
        """A batch without features and targets; `fill` adds their arrays."""
        count = len(recipe.modalities)
        return cls(
            features={},
            present=np.zeros((batch, length, count), np.float32),
            age_s=np.zeros((batch, length, count), np.float32),
            reset=np.zeros((batch, length), np.bool_),
            place=np.zeros((batch, length), np.int32),
            targets={},
            weights={h.name: np.zeros((batch, length), np.float32) for h in recipe.heads},
        )

    def fill(self, row: int, at: int, ticks: Ticks, begin: int, end: int) -> None:
        """Copy ticks `begin` to `end` of a sequence into a row, from column `at` on."""
        here, there = slice(at, at + end - begin), slice(begin, end)
        for name, vectors in ticks.features.items():
            self._array(self.features, name, vectors.shape[1:], np.dtype(np.float32))[row, here] = vectors[there]
        for name, target in ticks.targets.items():
            self._array(self.targets, name, target.shape[1:], target.dtype)[row, here] = target[there]
        for name, weights in self.weights.items():
            weights[row, here] = ticks.weights[name][there]
        self.present[row, here] = ticks.present[there]
        self.age_s[row, here] = ticks.age_s[there]
        self.reset[row, at] |= begin == 0
        self.place[row, here] = np.arange(begin, end)

    def _array(self, arrays: dict[str, Any], name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        if name not in arrays:
            arrays[name] = np.zeros((*self.reset.shape, *shape), dtype)
        found: Array = arrays[name]
        return found


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
    """Check that a sequence fits the recipe; raises FileError."""
    count = len(ticks)
    for name, m in recipe.modalities.items():
        if name not in ticks.features:
            if ticks.present[:, list(recipe.modalities).index(name)].any():
                raise FileError(f"{ticks.name}: {name} is marked present but has no features")
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
    """Chunks of `length` ticks of `batch` lanes, until all sequences are read; padding has weight 0."""
    waiting = ((ticks, 0) for ticks in sequences)
    lanes: list[tuple[Ticks, int] | None] = [None] * batch
    while True:
        chunk, empty = Batch.zeros(recipe, batch, length), True
        for row in range(batch):
            at = 0
            while at < length:
                lane = lanes[row] or next(waiting, None)
                if lane is None:
                    chunk.reset[row, at] = True
                    break
                ticks, begin = lane
                end = min(begin + length - at, len(ticks))
                chunk.fill(row, at, ticks, begin, end)
                at += end - begin
                lanes[row] = (ticks, end) if end < len(ticks) else None
                empty = False
        if empty:
            return
        yield chunk
