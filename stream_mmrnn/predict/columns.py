"""Ticks as columns: per modality the vectors of N ticks as one matrix, the present masks, ages in seconds.

The one place that turns ticks into the arrays that a step graph reads.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.types import Tick

MAX_AGE_S = 10.0
"""Ages are clipped to this; a stream without any sample yet has this age too."""


def rounds(keys: Sequence[Hashable], most: int) -> Iterator[tuple[int, int]]:
    """Split a list of ticks into runs [start, end) in which each session (its key) occurs at most once.

    A recurrent step takes one tick per session at a time; `most` is the maximum length of a run.
    """
    start = 0
    while start < len(keys):
        end, seen = start, set[Hashable]()
        while end < len(keys) and end - start < most and keys[end] not in seen:
            seen.add(keys[end])
            end += 1
        yield start, end
        start = end


class Columns:
    """Fills the input arrays of a graph from ticks, for the modalities `names`, up to `most` ticks at once."""

    def __init__(self, names: Sequence[str], most: int) -> None:
        self.names = tuple(names)
        self._values: Callable[[Mapping[str, Any]], Sequence[Any]] = _in_order(self.names)
        self._age_s = np.zeros((most, len(self.names)), np.float64)

    def fill(
        self,
        ticks: Sequence[Tick],
        features: Sequence[npt.NDArray[Any]],
        present: npt.NDArray[Any] | None,
        age: npt.NDArray[Any] | None,
    ) -> None:
        """Write `ticks` into the first rows: `features` one [N, size] array per modality, in the order of `names`;
        `present` and `age` [N, M], None where the graph has no such input. Ages are clipped seconds.
        """
        count = len(ticks)
        for name, into in zip(self.names, features, strict=True):
            np.concatenate([tick.features[name] for tick in ticks], out=into[:count].reshape(-1))
        if present is not None:
            present[:count] = [self._values(tick.present) for tick in ticks]
        if age is not None:
            ages = self._age_s[:count]
            ages[...] = [self._values(tick.age_ns) for tick in ticks]
            np.divide(ages, 1e9, out=ages)
            ages[ages < 0] = MAX_AGE_S
            np.minimum(ages, MAX_AGE_S, out=age[:count], casting="same_kind")

    def fill_one(
        self,
        tick: Tick,
        features: Sequence[tuple[str, npt.NDArray[Any]]],
        present: npt.NDArray[Any] | None,
        age: npt.NDArray[Any] | None,
    ) -> None:
        """Write one tick into the given row: the fast path of a live session, without arrays of length 1."""
        for name, into in features:
            into[...] = tick.features[name]
        for i, name in enumerate(self.names):
            if present is not None:
                present[i] = tick.present[name]
            if age is not None:  # inline: a call for each modality made a step 0.7 us slower
                age_s = tick.age_ns[name] / 1e9
                age[i] = age_s if 0 <= age_s < MAX_AGE_S else MAX_AGE_S


def _in_order(names: Sequence[str]) -> Callable[[Mapping[str, Any]], Sequence[Any]]:
    """A function that returns the values of these keys as a sequence."""
    of = itemgetter(*names)
    return of if len(names) > 1 else lambda table: (of(table),)
