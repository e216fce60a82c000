"""Host: handles each message of a client of sessions, without sockets and clocks.

A peer is the transport's name for a client, as bytes. A session belongs to the peer that opened it, until the peer
closes it or disconnects, or another peer opens it with its token. Ticks wait in queues (`groups`), and `step` takes the
oldest of each. Every other request has a cost, and each peer a budget between two steps (`turns`): a client that
floods, with whatever request, delays others by at most its budget. Knows nothing about transports.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection

from msgspec.structs import replace

from stream_mmrnn.core.errors import Busy, SessionError, SnapshotError, StreamError, WireError
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.batch import Batch
from stream_mmrnn.serve.block_codec import StepsReader, row_bytes
from stream_mmrnn.serve.groups import NO_ONE, TickQueues, WaitingBlock, WaitingTick
from stream_mmrnn.serve.open_sessions import Notice
from stream_mmrnn.serve.owners import Owners, tokens_of
from stream_mmrnn.serve.push_handler import PushHandler
from stream_mmrnn.serve.replies import error_name, grouped, refusal
from stream_mmrnn.serve.session_input import SessionInput
from stream_mmrnn.serve.sessions import Sessions
from stream_mmrnn.serve.step_reader import StepReader
from stream_mmrnn.serve.turns import OPENED_AT_ONCE, Peer, Put, Turns, cost_of

_IDLE_CHECK_NS, _SWEEP_NS = 100_000_000, 60_000_000_000
"""How often idle sessions, and states on disk that are too old, are looked for."""
SHARE = 32
"""Messages of a peer that are read at most between two steps, and one more for each of its sessions."""
_READ_BYTES = 8192
"""A message counts as one more for each so many bytes; a block as its ticks."""
_AFTER_TICKS = (protocol.Flush, protocol.Reset, protocol.Close, protocol.Open)
"""Requests that are handled after the ticks before them; and `group`."""
_TOO_MANY = "too many messages of this client wait already; read their answers first"


def _number(request: protocol.Request) -> int:
    """Of the tick or push that a message is about; -1 for none."""
    return int(getattr(request, "tick", getattr(request, "push", -1)))


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
        groups: bool = False,
    ) -> None:
        """`queue`: ticks of one session that may wait; one more is refused as `overrun`. `announced_queue`: what
        clients are told instead, where it is not 0. `make_input`: for raw sessions, which are refused without it.
        `peer_sessions`: the most that one peer may have; if 0, as many as are free of `slots`, where that is not 0.
        `groups`: clients are told that they may send blocks.
        """
        self.sessions = sessions
        self.out: list[tuple[Peer, protocol.Reply]] = []
        """Replies to send, in order; the caller removes them."""
        self.send_now: Callable[[], None] = lambda: None
        """Called during a step when some of its replies are in `out`."""
        self.counts: Counter[str] = Counter()
        """`messages`, `garbage`, `predictions`, `skipped`, `refused`, `overrun`, `taken`, `gone`."""
        self.waited, self.stepped = Histogram(), Histogram()
        """Time from receiving a tick, or a block of them, until its step began; time of steps."""
        self._queue = queue
        self._queues = TickQueues()
        self._turns = Turns(queue + 2 * slots)
        self._idle_checked_ns = self._swept_ns = 0
        spec = sessions.engine.spec
        self._reader = StepReader(spec)
        self._steps_reader = StepsReader(self._reader.names, self._reader.sizes)
        self._pushes = PushHandler(make_input, sessions, self._queues, self._reader, queue, self.counts, self._send)
        self._owners = Owners(sessions, self._queues, self._pushes, self.counts, self._send, peer_sessions, slots)
        self.welcome = protocol.welcome(spec, announced_queue or queue, protocol.VERSION if groups else protocol.OLDEST)
        self._answers: dict[type, Callable[..., None]] = {
            protocol.Hello: self._hello,
            protocol.Open: self._open,
            protocol.OpenGroup: self._open_group if groups else self._no_groups,
            protocol.Step: self._put,
            protocol.Steps: self._put_block if groups else self._no_groups,
            protocol.PushSample: self._push,
            protocol.Flush: self._flush,
            protocol.Reset: self._reset,
            protocol.Close: self._close,
        }

    @property
    def peers(self) -> Collection[Peer]:
        """Peers that own sessions."""
        return self._owners.of.keys()

    @property
    def ready(self) -> bool:
        """Whether something waits for `step`."""
        return bool(self._queues or self._turns)

    def share(self, peer: Peer) -> int:
        """How many messages of a peer are read at most between two steps, as `receive` counts them."""
        return SHARE + len(self._owners.of.get(peer, ()))

    # ---- requests ------------------------------------------------------------------------------------------------

    def receive(self, peer: Peer, content: bytes, now_ns: int) -> int:
        """Take one message of a peer: queue its ticks, answer it, or let it wait for its turn; returns as how many
        messages it counts.
        """
        counts = self.counts
        counts["messages"] += 1
        try:
            request = protocol.read_request(content)
        except WireError as e:
            counts["garbage"] += 1
            self._send(peer, protocol.Refused(error="bad_message", why=str(e)[:500]))
            return 1 + len(content) // _READ_BYTES
        if type(request) is protocol.Step and not self._turns and not self._owners.taking:
            try:  # as below, for most messages
                self._put(peer, request, now_ns)
            except StreamError as e:
                self._refuse(peer, e, request.session, request.tick)
            return 1
        if isinstance(request, protocol.OpenGroup):
            self._receive_group(peer, request, len(content), now_ns)
            return len(request.sessions)
        self._receive(Put(peer, self._owners.key(peer, request), request, len(content), now_ns, counts["messages"]))
        if isinstance(request, protocol.Steps):
            return max(len(request.ticks) // 8, 1 + len(content) // _READ_BYTES)
        return 1 + len(content) // _READ_BYTES

    def _receive(self, put: Put) -> None:
        request, peer = put.request, put.peer
        if not self._turns.has(peer, put.key) and self._can(put) and self._turns.pay(peer, cost_of(request)):
            self._answer(put)
        elif not self._turns.put_off(put):
            self.counts["overrun"] += 1
            if isinstance(request, protocol.Steps):
                self._send(peer, refusal(request, "overrun", _TOO_MANY))
            elif isinstance(request, protocol.OpenGroup):
                self._send(peer, grouped(request, [SessionError(_TOO_MANY)] * len(request.sessions)))
            else:
                session = getattr(request, "session", "")
                number = _number(request)
                self._send(peer, protocol.Refused(error="overrun", why=_TOO_MANY, session=session, tick=number))

    def _receive_group(self, peer: Peer, request: protocol.OpenGroup, size: int, now_ns: int) -> None:
        """In parts that a budget is enough for."""
        sessions, tokens = request.sessions, tokens_of(request)
        if len(tokens) != len(sessions) or request.first + len(sessions) > protocol.MAX_ROWS:
            why = f"a group has at most {protocol.MAX_ROWS} sessions, and a token or nil for each"
            self._send(peer, protocol.Refused(error="bad_message", why=why))
            return
        for at in range(0, len(sessions), OPENED_AT_ONCE):
            to = at + OPENED_AT_ONCE
            part = replace(request, sessions=sessions[at:to], tokens=tokens[at:to], first=request.first + at)
            share = size * len(part.sessions) // len(sessions)
            self._receive(Put(peer, (peer, request.group), part, share, now_ns, self.counts["messages"]))

    def handle(self, peer: Peer, request: protocol.Request, now_ns: int) -> None:
        """Handle one decoded message at once, after the ticks before it."""
        if isinstance(request, _AFTER_TICKS):
            while self._queues.waits(request.session):
                self.step(now_ns)
        self._answer(Put(peer, self._owners.key(peer, request), request, 0, now_ns))

    def _can(self, put: Put) -> bool:
        """Whether a message can be handled now: some come after the session's ticks that wait."""
        request = put.request
        if isinstance(request, protocol.OpenGroup):
            return self._owners.can_group(put, request, self._turns)
        if self._owners.taking and self._owners.is_taken(self._owners.key(put.peer, request), put.peer):
            return False
        return not isinstance(request, _AFTER_TICKS) or self._owners.can_now(
            put.peer, request.session, getattr(request, "token", None) if isinstance(request, protocol.Open) else None
        )

    def _answer(self, put: Put) -> None:
        request = put.request
        try:
            self._answers[type(request)](put.peer, request, put.received_ns)
        except StreamError as e:
            self._refuse(put.peer, e, getattr(request, "session", ""), _number(request))

    def _send(self, peer: Peer, reply: protocol.Reply) -> None:
        self.out.append((peer, reply))

    def _refuse(self, peer: Peer, error: StreamError, session: str, tick: int) -> None:
        self.counts["refused"] += 1
        if isinstance(error, Busy):
            self._send(peer, protocol.BusyNow(session=session, why=str(error), retry_s=error.retry_after_s))
        else:
            self._send(peer, protocol.Refused(error=error_name(error), why=str(error), session=session, tick=tick))

    def _hello(self, peer: Peer, request: protocol.Hello, now_ns: int) -> None:
        if request.version < protocol.OLDEST:
            why = f"protocol version {request.version} is older than {protocol.OLDEST}; use a newer client"
            self._send(peer, protocol.Refused(error="bad_message", why=why))
            return
        self._send(peer, replace(self.welcome, version=min(self.welcome.version, request.version)))

    # ---- opening and closing -------------------------------------------------------------------------------------

    def _open(self, peer: Peer, request: protocol.Open, now_ns: int) -> None:
        self._send(peer, self._owners.opened(peer, request.session, request.token, request.raw, now_ns)[0])

    def _open_group(self, peer: Peer, request: protocol.OpenGroup, now_ns: int) -> None:
        self._send(peer, grouped(request, self._owners.open_group(peer, request, now_ns)))

    def _no_groups(self, peer: Peer, request: protocol.OpenGroup | protocol.Steps, now_ns: int) -> None:
        why = "no groups are served here; open sessions one by one"
        self._send(peer, protocol.Refused(error="bad_message", why=why))

    def own(self, session: str, peer: Peer) -> None:
        """Make this peer the owner of an open session."""
        self._owners.own(session, peer)

    def owner(self, session: str) -> Peer:
        """The peer that owns a session; b"" for none."""
        return self._owners.owner(session)

    def disown(self, session: str) -> None:
        """Take a session from its owner, and drop its waiting ticks."""
        self._owners.disown(session)

    def _flush(self, peer: Peer, request: protocol.Flush, now_ns: int) -> None:
        session = request.session
        self._owners.owned(peer, session, now_ns)
        raw = self._pushes.raw.get(session)
        following = self.sessions.next_index(session) if raw is None else raw.next
        self._save_then(peer, protocol.Flushed(session=session, next=following), now_ns)

    def _reset(self, peer: Peer, request: protocol.Reset, now_ns: int) -> None:
        self._owners.owned(peer, request.session, now_ns)
        if request.session in self._pushes.raw:
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
            self._owners.owned(peer, session, now_ns)
        self.sessions.close(
            session, request.token, now_ns=now_ns, told=lambda: self._send(peer, protocol.Done(session=session))
        )
        self._owners.disown(session)
        self._pushes.raw.pop(session, None)

    # ---- ticks ---------------------------------------------------------------------------------------------------

    def _put(self, peer: Peer, request: protocol.Step, now_ns: int) -> None:
        session = request.session
        served = self._queues.served.get(session)
        if served is None or served.peer != peer:
            served = self._owners.owned(peer, session, now_ns)  # raises
        if len(self._queues.queue_of(served)) >= self._queue:
            self.counts["overrun"] += 1
            why = f"{self._queue} ticks of session {session!r} wait already; send no faster than the model's tick"
            self._send(peer, protocol.Refused(error="overrun", why=why, session=session, tick=request.tick))
            return
        self._reader.check(request)
        self._queues.put(WaitingTick(served, peer, request, now_ns))

    def _put_block(self, peer: Peer, request: protocol.Steps, now_ns: int) -> None:
        group = self._queues.groups.get((peer, request.group))
        if group is None:
            self.counts["refused"] += 1
            why = f"group {request.group} has no open session here; open it first"
            self._send(peer, refusal(request, "unknown", why))
            return
        if len(group.waiting) >= self._queue:
            self.counts["overrun"] += 1
            why = f"{self._queue} blocks of this group wait already; send no faster than the model's tick"
            self._send(peer, refusal(request, "overrun", why))
            return
        try:
            block = self._steps_reader.read(request, len(group.members))
        except StreamError as e:
            self.counts["refused"] += 1
            self._send(peer, refusal(request, "bad_tick", str(e)))
            return
        refused: list[protocol.RowsRefused] = []
        first = block.first_of_each() if request.rows else None
        if first is not None and not first.all():
            self.counts["refused"] += int((~first).sum())
            why = "a block has one tick of each row; this is another one"
            refused.append(protocol.RowsRefused("bad_tick", why, row_bytes(block.handles[~first])))
            block = block.take(first)
        self._queues.put_block(WaitingBlock(group, request.block, block, now_ns, refused, not refused))

    def _push(self, peer: Peer, request: protocol.PushSample, now_ns: int) -> None:
        self._pushes.push(peer, self._owners.owned(peer, request.session, now_ns), request, now_ns)

    def step(self, now_ns: int) -> int:
        """Handle the messages whose turn it is; step the oldest tick of each session that has one; how many ticks."""
        if self._turns:
            for put in self._turns.due(self._can):
                self._answer(put)
        batch = Batch(self.sessions, self._reader, self._pushes, self._queues, self._send, self.counts)
        for done in batch.step(now_ns):
            self.stepped.add(done.step_ns)
            for waited_ns in done.waited_ns:
                self.waited.add(waited_ns)
            self.send_now()
        for session in batch.lost:
            if session in self.sessions:
                self._notify(self.sessions.lose(session))
        self.counts["predictions"] += batch.count
        return batch.count

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
        for key in [key for key, (by, _) in self._owners.taking.items() if by == peer]:
            del self._owners.taking[key]
        self._queues.drop_groups(peer)
        sessions = list(self._owners.of.get(peer, ()))
        for session in sessions:
            # the input of a raw session is ahead of the engine by the ticks that wait: they are stepped
            self._owners.disown(session, drop=session not in self._pushes.raw)
            while self._queues.waits(session) and not self.sessions.has_writer:
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
            any_ticks, waiting = bool(self._queues), len(self._turns)
            self.step(now_ns)
            if not any_ticks and len(self._turns) == waiting:
                break  # they wait for each other; the states are saved without them
        notices = self.sessions.leave(now_ns)
        for notice in notices:
            self._notify(notice)
        return len(notices)

    def _notify(self, notice: Notice) -> None:
        owner = self.owner(notice.session)
        self._owners.disown(notice.session)
        raw = self._pushes.raw.pop(notice.session, None)
        following = notice.next_index if raw is None else raw.next
        if owner != NO_ONE:
            self._send(
                owner,
                protocol.EvictedNow(session=notice.session, token=notice.token, reason=notice.reason, next=following),
            )
