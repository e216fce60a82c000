"""Host: handles each message of a client of sessions, without sockets and clocks.

A peer is the transport's name for a client, as bytes. A session belongs to the peer that opened it, until the peer
closes it or disconnects, or another peer opens it with its token. Each session has a queue of ticks, and `step` takes
the oldest of each. Every other request has a cost, and each peer a budget between two steps (`turns`): a client that
floods, with whatever request, delays others by at most its budget. Knows nothing about transports.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Collection
from typing import Literal

import msgspec

from stream_mmrnn.core.errors import (
    BadTick,
    Busy,
    DuplicateSession,
    Evicted,
    SessionError,
    ShardDied,
    SnapshotError,
    StreamError,
    UnknownSession,
    UsageError,
    WireError,
)
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.core.types import Prediction, Tick
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.open_sessions import Notice
from stream_mmrnn.serve.raw_session import PendingPush, RawSession
from stream_mmrnn.serve.session_input import SessionInput
from stream_mmrnn.serve.sessions import Opened, Sessions
from stream_mmrnn.serve.step_reader import StepReader
from stream_mmrnn.serve.turns import Peer, Put, Turns, cost_of

ErrorName = Literal["unknown", "duplicate", "evicted", "bad_tick", "bad_message", "failed", "overrun"]

_ERRORS: tuple[tuple[type[StreamError], ErrorName], ...] = (
    (UnknownSession, "unknown"),
    (DuplicateSession, "duplicate"),
    (Evicted, "evicted"),
    (BadTick, "bad_tick"),
)
_PEER_RETRY_S = 1.0
"""What a peer with too many sessions is told to wait."""
_IDLE_CHECK_NS, _SWEEP_NS = 100_000_000, 60_000_000_000
"""How often idle sessions, and states on disk that are too old, are looked for."""
_READ = 32
"""Messages of a peer that are read at most between two steps, and one more for each of its sessions."""
_AFTER_TICKS = (protocol.Flush, protocol.Reset, protocol.Close, protocol.Open)
"""Requests that are handled after the ticks before them."""
_SAVE_PUSHES = 100
"""The state of a raw session is saved after so many pushes, also where no tick came of them."""
_RAW_AND_NOT = "session {!r} is of the other kind: one is opened for ticks, or raw for samples, and stays that"
_NOT_OWNER = "the session belongs to another connection; open it with its token to take it over"


def _error_name(error: StreamError) -> ErrorName:
    return next((name for kind, name in _ERRORS if isinstance(error, kind)), "failed")


def _number(request: protocol.Request) -> int:
    """Of the tick or push that a message is about; -1 for none."""
    return int(getattr(request, "tick", getattr(request, "push", -1)))


class _Waiting(msgspec.Struct, gc=False):
    peer: Peer
    tick: Tick
    received_ns: int
    push: PendingPush | None = None
    """Of a raw session: the push that completed the tick."""


class Host:
    """Sessions for peers: `receive` messages, `step` ticks that wait, send what is in `out`."""

    def __init__(
        self,
        sessions: Sessions,
        queue: int,
        announced_queue: int = 0,
        make_input: Callable[[str], SessionInput] | None = None,
        peer_sessions: int = 0,
        slots: int = 0,
    ) -> None:
        """`queue`: ticks of one session that may wait; one more is refused as `overrun`. `announced_queue`: what
        clients are told instead, where it is not 0. `make_input`: for raw sessions, which are refused without it.
        `peer_sessions`: the most that one peer may have; if 0, as many as are free of `slots`, where that is not 0.
        """
        self.sessions = sessions
        self.out: list[tuple[Peer, protocol.Reply]] = []
        """Replies to send, in order; the caller removes them."""
        self.counts: Counter[str] = Counter()
        """`messages`, `garbage`, `predictions`, `skipped`, `refused`, `overrun`, `taken`, `gone`."""
        self.waited, self.stepped = Histogram(), Histogram()
        """Time from receiving a tick until its step began; time of steps."""
        self._queue, self._peer_sessions, self._slots = queue, peer_sessions, slots
        self._owner: dict[str, Peer] = {}
        self._of: dict[Peer, set[str]] = {}
        self._make_input = make_input
        self._raw: dict[str, RawSession] = {}
        if make_input is not None:
            sessions.extra_of = lambda session: self._raw[session].snapshot() if session in self._raw else {}
        self._waiting: dict[str, deque[_Waiting]] = {}
        """Only sessions with a waiting tick; the one that has waited longest is first."""
        self._turns = Turns(queue + 2 * slots)
        self._taking: dict[str, Peer] = {}
        """Sessions that a peer takes over with their token when the ticks that wait are stepped; others' messages about
        them wait for that."""
        sessions.may_save = lambda session: session not in self._raw or session not in self._waiting
        self._idle_checked_ns = self._swept_ns = 0
        spec = sessions.engine.spec
        self._reader = StepReader(spec)
        self._heads = [h.name for h in spec.heads]
        self.welcome = protocol.welcome(spec, announced_queue or queue)
        self._answers: dict[type, Callable[..., None]] = {
            protocol.Hello: self._hello,
            protocol.Open: self._open,
            protocol.Step: self._put,
            protocol.PushSample: self._push,
            protocol.Flush: self._flush,
            protocol.Reset: self._reset,
            protocol.Close: self._close,
        }

    @property
    def peers(self) -> Collection[Peer]:
        """Peers that own sessions."""
        return self._of.keys()

    @property
    def ready(self) -> bool:
        """Whether something waits for `step`."""
        return bool(self._waiting or self._turns)

    def share(self, peer: Peer) -> int:
        """How many messages of a peer are read at most between two steps."""
        return _READ + len(self._of.get(peer, ()))

    # ---- requests ------------------------------------------------------------------------------------------------

    def receive(self, peer: Peer, content: bytes, now_ns: int) -> None:
        """Take one message of a peer: queue its tick, answer it, or let it wait for its turn."""
        self.counts["messages"] += 1
        try:
            request = protocol.read_request(content)
        except WireError as e:
            self.counts["garbage"] += 1
            self._send(peer, protocol.Refused(error="bad_message", why=str(e)[:500]))
            return
        session = getattr(request, "session", "")
        put = Put(peer, session, request, len(content), now_ns)
        if not self._turns.has(peer, session) and self._can(put) and self._turns.pay(peer, cost_of(request)):
            self._answer(put)
        elif not self._turns.put_off(put):
            self.counts["overrun"] += 1
            why = "too many messages of this client wait already; read their answers first"
            self._send(peer, protocol.Refused(error="overrun", why=why, session=session, tick=_number(request)))

    def handle(self, peer: Peer, request: protocol.Request, now_ns: int) -> None:
        """Handle one decoded message at once, after the ticks before it."""
        if isinstance(request, _AFTER_TICKS):
            while request.session in self._waiting:
                self.step(now_ns)
        self._answer(Put(peer, getattr(request, "session", ""), request, 0, now_ns))

    def _can(self, put: Put) -> bool:
        """Whether a message can be handled now: some come after the session's ticks that wait."""
        session = put.session
        if self._taking and self._taking.get(session, put.peer) != put.peer:
            return False
        if session not in self._waiting or not isinstance(put.request, _AFTER_TICKS):
            return True
        if self._owner.get(session) == put.peer:
            return False
        if isinstance(put.request, protocol.Open) and self.sessions.has_token(session, put.request.token):
            self._taking.setdefault(session, put.peer)
            return False
        return True  # it will be refused

    def _answer(self, put: Put) -> None:
        try:
            self._answers[type(put.request)](put.peer, put.request, put.received_ns)
        except StreamError as e:
            self._refuse(put.peer, e, put.session, _number(put.request))

    def _send(self, peer: Peer, reply: protocol.Reply) -> None:
        self.out.append((peer, reply))

    def _refuse(self, peer: Peer, error: StreamError, session: str, tick: int) -> None:
        self.counts["refused"] += 1
        if isinstance(error, Busy):
            self._send(peer, protocol.BusyNow(session=session, why=str(error), retry_s=error.retry_after_s))
        else:
            self._send(peer, protocol.Refused(error=_error_name(error), why=str(error), session=session, tick=tick))

    def _hello(self, peer: Peer, request: protocol.Hello, now_ns: int) -> None:
        if request.version != protocol.VERSION:
            why = f"protocol version {request.version} is not {protocol.VERSION}; use the same release on both sides"
            self._send(peer, protocol.Refused(error="bad_message", why=why))
            return
        self._send(peer, self.welcome)

    def _open(self, peer: Peer, request: protocol.Open, now_ns: int) -> None:
        session = request.session
        self._taking.pop(session, None)
        if request.raw and self._make_input is None:
            raise SessionError(
                "a cluster serves no raw sessions; make features with Predictor's encoders, or use serve"
            )
        if session in self.sessions and request.raw != (session in self._raw):
            raise SessionError(_RAW_AND_NOT.format(session))
        if session not in self._of.get(peer, ()):
            self._check_share(peer)
        opened = self.sessions.open(session, request.token, now_ns=now_ns)
        if session not in self._raw and (request.raw or RawSession.is_in(opened.extra)):
            self._begin_raw(request, opened, now_ns)
        before = self._owner.get(session)
        if before is not None and before != peer:
            self.disown(session)
            self.counts["taken"] += 1
            self._send(
                before, protocol.EvictedNow(session=session, token="", reason="taken", next=opened.next_index)
            )  # fmt: skip
        self.own(session, peer)
        raw = self._raw.get(session)
        following = opened.next_index if raw is None else raw.next
        at_ns = 0 if raw is None else raw.input.newest_ns - raw.input.zero_ns
        self._send(
            peer,
            protocol.Ready(session=session, token=opened.token, next=following, resumed=opened.resumed, at_ns=at_ns),
        )

    def _check_share(self, peer: Peer) -> None:
        """Raises Busy where a peer has as many sessions as one may have."""
        mine, free = len(self._of.get(peer, ())), self._slots - len(self.sessions)
        if 0 < self._peer_sessions <= mine:
            why = f"this client has {mine} sessions, as many as one may have (serve.client_slots)"
        elif self._slots and not self._peer_sessions and mine and mine >= free:
            why = f"this client has {mine} sessions, and {free} slots are left for others (serve.client_slots)"
        else:
            return
        self.sessions.counts["busy"] += 1
        raise Busy(f"{why}; close one first", _PEER_RETRY_S)

    def _begin_raw(self, request: protocol.Open, opened: Opened, now_ns: int) -> None:
        """Make or restore the input of a raw session that was opened; where that fails, it is closed or evicted."""
        session = request.session
        try:
            if self._make_input is None or (opened.resumed and not (request.raw and RawSession.is_in(opened.extra))):
                raise SessionError(_RAW_AND_NOT.format(session))
            raw = RawSession(self._make_input(session))
            if opened.resumed:
                raw.restore(opened.extra)
        except StreamError:
            if opened.resumed:
                self.sessions.drop(session)  # its state is on disk
            else:
                self.sessions.close(session, opened.token, now_ns=now_ns)
            raise
        self._raw[session] = raw

    def _put(self, peer: Peer, request: protocol.Step, now_ns: int) -> None:
        session = request.session
        self._check_owner(peer, session, now_ns)
        waiting = self._waiting.get(session)
        if waiting is not None and len(waiting) >= self._queue:
            self.counts["overrun"] += 1
            why = f"{self._queue} ticks of session {session!r} wait already; send no faster than the model's tick"
            self._send(peer, protocol.Refused(error="overrun", why=why, session=session, tick=request.tick))
            return
        tick = self._reader.read(request, now_ns)
        if waiting is None:
            waiting = self._waiting[session] = deque()
        waiting.append(_Waiting(peer, tick, now_ns))

    def _push(self, peer: Peer, request: protocol.PushSample, now_ns: int) -> None:
        session = request.session
        self._check_owner(peer, session, now_ns)
        raw = self._raw.get(session)
        if raw is None:
            raise BadTick(f"session {session!r} was opened for ticks and takes no samples; open it with raw = true")
        if request.push < raw.next:
            self.counts["skipped"] += 1
            self._send(peer, protocol.Skipped(session=session, tick=request.push, next=raw.next))
            return
        waiting = self._waiting.get(session, deque())
        if len(raw.pending) >= self._queue or len(waiting) >= self._queue:
            self.counts["overrun"] += 1
            why = f"{self._queue} ticks or pushes of session {session!r} wait already; read their answers first"
            self._send(peer, protocol.Refused(error="overrun", why=why, session=session, tick=request.push))
            return
        push = raw.begin(request, peer)
        try:
            for tick in raw.ticks(request):
                waiting.append(_Waiting(peer, tick, now_ns, push))
                push.left += 1
        except UsageError as e:
            self.counts["refused"] += 1
            push.error = str(e)
        if waiting:
            self._waiting[session] = waiting
        self.sessions.observe_input(session, now_ns, due=request.push % _SAVE_PUSHES == 0)
        self._send_pushed(session, raw)

    def _send_pushed(self, session: str, raw: RawSession) -> None:
        """Answer the pushes that have all their predictions."""
        for push in raw.done():
            self._send(
                push.peer,
                protocol.Pushed(
                    session=session, push=push.number, predictions=tuple(push.predictions), error=push.error
                ),
            )

    def _check_owner(self, peer: Peer, session: str, now_ns: int) -> None:
        if self._owner.get(session) != peer:
            if session in self.sessions:
                raise UnknownSession(_NOT_OWNER)
            raise self.sessions.missing(session, now_ns)

    def _flush(self, peer: Peer, request: protocol.Flush, now_ns: int) -> None:
        session = request.session
        self._check_owner(peer, session, now_ns)
        raw = self._raw.get(session)
        following = self.sessions.next_index(session) if raw is None else raw.next
        self._save_then(peer, protocol.Flushed(session=session, next=following), now_ns)

    def _reset(self, peer: Peer, request: protocol.Reset, now_ns: int) -> None:
        self._check_owner(peer, request.session, now_ns)
        if request.session in self._raw:
            raise SessionError(f"session {request.session!r} is raw and has no reset; close it and open another one")
        self.sessions.reset(request.session, now_ns=now_ns)
        # ticks that are sent again after a crash must not be stepped on the state before the reset
        self._save_then(peer, protocol.Done(session=request.session), now_ns)

    def _save_then(self, peer: Peer, reply: protocol.Flushed | protocol.Done, now_ns: int) -> None:
        """Answer when the session's present state, or a newer one, is on disk."""

        def told(error: SnapshotError | None) -> None:
            if error is None:
                self._send(peer, reply)
            else:
                self._refuse(peer, error, reply.session, -1)

        self.sessions.save_soon(reply.session, now_ns=now_ns, told=told, peer=peer)

    def _close(self, peer: Peer, request: protocol.Close, now_ns: int) -> None:
        session = request.session
        if session in self.sessions:
            self._check_owner(peer, session, now_ns)
        self.sessions.close(
            session, request.token, now_ns=now_ns, told=lambda: self._send(peer, protocol.Done(session=session))
        )
        self.disown(session)
        self._raw.pop(session, None)

    def own(self, session: str, peer: Peer) -> None:
        """Make this peer the owner of a session."""
        self._owner[session] = peer
        self._of.setdefault(peer, set()).add(session)

    def owner(self, session: str) -> Peer:
        """The peer that owns a session; b"" for none."""
        return self._owner.get(session, b"")

    def disown(self, session: str, drop: bool = True) -> None:
        """Take a session from its owner, and drop its waiting ticks, if so asked."""
        peer = self._owner.pop(session, None)
        if peer is not None:
            of = self._of[peer]
            of.discard(session)
            if not of:
                del self._of[peer]
        if drop:
            self._waiting.pop(session, None)

    # ---- stepping ------------------------------------------------------------------------------------------------

    def step(self, now_ns: int) -> int:
        """Handle the messages whose turn it is; step the oldest tick of each session that has one, as one batch; how
        many ticks.
        """
        if self._turns:
            for put in self._turns.due(self._can):
                self._answer(put)
        taken: list[_Waiting] = []
        for session in list(self._waiting):
            waiting = self._waiting[session]
            taken.append(waiting.popleft())
            if not waiting:
                del self._waiting[session]
        asked = {(of.tick.session, of.tick.index): of for of in taken}

        def refused(tick: Tick, error: SessionError) -> None:
            of = asked[tick.session, tick.index]
            if of.push is not None:
                self._pushed(of.push, tick.session, error=str(error))
            else:
                self._refuse(of.peer, error, tick.session, tick.index)

        def skipped(tick: Tick) -> None:
            self.counts["skipped"] += 1
            push = asked[tick.session, tick.index].push
            if push is not None:
                self._pushed(push, tick.session)
                return
            following = self.sessions.next_index(tick.session)
            self._send(
                asked[tick.session, tick.index].peer,
                protocol.Skipped(session=tick.session, tick=tick.index, next=following),
            )

        dead: tuple[str, ...] = ()
        try:
            predictions = self.sessions.step([of.tick for of in taken], now_ns=now_ns, refused=refused, skipped=skipped)
        except ShardDied as e:
            predictions, dead = list(e.predictions), e.sessions
        if predictions:
            self.stepped.add(predictions[-1].step_end_ns - predictions[0].step_start_ns)
        for prediction in predictions:
            of = asked[prediction.tick.session, prediction.tick.index]
            pred = self._pred(prediction, of.received_ns)
            if of.push is not None:
                self._pushed(of.push, prediction.tick.session, pred)
            else:
                self._send(of.peer, pred)
        self.counts["predictions"] += len(predictions)
        for session in dead:
            if session in self.sessions:
                self._notify(self.sessions.lose(session))
        return len(predictions)

    def _pushed(self, push: PendingPush, session: str, pred: protocol.Pred | None = None, error: str = "") -> None:
        """One tick of a push is done."""
        push.left -= 1
        push.error = push.error or error
        if pred is not None:
            push.predictions.append(pred)
        if (raw := self._raw.get(session)) is not None:
            self._send_pushed(session, raw)

    def _pred(self, prediction: Prediction, received_ns: int) -> protocol.Pred:
        tick = prediction.tick
        waited_ns = max(prediction.step_start_ns - received_ns, 0)
        self.waited.add(waited_ns)
        raw = self._raw.get(tick.session)
        index, event_ns = (tick.index, tick.event_ns) if raw is None else raw.since_begin(tick)
        return protocol.Pred(
            session=tick.session,
            tick=index,
            event_ns=event_ns,
            heads=tuple(prediction.heads[name].astype("<f4", copy=False).tobytes() for name in self._heads),
            present=tuple(tick.present[name] for name in self._reader.names),
            age_ns=tuple(tick.age_ns[name] for name in self._reader.names),
            waited_ns=waited_ns,
            step_ns=prediction.step_end_ns - prediction.step_start_ns,
            model=prediction.model,
        )

    # ---- housekeeping --------------------------------------------------------------------------------------------

    def housekeeping(self, now_ns: int) -> None:
        """Save states that are due, evict idle sessions, delete states that are too old.

        Where the sessions have no writer, call it while no tick waits: it waits for the disk.
        """
        if not self._turns:
            self._turns.begin_batch()
        self.write_states(now_ns)
        self.evict_idle(now_ns)
        if now_ns - self._swept_ns > _SWEEP_NS:
            self._swept_ns = now_ns
            self.sessions.sweep(now_ns)

    def write_states(self, now_ns: int) -> None:
        """Answer those whose state is written, and have the next ones written."""
        if not self.sessions.has_writer:
            self.sessions.save(now_ns)
        for notice in self.sessions.write_states(now_ns):
            self._notify(notice)

    def evict_idle(self, now_ns: int) -> None:
        """Evict sessions that have been idle for too long, and tell their peers. Call it often: it is rate-limited."""
        if now_ns - self._idle_checked_ns > _IDLE_CHECK_NS:
            self._idle_checked_ns = now_ns
            for notice in self.sessions.evict_idle(now_ns):
                self._notify(notice)

    def gone(self, peer: Peer, now_ns: int) -> int:
        """A peer has disconnected: save and evict its sessions; returns how many it had."""
        self._turns.forget(peer)
        for session in [session for session, by in self._taking.items() if by == peer]:
            del self._taking[session]
        sessions = list(self._of.get(peer, ()))
        for session in sessions:
            # the input of a raw session is ahead of the engine by the ticks that wait: they are stepped
            self.disown(session, drop=session not in self._raw)
            while session in self._waiting and not self.sessions.has_writer:
                self.step(now_ns)
            try:
                notice = self.sessions.cancel_soon(session, now_ns=now_ns)
            except (SessionError, SnapshotError):
                continue  # counted there; a session that cannot be saved stays open until it is idle
            if notice is not None:
                self._notify(notice)
        self.counts["gone"] += bool(sessions)
        return len(sessions)

    def leave(self, now_ns: int) -> int:
        """Step waiting ticks, then save and evict all sessions, as the server ends; returns how many."""
        while self.ready:
            self.step(now_ns)
        notices = self.sessions.leave(now_ns)
        for notice in notices:
            self._notify(notice)
        return len(notices)

    def _notify(self, notice: Notice) -> None:
        owner = self._owner.get(notice.session)
        self.disown(notice.session)
        raw = self._raw.pop(notice.session, None)
        following = notice.next_index if raw is None else raw.next
        if owner is not None:
            self._send(
                owner,
                protocol.EvictedNow(session=notice.session, token=notice.token, reason=notice.reason, next=following),
            )
