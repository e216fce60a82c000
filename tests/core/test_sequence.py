"""What sequence numbers say is missing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stream_mmrnn.core.sequence import SequenceTracker

KEYS = st.sampled_from("abc")


@given(st.lists(st.tuples(KEYS, st.integers(0, 5)), max_size=60))
def test_skipped_numbers_are_missing(sent: list[tuple[str, int]]) -> None:
    """Each stream counts up and skips some numbers: the tracker finds exactly those, however streams interleave."""
    tracker: SequenceTracker[str] = SequenceTracker()
    at = dict.fromkeys("abc", 0)
    for key, skipped in sent:
        seq = at[key] + skipped
        assert tracker.observe(key, seq, 0) == skipped
        at[key] = seq + 1
    assert tracker.numbers() == {key: n for key, n in at.items() if n}


@given(st.integers(0, 100), st.integers(0, 100))
def test_a_lower_number_is_a_restart(before: int, after: int) -> None:
    tracker: SequenceTracker[str] = SequenceTracker()
    tracker.observe("a", before, before)
    assert tracker.observe("a", after, 0) == max(0, after - before - 1)
    assert tracker.observe("a", after + 1, 0) == 0


def test_a_late_reader_misses_no_earlier_messages() -> None:
    tracker: SequenceTracker[str] = SequenceTracker()
    assert tracker.observe("a", 7, 7) == 0
    assert tracker.observe("a", 9, 9) == 1


@given(st.lists(st.integers(0, 30), max_size=200), st.integers(1, 8))
def test_memory_is_bounded_and_the_last_streams_are_known(keys: list[int], limit: int) -> None:
    tracker: SequenceTracker[int] = SequenceTracker(limit)
    at: dict[int, int] = {}
    for i, key in enumerate(keys):
        recent = set(keys[max(0, i - limit + 1) : i])
        missing = tracker.observe(key, at.get(key, 0), at.get(key, 0))
        if key in recent:
            assert missing == 0
        at[key] = at.get(key, 0) + 1
        assert len(tracker) <= 2 * limit
        assert key in tracker


@given(st.dictionaries(KEYS, st.integers(1, 99)), KEYS)
def test_a_snapshot_restores_and_a_popped_stream_is_forgotten(numbers: dict[str, int], key: str) -> None:
    tracker: SequenceTracker[str] = SequenceTracker()
    tracker.restore(numbers)
    assert tracker.numbers() == numbers
    assert tracker.pop(key) == numbers.get(key)
    assert key not in tracker
    tracker.forget(numbers)
    assert len(tracker) == 0
