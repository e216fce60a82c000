"""Served sessions, groups of them, and the ticks of both that wait to be stepped.

A session has a queue of ticks, a group one of blocks; a single tick of a session in a group waits in the group's, so
that each session's ticks keep their order. A batch takes the first of each queue. Knows nothing about engines and
replies.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, TypeAlias

import msgspec
import numpy as np

from stream_mmrnn.core.block import Block, Integers
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.raw_session import PendingPush
from stream_mmrnn.serve.turns import Peer

Key: TypeAlias = str | tuple[Peer, int]
"""Of a queue: a session's name, or a peer and the number of its group."""
NO_ONE: Peer = b""


class WaitingTick(NamedTuple):
    """One tick of a session."""

    served: Served
    peer: Peer
    step: protocol.Step
    received_ns: int
    push: PendingPush | None = None
    """Of a raw session: the push that completed the tick."""


class WaitingBlock(msgspec.Struct, gc=False, eq=False):
    """The ticks of a `steps`. Handles are rows of the group: who has them is looked up when they are stepped."""

    group: Group
    number: int
    block: Block
    received_ns: int
    refused: list[protocol.RowsRefused]
    """Rows of the message that are not in the block."""
    whole: bool
    """The block has all rows of the message."""


class Served:
    """An open session, and its ticks that wait where it is in no group."""

    __slots__ = ("group", "handle", "name", "peer", "row", "waiting")

    def __init__(self, name: str, peer: Peer, handle: int) -> None:
        self.name, self.peer, self.handle = name, peer, handle
        self.waiting: deque[WaitingTick] = deque()
        self.group: Group | None = None
        self.row = 0

    @property
    def key(self) -> Key:
        return self.name if self.group is None else self.group.key


class Group:
    """Rows of sessions of one peer, and what waits of them."""

    __slots__ = ("count", "handles", "key", "members", "names", "waiting")

    def __init__(self, peer: Peer, number: int) -> None:
        self.key = (peer, number)
        self.members: list[Served | None] = []
        self.names: list[str] = []
        """By row, also of sessions that are not open any more."""
        self.handles: Integers = np.zeros(0, np.int64)
        """By row; -1 where no session is open."""
        self.count = 0
        self.waiting: deque[WaitingBlock | WaitingTick] = deque()

    @property
    def peer(self) -> Peer:
        return self.key[0]

    @property
    def number(self) -> int:
        return self.key[1]

    def grow(self, rows: int) -> None:
        more = rows - len(self.members)
        if more > 0:
            self.members += [None] * more
            self.names += [""] * more
            self.handles = np.append(self.handles, np.full(more, -1))

    def put(self, row: int, served: Served) -> None:
        """Give a row to a session, which leaves the one that it had."""
        if served.group is not None:
            served.group.remove(served)
        before = self.members[row]
        if before is not None:
            self.remove(before)
        self.members[row], self.names[row], self.handles[row] = served, served.name, served.handle
        served.group, served.row = self, row
        self.count += 1

    def remove(self, served: Served) -> None:
        self.members[served.row] = served.group = None
        self.handles[served.row] = -1
        self.count -= 1


class TickQueues:
    """The sessions and groups of all peers, and which of them have something to step."""

    def __init__(self) -> None:
        self.served: dict[str, Served] = {}
        self.groups: dict[Key, Group] = {}
        self._ready: dict[Key, Served | Group] = {}
        """What waits; the one that has waited longest is first."""

    def __bool__(self) -> bool:
        return bool(self._ready)

    def waits(self, session: str) -> bool:
        """Whether a tick of the session waits, or may: one of its group does."""
        served = self.served.get(session)
        return served is not None and bool(self.queue_of(served))

    @staticmethod
    def queue_of(served: Served) -> deque[WaitingBlock | WaitingTick] | deque[WaitingTick]:
        return served.waiting if served.group is None else served.group.waiting

    def put(self, tick: WaitingTick) -> None:
        served = tick.served
        if served.group is None:
            served.waiting.append(tick)
            self._ready[served.name] = served
        else:
            served.group.waiting.append(tick)
            self._ready[served.group.key] = served.group

    def put_block(self, block: WaitingBlock) -> None:
        block.group.waiting.append(block)
        self._ready[block.group.key] = block.group

    def take(self) -> tuple[list[WaitingTick], list[WaitingBlock]]:
        """The oldest of each queue: at most one tick of each session."""
        ticks: list[WaitingTick] = []
        blocks: list[WaitingBlock] = []
        for key, of in list(self._ready.items()):
            if isinstance(of, Served):
                ticks.append(of.waiting.popleft())
            else:
                self._take_of(of, ticks, blocks)
            if not of.waiting:
                del self._ready[key]
        return ticks, blocks

    def _take_of(self, group: Group, ticks: list[WaitingTick], blocks: list[WaitingBlock]) -> None:
        """A block, or single ticks of different sessions."""
        seen: set[int] = set()
        waiting = group.waiting
        while waiting:
            first = waiting[0]
            if isinstance(first, WaitingBlock):
                if not seen:
                    waiting.popleft()
                    blocks.append(first)
                break
            if first.served.handle in seen:
                break
            waiting.popleft()
            if first.served.group is group:  # else it has left, and its ticks with it
                seen.add(first.served.handle)
                ticks.append(first)
        self.forget_empty(group)

    def drop(self, served: Served) -> None:
        """Forget a session and its ticks that wait; those in a group's blocks are refused when it is their turn."""
        self.served.pop(served.name, None)
        served.waiting.clear()
        if self._ready.get(served.name) is served:
            del self._ready[served.name]
        group = served.group
        if group is not None:
            group.remove(served)
            self.forget_empty(group)

    def forget_empty(self, group: Group) -> None:
        """Forget a group without sessions, when what waits of it has been answered."""
        if not group.count and not group.waiting and self.groups.get(group.key) is group:
            del self.groups[group.key]

    def drop_groups(self, peer: Peer) -> None:
        """A peer has disconnected: nothing of its groups is stepped or answered any more."""
        for group in [group for group in self.groups.values() if group.peer == peer]:
            for served in group.members:
                if served is not None:
                    group.remove(served)
            group.waiting.clear()
            self._ready.pop(group.key, None)
            del self.groups[group.key]
