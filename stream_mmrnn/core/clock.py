"""Time: one monotonic clock for all processes of a host, and the conversion of a device's clock to it."""

from __future__ import annotations

import time

now_ns = time.monotonic_ns
"""CLOCK_MONOTONIC (Linux, macOS) and QueryPerformanceCounter (Windows) count from the host's boot, so times from all
processes of a host are comparable."""


def wall_offset_ns() -> int:
    """Nanoseconds to add to `now_ns()` to get Unix time; the best of five readings."""
    best = None
    for _ in range(5):
        before = now_ns()
        wall = time.time_ns()
        after = now_ns()
        if best is None or after - before < best[0]:
            best = (after - before, wall - (before + after) // 2)
    assert best is not None
    return best[1]


_LOOK_NS = 1_000_000_000
_STEP_NS = 20_000_000
"""A smaller change is slewing (at most 0.5 ms per second), not a step."""


class WallClock:
    """Detects steps of the wall clock against the monotonic clock: it was set, or the host was suspended."""

    def __init__(self) -> None:
        self.steps = 0
        self._offset_ns = wall_offset_ns()
        self._looked_ns = now_ns()

    def poll(self, at_ns: int) -> int:
        """The step in ns since the last check, else 0; checks at most once a second."""
        if at_ns - self._looked_ns < _LOOK_NS:
            return 0
        self._looked_ns = at_ns
        before_ns, self._offset_ns = self._offset_ns, wall_offset_ns()
        step_ns = self._offset_ns - before_ns
        if abs(step_ns) < _STEP_NS:
            return 0
        self.steps += 1
        return step_ns


class RateLimiter:
    """Limits log lines: returns True at most once per period (1 s) for each key.

    Memory is bounded: beyond 256 keys, all further keys share one limit.
    """

    def __init__(self, period_ns: int = 1_000_000_000) -> None:
        self._period_ns = period_ns
        self._next_ns: dict[str, int] = {}
        self.unsaid = 0

    def __call__(self, key: str, at_ns: int) -> bool:
        if key not in self._next_ns and len(self._next_ns) >= 256:
            key = ""
        if at_ns < self._next_ns.get(key, at_ns):
            self.unsaid += 1
            return False
        self._next_ns[key] = at_ns + self._period_ns
        return True


class DeviceClock:
    """Event time of blocks from a device that counts its own samples.

    Each block comes with a noisy reading of when it ended. The device's sample count is smooth but its rate
    is a little off (tens of ppm); the readings are right on average but jitter by milliseconds. So the event
    time advances by the nominal length and is corrected by a second-order loop (a proportional and an
    integral gain, as in the delay-locked loop of F. Adriaensen, "Using a DLL to filter time", 2005), which
    follows a constant rate error without a lasting offset. If a reading differs by more than `jump_ns`, the
    event time jumps to it: the device stalled or lost samples. Event times are strictly increasing.
    """

    def __init__(self, rate_hz: float, jump_ns: int = 40_000_000, bandwidth_hz: float = 0.1) -> None:
        self.rate_hz = rate_hz
        self.jump_ns = jump_ns
        self.bandwidth_hz = bandwidth_hz
        self.jumps = 0
        self._event_ns: float | None = None
        self._drift = 0.0
        self._last_ns = -1

    def lost(self) -> None:
        """The device dropped samples without counting them: the event time jumps to the next reading."""
        self.jumps += self._event_ns is not None
        self._event_ns = None

    def stamp(self, frames: int, measured_ns: int) -> int:
        """Event time of the end of a block of `frames` samples whose end was measured at `measured_ns`."""
        length_ns = frames / self.rate_hz * 1e9
        if self._event_ns is None:
            self._event_ns = float(measured_ns)
        else:
            predicted = self._event_ns + length_ns * (1.0 + self._drift)
            error = measured_ns - predicted
            if abs(error) > self.jump_ns:
                self.jumps += 1
                self._event_ns = float(measured_ns)
            else:
                omega = min(2 * 3.141592653589793 * self.bandwidth_hz * length_ns / 1e9, 0.5)
                self._event_ns = predicted + 1.4142135623730951 * omega * error
                self._drift += omega * omega * error / length_ns
        self._last_ns = max(self._last_ns + 1, round(self._event_ns))
        return self._last_ns
