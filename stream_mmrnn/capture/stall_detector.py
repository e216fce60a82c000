"""How often a stream comes, by its own arrivals, and whether it has fallen silent.

Pure: it is told the time. Knows nothing about devices or what a stream is made of.
"""

from __future__ import annotations

from collections import deque

_GAPS = 32
_ENOUGH = 4
"""So many gaps say what the period is."""
_USUAL = 0.9
"""Of the gaps at most a tenth is longer than the period: of blocks that come in pairs every second gap is none."""
STALE_PERIODS = 2


class StallDetector:
    """Says of one dense stream that it is stale: silent for twice its own period. A sparse one never is."""

    def __init__(self, dense: bool = True) -> None:
        self._dense = dense
        self._gaps: deque[int] = deque(maxlen=_GAPS)
        self._last_ns: int | None = None
        self._silent_ns: int | None = None
        """Since when it is stale."""
        self._stale_ns = 0
        self.period_ns = 0
        """0 as long as it is not known."""
        self.silences = 0
        """How often it fell silent."""

    def on_sample(self, at_ns: int) -> bool:
        """A sample came; whether it ends a silence."""
        if not self._dense:
            return False
        if self._last_ns is not None:
            self._gaps.append(max(at_ns - self._last_ns, 0))
            if len(self._gaps) >= _ENOUGH:
                self.period_ns = sorted(self._gaps)[int(_USUAL * len(self._gaps))]
        self._last_ns = at_ns
        return self._end(at_ns)

    def check(self, at_ns: int) -> bool:
        """No sample came until now; whether the stream is stale from now on."""
        if self._silent_ns is not None or self._due_ns is None or at_ns < self._due_ns:
            return False
        self._silent_ns = self._due_ns
        self.silences += 1
        return True

    def wait_s(self, at_ns: int, most_s: float) -> float:
        """How long to wait for a sample, so that a silence is noticed when it begins."""
        if self._silent_ns is not None or self._due_ns is None:
            return most_s
        return min(most_s, max(self._due_ns - at_ns, 0) / 1e9)

    def stale_ns(self, at_ns: int) -> int:
        """For how long it was stale, all silences together."""
        return self._stale_ns + (max(at_ns - self._silent_ns, 0) if self._silent_ns is not None else 0)

    def stop(self, at_ns: int) -> None:
        """The device is given back: nothing is expected of it until it is heard again. What it does then is its own."""
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
        """When it is stale if nothing comes."""
        if self._last_ns is None or not self.period_ns:
            return None
        return self._last_ns + STALE_PERIODS * self.period_ns
