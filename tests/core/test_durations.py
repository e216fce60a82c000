"""Durations as people write and read them."""

from __future__ import annotations

import pytest

from stream_mmrnn.core.durations import parse_ns, spoken
from stream_mmrnn.core.errors import UsageError

S = 1_000_000_000


def test_a_number_and_a_unit() -> None:
    written = {"40ms": S // 25, "15min": 900 * S, "1.5h": 5400 * S, " 1d ": 86_400 * S, "2 w": 14 * 86_400 * S}
    assert {text: parse_ns(text, "--tick") for text in written} == written


@pytest.mark.parametrize("wrong", ["", "1", "0s", "-1s", "1 day", "nan", "1e3s", "999999999999w"])
def test_anything_else_is_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match=r"--tick is .*: expected a duration above 0"):
        parse_ns(wrong, "--tick")


def test_durations_are_said_in_the_unit_that_suits_them() -> None:
    said = [spoken(seconds) for seconds in (0, 0.04, 0.3, 599, 900, 7200, 23_400, 126_230_400)]
    assert said == ["0.0 s", "40 ms", "0.3 s", "599.0 s", "15 min", "2 h", "6.5 h", "1461 d"]
