"""Block: N ticks of N sessions as columns, from the socket to the graph. BlockPredictions: their predictions.

Absent rows are left out of the feature matrices. Knows nothing about models, engines or messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.types import FEATURE_BOUND

Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
Features = npt.NDArray[Any]
"""float32 or float16."""


class Block(msgspec.Struct, frozen=True, gc=False, eq=False):
    """N ticks, each of another session; M modalities in the order of the model."""

    handles: Integers
    """[N] the numbers by which the receiver knows the sessions; no two are the same."""
    indices: Integers
    """[N] tick indices."""
    event_ns: Integers
    """[N] the ends of the ticks."""
    present: Flags
    """[N, M]"""
    age_ns: Integers
    """[N, M] the tick's end minus the time of the newest sample; -1 where there is none yet."""
    features: tuple[Features, ...]
    """By modality [P, size]: the vectors of the P ticks that have it, in the order of the ticks."""

    def __len__(self) -> int:
        return len(self.handles)

    def take(self, rows: Flags) -> Block:
        """The ticks where `rows` [N] is true."""
        return Block(
            self.handles[rows],
            self.indices[rows],
            self.event_ns[rows],
            self.present[rows],
            self.age_ns[rows],
            tuple(vectors[rows[here]] for vectors, here in zip(self.features, self.present.T, strict=True)),
        )

    def fits(self, sizes: Sequence[int]) -> str:
        """Why the columns do not belong to one block of a model with modalities of these sizes; "" where they do."""
        count, width = len(self.handles), len(sizes)
        columns = (self.indices, self.event_ns)
        if any(c.shape != (count,) for c in columns):
            return f"expected {count} indices and times, got {len(self.indices)} and {len(self.event_ns)}"
        if self.present.shape != (count, width) or self.age_ns.shape != (count, width):
            return f"expected `present` and `age_ns` of {count} ticks and {width} modalities"
        if len(self.features) != width:
            return f"expected the features of {width} modalities, got {len(self.features)}"
        for i, (vectors, size, rows) in enumerate(zip(self.features, sizes, self.present.sum(0), strict=True)):
            if vectors.shape != (rows, size):
                return f"expected {rows} vectors of {size} numbers of modality {i}, got {vectors.shape}"
        return ""

    def finite(self) -> Flags:
        """[N] whether all numbers of a tick are finite and below `FEATURE_BOUND`."""
        good = np.ones(len(self), np.bool_)
        for vectors, here in zip(self.features, self.present.T, strict=True):
            if not vectors.size or (np.absolute(vectors) < FEATURE_BOUND).all():  # NaN compares false
                continue
            good[np.flatnonzero(here)[~(np.absolute(vectors) < FEATURE_BOUND).all(axis=1)]] = False
        return good

    def first_of_each(self) -> Flags:
        """[N] whether a tick is the first one of its session in this block."""
        first = np.zeros(len(self), np.bool_)
        first[np.unique(self.handles, return_index=True)[1]] = True
        return first


class BlockPredictions(msgspec.Struct, frozen=True, gc=False, eq=False):
    """The heads' outputs for N ticks, in the order of their block."""

    handles: Integers
    indices: Integers
    event_ns: Integers
    heads: dict[str, npt.NDArray[np.float32]]
    """By head [N, size]."""
    model: str
    """sha256."""
    step_start_ns: int
    step_end_ns: int

    def __len__(self) -> int:
        return len(self.handles)
