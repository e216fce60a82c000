import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_mmrnn.clock import DeviceClock, now_ns, wall_offset_ns

RATE = 16_000
BLOCK = 320


def run(drift_ppm: float, jitter_ms: float, seconds: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Stamps of a device that runs `drift_ppm` fast, read with noise, and when its blocks truly ended."""
    rng = np.random.default_rng(seed)
    count = int(seconds * RATE / BLOCK)
    true = 5e9 + np.arange(1, count + 1) * (BLOCK / RATE * 1e9 / (1 + drift_ppm * 1e-6))
    clock = DeviceClock(RATE)
    stamps = [clock.stamp(BLOCK, round(t)) for t in true + rng.normal(0, jitter_ms * 1e6, count)]
    return np.array(stamps, float), true


def test_a_drifting_jittering_device_is_followed() -> None:
    for drift in (200.0, -200.0):
        for seed in range(3):
            stamps, true = run(drift, 3.0, 60, seed)
            late = np.abs(stamps - true)[int(30 * RATE / BLOCK) :]
            assert late.max() <= 5e6
            # not only bounded: no lasting offset, and smoother than the readings by far
            assert abs(np.mean((stamps - true)[-1000:])) < 0.5e6
            assert np.std(np.diff(stamps)[-1000:]) < 0.5e6


def test_a_perfect_device_is_left_alone() -> None:
    stamps, true = run(0.0, 0.0, 10)
    assert np.abs(stamps - true).max() <= 1


def test_a_jump_is_believed_at_once_and_counted() -> None:
    clock = DeviceClock(RATE)
    for k in range(100):
        clock.stamp(BLOCK, k * 20_000_000)
    assert clock.jumps == 0
    assert clock.stamp(BLOCK, 100 * 20_000_000 + 500_000_000) == 2_500_000_000
    assert clock.jumps == 1


def test_a_lost_stretch_is_not_smoothed_over() -> None:
    clock = DeviceClock(RATE)
    for k in range(100):
        clock.stamp(BLOCK, k * 20_000_000)
    clock.lost()
    # 30 ms are gone, less than what counts as a jump
    assert clock.stamp(BLOCK, 100 * 20_000_000 + 30_000_000) == 2_030_000_000
    assert clock.jumps == 1
    fresh = DeviceClock(RATE)
    fresh.lost()
    assert fresh.jumps == 0


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 4096), st.integers(0, 10**13), st.booleans()),
        min_size=1,
        max_size=60,
    )
)
def test_stamps_never_go_back(readings: list[tuple[int, int, bool]]) -> None:
    clock = DeviceClock(RATE)
    last = -1
    for frames, measured, lost in readings:
        if lost:
            clock.lost()
        stamp = clock.stamp(frames, measured)
        assert stamp > last
        last = stamp


@settings(max_examples=25, deadline=None)
@given(st.floats(-300, 300), st.floats(0, 3), st.integers(0, 2**32 - 1))
def test_any_ordinary_device_is_followed(drift: float, jitter: float, seed: int) -> None:
    stamps, true = run(drift, jitter, 35, seed)
    assert np.abs(stamps - true)[int(30 * RATE / BLOCK) :].max() <= 5e6


def test_wall_time_is_near_the_systems() -> None:
    import time

    assert abs(now_ns() + wall_offset_ns() - time.time_ns()) < 1_000_000_000
