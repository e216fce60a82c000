"""Turns: how much of each peer's messages is handled between two batches, and what waits until its peer may have more.

Ticks cost nothing here, for a batch takes one of each session. Other messages are limited by a budget per peer and
batch. What is over it waits, and what follows it of the same session or group waits behind it: a session's messages
keep their order. Knows nothing about sessions, and nothing of what messages do.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from typing import NamedTuple, TypeAlias

from stream_mmrnn.serve import protocol

Peer: TypeAlias = bytes
BUDGET = 32
"""Of each peer, between two batches."""
_COST = {
    protocol.Hello: 4,
    protocol.Open: 4,
    protocol.OpenGroup: 4,  # each session
    protocol.Step: 0,
    protocol.Steps: 0,
    protocol.PushSample: 1,
    protocol.Flush: 4,
    protocol.Reset: 4,
    protocol.Close: 4,
}
"""By request: about 0.1 ms each (an open or close may read a state from the disk)."""
_PICTURE_COST = 16
_JPEG = b"\xff\xd8"
_MOST_BYTES = 16 << 20
"""Of one peer, that wait."""


OPENED_AT_ONCE = BUDGET // _COST[protocol.OpenGroup]
"""Sessions of a `group` that a budget is enough for."""


def cost_of(request: protocol.Request) -> int:
    if isinstance(request, protocol.OpenGroup):
        return _COST[protocol.OpenGroup] * len(request.sessions)
    if isinstance(request, protocol.PushSample) and request.data.startswith(_JPEG) and not request.vector:
        return _PICTURE_COST  # it is decoded
    return _COST[type(request)]


class Put(NamedTuple):
    """A message that waits."""

    peer: Peer
    key: Hashable
    """Messages with the same one keep their order: of a session, or of a group."""
    request: protocol.Request
    size: int
    received_ns: int
    number: int = 0
    """Grows with each message of a peer."""


class Turns:
    """`pay` for what is handled at once, `put_off` the rest, and handle what `due` yields once per batch."""

    def __init__(self, most: int) -> None:
        """`most`: messages of one peer that may wait."""
        self._most = most
        self._spent: Counter[Peer] = Counter()
        self._put_off: dict[Peer, dict[Hashable, deque[Put]]] = {}
        self._count: Counter[Peer] = Counter()
        self._bytes: Counter[Peer] = Counter()

    def __bool__(self) -> bool:
        """Whether a message waits."""
        return bool(self._put_off)

    def has(self, peer: Peer, key: Hashable) -> bool:
        """Whether a message of this peer with this key waits."""
        return peer in self._put_off and key in self._put_off[peer]

    def has_earlier(self, put: Put, key: Hashable) -> bool:
        """Whether a message of the same peer waits that has this key and came before `put`."""
        waiting = self._put_off.get(put.peer, {}).get(key)
        return waiting is not None and len(waiting) > 0 and waiting[0].number < put.number

    def __len__(self) -> int:
        """How many messages wait."""
        return sum(self._count.values())

    def pay(self, peer: Peer, cost: int) -> bool:
        """Take a cost from the peer's budget; False where it has too little."""
        if not cost:
            return True
        if self._spent[peer] + cost > BUDGET:
            return False
        self._spent[peer] += cost
        return True

    def put_off(self, put: Put) -> bool:
        """Let a message wait; False where too many of its peer do."""
        peer = put.peer
        if self._count[peer] >= self._most or self._bytes[peer] + put.size > _MOST_BYTES:
            return False
        self._put_off.setdefault(peer, {}).setdefault(put.key, deque()).append(put)
        self._count[peer] += 1
        self._bytes[peer] += put.size
        return True

    def begin_batch(self) -> None:
        """Give every peer its whole budget; nothing is kept of one that is gone."""
        self._spent.clear()

    def due(self, can: Callable[[Put], bool]) -> Iterator[Put]:
        """Begin the next batch's budgets: the messages that are to be handled now, those of a key in order.

        `can`: whether a message can be handled now; if not, it goes on waiting.
        """
        self.begin_batch()
        for peer, by_key in list(self._put_off.items()):
            for key in list(by_key):
                waiting = by_key[key]
                before = len(waiting)
                while waiting and can(waiting[0]) and self.pay(peer, cost_of(waiting[0].request)):
                    put = waiting.popleft()
                    self._count[peer] -= 1
                    self._bytes[peer] -= put.size
                    yield put
                if len(waiting) < before:
                    del by_key[key]
                    if waiting:
                        by_key[key] = waiting  # the last in turn
                if self._spent[peer] >= BUDGET:
                    break
            if not by_key:
                self.forget(peer)

    def forget(self, peer: Peer) -> None:
        """Drop all that waits of a peer."""
        for of in (self._put_off, self._count, self._bytes):
            of.pop(peer, None)
