"""Percentiles of the stages of the last predictions."""

from __future__ import annotations

import numpy as np

from stream_mmrnn.core.latency import STAGES

_WINDOW_NS = 10_000_000_000
_MAX_ROWS = 4096
_LONGEST_NS = 2**61
"""A stage is clipped to this: the difference of two untrusted stamps need not fit 64 bits."""
_REFRESH_NS = 250_000_000
"""Percentiles are computed at most this often."""


class Latencies:
    """The stages of the predictions of the last 10 s, at most the newest 4096, in a ring buffer."""

    def __init__(self) -> None:
        self._rows = np.zeros((_MAX_ROWS, len(STAGES)), np.int64)
        self._at = np.full(_MAX_ROWS, -(2**62), np.int64)
        self._next = 0
        self._computed_ns = -(2**62)
        self._table: dict[str, dict[str, float]] = {}

    def add(self, at_ns: int, took: dict[str, int]) -> None:
        i = self._next % _MAX_ROWS
        self._rows[i] = [max(-_LONGEST_NS, min(took[s], _LONGEST_NS)) for s in STAGES]
        self._at[i] = at_ns
        self._next += 1

    def table(self, now_ns: int) -> dict[str, dict[str, float]]:
        """By stage, p50 and p99 in ms; empty without predictions."""
        if 0 <= now_ns - self._computed_ns < _REFRESH_NS:
            return self._table
        self._computed_ns = now_ns
        rows = self._rows[self._at >= now_ns - _WINDOW_NS]
        self._table = {}
        if len(rows):
            p50, p99 = np.percentile(rows, (50, 99), axis=0) / 1e6
            for i, stage in enumerate(STAGES):
                self._table[stage] = {"p50": round(float(p50[i]), 3), "p99": round(float(p99[i]), 3)}
        return self._table
