"""Detect that a stream has stalled, from the rate of its own arrivals. Pure: the caller gives the time."""

from __future__ import annotations

from collections import deque

_GAPS = 32
_ENOUGH = 4
"""Gaps needed to estimate the period."""
_QUANTILE = 0.9
"""The period is this quantile of the gaps: where blocks arrive in pairs, every second gap is almost 0."""
STALE_PERIODS = 2


class StallDetector:
    """Watches one dense stream; it is stale after twice its period without a sample. A sparse stream never is."""

    def __init__(self, dense: bool = True) -> None:
        self._dense = dense
        self._gaps: deque[int] = deque(maxlen=_GAPS)
        self._last_ns: int | None = None
        self._silent_ns: int | None = None
        """Since when it is stale."""
        self._stale_ns = 0
        self.period_ns = 0
        """0 until it is known."""
        self.silences = 0
        """How often it became stale."""

    def on_sample(self, at_ns: int) -> bool:
        """A sample has arrived; returns whether the stream was stale."""
        if not self._dense:
            return False
        if self._last_ns is not None:
            self._gaps.append(max(at_ns - self._last_ns, 0))
            if len(self._gaps) >= _ENOUGH:
                self.period_ns = sorted(self._gaps)[int(_QUANTILE * len(self._gaps))]
        self._last_ns = at_ns
        return self._end(at_ns)

    def check(self, at_ns: int) -> bool:
        """No sample has arrived until now; returns whether the stream has just become stale."""
        if self._silent_ns is not None or self._due_ns is None or at_ns < self._due_ns:
            return False
        self._silent_ns = self._due_ns
        self.silences += 1
        return True

    def wait_s(self, at_ns: int, most_s: float) -> float:
        """How long to wait for a sample so that a stall is noticed when it begins; `most_s` at most."""
        if self._silent_ns is not None or self._due_ns is None:
            return most_s
        return min(most_s, max(self._due_ns - at_ns, 0) / 1e9)

    def stale_ns(self, at_ns: int) -> int:
        """How long it was stale in total."""
        return self._stale_ns + (max(at_ns - self._silent_ns, 0) if self._silent_ns is not None else 0)

    def stop(self, at_ns: int) -> None:
        """The device was closed: expect nothing until the next sample, and learn the period again from there."""
        self._end(at_ns)
        self._gaps.clear()
        self._last_ns, self.period_ns = None, 0

    def _end(self, at_ns: int) -> bool:
        if self._silent_ns is None:
            return False
        self._stale_ns = self.stale_ns(at_ns)
        self._silent_ns = None
        return True

    @property
    def _due_ns(self) -> int | None:
        """When it becomes stale if no sample arrives."""
        if self._last_ns is None or not self.period_ns:
            return None
        return self._last_ns + STALE_PERIODS * self.period_ns
