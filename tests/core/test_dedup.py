from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stream_mmrnn.core.dedup import WINDOW, TickDeduplicator


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(-WINDOW // 4, WINDOW // 4)), max_size=200))
def test_it_knows_what_it_had_in_whatever_order(ticks: list[tuple[str, int]]) -> None:
    deduplicator, had = TickDeduplicator(), set()
    for session, tick in ticks:
        assert deduplicator.first(session, tick) is ((session, tick) not in had)
        had.add((session, tick))
    assert deduplicator.count == len(ticks) - len(had)


def test_an_engine_that_went_on_fills_what_was_missing() -> None:
    deduplicator = TickDeduplicator()
    assert [deduplicator.first("a", k) for k in (10, 11, 14)] == [True] * 3
    assert [deduplicator.first("a", k) for k in range(9, 17)] == [True, False, False, True, True, False, True, True]


def test_far_back_is_somebody_who_counts_anew() -> None:
    deduplicator = TickDeduplicator()
    assert deduplicator.first("a", 10 * WINDOW)
    assert deduplicator.first("a", 0)
    assert not deduplicator.first("a", 0)
    assert deduplicator.first("a", 2**63)
    assert deduplicator.first("a", -(2**63))


def test_its_memory_is_bounded() -> None:
    deduplicator = TickDeduplicator(sessions=3)
    for name in "abcd":
        assert deduplicator.first(name, 1)
    assert len(deduplicator._had) == 3
    assert deduplicator.first("a", 1)
    assert not deduplicator.first("d", 1)
    for k in range(3 * WINDOW):
        deduplicator.first("d", k)
    assert deduplicator._had["d"][1].bit_length() <= WINDOW
