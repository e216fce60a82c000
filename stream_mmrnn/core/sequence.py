"""Sequence numbers: what is missing before a message of a numbered stream."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class SequenceTracker(Generic[Key]):
    """The next number of each stream. A number below the expected one is a publisher that restarted: nothing is
    missing before it.

    With a `limit` the memory is bounded: between `limit` and twice as many streams are remembered, those that were
    silent longest are forgotten first.
    """

    def __init__(self, limit: int = 0) -> None:
        self._limit = limit
        self._next: dict[Key, int] = {}
        self._older: dict[Key, int] = {}
        """Streams that have been silent since `_next` was last full."""

    def __len__(self) -> int:
        return len(self._next) + len(self._older)

    def __contains__(self, key: Key) -> bool:
        return key in self._next or key in self._older

    def observe(self, key: Key, seq: int, first: int) -> int:
        """Message `seq` of stream `key` has come: how many are missing before it.

        `first` is the number that a stream begins with that is not known yet: `seq` itself where the reader came in the
        middle, 0 where it saw the beginning.
        """
        expected = self._next.get(key)
        if expected is None:
            if self._limit and len(self._next) >= self._limit:
                self._older, self._next = self._next, {}
            expected = self._older.pop(key, first)
        self._next[key] = seq + 1
        return max(0, seq - expected)

    def pop(self, key: Key) -> int | None:
        """Forget a stream; its next number, or None if it was not known."""
        found = self._next.pop(key, None)
        older = self._older.pop(key, None)
        return older if found is None else found

    def forget(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self.pop(key)

    def numbers(self) -> dict[Key, int]:
        """The next number of each stream that is remembered."""
        return self._older | self._next

    def restore(self, numbers: Mapping[Key, int]) -> None:
        self._next, self._older = dict(numbers), {}
