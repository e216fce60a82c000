"""Admission: whether one session more can be served in time, from what steps were measured to take.

A step of n ticks takes about `call + n * tick`: both are fitted to the newest steps, and `jitter` is how much later
than that the slowest hundredth was. In an open loop the worst a tick meets is a step that has just begun and then one
with everybody in it, whatever the phases; so the slowest hundredth is back after `2 call + sessions * tick + jitter`.
That must fit into its share of the tick. Pure: knows nothing about sessions' names, engines or clocks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

WINDOW = 512
"""Steps that are looked at: the newest."""
LEAST = 16
"""With fewer there is nothing to judge by, and slots are the only limit."""
_TRIM = 0.9
"""The line is fitted again without the slowest tenth: what disturbs a step is the jitter's business."""


class Cost(NamedTuple):
    """What steps take, in nanoseconds."""

    call_ns: float
    """A step, whoever is in it."""
    tick_ns: float
    """And each tick of it."""
    jitter_ns: float
    """And the slowest hundredth of steps, on top of that."""

    def p99_ns(self, sessions: int) -> float:
        """From a tick's due time to its prediction, with so many sessions."""
        return 2 * self.call_ns + sessions * self.tick_ns + self.jitter_ns


def _line(counts: np.ndarray, took_ns: np.ndarray) -> tuple[float, float]:
    """Least squares, neither part below zero; where counts hardly differ, everything is each tick's."""
    count, took = counts.mean(), took_ns.mean()
    apart = counts - count
    if (spread := float(apart @ apart)) < 1e-9:
        return 0.0, float(took / count)
    slope = float(apart @ (took_ns - took)) / spread
    slope = min(max(slope, 0.0), float(took / count))
    return float(took - slope * count), slope


class Admission:
    """The newest steps, and what follows from them."""

    def __init__(self, period_ns: int, share: float) -> None:
        """`period_ns`: of a session's ticks; `share`: of it that the slowest hundredth may take."""
        self.bound_ns = share * period_ns
        self._least: Cost | None = None
        self._counts = np.ones(WINDOW)
        self._took_ns = np.zeros(WINDOW)
        self._at = self._held = 0

    def add(self, count: int, took_ns: int) -> None:
        """A step of `count` ticks took so long."""
        self._counts[self._at] = count
        self._took_ns[self._at] = took_ns
        self._at = (self._at + 1) % WINDOW
        self._held = min(self._held + 1, WINDOW)

    def cost(self) -> Cost | None:
        """None before `LEAST` steps."""
        if self._held < LEAST:
            return None
        counts, took_ns = self._counts[: self._held], self._took_ns[: self._held]
        call_ns, tick_ns = _line(counts, took_ns)
        usual = (late_ns := took_ns - call_ns - counts * tick_ns) <= np.quantile(late_ns, _TRIM)
        call_ns, tick_ns = _line(counts[usual], took_ns[usual])
        late_ns = took_ns - call_ns - counts * tick_ns
        return Cost(call_ns, tick_ns, max(float(np.quantile(late_ns, 0.99, method="lower")), 0.0))

    def settle(self) -> None:
        """What was measured so far is the least that will be counted on, however quick a few steps are.

        While sessions come one by one, steps hold few ticks each: a line through those says little of full ones, and
        has been seen to let in a quarter more than could be served.
        """
        self._least = self.cost()

    def _costs(self) -> list[Cost]:
        return [cost for cost in (self._least, self.cost()) if cost is not None]

    def admits(self, sessions: int) -> bool:
        """Whether so many sessions can be served in time."""
        return all(cost.p99_ns(sessions) <= self.bound_ns for cost in self._costs())

    def capacity(self) -> int | None:
        """The most sessions that can be served in time; None where nobody can say (yet)."""
        most = [int((self.bound_ns - cost.p99_ns(0)) / cost.tick_ns) for cost in self._costs() if cost.tick_ns]
        return max(min(most), 0) if most else None
