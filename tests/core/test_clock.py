import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_mmrnn.core.clock import DeviceClock, WallClock, now_ns, wall_offset_ns

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


def test_a_drifting_jittering_device_is_tracked() -> None:
    for drift in (200.0, -200.0):
        for seed in range(3):
            stamps, true = run(drift, 3.0, 60, seed)
            late = np.abs(stamps - true)[int(30 * RATE / BLOCK) :]
            assert late.max() <= 5e6
            # not only bounded: no lasting offset, and smoother than the readings by far
            assert abs(np.mean((stamps - true)[-1000:])) < 0.5e6
            assert np.std(np.diff(stamps)[-1000:]) < 0.5e6


def test_exact_readings_are_unchanged() -> None:
    stamps, true = run(0.0, 0.0, 10)
    assert np.abs(stamps - true).max() <= 1


def test_a_jump_is_followed_immediately_and_counted() -> None:
    clock = DeviceClock(RATE)
    for k in range(100):
        clock.stamp(BLOCK, k * 20_000_000)
    assert clock.jumps == 0
    assert clock.stamp(BLOCK, 100 * 20_000_000 + 500_000_000) == 2_500_000_000
    assert clock.jumps == 1


def test_lost_samples_cause_a_jump() -> None:
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
def test_event_times_never_go_back(readings: list[tuple[int, int, bool]]) -> None:
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
def test_any_ordinary_device_is_tracked(drift: float, jitter: float, seed: int) -> None:
    stamps, true = run(drift, jitter, 35, seed)
    assert np.abs(stamps - true)[int(30 * RATE / BLOCK) :].max() <= 5e6


def test_wall_time_is_near_the_systems() -> None:
    import time

    assert abs(now_ns() + wall_offset_ns() - time.time_ns()) < 1_000_000_000


def portaudio(
    seconds: float, drift_ppm: float, jump_s: float = 0.0, seed: int = 0, pairs: bool = False
) -> tuple[np.ndarray, np.ndarray, DeviceClock]:
    """A device as PortAudio gives it: readings are late by what the scheduler takes, and now and then by much; with
    `pairs` two blocks come at once. After half the time `jump_s` of sound is lost, and no counter shows it.
    """
    rng = np.random.default_rng(seed)
    count = int(seconds * RATE / BLOCK)
    true = 5e9 + np.arange(1, count + 1) * (BLOCK / RATE * 1e9 / (1 + drift_ppm * 1e-6))
    true[count // 2 :] += jump_s * 1e9
    late = rng.exponential(0.5e6, count) + (rng.random(count) < 0.02) * rng.uniform(0, 15e6, count)
    if pairs:
        late[0::2] += BLOCK / RATE * 1e9
    clock = DeviceClock(RATE)
    return np.array([clock.stamp(BLOCK, round(t)) for t in true + late], float), true, clock


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([200.0, -200.0, 0.0]), st.sampled_from([0.0, 2.0, 0.5]), st.integers(0, 2**32 - 1))
def test_readings_that_are_only_ever_late_and_sound_that_is_lost(drift: float, jump_s: float, seed: int) -> None:
    stamps, true, clock = portaudio(64, drift, jump_s, seed)
    half, settled = len(true) // 2, int(30 * RATE / BLOCK)
    assert np.abs(stamps - true)[settled:half].max() <= 5e6
    assert np.abs(stamps - true)[half + settled :].max() <= 5e6
    # a jump is no slope: right after it the stamps are as near as a single reading is
    assert np.abs(stamps - true)[half : half + 50].max() <= 20e6
    assert clock.jumps == (jump_s > 0)
    assert (np.diff(stamps) > 0).all()


def test_a_driver_that_says_2_s_ago_once_does_not_turn_time_back() -> None:
    clock = DeviceClock(RATE)
    stamps = []
    for k in range(3000):
        wrong = -2_000_000_000 if k == 500 else 0
        stamps.append(clock.stamp(BLOCK, 5_000_000_000 + k * 20_000_000 + wrong))
    assert (np.diff(stamps) > 0).all()
    assert stamps[-1] == 5_000_000_000 + 2999 * 20_000_000
    assert clock.jumps == 2


def test_a_wall_clock_that_is_set_is_noticed_once_and_ours_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    true, by = time.time_ns, [0]
    monkeypatch.setattr(time, "time_ns", lambda: true() + by[0])
    wall, at_ns, steps = WallClock(), now_ns(), []
    for k in range(1, 40):
        if k == 10:
            by[0] = 2_000_000_000
        if k == 30:
            by[0] = -3_600_000_000_000
        # slewed as fast as a kernel does it: no step
        by[0] += 500_000
        steps.append(wall.poll(at_ns + k * 1_000_000_000))
        assert wall.poll(at_ns + k * 1_000_000_000 + 5) == 0, "it looks once a second"
    assert [round(s / 1e9) for s in steps if s] == [2, -3602]
    assert wall.steps == 2
    assert steps[9]
    assert steps[29]
