"""How much a mouth moves: scale, frame rate, restart, and the state."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_mmrnn.capture.encoders.mouth_movement import MouthMovement

LIPS, MOUTH = np.linspace(-1, 1, 80, dtype=np.float32), np.array([0.1, 0.5, 0.3, 0.6], np.float32)
STILL = np.log(np.array([0.003, 0.003, 0.002, 0.002], np.float32))


def fed(movement: MouthMovement, by: list[float], rate_hz: float = 25.0, start_ns: int = 10**9) -> np.ndarray:
    """Pictures of lips that are shifted by these distances."""
    return np.stack(
        [movement.feed(LIPS + np.float32(d), MOUTH, start_ns + round(i * 1e9 / rate_hz)) for i, d in enumerate(by)]
    )


def test_a_still_mouth_is_the_least() -> None:
    assert fed(MouthMovement(), [0.0] * 20) == pytest.approx(np.tile(STILL, (20, 1)), abs=1e-3)


def test_each_number_is_what_it_says() -> None:
    found = np.exp(fed(MouthMovement(), [0.0] * 40 + [0.1] * 6)) - np.exp(STILL)
    measures, lips, moved, step = found[40:].T
    assert measures == pytest.approx(np.zeros(6), abs=1e-5), "the measures of the mouth stay"
    mean = 1 - np.exp(-0.04 / (4 / 3))
    assert lips[0] == pytest.approx(0.1 * (1 - mean), rel=1e-2)
    assert (np.diff(lips) < 0).all(), "the running mean follows"
    assert moved == pytest.approx([0.1, 0.1, 0.1, 0.1, 0, 0], abs=1e-5), "within 160 ms"
    assert step == pytest.approx([0.1, 0, 0, 0, 0, 0], abs=1e-5)


def test_it_says_about_the_same_at_any_frame_rate() -> None:
    """A mouth that opens at a constant speed for half a second."""
    ends = [
        fed(MouthMovement(), list(np.r_[np.zeros(2 * rate), np.linspace(0, 0.2, rate // 2)]), rate)[-1]
        for rate in (12, 25, 50, 100)
    ]
    assert np.ptp(ends, axis=0).max() < 0.35


def test_another_face_begins_anew() -> None:
    movement = MouthMovement()
    fed(movement, list(np.random.default_rng(0).random(30)))
    movement.reset()
    assert fed(movement, [0.5] * 5) == pytest.approx(np.tile(STILL, (5, 1)), abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 1, width=32), st.integers(0, 200_000_000)), min_size=2, max_size=40), st.data())
def test_the_state_is_whole(pictures: list[tuple[float, int]], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(pictures)))
    times = np.cumsum([gap for _, gap in pictures])

    def run(movement: MouthMovement, first: int, last: int) -> list[bytes]:
        return [
            movement.feed(LIPS * np.float32(pictures[k][0]), MOUTH, int(times[k])).tobytes() for k in range(first, last)
        ]

    one, other = MouthMovement(), MouthMovement()
    whole = run(MouthMovement(), 0, len(pictures))
    before = run(one, 0, cut)
    other.restore(one.snapshot())
    assert before + run(other, cut, len(pictures)) == whole
    assert all(np.isfinite(np.frombuffer(x, np.float32)).all() for x in whole)
