"""Owners: which peer has which sessions and groups, how it gets and loses them, and what has to wait for that.

Knows nothing about queues' order, budgets and steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from stream_mmrnn.core.errors import Busy, StreamError, UnknownSession
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.groups import NO_ONE, Group, Key, Served, TickQueues
from stream_mmrnn.serve.push_handler import PushHandler
from stream_mmrnn.serve.sessions import Sessions
from stream_mmrnn.serve.turns import Peer, Put, Turns

_PEER_RETRY_S = 1.0
"""What a peer with too many sessions is told to wait."""
_NOT_OWNER = "the session belongs to another connection; open it with its token to take it over"


class Owners:
    """A session belongs to the peer that opened it, until that closes it or leaves, or another one has its token."""

    def __init__(
        self,
        sessions: Sessions,
        queues: TickQueues,
        pushes: PushHandler,
        counts: Counter[str],
        send: Callable[[Peer, protocol.Reply], None],
        peer_sessions: int,
        slots: int,
    ) -> None:
        """`peer_sessions`, `slots`: as for `Host`."""
        self._sessions, self._queues, self._pushes = sessions, queues, pushes
        self._counts, self._send = counts, send
        self._peer_sessions, self._slots = peer_sessions, slots
        self.of: dict[Peer, set[str]] = {}
        """By peer, its sessions."""
        self.taking: dict[Key, tuple[Peer, str]] = {}
        """Sessions or groups of which a peer takes a session over, by its name, with a token when the ticks that wait
        are stepped; others' messages about them wait for that."""

    # ---- what has to wait ----------------------------------------------------------------------------------------

    def key(self, peer: Peer, request: protocol.Request) -> Key:
        """The queue that a message belongs to."""
        if isinstance(request, protocol.Steps | protocol.OpenGroup):
            return peer, request.group
        served = self._queues.served.get(session := getattr(request, "session", ""))
        return served.key if served is not None else session

    def is_taken(self, key: Key, peer: Peer) -> bool:
        """Whether a message of this peer has to wait until another one has taken a session over."""
        return key in self.taking and self.taking[key][0] != peer

    def can_now(self, peer: Peer, session: str, token: str | None) -> bool:
        """Whether a request about a session can be handled now, which comes after its ticks."""
        served = self._queues.served.get(session)
        if served is None or not self._queues.queue_of(served):
            return True
        if served.peer == peer:
            return False
        if token is not None and self._sessions.has_token(session, token):
            self.taking.setdefault(served.key, (peer, session))
            return False
        return True  # it will be refused

    def can_group(self, put: Put, request: protocol.OpenGroup, turns: Turns) -> bool:
        """Whether a `group` can be handled now: not while ticks or earlier messages of one of its sessions wait.

        It does not wait for later ones, which may wait for it.
        """
        group = self._queues.groups.get((put.peer, request.group))
        if group is not None and group.waiting:
            return False
        for session, token in zip(request.sessions, tokens_of(request), strict=True):
            served = self._queues.served.get(session)
            key = served.key if served is not None else session
            if self.is_taken(key, put.peer) or (key != put.key and turns.has_earlier(put, key)):
                return False
            if not self.can_now(put.peer, session, token):
                return False
        return True

    # ---- opening -------------------------------------------------------------------------------------------------

    def opened(
        self, peer: Peer, session: str, token: str | None, raw: bool, now_ns: int
    ) -> tuple[protocol.Ready, Served]:
        """Open a session for a peer, and tell the one that had it."""
        before = self._queues.served.get(session)
        if self.taking:
            # its group may be another one by now, or none
            over = before.key if before is not None else session
            self.taking = {k: by for k, by in self.taking.items() if k != over and by != (peer, session)}
        self._pushes.check_kind(session, raw)
        if session not in self.of.get(peer, ()):
            self._check_share(peer, more=not self._sessions.has_token(session, token))
        opened = self._sessions.open(session, token, now_ns=now_ns)
        self._pushes.begin(session, raw, opened, now_ns)
        first = before.peer if before is not None else NO_ONE
        if first not in (peer, NO_ONE):
            self.disown(session)
            self._counts["taken"] += 1
            self._send(first, protocol.EvictedNow(session=session, token="", reason="taken", next=opened.next_index))
        served = self.own(session, peer)
        pushes = self._pushes.raw.get(session)
        following = opened.next_index if pushes is None else pushes.next
        at_ns = 0 if pushes is None else pushes.input.newest_ns - pushes.input.zero_ns
        ready = protocol.Ready(session=session, token=opened.token, next=following, resumed=opened.resumed, at_ns=at_ns)
        return ready, served

    def open_group(self, peer: Peer, request: protocol.OpenGroup, now_ns: int) -> list[protocol.Ready | StreamError]:
        """Open each session as a row of a group; what came of each."""
        key = peer, request.group
        group = self._queues.groups.get(key) or Group(*key)
        found: list[protocol.Ready | StreamError] = []
        rows = range(request.first, request.first + len(request.sessions))
        for row, session, token in zip(rows, request.sessions, tokens_of(request), strict=True):
            group.grow(row + 1)  # blocks have a row of it also where it is refused
            try:
                ready, served = self.opened(peer, session, token, False, now_ns)
            except StreamError as e:
                self._counts["refused"] += 1
                found.append(e)
                continue
            if served.group is not group or served.row != row:
                left = served.group
                group.put(row, served)
                if left is not None:
                    self._queues.forget_empty(left)
            group.handles[row] = served.handle
            found.append(ready)
        if group.count:
            self._queues.groups[key] = group
        return found

    def _check_share(self, peer: Peer, more: bool) -> None:
        """Raises Busy where a peer has as many sessions as one may have; `more`: the session would take a free slot."""
        mine, free = len(self.of.get(peer, ())), self._slots - len(self._sessions)
        if 0 < self._peer_sessions <= mine:
            why = f"this client has {mine} sessions, as many as one may have (serve.client_slots)"
        elif more and self._slots and not self._peer_sessions and mine and mine >= free:
            why = f"this client has {mine} sessions, and {free} slots are left for others (serve.client_slots)"
        else:
            return
        self._sessions.counts["busy"] += 1
        raise Busy(f"{why}; close one first", _PEER_RETRY_S)

    # ---- having --------------------------------------------------------------------------------------------------

    def owned(self, peer: Peer, session: str, now_ns: int) -> Served:
        """The session, if it belongs to the peer. Raises UnknownSession or Evicted."""
        served = self._queues.served.get(session)
        if served is not None and served.peer == peer:
            return served
        if session in self._sessions:
            raise UnknownSession(_NOT_OWNER)
        raise self._sessions.missing(session, now_ns)

    def own(self, session: str, peer: Peer) -> Served:
        """Make this peer the owner of an open session."""
        served, handle = self._queues.served.get(session), self._sessions.handle(session)
        if served is None or served.handle != handle:
            served = self._queues.served[session] = Served(session, peer, handle)
        served.peer = peer
        self.of.setdefault(peer, set()).add(session)
        return served

    def owner(self, session: str) -> Peer:
        """The peer that owns a session; b"" for none."""
        served = self._queues.served.get(session)
        return served.peer if served is not None else NO_ONE

    def disown(self, session: str, drop: bool = True) -> None:
        """Take a session from its owner, and drop its waiting ticks, if so asked."""
        served = self._queues.served.get(session)
        if served is None:
            return
        if (of := self.of.get(served.peer)) is not None:
            of.discard(session)
            if not of:
                del self.of[served.peer]
        served.peer = NO_ONE
        if drop:
            self._queues.drop(served)


def tokens_of(request: protocol.OpenGroup) -> tuple[str | None, ...]:
    """One for each session."""
    return request.tokens or (None,) * len(request.sessions)
