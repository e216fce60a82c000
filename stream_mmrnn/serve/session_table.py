"""SessionTable: what every tick changes of the open sessions, as arrays by the engine's handles.

A block of ticks updates it without a loop. `OpenSession` is one row of it. Knows nothing about engines and disks.
"""

from __future__ import annotations

import hashlib
from typing import Literal, TypeAlias

import numpy as np

from stream_mmrnn.core.block import Flags, Integers
from stream_mmrnn.predict.snapshots import NEVER

Reason: TypeAlias = Literal["idle", "cancelled", "leaving", "lost"]
"""Why a session lost its slot: it was idle, its peer disconnected, the engine stops, or a shard died."""


class SessionTable:
    """Rows of open sessions; other rows have no meaning."""

    def __init__(self) -> None:
        self.open: Flags = np.zeros(0, np.bool_)
        self.last: Integers = np.zeros(0, np.int64)
        """Index of the newest tick."""
        self.active_ns: Integers = np.zeros(0, np.int64)
        """When it last had a tick, or was opened."""
        self.unsaved: Integers = np.zeros(0, np.int64)
        """Ticks since the newest snapshot; -1 where there is none."""
        self.leaves: Flags = np.zeros(0, np.bool_)
        """It leaves its slot because it was idle; a tick keeps it there."""
        self.names: list[str] = []

    def add(self, handle: int, name: str, now_ns: int, last: int, unsaved: int) -> None:
        if handle >= len(self.names):
            self._grow(max(2 * len(self.names), handle + 1, 64))
        self.open[handle], self.leaves[handle] = True, False
        self.last[handle], self.active_ns[handle], self.unsaved[handle] = last, now_ns, unsaved
        self.names[handle] = name

    def _grow(self, size: int) -> None:
        more = size - len(self.names)
        self.open, self.leaves = (np.append(of, np.zeros(more, np.bool_)) for of in (self.open, self.leaves))
        self.last, self.active_ns, self.unsaved = (
            np.append(of, np.zeros(more, np.int64)) for of in (self.last, self.active_ns, self.unsaved)
        )
        self.names += [""] * more

    def remove(self, handle: int) -> None:
        self.open[handle] = self.leaves[handle] = False
        self.names[handle] = ""

    def stepped(self, handles: Integers, indices: Integers) -> int:
        """Sessions have had newer ticks; returns how many indices were left out."""
        last = self.last[handles]
        left_out = indices - last - 1
        skipped = int(left_out[last != NEVER].sum())
        self.last[handles] = indices
        unsaved = self.unsaved[handles]
        self.unsaved[handles] = unsaved + (unsaved >= 0)
        return skipped

    def due(self, every: int) -> list[str]:
        """Sessions without a snapshot, then those with `every` unsaved ticks and more, the most first."""
        handles = np.flatnonzero(self.open & ((self.unsaved < 0) | (self.unsaved >= every)))
        unsaved = self.unsaved[handles]
        order = np.lexsort((-unsaved, unsaved >= 0))
        return [self.names[i] for i in handles[order].tolist()]

    def idle_for(self, duration_ns: int, now_ns: int) -> list[str]:
        """Sessions without a tick for longer than that."""
        return [self.names[i] for i in np.flatnonzero(self.open & (now_ns - self.active_ns > duration_ns)).tolist()]

    def oldest_ns(self, now_ns: int) -> int:
        """When the session that has been silent for longest was last active; now where there is none."""
        return int(self.active_ns[self.open].min(initial=now_ns))


class OpenSession:
    """A session that has a slot."""

    __slots__ = ("_table", "handle", "leaving", "stored", "token", "token_sha256")

    def __init__(
        self,
        table: SessionTable,
        name: str,
        handle: int,
        token: str,
        now_ns: int,
        last: int = NEVER,
        unsaved: int = -1,
        stored: bool = False,
    ) -> None:
        """`stored`: a state of it may be on disk."""
        table.add(handle, name, now_ns, last, unsaved)
        self._table, self.handle, self.token, self.stored = table, handle, token, stored
        self.token_sha256 = hash_of(token)
        self.leaving: Reason | None = None
        """It leaves its slot when its state is written, unless it is used before that."""

    @property
    def last(self) -> int:
        return self._table.last.item(self.handle)

    @property
    def active_ns(self) -> int:
        return self._table.active_ns.item(self.handle)

    @active_ns.setter
    def active_ns(self, value: int) -> None:
        self._table.active_ns[self.handle] = value

    @property
    def unsaved(self) -> int:
        return self._table.unsaved.item(self.handle)

    @unsaved.setter
    def unsaved(self, value: int) -> None:
        self._table.unsaved[self.handle] = value

    def leave(self, reason: Reason | None) -> None:
        self.leaving = reason
        self._table.leaves[self.handle] = reason == "idle"

    def close(self) -> None:
        self._table.remove(self.handle)


def hash_of(token: str) -> str:
    """What is kept of a token: a reader of the disk must not be able to resume the session."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
