"""A simulation: a remote clock with an offset, a rate and jumps, and a network that adds delays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_mmrnn.capture.remote_clock import RemoteClock

S = 1_000_000_000
MS = 1_000_000
PERIOD = 40 * MS


def remote_of(offset_ns: int, ppm: float, jumps: list[tuple[int, int]]) -> Callable[[int], int]:
    """What the remote clock reads at a true time; `jumps` are (when, by how much)."""
    return lambda at_ns: at_ns + offset_ns + round(at_ns * ppm * 1e-6) + sum(by for when, by in jumps if at_ns >= when)


def run(
    ppm: float, jumps: list[tuple[int, int]], seconds: int, mean_delay_ms: float, both_ways: bool, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, RemoteClock]:
    """True times of samples, 25 per second, their estimated times, and the clock."""
    rng = np.random.default_rng(seed)
    remote = remote_of(1_700_000_000 * S, ppm, jumps)
    clock = RemoteClock()
    true, stamps, received_ns = [], [], 0
    for k in range(seconds * 25):
        at_ns = 50 * S + k * PERIOD
        there, back = (round((0.3 + rng.exponential(mean_delay_ms)) * MS) for _ in range(2))
        stamp = remote(at_ns)
        received_ns = max(at_ns + back, received_ns)  # a stream keeps its order
        if both_ways:
            if k % 5 == 0:
                clock.exchange(at_ns - there, stamp, at_ns + back)
            stamps.append(clock.stamp(stamp))
        else:
            stamps.append(clock.arrived(stamp, received_ns))
            assert stamps[-1] <= received_ns or stamps[-1] == stamps[-2] + 1
        true.append(at_ns)
    return np.array(true), np.array(stamps), clock


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize("ppm", [200.0, -200.0])
def test_a_clock_that_drifts_by_200_ppm_is_followed(ppm: float, both_ways: bool) -> None:
    for seed in range(3):
        true, stamps, clock = run(ppm, [], 100, 3.0, both_ways, seed)
        assert np.abs(stamps - true)[30 * 25 :].max() <= 3 * MS
        assert clock.rate_ppm == pytest.approx(-ppm, abs=10)
        assert clock.jumps == 0


@pytest.mark.parametrize("both_ways", [True, False])
@pytest.mark.parametrize("by_s", [2, -2])
def test_a_jump_resets_the_estimate(by_s: int, both_ways: bool) -> None:
    when = 50 * S + 20 * S
    true, stamps, clock = run(200.0, [(when, by_s * S)], 60, 2.0, both_ways)
    assert clock.jumps == 1
    wrong = np.abs(stamps - true) > 5 * MS
    assert not wrong[true >= when + 30 * S].any()
    # exact again much sooner: at once after a jump forward, and after the length of a jump back
    assert not wrong[true >= when + 3 * S].any()
    assert (np.diff(stamps) > 0).all()


def test_a_queue_that_drains_is_no_jump() -> None:
    """For 2 s nothing arrives, and then everything at once: the messages are late, the clock has not jumped."""
    clock, remote = RemoteClock(), remote_of(5 * S, 0.0, [])
    for k in range(400):
        at_ns = 50 * S + k * PERIOD
        stalled = 200 <= k < 250
        received_ns = 50 * S + 250 * PERIOD + k if stalled else at_ns + MS
        assert abs(clock.arrived(remote(at_ns), received_ns) - at_ns) <= MS
    assert clock.jumps == 0


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.floats(-300, 300),
    st.integers(-(10**18), 10**18),
    st.floats(0.0, 4.0),
    st.lists(st.tuples(st.integers(50, 90), st.sampled_from([-2 * S, 2 * S, -S, S])), max_size=3),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_stamps_never_go_back_and_are_exact_after_30_s(
    ppm: float, offset_ns: int, delay_ms: float, jumps: list[tuple[int, int]], both_ways: bool, seed: int
) -> None:
    last = max((when for when, _ in jumps), default=50)
    true, stamps, _ = run(ppm, [(when * S, by) for when, by in jumps], last - 50 + 34, delay_ms, both_ways, seed)
    assert (np.diff(stamps) > 0).all()
    assert np.abs(stamps - true)[true >= (last + 30) * S].max() <= 5 * MS


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(-(2**62), 2**62), st.integers(0, 2**62), st.integers(0, 2**62)),
        min_size=1,
        max_size=60,
    )
)
def test_random_readings_never_make_it_fail_or_go_back(readings: list[tuple[bool, int, int, int]]) -> None:
    clock, last = RemoteClock(), -(2**70)
    for one_way, remote_ns, sent_ns, received_ns in readings:
        if one_way:
            stamp = clock.arrived(remote_ns, received_ns)
        else:
            clock.exchange(sent_ns, remote_ns, received_ns)
            stamp = clock.stamp(remote_ns)
        assert stamp > last
        last = stamp
