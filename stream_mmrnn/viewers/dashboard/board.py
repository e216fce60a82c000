"""The newest state, picture and sound of the page, and the number of its clients. Knows nothing about HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Protocol

HEARTBEAT_S = 1.0
"""How often an event stream without news is written to, so that a disconnected client is noticed."""


class View(Protocol):
    """What a page shows, and what can be posted to it: a session, another one, a recording."""

    @property
    def board(self) -> Board: ...

    @property
    def posts(self) -> Mapping[str, Callable[[bytes], str]]:
        """By path, a function that takes the JSON body of a POST and returns "" or, as one sentence, why it is refused.
        They are called in the server's thread.
        """


class OwnView:
    """A view whose posts are given."""

    def __init__(self, posts: Mapping[str, Callable[[bytes], str]]) -> None:
        self.board, self.posts = Board(), posts


class Board:
    """Written from any thread, read in the server's thread."""

    def __init__(self) -> None:
        self._newest = (0, b"")
        self._changed = asyncio.Event()
        self.picture = b""
        self.sound = (0, b"")
        self.seen: dict[object, int] = {}
        """By client, the number of the state that it was sent last."""
        self.closing = False

    @property
    def clients(self) -> int:
        return len(self.seen)

    @property
    def delivered(self) -> bool:
        """Whether every client was sent the newest state."""
        return all(number == self._newest[0] for number in list(self.seen.values()))

    def put(self, state: bytes) -> None:
        self._newest = (self._newest[0] + 1, state)

    def wake(self) -> None:
        """Wake all waiting clients; call it in the server's thread."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def wait(self, seen: int) -> tuple[int, bytes]:
        """The newest state and its number: at once if it is newer than `seen`, else after `HEARTBEAT_S` at most."""
        if self._newest[0] == seen and not self.closing:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), HEARTBEAT_S)
        return self._newest
