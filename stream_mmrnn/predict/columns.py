"""Ticks as columns: per modality the vectors of N ticks as one matrix, the present masks, ages in seconds.

The one place that turns ticks and blocks of ticks into the arrays that a step graph reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.block import Block, Integers
from stream_mmrnn.core.types import ModalitySpec, Tick

MAX_AGE_S = 10.0
"""Ages are clipped to this; a stream without any sample yet has this age too."""

Row: TypeAlias = tuple[Sequence[tuple[str, npt.NDArray[Any]]], npt.NDArray[Any] | None, npt.NDArray[Any] | None]
"""Views of one row of a graph's inputs: features by modality, present, age; None where it has no such input."""


def rounds(keys: Sequence[Hashable], most: int) -> Iterator[Sequence[int]]:
    """Split a list of ticks into rounds in which each session (its key) occurs at most once: positions in `keys`.

    A recurrent step takes one tick per session at a time, so the k-th ticks of all sessions are round k; `most` is the
    maximum length of a round.
    """
    if len(set(keys)) == len(keys):
        yield from (range(at, min(at + most, len(keys))) for at in range(0, len(keys), most))
        return
    seen: dict[Hashable, int] = {}
    places: list[list[int]] = []
    for i, key in enumerate(keys):
        k = seen.get(key, 0)
        seen[key] = k + 1
        if k == len(places):
            places.append([])
        places[k].append(i)
    for mine in places:
        yield from (mine[at : at + most] for at in range(0, len(mine), most))


def seconds(age_ns: Integers, out: npt.NDArray[np.float64] | None = None) -> npt.NDArray[np.float64]:
    """Ages as a graph reads them; `out` is filled and returned if it is given."""
    age_s: npt.NDArray[np.float64] = np.divide(age_ns, 1e9, out=out)
    age_s[age_s < 0] = MAX_AGE_S
    return np.minimum(age_s, MAX_AGE_S, out=age_s)


class Columns:
    """Fills the input arrays of a graph with these modalities, up to `most` rows at once."""

    def __init__(
        self, modalities: Sequence[ModalitySpec], most: int, vectors: list[npt.NDArray[Any]] | None = None
    ) -> None:
        """`vectors`: matrices [N, size] by modality, into which `block` writes its features; else it has its own."""
        self.names = tuple(m.name for m in modalities)
        self.sizes = tuple(m.size for m in modalities)
        self._values: Callable[[Mapping[str, Any]], Sequence[Any]] = _in_order(self.names)
        self._age_s = np.zeros((most, len(self.names)), np.float64)
        # of the newest `block`: memory that is new each time costs more than the copy
        self._vectors = [np.empty((0, size), np.float32) for size in self.sizes] if vectors is None else vectors

    def block(self, ticks: Sequence[Tick], handles: Sequence[int]) -> Block:
        """One tick of each of N sessions as a block; `handles` are theirs. Its features hold until the next call."""
        shape = count, _ = len(ticks), len(self.names)
        cells = math.prod(shape)
        flags = chain.from_iterable([self._values(tick.present) for tick in ticks])
        present = np.fromiter(flags, np.bool_, cells).reshape(shape)
        ages_ns = chain.from_iterable([self._values(tick.age_ns) for tick in ticks])
        features = []
        for i, (name, there) in enumerate(zip(self.names, present.sum(0).tolist(), strict=True)):
            if there == count:
                vectors = [tick.features[name] for tick in ticks]
            else:
                vectors = [tick.features[name] for tick in ticks if tick.present[name]]
            if len(vectors) > len(self._vectors[i]):
                self._vectors[i] = np.empty((count, self.sizes[i]), np.float32)
            matrix = self._vectors[i][: len(vectors)]
            if vectors:
                np.concatenate(vectors, out=matrix.reshape(-1))
            features.append(matrix)
        return Block(
            np.array(handles, np.int64),
            np.array([tick.index for tick in ticks], np.int64),
            np.array([tick.event_ns for tick in ticks], np.int64),
            present,
            np.fromiter(ages_ns, np.int64, cells).reshape(shape),
            tuple(features),
        )

    def fill(
        self,
        block: Block,
        rows: slice,
        taken: list[int],
        features: Sequence[npt.NDArray[Any]],
        present: npt.NDArray[Any] | None,
        age: npt.NDArray[Any] | None,
    ) -> None:
        """Write the ticks `rows` of a block into the first rows of a graph's inputs: `features` one [N, size] array per
        modality, zeros where absent; `present` and `age` [N, M], None where the graph has no such input. Ages are
        clipped seconds.

        `taken` counts by modality the vectors of the block that earlier calls have written; it is moved on.
        """
        here = block.present[rows]
        count = len(here)
        for i, (vectors, into, there) in enumerate(zip(block.features, features, here.sum(0).tolist(), strict=True)):
            begin = taken[i]
            end = taken[i] = begin + there
            if there == count:
                into[:count] = vectors[begin:end]
                continue
            into[:count] = 0
            if there:
                into[:count][here[:, i]] = vectors[begin:end]
        if present is not None:
            present[:count] = here
        if age is not None:
            age[:count] = seconds(block.age_ns[rows], self._age_s[:count])

    def fill_only(self, block: Block, row: Row) -> None:
        """Write a block of one tick into the given row, without arrays of length 1."""
        features, present, age = row
        for (_, into), vectors, here in zip(features, block.features, block.present[0].tolist(), strict=True):
            into[...] = vectors[0] if here else 0
        if present is not None:
            present[...] = block.present[0]
        if age is not None:
            ages_s = [age_ns / 1e9 for age_ns in block.age_ns[0].tolist()]
            age[...] = [age_s if 0 <= age_s < MAX_AGE_S else MAX_AGE_S for age_s in ages_s]

    def fill_one(
        self,
        tick: Tick,
        features: Sequence[tuple[str, npt.NDArray[Any]]],
        present: npt.NDArray[Any] | None,
        age: npt.NDArray[Any] | None,
    ) -> None:
        """Write one tick into the given row: the fast path of a live session, without arrays of length 1."""
        here = tick.present
        for name, into in features:
            into[...] = tick.features[name] if here[name] else 0
        for i, name in enumerate(self.names):
            if present is not None:
                present[i] = here[name]
            if age is not None:  # inline: a call for each modality made a step 0.7 us slower
                age_s = tick.age_ns[name] / 1e9
                age[i] = age_s if 0 <= age_s < MAX_AGE_S else MAX_AGE_S


def _in_order(names: Sequence[str]) -> Callable[[Mapping[str, Any]], Sequence[Any]]:
    """A function that returns the values of these keys as a sequence."""
    of = itemgetter(*names)
    return of if len(names) > 1 else lambda table: (of(table),)
