"""TickDeduplicator: which ticks a reader has already had. An engine that was restarted publishes some again."""

from __future__ import annotations

from collections import OrderedDict

WINDOW = 4096
"""Ticks below the newest that are remembered. A tick further back is no repeat: the session counts anew."""


class TickDeduplicator:
    """Tells the first time of a tick from all others, in bounded memory."""

    def __init__(self, sessions: int = 1024) -> None:
        """Of more than `sessions` those are forgotten that were silent longest."""
        self._sessions = sessions
        self._had: OrderedDict[str, tuple[int, int]] = OrderedDict()
        """By session the newest tick, and a mask: bit i says whether the tick i below it was had."""
        self.count = 0
        """Ticks that came again."""

    def first(self, session: str, tick: int) -> bool:
        """Whether this tick is new; counts it where it is not."""
        newest, mask = self._had.pop(session, (tick, 0))
        ahead = tick - newest
        if abs(ahead) >= WINDOW:
            newest, mask = tick, 0
        elif ahead > 0:
            newest, mask = tick, (mask << ahead) & ((1 << WINDOW) - 1)
        bit = 1 << (newest - tick)
        new = not mask & bit
        self._had[session] = (newest, mask | bit)
        if len(self._had) > self._sessions:
            self._had.popitem(last=False)
        self.count += not new
        return new
