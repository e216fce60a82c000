from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stream_mmrnn.core.latency import STAGES, Histogram, StageTable, stages
from stream_mmrnn.core.types import Stamps

times = st.integers(0, 2**60)


@given(times, times, times, times, times, times, times, times)
def test_the_stages_add_up_to_the_total(event: int, e: int, c: int, p: int, r: int, s: int, d: int, sent: int) -> None:
    took = stages(event, Stamps(e, c, p, r, "clock"), s, d, sent)
    assert tuple(took) == STAGES
    assert sum(v for k, v in took.items() if k != "total") == took["total"]


@given(st.lists(st.integers(0, 2**50), min_size=1, max_size=300), st.sampled_from([0, 1, 50, 95, 99, 99.9, 100]))
def test_percentiles_are_within_a_bucket_of_the_exact_ones(values: list[int], p: float) -> None:
    h = Histogram()
    for v in values:
        h.add(v)
    exact = np.percentile(values, p, method="inverted_cdf")
    assert exact <= h.percentile(p) <= exact * (1 + 1 / 128) + 1
    assert h.max_ns == max(values)
    assert h.count == len(values)


def test_a_table_omits_stages_without_values() -> None:
    table = StageTable(("step", "emit"))
    table.add({"step": 2_000_000, "other": 5})
    table.add({"step": -3})
    assert table.table() == {"step": {"p50": 0.0, "p95": 2.0, "p99": 2.0, "max": 2.0, "count": 2}}
    assert Histogram().percentile(50) == 0
