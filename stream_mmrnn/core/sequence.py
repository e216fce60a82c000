"""Sequence numbers: how many messages of a numbered stream were lost."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class SequenceTracker(Generic[Key]):
    """Tracks the next number of each stream. A number below the expected one means that the publisher restarted; no
    message counts as missing then.

    With a `limit` the memory is bounded: it keeps between `limit` and twice as many streams, and evicts those without
    messages for the longest time.
    """

    def __init__(self, limit: int = 0) -> None:
        self._limit = limit
        self._next: dict[Key, int] = {}
        self._older: dict[Key, int] = {}
        """Streams without a message since `_next` was last full."""

    def __len__(self) -> int:
        return len(self._next) + len(self._older)

    def __contains__(self, key: Key) -> bool:
        return key in self._next or key in self._older

    def observe(self, key: Key, seq: int, first: int) -> int:
        """Record message `seq` of stream `key`; returns how many messages are missing before it.

        `first`: the expected first number of an unknown stream: `seq` itself if the reader joined late, 0 if it
        reads from the beginning.
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
        """The next number of each known stream."""
        return self._older | self._next

    def restore(self, numbers: Mapping[Key, int]) -> None:
        self._next, self._older = dict(numbers), {}
