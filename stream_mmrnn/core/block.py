"""Block: N ticks of N sessions as columns, from the socket to the graph. BlockPredictions: their predictions.

StateBlock: the recurrent states of N sessions. Absent rows are left out of the feature matrices. Knows nothing about
models, engines or messages.
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

_HALF_EXPONENT = np.uint16(0x7C00)
"""The exponent bits of a float16: all of them are set where it is infinite or no number."""
LARGEST = float(np.float32(FEATURE_BOUND))
"""The bound as float32, in which it is a little smaller: numbers of vectors are compared with this."""
_FLOATS = (np.dtype(np.float32), np.dtype(np.float16))


def _within_bound(vectors: Features) -> Flags:
    """By number: finite and below `FEATURE_BOUND`, which no float16 reaches."""
    if vectors.dtype == np.float16:
        within: Flags = (vectors.view(np.uint16) & _HALF_EXPONENT) != _HALF_EXPONENT  # isfinite takes 9 times as long
        return within
    with np.errstate(invalid="ignore"):  # a NaN compares false
        return np.absolute(vectors) < FEATURE_BOUND


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
        count, width = self.handles.size, len(sizes)
        for name, column, shape in (
            ("handles", self.handles, (count,)),
            ("indices", self.indices, (count,)),
            ("event_ns", self.event_ns, (count,)),
            ("age_ns", self.age_ns, (count, width)),
        ):
            if column.shape != shape or column.dtype != np.int64:
                return f"expected `{name}` as int64 of shape {shape}, got {column.dtype} of {column.shape}"
        if self.present.shape != (count, width) or self.present.dtype != np.bool_:
            shape, kind = self.present.shape, self.present.dtype
            return f"expected `present` as bool of shape {(count, width)}, got {kind} of {shape}"
        if len(self.features) != width:
            return f"expected the features of {width} modalities, got {len(self.features)}"
        counts = self.present.sum(0).tolist()
        for i, (vectors, size, rows) in enumerate(zip(self.features, sizes, counts, strict=True)):
            if vectors.shape != (rows, size) or vectors.dtype not in _FLOATS:
                return (
                    f"expected {rows} vectors of {size} numbers of modality {i} as float32 or float16, got "
                    f"{vectors.dtype} of {vectors.shape}"
                )
        return ""

    def finite(self) -> Flags:
        """[N] whether all numbers of a tick are finite and below `FEATURE_BOUND`."""
        good = np.ones(len(self), np.bool_)
        for i, vectors in enumerate(self.features):
            # of a matrix with a NaN the maximum is NaN, which compares false
            whole = vectors.dtype != np.float16 and vectors.size and float(np.absolute(vectors).max()) < LARGEST
            if vectors.size and not whole and not (within := _within_bound(vectors).all(axis=1)).all():
                good[np.flatnonzero(self.present[:, i])[~within]] = False
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

    def take(self, rows: Flags) -> BlockPredictions:
        """The predictions where `rows` [N] is true."""
        return msgspec.structs.replace(
            self,
            handles=self.handles[rows],
            indices=self.indices[rows],
            event_ns=self.event_ns[rows],
            heads={name: values[rows] for name, values in self.heads.items()},
        )


class StateBlock(msgspec.Struct, frozen=True, gc=False, eq=False):
    """The recurrent states of N sessions."""

    fresh: Flags
    """[N] sessions before their first step: they have no state, and their rows hold zeros."""
    states: dict[str, npt.NDArray[Any]]
    """By state [N, *shape], in the model's own types."""

    def __len__(self) -> int:
        return len(self.fresh)

    def row(self, i: int) -> dict[str, npt.NDArray[Any]]:
        """One session's snapshot, as views: empty before its first step."""
        return {} if self.fresh[i] else {name: rows[i, ...] for name, rows in self.states.items()}
