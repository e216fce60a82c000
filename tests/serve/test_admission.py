"""Admission control from the measured cost of steps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stream_mmrnn.serve.admission import LEAST, WINDOW, Admission, Cost

TICK_NS = 40_000_000


def fed(call_ns: float, tick_ns: float, counts: list[int], share: float = 1.0) -> Admission:
    admission = Admission(TICK_NS, share)
    for count in counts:
        admission.add(count, round(call_ns + count * tick_ns))
    return admission


@given(st.integers(0, 5_000_000), st.integers(1_000, 2_000_000), st.integers(2, 40))
@example(1_000_000, 2_000_000, 12)  # the bound is reached exactly
@example(500_000, 1_000_000, 12)
def test_a_line_is_found_and_the_capacity_is_its_inverse(call_ns: int, tick_ns: int, most: int) -> None:
    admission = fed(call_ns, tick_ns, [1 + i % most for i in range(200)])
    cost = admission.cost()
    assert cost is not None
    assert cost.call_ns == pytest.approx(call_ns, rel=1e-3, abs=50)
    assert cost.tick_ns == pytest.approx(tick_ns, rel=1e-3, abs=50)
    assert cost.jitter_ns < 100
    capacity = admission.capacity()
    assert capacity is not None
    assert capacity == pytest.approx(max((TICK_NS - 2 * call_ns) / tick_ns, 0), rel=0.01, abs=1)
    assert not admission.admits(capacity + 1)
    assert capacity == 0 or admission.admits(capacity)


def test_without_measurements_nothing_is_refused() -> None:
    admission = Admission(TICK_NS, 0.7)
    for _ in range(LEAST - 1):
        admission.add(1, 10**12)
    assert admission.admits(10**6)
    assert admission.capacity() is None
    admission.add(1, 10**12)
    assert not admission.admits(1)


def test_where_counts_do_not_differ_all_of_a_step_is_its_ticks() -> None:
    admission = fed(1_000_000, 100_000, [10] * 100)
    assert admission.cost() == Cost(0.0, 200_000.0, 0.0)
    assert admission.capacity() == 200


def test_a_single_outlier_does_not_count_and_frequent_ones_do() -> None:
    rng = np.random.default_rng(0)
    counts = [int(n) for n in rng.integers(1, 20, 400)]
    quiet = fed(500_000, 100_000, counts)
    once = fed(500_000, 100_000, counts)
    once.add(5, 60 * 10**9)
    often = fed(500_000, 100_000, counts)
    for _ in range(40):
        often.add(5, 30_000_000)
    assert once.capacity() == pytest.approx(quiet.capacity(), abs=3)
    capacity = often.capacity()
    assert capacity is not None
    assert capacity < 120  # nearly 30 of 40 ms are gone


def test_only_the_newest_steps_count() -> None:
    admission = fed(0, 10_000_000, [1, 2, 3] * 100)
    assert admission.capacity() == 4
    for i in range(WINDOW):
        admission.add(1 + i % 7, (1 + i % 7) * 100_000)
    assert admission.capacity() == 400


def test_the_share_is_of_the_tick() -> None:
    assert fed(0, 1_000_000, [1, 2, 3, 4] * 10, 0.5).capacity() == 20


def test_the_settled_cost_is_a_lower_bound() -> None:
    """Fast small steps do not admit more sessions than full steps allow."""
    admission = Admission(TICK_NS, 0.5)
    for count in (1, 16, 64) * 20:
        admission.add(count, 1_000_000 + count * 200_000)
    before = admission.capacity()
    admission.settle()
    for count in (1, 2, 3) * 300:
        admission.add(count, 100_000 + count * 100_000)
    assert admission.capacity() == before
    assert before is not None
    assert admission.admits(before)
    assert not admission.admits(before + 1)
    for count in (1, 16, 64) * 300:  # slower than ever: that counts at once
        admission.add(count, 1_000_000 + count * 400_000)
    assert (admission.capacity() or 0) < before
