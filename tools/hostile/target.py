"""What a target is: it takes cases made from a seed and raises StreamError if it refuses one."""

from __future__ import annotations

from random import Random
from typing import Protocol

WAIT_S = 20.0
TICK_NS = 40_000_000


class Target(Protocol):
    """Made once in a process of its own, with a folder; then fed."""

    def case(self, rng: Random, number: int) -> None: ...

    def close(self) -> dict[str, int]:
        """What it counted, by name."""


class MissedError(Exception):
    """What is honest did not come through, or a count is wrong."""
