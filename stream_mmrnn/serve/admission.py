"""Admission control: whether one more session can be served in time, from the measured times of steps.

A step of n ticks takes about `call + n * tick`. Both are fitted to the newest steps; `jitter` is the p99 of the
residuals. In the worst case a tick waits for a step that has just begun, and then for one with all sessions in it, so
its p99 latency is `2 call + sessions * tick + jitter`. That must fit into its share of the tick period. Pure: it calls
no engine and reads no clock.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

WINDOW = 512
"""How many of the newest steps count."""
LEAST = 16
"""With fewer steps there is no estimate, and slots are the only limit."""
_TRIM = 0.9
"""The line is fitted again without the slowest tenth, which counts as jitter."""


class Cost(NamedTuple):
    """Cost of steps, in nanoseconds."""

    call_ns: float
    """Of each step."""
    tick_ns: float
    """Of each tick in it."""
    jitter_ns: float
    """p99 of what steps take beyond that."""

    def p99_ns(self, sessions: int) -> float:
        """Latency from a tick's due time to its prediction, with so many sessions."""
        return 2 * self.call_ns + sessions * self.tick_ns + self.jitter_ns

    def sessions(self, bound_ns: float) -> int:
        """The most sessions whose latency is within a bound; for costs with `tick_ns` above 0."""
        most = int(max(bound_ns - self.p99_ns(0), 0) / self.tick_ns)
        # a quotient is rounded otherwise than a product
        if self.p99_ns(most) > bound_ns:
            return max(most - 1, 0)
        return most + (self.p99_ns(most + 1) <= bound_ns)


def _line(counts: np.ndarray, took_ns: np.ndarray) -> tuple[float, float]:
    """Least squares, with both parts at least 0; where counts hardly differ, all of the time is put on ticks."""
    count, took = counts.mean(), took_ns.mean()
    apart = counts - count
    if (spread := float(apart @ apart)) < 1e-9:
        return 0.0, float(took / count)
    slope = float(apart @ (took_ns - took)) / spread
    slope = min(max(slope, 0.0), float(took / count))
    return float(took - slope * count), slope


class Admission:
    """The newest steps, and how many sessions they allow."""

    def __init__(self, period_ns: int, share: float) -> None:
        """`period_ns`: between a session's ticks; `share`: the part of it that the p99 latency may take."""
        self.bound_ns = share * period_ns
        self._least: Cost | None = None
        self._counts = np.ones(WINDOW)
        self._took_ns = np.zeros(WINDOW)
        self._at = self._held = 0

    def add(self, count: int, took_ns: int) -> None:
        """Record a step of `count` ticks."""
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
        """Take the present cost as the lower bound from now on, however fast later steps are.

        While sessions open one by one, steps hold few ticks. A line fitted to those predicts full steps badly: it was
        measured to admit a quarter more than could be served.
        """
        self._least = self.cost()

    def _costs(self) -> list[Cost]:
        return [cost for cost in (self._least, self.cost()) if cost is not None]

    def admits(self, sessions: int) -> bool:
        """Whether this many sessions can be served in time."""
        return all(cost.p99_ns(sessions) <= self.bound_ns for cost in self._costs())

    def capacity(self) -> int | None:
        """The most sessions that can be served in time; None while there is no estimate."""
        return min((cost.sessions(self.bound_ns) for cost in self._costs() if cost.tick_ns), default=None)
