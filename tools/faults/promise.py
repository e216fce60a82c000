"""What a promise is: a figure with its bound. Knows nothing about how one is broken or measured.

A module beside this one tries to break the promises of one subject. It has a `TITLE`, what it does not promise as
`NOT_PROMISED` (sentences), and `run(quick, say)`, which yields figures as they are measured: with `quick` in seconds,
for the test suite, else in full. `say` takes a line of progress.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, Protocol

Say = Callable[[str], None]


class Figure(NamedTuple):
    """One promise as measured."""

    name: str
    """Stays the same from release to release: `subject_what_unit`."""
    what: str
    """What was done and counted, in one line."""
    value: float
    unit: str
    """`s`, `ms`, `MB`, `messages`, ...; "" for a ratio."""
    bound: float
    relation: Literal["<=", ">=", "=="] = "<="
    timed: bool = False
    """It moves with how busy the machine is: the test suite prints it and does not judge it."""

    @property
    def held(self) -> bool:
        value, bound = self.value, self.bound
        return value <= bound if self.relation == "<=" else value >= bound if self.relation == ">=" else value == bound


class Subject(Protocol):
    """A module of promises."""

    TITLE: str
    NOT_PROMISED: tuple[str, ...]

    def run(self, quick: bool, say: Say) -> Iterator[Figure]: ...
