"""Prewarm: run something on nobody's data just before it is needed, so that code and weights are in the caches.

A step that runs 25 times a second finds the caches cold and takes several times as long as in a hot loop; a run that
ended less than a millisecond ago mends that (docs/performance.md has the figures). Knows nothing about what is run.
"""

from __future__ import annotations

from collections.abc import Callable

LEAD_NS = 1_000_000
"""How long before the expected moment; a run of some 0.5 ms ends in time, and what it warmed is still there."""
_TOLERANCE_NS = 300_000


class Prewarmer:
    """Expects the next step one `period_ns` after the last one.

    `stepped` after each; `wait_ms` says how long to wait for data at most, `run_if_due` is called when that is over. A
    step that comes sooner than expected (another session's) has warmed the caches itself and moves the expectation on.
    """

    def __init__(self, warm: Callable[[], None], period_ns: int, lead_ns: int = LEAD_NS) -> None:
        self._warm = warm
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
        """Run where the moment has come (once for each step); whether it was."""
        if not self._due_ns or now_ns < self._due_ns - _TOLERANCE_NS:
            return False
        # of a stream that has ended nothing is expected any more
        late = now_ns > self._due_ns + self.period_ns
        self._due_ns = 0
        if not late:
            self._warm()
            self.runs += 1
        return not late
