from hypothesis import given
from hypothesis import strategies as st

from stream_mmrnn.capture.stall_detector import StallDetector

MS = 1_000_000


def after_gaps(*gaps_ms: int, dense: bool = True) -> tuple[StallDetector, int]:
    stall_detector, at_ns = StallDetector(dense), 10**12
    stall_detector.on_sample(at_ns)
    for gap in gaps_ms:
        at_ns += gap * MS
        stall_detector.on_sample(at_ns)
    return stall_detector, at_ns


def test_a_stream_is_stale_after_twice_its_period_until_the_next_sample() -> None:
    stall_detector, at_ns = after_gaps(*[40] * 20)
    assert stall_detector.period_ns == 40 * MS
    assert stall_detector.wait_s(at_ns, 0.1) == 0.08
    assert stall_detector.wait_s(at_ns + 70 * MS, 0.1) == 0.01
    assert not stall_detector.check(at_ns + 80 * MS - 1)
    assert stall_detector.check(at_ns + 80 * MS)
    assert not stall_detector.check(at_ns + 90 * MS), "it is said once"
    assert stall_detector.wait_s(at_ns + 90 * MS, 0.1) == 0.1
    assert stall_detector.stale_ns(at_ns + 100 * MS) == 20 * MS
    assert stall_detector.on_sample(at_ns + 130 * MS)
    assert (stall_detector.silences, stall_detector.stale_ns(at_ns + 999 * MS)) == (1, 50 * MS)
    # one long gap does not change the period
    assert stall_detector.period_ns == 40 * MS


def test_the_period_is_learned_from_the_stream() -> None:
    assert after_gaps(*[20] * 10)[0].period_ns == 20 * MS
    # blocks in pairs: the period is that of the pairs, else every second gap would be a stall
    assert after_gaps(*[0, 40] * 10)[0].period_ns == 40 * MS
    # a camera in the dark: after a few long gaps the period is longer
    stall_detector, at_ns = after_gaps(*[33] * 32, *[100] * 5)
    assert stall_detector.period_ns == 100 * MS
    assert not stall_detector.check(at_ns + 150 * MS)


def test_a_new_sparse_or_stopped_stream_is_never_stale() -> None:
    for stall_detector, at_ns in (after_gaps(), after_gaps(40, 40, 40), after_gaps(*[40] * 9, dense=False)):
        assert not stall_detector.check(at_ns + 10_000 * MS)
        assert stall_detector.wait_s(at_ns, 0.1) == 0.1
    stall_detector, at_ns = after_gaps(*[40] * 9)
    assert stall_detector.check(at_ns + 80 * MS)
    stall_detector.stop(at_ns + 500 * MS)
    assert not stall_detector.check(at_ns + 9000 * MS)
    assert stall_detector.stale_ns(at_ns + 9000 * MS) == 420 * MS


@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from(["hear", "wait"])), max_size=80))
def test_random_events_count_stalls_and_stale_time_never_decreases(events: list[tuple[int, str]]) -> None:
    stall_detector, at_ns, begun, ended, before_ns = StallDetector(), 0, 0, 0, 0
    for gap, what in events:
        at_ns += gap * MS
        if what == "hear":
            ended += stall_detector.on_sample(at_ns)
        else:
            begun += stall_detector.check(at_ns)
        assert begun - ended in (0, 1)
        assert stall_detector.silences == begun
        assert before_ns <= stall_detector.stale_ns(at_ns) <= at_ns
        before_ns = stall_detector.stale_ns(at_ns)
        assert 0 <= stall_detector.wait_s(at_ns, 0.1) <= 0.1
