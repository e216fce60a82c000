"""Latency of predictions by stage, as histograms and percentiles, for the dashboard, the summary and the benchmark.

The stages of one prediction add up to its total: each begins where the one before it ends.
"""

from __future__ import annotations

from stream_mmrnn.core.types import Stamps

STAGES = ("wait", "capture", "encode", "transport", "queue", "step", "emit", "total")
"""wait: from the tick's end to the event that closed it (a later sample, or the clock); capture: until the sample was
received from the device; encode: until its features were sent; transport: until the engine received them; queue: until
the step began; step; emit: until the prediction was sent; total: from the tick's end until then."""


def stages(event_ns: int, closed: Stamps, step_start_ns: int, step_end_ns: int, publish_ns: int) -> dict[str, int]:
    """Duration of each stage in nanoseconds, for the prediction of the tick that ended at `event_ns`."""
    return {
        "wait": closed.event_ns - event_ns,
        "capture": closed.capture_ns - closed.event_ns,
        "encode": closed.publish_ns - closed.capture_ns,
        "transport": closed.received_ns - closed.publish_ns,
        "queue": step_start_ns - closed.received_ns,
        "step": step_end_ns - step_start_ns,
        "emit": publish_ns - step_end_ns,
        "total": publish_ns - event_ns,
    }


class Histogram:
    """Counts of nanoseconds in buckets whose width is at most 1/128 of their value, as HdrHistogram does it.

    Values below 256 ns are exact; negative ones count as 0. Memory is bounded by the number of distinct buckets
    (7,400 for all of int64).
    """

    def __init__(self) -> None:
        self._buckets: dict[int, int] = {}
        self.count = 0
        self.max_ns = 0
        self._sum_ns = 0

    def add(self, value_ns: int) -> None:
        value_ns = max(value_ns, 0)
        shift = max(value_ns.bit_length() - 8, 0)
        key = (value_ns >> shift) << shift
        self._buckets[key] = self._buckets.get(key, 0) + 1
        self.count += 1
        self._sum_ns += value_ns
        self.max_ns = max(self.max_ns, value_ns)

    def percentile(self, p: float) -> int:
        """The p-th percentile (upper end of its bucket); 0 without values."""
        left = max(1, -(-self.count * p // 100))
        for key in sorted(self._buckets):
            left -= self._buckets[key]
            if left <= 0:
                return min(key + (1 << max(key.bit_length() - 8, 0)) - 1, self.max_ns)
        return 0

    @property
    def mean_ns(self) -> float:
        """Exact mean; 0 without values."""
        return self._sum_ns / self.count if self.count else 0.0

    def buckets(self) -> list[tuple[int, int]]:
        """(lowest value, count) of each bucket, in order, for plots."""
        return sorted(self._buckets.items())

    def row(self) -> dict[str, float]:
        """Milliseconds: p50, p95, p99, max; and the count."""
        percentiles = {f"p{p}": round(self.percentile(p) / 1e6, 4) for p in (50, 95, 99)}
        return {**percentiles, "max": round(self.max_ns / 1e6, 4), "count": self.count}


class StageTable:
    """A histogram for each stage."""

    def __init__(self, names: tuple[str, ...] = STAGES) -> None:
        self._histograms = {name: Histogram() for name in names}

    def add(self, values_ns: dict[str, int]) -> None:
        for name, histogram in self._histograms.items():
            if name in values_ns:
                histogram.add(values_ns[name])

    def table(self) -> dict[str, dict[str, float]]:
        """Milliseconds: p50, p95, p99, max and the count, by stage; stages without counts are left out."""
        return {name: h.row() for name, h in self._histograms.items() if h.count}
