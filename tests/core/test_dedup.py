from __future__ import annotations

import pickle

from hypothesis import given
from hypothesis import strategies as st

from stream_mmrnn.core.dedup import WINDOW, TickDeduplicator


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(-WINDOW // 4, WINDOW // 4)), max_size=200))
def test_duplicates_are_recognised_in_any_order(ticks: list[tuple[str, int]]) -> None:
    deduplicator, had = TickDeduplicator(), set()
    for session, tick in ticks:
        assert deduplicator.first(session, tick) is ((session, tick) not in had)
        had.add((session, tick))
    assert deduplicator.count == len(ticks) - len(had)


def test_missing_ticks_may_arrive_later() -> None:
    deduplicator = TickDeduplicator()
    assert [deduplicator.first("a", k) for k in (10, 11, 14)] == [True] * 3
    assert [deduplicator.first("a", k) for k in range(9, 17)] == [True, False, False, True, True, False, True, True]


def test_a_tick_far_back_is_a_restarted_count() -> None:
    deduplicator = TickDeduplicator()
    assert deduplicator.first("a", 10 * WINDOW)
    assert deduplicator.first("a", 0)
    assert not deduplicator.first("a", 0)
    assert deduplicator.first("a", 2**63)
    assert deduplicator.first("a", -(2**63))


def test_memory_is_bounded() -> None:
    deduplicator = TickDeduplicator(sessions=3)
    for name in "abcd":
        assert deduplicator.first(name, 1)
    assert deduplicator.first("a", 1), "it was evicted"
    assert not deduplicator.first("d", 1)
    for k in range(3 * WINDOW):
        deduplicator.first("d", k)
    full = len(pickle.dumps(deduplicator))
    for k in range(3 * WINDOW, 6 * WINDOW):
        deduplicator.first("d", k)
    assert len(pickle.dumps(deduplicator)) <= full + 16
    for i in range(100):
        deduplicator.first(f"s{i}", 1)
    assert len(pickle.dumps(deduplicator)) <= full
