from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stream_mmrnn.repeats import WINDOW, Repeats


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(-WINDOW // 4, WINDOW // 4)), max_size=200))
def test_it_knows_what_it_had_in_whatever_order(ticks: list[tuple[str, int]]) -> None:
    repeats, had = Repeats(), set()
    for session, tick in ticks:
        assert repeats.first(session, tick) is ((session, tick) not in had)
        had.add((session, tick))
    assert repeats.count == len(ticks) - len(had)


def test_an_engine_that_went_on_fills_what_was_missing() -> None:
    repeats = Repeats()
    assert [repeats.first("a", k) for k in (10, 11, 14)] == [True] * 3
    assert [repeats.first("a", k) for k in range(9, 17)] == [True, False, False, True, True, False, True, True]


def test_far_back_is_somebody_who_counts_anew() -> None:
    repeats = Repeats()
    assert repeats.first("a", 10 * WINDOW)
    assert repeats.first("a", 0)
    assert not repeats.first("a", 0)
    assert repeats.first("a", 2**63)
    assert repeats.first("a", -(2**63))


def test_its_memory_is_bounded() -> None:
    repeats = Repeats(sessions=3)
    for name in "abcd":
        assert repeats.first(name, 1)
    assert len(repeats._had) == 3
    assert repeats.first("a", 1)
    assert not repeats.first("d", 1)
    for k in range(3 * WINDOW):
        repeats.first("d", k)
    assert repeats._had["d"][1].bit_length() <= WINDOW
