"""Whole numbers in texts from outside. Knows nothing about what they count."""

from __future__ import annotations


def whole_number(text: str, least: int, most: int) -> int | None:
    """The number that ASCII digits spell, within bounds; None for anything else. `most` bounds the digits, too: Python
    raises ValueError at some thousands of them, and leading zeros would hide how many are sent.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(most))):
        return None
    number = int(text)
    return number if least <= number <= most else None
