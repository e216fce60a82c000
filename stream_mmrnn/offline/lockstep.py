"""Lock step: several recordings replayed together, the k-th ticks of all sessions as one block.

Messages stay columns from the file to the graph: no object is made for a message or a tick. Knows nothing about how a
recording is read or aligned, and not how predictions are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.block import Block, BlockPredictions
from stream_mmrnn.predict.protocols import Engine
from stream_mmrnn.predict.tick_columns import TickColumns, joined

_AHEAD = 64
"""So many ticks of each session are there before the next are made into blocks: recordings are read in pieces of other
lengths, and each piece that ends would cut those of the others."""


class _Track:
    """The ticks of one recording, as they come."""

    def __init__(self, name: str, parts: Iterable[TickColumns], engine: Engine) -> None:
        self.name, self._parts, self._engine = name, iter(parts), engine
        self._held: TickColumns | None = None
        """A part that begins with a new state, after the ticks that are ready."""
        self.ready: TickColumns | None = None
        """Ticks that were not stepped yet; None without any."""

    def refill(self) -> bool:
        """Have ticks ready; False at the end, when the session was closed."""
        while self._held is None and (self.ready is None or len(self.ready) < _AHEAD):
            part = next(self._parts, None)
            if part is None:
                break
            if part.fresh and self.ready is not None:
                self._held = part
            else:
                self._add(part)
        if self.ready is None and self._held is not None:
            self._add(self._held)
            self._held = None
        if self.ready is None:
            self._engine.close(self.name)
        return self.ready is not None

    def _add(self, part: TickColumns) -> None:
        if part.fresh:
            self._engine.reset(self.name)
        self.ready = part if self.ready is None else joined([self.ready, part])

    def pop(self, count: int) -> TickColumns:
        """The next `count` ticks, at most those that are ready."""
        assert self.ready is not None
        head, rest = self.ready.split(count)
        self.ready = rest if len(rest) else None
        return head


class Step(NamedTuple):
    """One block, and what came of it."""

    names: list[str]
    """Of its sessions, in the order of the block."""
    block: Block
    predictions: BlockPredictions


def lockstep(tracks: Mapping[str, Iterable[TickColumns]], engine: Engine) -> Iterator[Step]:
    """Step the ticks of all tracks together, by name; each becomes a session of that name while it lasts.

    Raises:
        Busy: the engine has fewer free slots than there are tracks.

    """
    running = []
    for name, parts in tracks.items():
        engine.open(name)
        running.append(_Track(name, parts, engine))
    while running := [track for track in running if track.refill()]:
        ready = [track.ready for track in running if track.ready is not None]
        count = min(map(len, ready))
        names = [track.name for track in running]
        handles = np.array([engine.handle(name) for name in names], np.int64)
        for block in interleaved([track.pop(count) for track in running], handles):
            yield Step(names, block, engine.step_block(block))


def interleaved(parts: Sequence[TickColumns], handles: npt.NDArray[np.int64]) -> Iterator[Block]:
    """Blocks of the k-th ticks of S sessions with N ticks each; all share the memory of the interleaved columns."""
    indices, event_ns, present, age_ns = (
        np.stack([getattr(part, name) for part in parts], axis=1)
        for name in ("indices", "event_ns", "present", "age_ns")
    )
    features, begins = [], []
    for i in range(present.shape[2]):
        here = present[:, :, i]
        row = (np.cumsum(here) - 1).reshape(here.shape)
        vectors = np.empty((int(here.sum()), parts[0].features[i].shape[1]), np.float32)
        for s, part in enumerate(parts):
            vectors[row[here[:, s], s]] = part.features[i]
        features.append(vectors)
        begins.append([0, *(row[:, -1] + 1).tolist()])
    for k in range(len(indices)):
        yield Block(
            handles,
            indices[k],
            event_ns[k],
            present[k],
            age_ns[k],
            tuple(vectors[begin[k] : begin[k + 1]] for vectors, begin in zip(features, begins, strict=True)),
        )
