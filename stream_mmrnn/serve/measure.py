"""Measures the steps of an engine with dummy sessions: before it has clients, and before one of them is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from stream_mmrnn.core.block import Block
from stream_mmrnn.core.errors import SessionError
from stream_mmrnn.serve.admission import LEAST, Admission, Cost, fit

if TYPE_CHECKING:
    from stream_mmrnn.predict.protocols import Engine

_ROUNDS, _LIMIT_NS = 16, 500_000_000
"""Rounds over all counts for one result; it stops earlier after so long."""
_TIMES, _ALL_NS = 8, 2_000_000_000
"""It is measured so often at most, and so long, until two results agree."""
_AGREE = 1.25
"""Two results that differ by no more than this factor agree."""
_AGAIN_ROUNDS, _AGAIN_SHARE = 3, 0.25
"""The same while sessions are open: the share is of the bound of latencies."""
_COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Ticks in a step."""


def measure(engine: Engine, admission: Admission, now_ns: int) -> None:
    """Step dummy sessions in batches of several sizes until two results agree, and settle the cost of steps.

    What runs beside it only makes steps slower: of results that never agree, the fastest counts. Leaves all slots free.
    """
    with _dummies(engine) as block:
        _steps(engine, block, 1, 0)  # the first steps also allocate memory
        found: list[Cost] = []
        spent_ns = 0
        while len(found) < _TIMES and spent_ns <= _ALL_NS:
            counts, took_ns = _steps(engine, block, _ROUNDS, _LIMIT_NS)
            spent_ns += int(took_ns.sum())
            found.append(fit(counts, took_ns))
            if len(found) > 1 and _agree(found[-2], found[-1], len(block)):
                break
        best = found[-2:] if len(found) > 1 and _agree(found[-2], found[-1], len(block)) else found
        admission.settle(min(best, key=lambda cost: cost.p99_ns(len(block))), now_ns)


def _agree(one: Cost, other: Cost, most: int) -> bool:
    """Whether two results say about the same of a large step."""
    low, high = sorted(cost.call_ns + most * cost.tick_ns for cost in (one, other))
    return high <= _AGREE * low


def measure_again(engine: Engine, admission: Admission, now_ns: int) -> None:
    """Settle the cost anew in the slots that are free, in little time, as sessions wait meanwhile."""
    with _dummies(engine) as block:
        if not len(block):
            return
        counts, took_ns = _steps(engine, block, _AGAIN_ROUNDS, round(_AGAIN_SHARE * admission.bound_ns), least=1)
        before = admission.settled
        most = float(counts.max())
        if before is None or (most >= max(_COUNTS) / 2 and len(counts) >= LEAST):
            admission.settle(fit(counts, took_ns), now_ns)
            return
        # small steps do not say what a tick costs: the shape stays, and the speed is new
        scale = float(np.median(took_ns / np.maximum(before.call_ns + counts * before.tick_ns, 1.0)))
        late_ns = took_ns - scale * (before.call_ns + counts * before.tick_ns)
        cost = Cost(scale * before.call_ns, scale * before.tick_ns, max(float(np.quantile(late_ns, 0.99)), 0.0))
        admission.settle(cost, now_ns)


def _steps(
    engine: Engine, block: Block, rounds: int, limit_ns: int, least: int = LEAST
) -> tuple[np.ndarray, np.ndarray]:
    """Sizes of steps, and how long each took: all sizes in every round, until time is over and there are enough."""
    sizes = sorted({min(n, len(block)) for n in _COUNTS} - {0})
    counts: list[int] = []
    took_ns: list[int] = []
    spent_ns = 0
    for _ in range(rounds):
        for size in sizes:
            done = engine.step_block(block if size == len(block) else block.take(np.arange(len(block)) < size))
            counts.append(size)
            took_ns.append(spent := done.step_end_ns - done.step_start_ns)
            spent_ns += spent
            if len(counts) >= least and spent_ns > limit_ns:
                return np.array(counts, np.float64), np.array(took_ns, np.float64)
    return np.array(counts, np.float64), np.array(took_ns, np.float64)


@contextlib.contextmanager
def _dummies(engine: Engine) -> Iterator[Block]:
    """A tick of each of as many dummy sessions as there are free slots, up to the largest count; they are closed."""
    names: list[str] = []
    try:
        with contextlib.suppress(SessionError):
            for i in range(max(_COUNTS)):
                engine.open(name := f"\0measured {i}")
                names.append(name)
        count, modalities = len(names), engine.spec.modalities
        nothing = np.zeros(count, np.int64)
        yield Block(
            np.array([engine.handle(name) for name in names], np.int64),
            nothing,
            nothing,
            np.ones((count, len(modalities)), np.bool_),
            np.zeros((count, len(modalities)), np.int64),
            tuple(np.zeros((count, m.size), np.float32) for m in modalities),
        )
    finally:
        for name in names:
            engine.close(name)
