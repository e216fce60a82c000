"""GroupColumns: what a program gives for a group, checked, as a block. Knows nothing about messages and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.block import Block, Integers
from stream_mmrnn.core.errors import BadTick, SessionError
from stream_mmrnn.core.types import MAX_TICK


class GroupColumns:
    def __init__(self, names: Sequence[str], sizes: Sequence[int]) -> None:
        """Names and sizes of the model's modalities."""
        self.names, self.sizes = tuple(names), tuple(sizes)

    def block(
        self,
        rows: npt.ArrayLike | None,
        features: Mapping[str, Any],
        ticks: npt.ArrayLike | None,
        event_ns: npt.ArrayLike | None,
        present: Mapping[str, npt.ArrayLike] | None,
        age_ns: npt.ArrayLike | None,
        next_ticks: Integers,
        errors: Mapping[int, SessionError],
    ) -> Block:
        """The columns, with rows of the group as handles; what is None is as `Group.send` says. `next_ticks` [N] and
        `errors` are of the group's sessions. Raises BadTick, or the error of a session that is over.
        """
        sessions = len(next_ticks)
        if unknown := (set(features) | set(present or ())) - set(self.names):
            known = ", ".join(self.names)
            raise BadTick(f"the model of this group has no {sorted(unknown)[0]!r}; it takes {known}")
        if rows is None:
            at = np.array([i for i in range(sessions) if i not in errors], np.int64)
        else:
            at = np.array(rows, np.int64)
            if at.ndim != 1 or (len(at) and not 0 <= at.min() <= at.max() < sessions):
                raise BadTick(f"expected rows from 0 to {sessions - 1}, the sessions of this group")
            if len(np.unique(at)) != len(at):
                raise BadTick("a block has one tick of each session; send the second one in another block")
            for row in at.tolist() if errors else ():
                if row in errors:
                    raise errors[row]
        if not len(at):
            raise next(iter(errors.values()), BadTick("a block has at least one row"))
        count, width = len(at), len(self.names)
        masks = np.zeros((count, width), np.bool_)
        vectors = []
        for i, (name, size) in enumerate(zip(self.names, self.sizes, strict=True)):
            value = features.get(name)
            if value is not None:
                masks[:, i] = True if present is None or name not in present else np.asarray(present[name], np.bool_)
            some = int(np.count_nonzero(masks[:, i]))
            matrix = np.zeros((0, size), np.float32) if value is None else np.asarray(value)
            if matrix.dtype not in (np.float16, np.float32):
                matrix = matrix.astype(np.float32)
            if matrix.shape != (some, size):
                raise BadTick(f"expected {some} vectors of {size} numbers as {name}, got {list(matrix.shape)}")
            vectors.append(matrix)
        return Block(
            at,
            next_ticks[at] if ticks is None else _column(ticks, count, "ticks"),
            np.zeros(count, np.int64) if event_ns is None else _column(event_ns, count, "event_ns"),
            masks,
            masks.astype(np.int64) - 1
            if age_ns is None
            else np.ascontiguousarray(np.broadcast_to(np.asarray(age_ns, np.int64), (count, width))),
            tuple(vectors),
        )


def _column(values: npt.ArrayLike, count: int, what: str) -> Integers:
    found = np.ascontiguousarray(np.broadcast_to(np.asarray(values, np.int64), (count,)))
    if what == "ticks" and count and not 0 <= found.min() <= found.max() <= MAX_TICK:
        raise BadTick("expected indices of ticks from 0 to 2^53 - 1")
    return found
