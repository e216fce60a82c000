"""What a client's sessions and groups share: figures that need no request, and closing at the end of `with`.

Knows nothing about connections and messages.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sized
from types import TracebackType
from typing import Protocol, Self


class Waiting(Protocol):
    """The state of a session or group in a client."""

    @property
    def skipped(self) -> int: ...

    @property
    def unanswered(self) -> Sized: ...

    @property
    def answers(self) -> Sized: ...


class Figures:
    """Of one session, or of one group."""

    def __init__(self, state: Waiting) -> None:
        self._waiting = state

    @property
    def skipped(self) -> int:
        """Ticks that the server had seen already: duplicates, and those whose answers were lost when it died."""
        return self._waiting.skipped

    @property
    def waiting(self) -> int:
        """Ticks of a session, or blocks of a group, without an answer yet."""
        return len(self._waiting.unanswered)

    @property
    def unread(self) -> int:
        """Answers that have arrived and were not read yet."""
        return len(self._waiting.answers)

    def _post(self) -> None:
        """Hand waiting messages to the transport."""


class Closing:
    """A context manager that closes at its end."""

    def close(self, timeout_s: float = 5.0) -> None:
        raise AssertionError("each kind has its own")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            with contextlib.suppress(Exception):  # do not hide the first error
                self.close(1.0)


class AsyncClosing:
    """The same, awaited."""

    async def close(self, timeout_s: float = 5.0) -> None:
        raise AssertionError("each kind has its own")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if kind is None:
            await self.close()
        else:
            with contextlib.suppress(Exception):  # do not hide the first error
                await self.close(1.0)
