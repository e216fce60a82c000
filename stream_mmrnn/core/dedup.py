"""TickDeduplicator: recognises ticks that an engine published again after a restart."""

from __future__ import annotations

from collections import OrderedDict

WINDOW = 4096
"""Ticks remembered below the newest. A tick further back is not a duplicate: the session has restarted its count."""


class TickDeduplicator:
    """Recognises duplicate ticks, in bounded memory."""

    def __init__(self, sessions: int = 1024) -> None:
        """`sessions`: maximum number of sessions; the least recently used are evicted."""
        self._sessions = sessions
        self._seen: OrderedDict[str, tuple[int, int]] = OrderedDict()
        """By session: the newest tick, and a mask in which bit i means that the tick i below it was seen."""
        self.count = 0
        """Number of duplicates."""

    def first(self, session: str, tick: int) -> bool:
        """Whether this tick is new; a duplicate is counted."""
        newest, mask = self._seen.pop(session, (tick, 0))
        ahead = tick - newest
        if abs(ahead) >= WINDOW:
            newest, mask = tick, 0
        elif ahead > 0:
            newest, mask = tick, (mask << ahead) & ((1 << WINDOW) - 1)
        bit = 1 << (newest - tick)
        new = not mask & bit
        self._seen[session] = (newest, mask | bit)
        if len(self._seen) > self._sessions:
            self._seen.popitem(last=False)
        self.count += not new
        return new
