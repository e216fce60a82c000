"""OpenSessions: the open sessions of an engine, and how their states are saved: while they run, and as they leave.

Without writer threads a state is written at once, by the call that asks for it. With one no call waits for the disk:
who asks is told later, and a session keeps its slot until its state is written. Knows nothing about how sessions are
opened and stepped.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor

import msgspec
import numpy as np

from stream_mmrnn.core.errors import Evicted, SessionError, ShardDied, SnapshotError, UnknownSession
from stream_mmrnn.core.settings import StateSettings
from stream_mmrnn.predict.protocols import Engine
from stream_mmrnn.predict.snapshots import Snapshot
from stream_mmrnn.serve.save_queue import MOST, SaveQueue, StatesToWrite, Told
from stream_mmrnn.serve.saved_states import BlockStore, SavedStates, Store
from stream_mmrnn.serve.session_table import OpenSession, Reason, SessionTable
from stream_mmrnn.serve.state_rows import StateRows

_ROUTINE_NS = 50_000_000
"""So often it is looked which sessions are due; all of them are one block."""
_RETRY_NS = 1_000_000_000
"""Where a state could not be written, only those that peers ask for are tried before so long."""


class Notice(msgspec.Struct, frozen=True):
    """A session has lost its slot. Its state is on disk, and its token opens it again until that expires."""

    session: str
    token: str
    reason: Reason
    next_index: int


class OpenSessions:
    """One store belongs to one engine."""

    def __init__(
        self,
        engine: Engine,
        store: Store | BlockStore,
        settings: StateSettings,
        wall_offset_ns: int = 0,
        writer: Executor | None = None,
    ) -> None:
        """With a `writer` the store has to be a BlockStore."""
        self.engine, self.store, self.settings = engine, store, settings
        self.counts = {
            **dict.fromkeys(("opened", "resumed", "closed", "evicted", "lost", "stepped", "duplicates", "stale"), 0),
            **dict.fromkeys(("skipped", "busy", "unknown", "duplicate", "evicted_asked", "bad_ticks"), 0),
            **dict.fromkeys(("saved", "unsaved", "unswept"), 0),
        }
        """`duplicates`: repeated newest ticks, `stale`: older ones; neither was stepped. `skipped`: indices that were
        left out. `busy`, `unknown`, `duplicate`, `evicted_asked`: refusals. `unsaved`: states that could not be
        written; such a session is not evicted. `unswept`: times that expired states could not be removed. `lost`:
        sessions of a shard that died."""
        self.extra_of: Callable[[str], dict[str, bytes | str]] = lambda session: {}
        """What the state of a session holds beside the engine's tensors; raises SnapshotError."""
        self.may_save: Callable[[str], bool] = lambda session: True
        """Whether a session's state is whole now. The writer takes no other one."""
        self.last_problem = ""
        """Why the newest state could not be written, or expired ones not be removed."""
        self._idle_ns = round(settings.idle_s * 1e9)
        self._table = SessionTable()
        self._live: dict[str, OpenSession] = {}
        self._states = SavedStates(store, wall_offset_ns)
        self._queue = SaveQueue(self._states, writer) if writer is not None else None
        self._routine_ns = self._retry_ns = 0
        self._lost: list[str] = []
        """Sessions of a shard that was found dead while nothing was stepped."""

    def __contains__(self, session: str) -> bool:
        return session in self._live

    def __len__(self) -> int:
        """How many sessions are open."""
        return len(self._live)

    # ---- saving at once ------------------------------------------------------------------------------------------

    def save(self, now_ns: int, most: int = 1) -> list[str]:
        """Save at most `most` sessions that are due, those with the most unsaved ticks first; returns their names.

        It waits for the disk: call it while no tick waits, or have a writer and call `write_states`. After a crash a
        session continues from its newest snapshot, and `Opened.next_index` says which ticks to send again. One that
        cannot be saved is counted, and is due again.
        """
        saved = []
        for session in self._due()[:most]:
            with contextlib.suppress(SnapshotError):  # counted
                self._save(session, self._live[session], now_ns)
                saved.append(session)
        return saved

    def _due(self) -> list[str]:
        every = self.settings.snapshot_every
        return self._table.due(every) if every else []

    def flush(self, session: str, *, now_ns: int, unchanged: bool = False) -> int:
        """Save the session's state now, also where it is `unchanged`, if so asked; returns the index of the next tick.

        Raises:
            UnknownSession, Evicted: it is not open.
            SnapshotError: it cannot be written; the session stays open.

        """
        live = self._find(session, now_ns)
        self._settle(session)
        if live.unsaved or unchanged:
            self._save(session, live, now_ns)
        return live.last + 1

    def _save(self, session: str, live: OpenSession, now_ns: int) -> None:
        self._settle(session)
        error: SnapshotError | None = None
        try:
            with self._counted():
                self._states.save(self._snapshot(session, live), live.token, now_ns)
            live.unsaved, live.stored = 0, True
            self.counts["saved"] += 1
        except SnapshotError as e:
            error = e
            raise
        finally:
            for told in self._queue.answered(session) if self._queue is not None else ():
                told(error)

    def _snapshot(self, session: str, live: OpenSession) -> Snapshot:
        state = self.engine.snapshot(session)
        return Snapshot(session, self.engine.spec.sha256, live.last, state, self.extra_of(session))

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Count a state that cannot be written, and keep the reason; the error goes on."""
        try:
            yield
        except SnapshotError as e:
            self.counts["unsaved"] += 1
            self.last_problem = str(e)
            raise

    def _settle(self, session: str) -> None:
        """Wait until the session's state in the writer is on disk."""
        written = self._queue.settle(session) if self._queue is not None else None
        if written is not None:
            self._tell(session, written.error, written.told)

    # ---- saving by the writer ------------------------------------------------------------------------------------

    @property
    def has_writer(self) -> bool:
        return self._queue is not None

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits for the writer; `write_states` then soon has something to tell."""
        return self._queue is not None and self._queue.is_awaited

    def save_soon(self, session: str, *, now_ns: int, told: Told, peer: bytes = b"") -> None:
        """As `flush`, and `told` is called when the state is on disk: by `write_states`, or now where it is unchanged
        or there is no writer. `peer`: who asks; peers take turns.

        Raises:
            UnknownSession, Evicted: it is not open.
            SnapshotError: it cannot be written; the session stays open. With a writer `told` is given that.

        """
        live = self._find(session, now_ns)
        if self._queue is None:
            self.flush(session, now_ns=now_ns)
            told(None)
        elif live.unsaved:
            self._queue.ask(session, peer, told)
        elif not self._queue.join(session, told):
            told(None)

    def write_states(self, now_ns: int) -> list[Notice]:
        """Tell who waits for what the writer has written, and give it what is next; returns the sessions that left.

        Call it often: it does not wait.
        """
        queue, notices = self._queue, list[Notice]()
        if queue is None:
            return notices
        for written in queue.done():
            self._tell(written.session, written.error, written.told)
            live = self._live.get(written.session)
            if written.error is not None:
                self._retry_ns = now_ns + _RETRY_NS
            if live is None or live.leaving is None:
                continue
            if written.error is None and not live.unsaved:
                notices.append(self._evicted(written.session, live, live.leaving))
            else:
                queue.leave(written.session)
        if (error := queue.swept()) is not None:
            self._unswept(error)
        if queue.has_room:
            if now_ns >= self._routine_ns:
                self._routine_ns = now_ns + _ROUTINE_NS
                queue.add_due(self._due())
            if not queue.any_waits:
                return notices
            sessions = queue.take(self._may, asked_only=now_ns < self._retry_ns)
            if sessions:
                states = self._states_of(sessions, now_ns)
                if states.sessions:
                    queue.write(states, now_ns)
        return notices

    def _states_of(self, sessions: Sequence[str], now_ns: int) -> StatesToWrite:
        """The present states of these sessions, as they are to be written; without those that have none."""
        plain: list[str] = []
        alone: list[tuple[Snapshot, str]] = []
        for session in sessions:
            live = self._live[session]
            try:
                with self._counted():
                    extra = self.extra_of(session)
                    if extra:
                        alone.append((self._snapshot(session, live), live.token))
                    else:
                        plain.append(session)
            except ShardDied as e:
                self._lost += e.sessions
            except SnapshotError as e:
                self._not_saved(session, live, e, now_ns)
        for snapshot, _ in alone:
            live = self._live[snapshot.session]
            live.unsaved, live.stored = 0, True
        return StatesToWrite(self._rows_of(plain), alone)

    def _not_saved(self, session: str, live: OpenSession, error: SnapshotError, now_ns: int) -> None:
        assert self._queue is not None
        self._retry_ns = now_ns + _RETRY_NS
        for told in self._queue.answered(session):
            told(error)
        if live.leaving is not None:
            self._queue.leave(session)

    def _rows_of(self, sessions: list[str]) -> StateRows | None:
        """The states of sessions as columns, without those of a shard that is dead; None where nothing is left."""
        while sessions:
            of = [self._live[session] for session in sessions]
            handles = np.array([live.handle for live in of])
            try:
                states = self.engine.snapshot_block(handles)
            except ShardDied as e:
                self._lost += e.sessions
                sessions = [session for session in sessions if session not in e.sessions]
                continue
            self._table.unsaved[handles] = 0
            for live in of:
                live.stored = True
            tokens = [live.token_sha256 for live in of]
            last, unknown_ns = self._table.last[handles], np.zeros(len(of), np.int64)
            return StateRows(self.engine.spec.sha256, sessions, tokens, last, unknown_ns, states)
        return None

    def _may(self, session: str, kind: str) -> bool:
        live = self._live[session]
        if kind == "due" and 0 <= live.unsaved < self.settings.snapshot_every:
            return False
        return self.may_save(session)

    def _tell(self, session: str, error: SnapshotError | None, tell: list[Told]) -> None:
        """A state has been written, or not."""
        if error is None:
            self.counts["saved"] += 1
        else:
            self.counts["unsaved"] += 1
            self.last_problem = str(error)
            if (live := self._live.get(session)) is not None:
                live.unsaved = -1
        for told in tell:
            told(error)

    # ---- eviction ------------------------------------------------------------------------------------------------

    def cancel(self, session: str, *, now_ns: int) -> Notice:
        """Save and evict a session now, because its peer disconnected.

        Raises:
            UnknownSession, Evicted: it is not open.
            SnapshotError: its state cannot be written; it stays open.

        """
        return self._evict(session, self._find(session, now_ns), "cancelled", now_ns)

    def cancel_soon(self, session: str, *, now_ns: int) -> Notice | None:
        """As `cancel`; with a writer the session leaves when its state is written, and `write_states` says so. One that
        cannot be saved is tried again.
        """
        if self._queue is None:
            return self.cancel(session, now_ns=now_ns)
        self._leave_soon(session, self._find(session, now_ns), "cancelled")
        return None

    def _leave_soon(self, session: str, live: OpenSession, reason: Reason) -> None:
        assert self._queue is not None
        live.leave(reason)
        self._queue.leave(session)

    def _stay(self, session: str, live: OpenSession) -> None:
        """It is used: it does not leave."""
        if self._queue is not None and live.leaving is not None:
            live.leave(None)
            self._queue.stay(session)

    def lose(self, session: str) -> Notice:
        """A shard died with the session's state: free the slot, and keep what is on disk."""
        live = self._live[session]
        self._abandon(session, "its engine's process died")
        self._close(session)
        self.counts["lost"] += 1
        return Notice(session, live.token, "lost", 0)

    def _abandon(self, session: str, why: str) -> None:
        """Nothing more is written of a session; who waits for that is told why."""
        if self._queue is not None:
            for told in self._queue.drop(session):
                told(SnapshotError(f"the state of session {session!r} was not written: {why}"))

    def evict_idle(self, now_ns: int) -> list[Notice]:
        """Save and evict sessions that were idle for too long. One that cannot be saved stays open, and is counted.

        With a writer they leave when they are written: `write_states` returns them. Sessions whose state died with a
        shard while nothing was stepped are returned, too.
        """
        lost, self._lost = self._lost, []
        notices = [self.lose(session) for session in lost if session in self._live]
        idle = self.idle_for(self._idle_ns, now_ns)
        if self._queue is None:
            return notices + self._evict_all(idle, "idle", now_ns)
        for session in idle:
            if self._live[session].leaving is None:
                self._leave_soon(session, self._live[session], "idle")
        return notices

    def idle_for(self, duration_ns: int, now_ns: int) -> list[str]:
        """Open sessions without a tick for longer than `duration_ns`."""
        return self._table.idle_for(duration_ns, now_ns)

    def leave(self, now_ns: int) -> list[Notice]:
        """Save and evict all sessions, as the engine stops; another one may continue them. It waits for the disk."""
        if self._queue is None:
            return self._evict_all(list(self._live), "leaving", now_ns)
        notices: list[Notice] = []
        sessions = list(self._live)
        for i in range(0, len(sessions), MOST):
            notices += self._leave_together(sessions[i : i + MOST], now_ns)
        self._queue.drain()
        return notices

    def _leave_together(self, sessions: Sequence[str], now_ns: int) -> list[Notice]:
        """Save and evict many sessions as one block."""
        for session in sessions:
            self._settle(session)
        states = self._states_of(sessions, now_ns)
        failed = self._states.save_all(states.rows, states.alone, now_ns)
        notices = []
        assert self._queue is not None
        for session in states.sessions:
            self._tell(session, failed.get(session), self._queue.answered(session))
            if session not in failed:
                notices.append(self._evicted(session, self._live[session], "leaving"))
        return notices

    def _evict_all(self, sessions: Sequence[str], reason: Reason, now_ns: int) -> list[Notice]:
        notices = []
        for session in sessions:
            with contextlib.suppress(SnapshotError):  # counted
                notices.append(self._evict(session, self._live[session], reason, now_ns))
        return notices

    def _evict(self, session: str, live: OpenSession, reason: Reason, now_ns: int) -> Notice:
        self._save(session, live, now_ns)
        return self._evicted(session, live, reason)

    def _evicted(self, session: str, live: OpenSession, reason: Reason) -> Notice:
        """Free the slot of a session whose state is on disk."""
        self._stay(session, live)
        self._abandon(session, "it has left")
        following = live.last + 1
        self._close(session)
        self.counts["evicted"] += 1
        return Notice(session, live.token, reason, following)

    def _close(self, session: str) -> OpenSession:
        """Free the slot of an open session."""
        live = self._live.pop(session)
        live.close()
        self.engine.close(session)
        return live

    # ---- what is kept --------------------------------------------------------------------------------------------

    def _forget(self, session: str, live: OpenSession | None, told: Callable[[], None]) -> None:
        """Remove what is kept of a session that was closed; `live`: as it was."""
        self._abandon(session, "it was closed")
        if self._queue is not None and (live is None or live.stored):
            self._queue.remove(session, told)
            return
        if self._queue is None:
            self._states.forget(session)
        told()

    def is_kept(self, session: str, now_ns: int) -> bool:
        """Whether a state of a session is kept."""
        if self._queue is not None and self._queue.is_removing(session):
            return False
        return self._states.holds(session, now_ns)

    def _kept(self, session: str, now_ns: int) -> Snapshot | None:
        """The state of a session that is kept. Raises SnapshotError."""
        if self._queue is not None and self._queue.is_removing(session):
            return None
        return self._states.load(session, now_ns)

    def sweep(self, now_ns: int) -> int:
        """Delete expired states; returns how many files, 0 where the writer does it. A failure is counted; the next
        call tries again.
        """
        if self._queue is not None:
            self._queue.sweep(now_ns)
            return 0
        try:
            return self._states.sweep(now_ns)
        except SnapshotError as e:
            self._unswept(e)
            return 0

    def _unswept(self, error: SnapshotError) -> None:
        self.counts["unswept"] += 1
        self.last_problem = str(error)

    # ---- helpers -------------------------------------------------------------------------------------------------

    def _find(self, session: str, now_ns: int) -> OpenSession:
        live = self._live.get(session)
        if live is None:
            raise self.missing(session, now_ns)
        return live

    def missing(self, session: str, now_ns: int) -> SessionError:
        """The error for a session that is not open: UnknownSession, or Evicted where its state is kept."""
        if self.is_kept(session, now_ns):
            return self._evicted_error(session)
        self.counts["unknown"] += 1
        return UnknownSession(f"session {session[:80]!r} is not open; open it first")

    def _evicted_error(self, session: str) -> Evicted:
        self.counts["evicted_asked"] += 1
        return Evicted(f"session {session!r} is not open here, but its state is kept; open it with its resume token")
