"""Stepped: answers as columns, from which single ones are taken while they are kept. Knows nothing about sessions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stream_mmrnn.core.block import Integers
from stream_mmrnn.serve.cluster.frames import PredColumns
from stream_mmrnn.serve.cluster.pieces import KeptRow

_I8 = np.dtype("<i8")


class Stepped:
    """Answers of one step to ticks of one client, as columns, from which single ones are taken while they are kept."""

    __slots__ = ("age_ns", "event_ns", "heads", "present", "step_ns", "waited_ns")

    def __init__(
        self,
        event_ns: Integers,
        present: np.ndarray,
        age_ns: Integers,
        heads: list[np.ndarray],
        waited_ns: int = 0,
        step_ns: int = 0,
    ) -> None:
        self.event_ns, self.present, self.age_ns, self.heads = event_ns, present, age_ns, heads
        self.waited_ns, self.step_ns = waited_ns, step_ns

    def columns(self, sessions: list[str], indices: Integers, begin: int, end: int) -> PredColumns:
        """Of the rows from `begin` to `end`; `sessions` and `indices` are of all rows."""
        return PredColumns(
            sessions[begin:end],
            indices[begin:end].astype(_I8, copy=False).tobytes(),
            self.event_ns[begin:end].astype(_I8, copy=False).tobytes(),
            self.present[begin:end].astype(np.uint8, copy=False).tobytes(),
            self.age_ns[begin:end].astype(_I8, copy=False).tobytes(),
            tuple(values[begin:end].astype("<f4", copy=False).tobytes() for values in self.heads),
            self.waited_ns,
            self.step_ns,
        )

    def row(self, index: int, i: int) -> KeptRow:
        return KeptRow(
            index,
            int(self.event_ns[i]),
            self.present[i].astype(np.uint8).tobytes(),
            self.age_ns[i].astype(_I8).tobytes(),
            tuple(values[i].astype("<f4").tobytes() for values in self.heads),
        )

    @staticmethod
    def of_kept(kept: KeptRow) -> Stepped:
        return Stepped(
            np.array([kept.event_ns], np.int64),
            np.frombuffer(kept.present, np.uint8)[None],
            np.frombuffer(kept.age_ns, _I8)[None],
            [np.frombuffer(head, "<f4")[None] for head in kept.heads],
        )

    @staticmethod
    def of_rows(sessions: list[str], rows: Sequence[tuple[int, tuple[Stepped, int]]]) -> PredColumns:
        """Kept answers: by index, each with its row."""
        found = [of.row(index, i) for index, (of, i) in rows]
        return PredColumns(
            sessions,
            np.array([row.index for row in found], _I8).tobytes(),
            np.array([row.event_ns for row in found], _I8).tobytes(),
            b"".join([row.present for row in found]),
            b"".join([row.age_ns for row in found]),
            tuple(b"".join(heads) for heads in zip(*(row.heads for row in found), strict=True)),
            0,
            0,
        )
