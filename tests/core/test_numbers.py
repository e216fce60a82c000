from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_mmrnn.core.numbers import whole_number


@given(st.integers(-10, 200), st.integers(0, 50), st.integers(50, 150))
def test_a_number_within_its_bounds(number: int, least: int, most: int) -> None:
    assert whole_number(str(number), least, most) == (number if least <= number <= most else None)


@pytest.mark.parametrize("text", ["", "²", "٣", "+1", " 1", "1_0", "0x1", "1.0", "0001", "9" * 5000])
def test_anything_else_is_none(text: str) -> None:
    assert whole_number(text, 0, 999) is None


@given(st.text())
def test_no_text_is_an_error(text: str) -> None:
    whole_number(text, 0, 10**6)
