"""Limits of what the live view keeps, and how it shortens what it is given: the bus is untrusted input."""

from __future__ import annotations

import math

MAX_HEADS = 8
MAX_OUTPUTS = 32
"""Numbers shown of one head."""
MAX_MODALITIES = 64
MAX_SESSIONS = 1024


def clean(text: str, most: int = 64) -> str:
    """Text that can be shown: printable characters only, at most `most` of them."""
    return "".join(c if c.isprintable() else " " for c in text[:most])


def short(value: float | None) -> float | None:
    """Four significant digits; None, a gap in the line, if it is not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def ms(ns: int) -> float:
    return round(ns / 1e6, 1)
