"""Durations as people write and read them: `15min`, `1d`."""

from __future__ import annotations

import re

from stream_mmrnn.core.errors import UsageError

NANOSECONDS = {
    "ns": 1,
    "us": 1_000,
    "ms": 1_000_000,
    "s": 1_000_000_000,
    "min": 60_000_000_000,
    "h": 3_600_000_000_000,
    "d": 86_400_000_000_000,
    "w": 604_800_000_000_000,
}
"""By unit."""
_WRITTEN = re.compile(r"(\d{1,12}(?:\.\d{1,9})?)\s*(ns|us|ms|s|min|h|d|w)")
_LONGEST_NS = 2**62


def parse_ns(text: str, what: str) -> int:
    """Nanoseconds of a duration such as `40ms`, `15min`, `1.5d`; `what` names the option in the error.

    Raises:
        UsageError: it is no duration above 0.

    """
    found = _WRITTEN.fullmatch(text.strip())
    ns = round(float(found[1]) * NANOSECONDS[found[2]]) if found else 0
    if not 0 < ns <= _LONGEST_NS:
        raise UsageError(f"{what} is {text!r}: expected a duration above 0, such as 40ms, 15min, 12h or 1d")
    return ns


def spoken(seconds: float) -> str:
    """A duration for people, in the unit that suits it: `40 ms`, `12.0 s`, `15 min`, `6.5 h`, `1461 d`."""
    if 0 < seconds < 0.1:
        return f"{seconds * 1000:.3g} ms"
    for unit, size_s, least in (("d", 86_400, 1), ("h", 3600, 1), ("min", 60, 10)):
        if seconds >= least * size_s:
            return f"{seconds / size_s:.1f}".removesuffix(".0") + f" {unit}"
    return f"{seconds:.1f} s"
