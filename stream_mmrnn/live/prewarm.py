"""Prewarm: a dummy run just before the next step is due, so that code and weights are in the caches.

A step that runs 25 times a second finds the caches cold and takes several times as long as in a hot loop; a run that
ended less than a millisecond ago avoids that (docs/performance.md has the figures).
"""

from __future__ import annotations

import time
from collections.abc import Callable

LEAD_NS = 1_000_000
"""How long before the expected moment; a run of some 0.5 ms ends in time, and what it warmed is still there."""
_NEAR_NS = 1_000_000
"""So near the moment is slept for: sockets wait in whole milliseconds."""


class Prewarmer:
    """Expects the next step one `period_ns` after the last one.

    `stepped` after each; `wait_ms` says how long to wait for data at most, `run_if_due` is called when that is over. A
    step that comes sooner than expected (another session's) has warmed the caches itself and moves the expectation on.
    """

    def __init__(
        self,
        warm: Callable[[], None],
        period_ns: int,
        lead_ns: int = LEAD_NS,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._warm, self._sleep = warm, sleep
        self.period_ns, self._lead_ns = period_ns, lead_ns
        self._due_ns = 0
        self.runs = 0

    def stepped(self, start_ns: int) -> None:
        """Something was stepped at `start_ns`."""
        self._due_ns = start_ns + self.period_ns - self._lead_ns

    def wait_ms(self, now_ns: int, most_ms: int) -> int:
        """Whole milliseconds until the next prewarm, `most_ms` at most."""
        if not self._due_ns:
            return most_ms
        return max(min((self._due_ns - now_ns) // 1_000_000, most_ms), 0)

    def run_if_due(self, now_ns: int) -> bool:
        """Run where the moment has come or is about to (once for each step); whether it was."""
        if not self._due_ns or now_ns < self._due_ns - _NEAR_NS:
            return False
        if now_ns < self._due_ns:
            self._sleep((self._due_ns - now_ns) / 1e9)
        # of a stream that has ended nothing is expected any more
        late = now_ns > self._due_ns + self.period_ns
        self._due_ns = 0
        if not late:
            self._warm()
            self.runs += 1
        return not late
