"""Admission control: whether one more session can be served in time, from the measured times of steps.

A step of n ticks takes about `call + n * tick`. Both are measured with dummy sessions (`settle`), and again from the
newest steps; `jitter` is the p99 of the residuals. In the worst case a tick waits for a step that has just begun, and
then for one with all sessions in it, so its p99 latency is `2 call + sessions * tick + jitter`. That must fit into its
share of the tick period. Where clients send one tick at a time, their steps say nothing about `tick`: then the dummy
sessions' share of it holds. Pure: it calls no engine and reads no clock.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

WINDOW = 512
"""How many of the newest steps count."""
FORGET_NS = 10_000_000_000
"""Steps longer ago do not count."""
LEAST = 16
"""With fewer steps there is no estimate of them."""
_TRIM = 0.9
"""The line is fitted again without the slowest tenth, which counts as jitter."""
_TRUST = 0.25
"""How far, relative to itself, the cost of a tick that dummy sessions had may be from that of others: one standard
deviation."""
_MOST_JITTER = 0.5
"""Of the bound: what does not depend on the number of sessions may halve it, and not take it all."""
_IDLE = 0.5
"""Of the share: an engine with less to do is idle."""
_LOOK_NS = 1_000_000_000
"""How far back it is looked how much the engine has to do. Dummy sessions are measured again no sooner."""

Numbers = npt.NDArray[np.float64]


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


def _line(counts: Numbers, took_ns: Numbers, tick_ns: float | None) -> tuple[float, float]:
    """Least squares, with both parts at least 0. `tick_ns`: what a tick is expected to cost, which counts as much as
    the steps leave open; if None, all of the time is put on ticks where counts hardly differ.
    """
    count, took = float(counts.mean()), float(took_ns.mean())
    apart = counts - count
    spread = float(apart @ apart)
    if spread < 1e-9:
        slope = took / count if tick_ns is None else tick_ns
    else:
        slope = float(apart @ (took_ns - took)) / spread
        if tick_ns is not None:
            late_ns = took_ns - took - slope * apart
            error = float(late_ns @ late_ns) / max(len(counts) - 2, 1) / spread
            expected = (_TRUST * tick_ns) ** 2
            if error + expected > 0:
                slope = (slope * expected + tick_ns * error) / (expected + error)
    slope = min(max(slope, 0.0), took / count)
    return took - slope * count, slope


def fit(counts: Numbers, took_ns: Numbers, tick_ns: float | None = None) -> Cost:
    """The cost of steps of so many ticks; `tick_ns`: of `_line`."""
    call_ns, tick = _line(counts, took_ns, tick_ns)
    usual = (late_ns := took_ns - call_ns - counts * tick) <= np.quantile(late_ns, _TRIM)
    call_ns, tick = _line(counts[usual], took_ns[usual], tick_ns)
    late_ns = took_ns - call_ns - counts * tick
    return Cost(call_ns, tick, max(float(np.quantile(late_ns, 0.99, method="lower")), 0.0))


class Admission:
    """The cost of dummy sessions, the newest steps, and how many sessions they allow. Times are `now_ns`."""

    def __init__(self, period_ns: int, share: float) -> None:
        """`period_ns`: between a session's ticks; `share`: the part of it that the p99 latency may take."""
        self.bound_ns = share * period_ns
        self._period_ns, self._share = period_ns, share
        self._settled: Cost | None = None
        self._settled_ns = 0
        self._counts, self._took_ns, self._at_ns = np.ones(WINDOW), np.zeros(WINDOW), np.zeros(WINDOW, np.int64)
        self._at = self._held = 0

    def add(self, count: int, took_ns: int, now_ns: int) -> None:
        """Record a step of `count` ticks."""
        self._counts[self._at] = count
        self._took_ns[self._at] = took_ns
        self._at_ns[self._at] = now_ns
        self._at = (self._at + 1) % WINDOW
        self._held = min(self._held + 1, WINDOW)

    def _newest(self, within_ns: int, now_ns: int) -> npt.NDArray[np.bool_]:
        """Which of the steps that are held were not longer ago."""
        return self._at_ns[: self._held] >= now_ns - within_ns

    def settle(self, cost: Cost, now_ns: int) -> None:
        """Take the cost of dummy sessions as the lower bound until it is measured again, however fast steps are. What
        was measured before is forgotten.

        While sessions open one by one, steps hold few ticks. A line fitted to those predicts full steps badly: it was
        measured to admit a quarter more than could be served.
        """
        self._settled, self._settled_ns = self._bounded(cost), now_ns
        self._at = self._held = 0

    @property
    def settled(self) -> Cost | None:
        return self._settled

    def _bounded(self, cost: Cost) -> Cost:
        return cost._replace(jitter_ns=min(cost.jitter_ns, _MOST_JITTER * self.bound_ns))

    def cost(self, now_ns: int) -> Cost | None:
        """Of the newest steps; None before `LEAST` of them."""
        newest = self._newest(FORGET_NS, now_ns)
        counts, took_ns = self._counts[: self._held][newest], self._took_ns[: self._held][newest]
        if len(counts) < LEAST:
            return None
        expected: float | None = None
        if (settled := self._settled) is not None:
            slower = float(np.median(took_ns / np.maximum(settled.call_ns + counts * settled.tick_ns, 1.0)))
            expected = settled.tick_ns * max(slower, 1.0)
        return self._bounded(fit(counts, took_ns, expected))

    def _costs(self, now_ns: int) -> list[Cost]:
        return [cost for cost in (self._settled, self.cost(now_ns)) if cost is not None]

    def admits(self, sessions: int, now_ns: int) -> bool:
        """Whether this many sessions can be served in time."""
        if all(cost.p99_ns(sessions) <= self.bound_ns for cost in self._costs(now_ns)):
            return True
        rows, busy = self._load(now_ns)
        # only where most of the sessions send ticks does the load say what one more brings
        return 2 * rows >= sessions and busy * sessions <= _IDLE * self._share * rows

    def capacity(self, now_ns: int) -> int | None:
        """The most sessions that can be served in time; None while there is no estimate."""
        return min((cost.sessions(self.bound_ns) for cost in self._costs(now_ns) if cost.tick_ns), default=None)

    def _load(self, now_ns: int) -> tuple[float, float]:
        """How many sessions sent ticks, and the share of the time that their steps took."""
        newest = self._newest(_LOOK_NS, now_ns)
        if not newest.any():
            return 0.0, 0.0
        span_ns = max(now_ns - int(self._at_ns[: self._held][newest].min()), self._period_ns)
        rows = float(self._counts[: self._held][newest].sum()) * self._period_ns / span_ns
        return rows, float(self._took_ns[: self._held][newest].sum()) / span_ns

    def is_stale(self, now_ns: int) -> bool:
        """Whether dummy sessions should be measured again before somebody is refused: not while there is much to do."""
        return now_ns - self._settled_ns >= _LOOK_NS and self._load(now_ns)[1] <= _IDLE * self._share
