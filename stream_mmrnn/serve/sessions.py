"""Sessions: many sessions over one engine, each with the results of a session alone.

Adds to an engine's slots: validated names, deduplicated ticks, features that are validated before they share a batch,
eviction of idle sessions to disk, resuming by token, and admission control. Each kind of refusal is its own error,
raised at once. Each call is given the time (`now_ns` of the monotonic clock); no clock is read here. Knows nothing
about sockets or clients.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Literal, TypeAlias

import msgspec
import numpy as np

from stream_mmrnn.core import config, topics
from stream_mmrnn.core.errors import (
    BadTick,
    Busy,
    DuplicateSession,
    Evicted,
    SessionError,
    SnapshotError,
    UnknownSession,
)
from stream_mmrnn.core.types import MAX_TICK, Prediction, Tick
from stream_mmrnn.predict.protocols import Engine
from stream_mmrnn.predict.snapshots import NEVER, Snapshot
from stream_mmrnn.serve.admission import Admission
from stream_mmrnn.serve.measure import measure
from stream_mmrnn.serve.saved_states import SavedStates, Store, same_token

Reason: TypeAlias = Literal["idle", "cancelled", "leaving", "lost"]
"""Why a session lost its slot: it was idle, its peer disconnected, the engine stops, or a shard died."""


class Opened(msgspec.Struct, frozen=True):
    """The result of `open`."""

    session: str
    token: str
    """Secret: a client that has it can take the session over, open or evicted. It does not change."""
    next_index: int
    """Index of the next tick; earlier ones are dropped as duplicates or stale."""
    resumed: bool
    """Whether it continues from a saved state."""
    extra: Mapping[str, bytes | str] = {}
    """What its saved state holds beside the engine's tensors, where it was evicted."""


class Notice(msgspec.Struct, frozen=True):
    """A session has lost its slot. Its state is on disk, and its token opens it again until that expires."""

    session: str
    token: str
    reason: Reason
    next_index: int


class _Live(msgspec.Struct):
    """An open session."""

    token: str
    active_ns: int
    """When it last had a tick, or was opened."""
    last: int = NEVER
    """Index of its newest tick."""
    unsaved: int = -1
    """Ticks since its newest snapshot; -1 where it has none."""


class Sessions:
    """Open sessions of one engine, and evicted ones in its store. One store belongs to one engine."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        settings: config.StateSettings,
        *,
        admission: config.AdmissionSettings | None = None,
        wall_offset_ns: int = 0,
        make_token: Callable[[], str] = secrets.token_urlsafe,
        writer: Executor | None = None,
    ) -> None:
        """`admission`: the engine is measured at once, and never given more sessions than it can serve in time; without
        it, slots are the only limit. `wall_offset_ns` (`clock.wall_offset_ns`) converts `now_ns` to Unix time. With a
        `writer` of one thread `save` does not wait for the disk; shut it down after `leave`.
        """
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
        self.last_problem = ""
        """Why the newest state could not be written, or expired ones not be removed."""
        self._idle_ns = round(settings.idle_s * 1e9)
        self._make_token = make_token
        self._live: dict[str, _Live] = {}
        self._states = SavedStates(store, wall_offset_ns, writer)
        self._sizes = tuple((m.name, (m.size,)) for m in engine.spec.modalities)
        self._retry = admission or config.AdmissionSettings()
        self.admission: Admission | None = None
        if admission is not None:
            self.admission = Admission(engine.spec.tick_ns, admission.share)
            measure(engine, self.admission)

    def __contains__(self, session: str) -> bool:
        return session in self._live

    def __len__(self) -> int:
        """How many sessions are open."""
        return len(self._live)

    # ---- opening -------------------------------------------------------------------------------------------------

    def open(self, session: str, token: str | None = None, *, now_ns: int) -> Opened:
        """Begin a session, or with its token continue one that is open or evicted.

        Raises:
            Busy: no free slot, or one more could not be served in time; `retry_after_s` says when to ask again.
            DuplicateSession: it is open, and the token is not its token.
            Evicted: its state is kept, and the token is not its token.
            UnknownSession: a token was given, but no state of the session is kept.
            SessionError: its name is not valid, or its state is of another model.
            SnapshotError: its state cannot be read.

        """
        if not re.match(topics.SESSION_NAME, session):
            raise SessionError(f"a session cannot be called {session[:80]!r}; expected {topics.SESSION_NAME}")
        live = self._live.get(session)
        if live is not None:
            if token is None or not same_token(token, live.token):
                self.counts["duplicate"] += 1
                raise DuplicateSession(f"session {session!r} is open already; give its token, or take another name")
            live.active_ns = now_ns
            return Opened(session, live.token, live.last + 1, live.last != NEVER)
        snapshot = None
        if token is not None:
            snapshot = self._load(session, token, now_ns)
        elif self._states.holds(session, now_ns):
            raise self._evicted(session)
        self._admit(session, now_ns)
        if snapshot is None:
            self._live[session] = live = _Live(self._make_token(), now_ns)
            self.counts["opened"] += 1
            return Opened(session, live.token, 0, False)
        assert token is not None
        self._restore(snapshot, token, now_ns)
        return Opened(session, token, snapshot.tick_index + 1, True, snapshot.extra)

    def adopt(self, snapshot: Snapshot, token: str, *, now_ns: int) -> None:
        """Continue a session that was open on another engine, without a request of its client.

        Raises:
            Busy: no free slot, or one more could not be served in time.
            SessionError: its state is of another model.

        """
        if snapshot.model_sha256 != self.engine.spec.sha256:
            raise self._other_model(snapshot)
        self._admit(snapshot.session, now_ns)
        self._restore(snapshot, token, now_ns)

    def _restore(self, snapshot: Snapshot, token: str, now_ns: int) -> None:
        """Restore a state into the slot that its session has."""
        try:
            self.engine.restore(snapshot.session, snapshot.state)
        except BaseException:
            self.engine.close(snapshot.session)
            raise
        self._live[snapshot.session] = _Live(token, now_ns, snapshot.tick_index, 0)
        self.counts["resumed"] += 1

    def drop(self, session: str) -> bool:
        """Forget a session without saving it: another engine has it now. Returns whether it was open."""
        if self._live.pop(session, None) is None:
            return False
        self._settle(session)
        self.engine.close(session)
        return True

    def _other_model(self, snapshot: Snapshot) -> SessionError:
        return SessionError(
            f"the state of session {snapshot.session!r} is of model {snapshot.model_sha256[:12]}, this engine's is "
            f"{self.engine.spec.sha256[:12]}; close it with its token to begin anew"
        )

    def _load(self, session: str, token: str, now_ns: int) -> Snapshot:
        """Load the state of a session, if this is its token."""
        snapshot = self._states.load(session, now_ns)
        if snapshot is None:
            self.counts["unknown"] += 1
            raise UnknownSession(f"no state of session {session!r} is kept (any more); open it without a token")
        if not self._states.is_token(snapshot, token):
            raise self._evicted(session)
        if snapshot.model_sha256 != self.engine.spec.sha256:
            raise self._other_model(snapshot)
        return snapshot

    def _admit(self, session: str, now_ns: int) -> None:
        """Take a slot of the engine, or raise Busy with a hint."""
        why = ""
        if self.admission is not None and self._live and not self.admission.admits(len(self._live) + 1):
            why = f"{len(self._live)} sessions are open, and one more could not be served in time"
        else:
            try:
                self.engine.open(session)
            except Busy as e:
                why = str(e)
        if why:
            self.counts["busy"] += 1
            after_s = self._retry_after_s(now_ns)
            raise Busy(f"{why}; ask again in {after_s:.3g} s", after_s)

    def _retry_after_s(self, now_ns: int) -> float:
        """Until the next session would be evicted as idle, within bounds: others may close at any time."""
        oldest_ns = min((live.active_ns for live in self._live.values()), default=now_ns)
        left_s = (oldest_ns + self._idle_ns - now_ns) / 1e9
        return min(max(left_s, self._retry.retry_s), self._retry.retry_max_s)

    # ---- stepping ------------------------------------------------------------------------------------------------

    def step(
        self,
        ticks: Sequence[Tick],
        *,
        now_ns: int,
        refused: Callable[[Tick, SessionError], None] | None = None,
        skipped: Callable[[Tick], None] | None = None,
    ) -> list[Prediction]:
        """Predictions for the ticks, in order. Ticks that their session had already go to `skipped` and are counted.

        Ticks of sessions that are not open, and ticks that do not fit the model, are passed to `refused` with their
        error; the others are stepped. Without `refused` the error is raised, and nothing is stepped.

        Raises:
            UnknownSession, Evicted, BadTick: see above.
            ProcessError: the engine has failed; a new one continues its sessions from their snapshots.

        """
        checked: list[Tick] = []
        for tick in ticks:
            error = self.missing(tick.session, now_ns) if tick.session not in self._live else self._misfit(tick)
            if error is None:
                checked.append(tick)
            elif refused is None:
                raise error
            else:
                refused(tick, error)
        fit: list[Tick] = []
        for tick in checked:
            if self._is_new(tick, now_ns):
                fit.append(tick)
            elif skipped is not None:
                skipped(tick)
        if not fit:
            return []
        predictions = self.engine.step(fit)
        self.counts["stepped"] += len(fit)
        if self.admission is not None:
            self.admission.add(len(fit), predictions[-1].step_end_ns - predictions[0].step_start_ns)
        return list(predictions)

    def _is_new(self, tick: Tick, now_ns: int) -> bool:
        """Whether the tick is newer than all of its session; marks it as seen."""
        live = self._live[tick.session]
        live.active_ns = now_ns
        if tick.index <= live.last:
            self.counts["duplicates" if tick.index == live.last else "stale"] += 1
            return False
        if live.last != NEVER:
            self.counts["skipped"] += tick.index - live.last - 1
        live.last = tick.index
        live.unsaved += live.unsaved >= 0
        return True

    def observe_input(self, session: str, now_ns: int, due: bool) -> None:
        """A session is not idle, though no tick came of it; `due`: its state is to be saved soon."""
        live = self._live[session]
        live.active_ns = now_ns
        if due and self.settings.snapshot_every:
            live.unsaved = max(live.unsaved, self.settings.snapshot_every) if live.unsaved >= 0 else live.unsaved

    def _misfit(self, tick: Tick) -> BadTick | None:
        """Why a tick does not fit the model.

        Two vectors of wrong sizes could fill two rows of a batch together: one session would read data of the other.
        """
        for name, shape in self._sizes:
            vector = tick.features.get(name)
            if vector is None or vector.shape != shape or vector.dtype != np.float32:
                got = "none" if vector is None else f"{vector.dtype} {list(vector.shape)}"
            elif name not in tick.present or name not in tick.age_ns:
                got = "no mask or no age of it"
            else:
                continue
            self.counts["bad_ticks"] += 1
            return BadTick(
                f"tick {tick.index} of session {tick.session!r}: expected float32 {list(shape)} as {name}, got {got}"
            )
        if not 0 <= tick.index <= MAX_TICK:
            self.counts["bad_ticks"] += 1
            return BadTick(
                f"tick {tick.index} of session {tick.session!r}: expected an index from 0 to 2^53 - 1; number the "
                "session's ticks from 0"
            )
        return None

    def next_index(self, session: str) -> int:
        """Index of the next tick of an open session."""
        return self._live[session].last + 1

    def reset(self, session: str, *, now_ns: int) -> None:
        """Start the session's state anew; tick indices continue. Raises UnknownSession or Evicted."""
        live = self._find(session, now_ns)
        live.active_ns, live.unsaved = now_ns, -1
        self.engine.reset(session)

    # ---- closing and eviction ------------------------------------------------------------------------------------

    def close(self, session: str, token: str | None = None, *, now_ns: int) -> None:
        """End a session: free its slot and delete its state. For an evicted session its token is needed.

        Raises:
            UnknownSession: it is not open, and no state of it is kept.
            Evicted: it is not open, and the token is not its token.

        """
        self._settle(session)
        if self._live.pop(session, None) is not None:
            self.engine.close(session)
        elif token is None or not self._states.owns(session, token, now_ns):
            raise self.missing(session, now_ns)
        self.store.forget(session)
        self.counts["closed"] += 1

    def cancel(self, session: str, *, now_ns: int) -> Notice:
        """Save and evict a session now, because its peer disconnected.

        Raises:
            UnknownSession, Evicted: it is not open.
            SnapshotError: its state cannot be written; it stays open.

        """
        return self._evict(session, self._find(session, now_ns), "cancelled", now_ns)

    def lose(self, session: str) -> Notice:
        """A shard died with the session's state: free the slot, and keep what is on disk."""
        live = self._live.pop(session)
        self._settle(session)
        self.engine.close(session)
        self.counts["lost"] += 1
        return Notice(session, live.token, "lost", 0)

    def evict_idle(self, now_ns: int) -> list[Notice]:
        """Save and evict sessions that were idle for too long. One that cannot be saved stays open, and is counted."""
        return self._evict_all(self.idle_for(self._idle_ns, now_ns), "idle", now_ns)

    def idle_for(self, duration_ns: int, now_ns: int) -> list[str]:
        """Open sessions without a tick for longer than `duration_ns`."""
        return [name for name, live in self._live.items() if now_ns - live.active_ns > duration_ns]

    def leave(self, now_ns: int) -> list[Notice]:
        """Save and evict all sessions, as the engine stops; another one may continue them."""
        return self._evict_all(list(self._live), "leaving", now_ns)

    def _evict_all(self, sessions: Sequence[str], reason: Reason, now_ns: int) -> list[Notice]:
        notices = []
        for session in sessions:
            with contextlib.suppress(SnapshotError):  # counted
                notices.append(self._evict(session, self._live[session], reason, now_ns))
        return notices

    def _evict(self, session: str, live: _Live, reason: Reason, now_ns: int) -> Notice:
        self._save(session, live, now_ns)
        self.engine.close(session)
        del self._live[session]
        self.counts["evicted"] += 1
        return Notice(session, live.token, reason, live.last + 1)

    # ---- saving --------------------------------------------------------------------------------------------------

    def save(self, now_ns: int, most: int = 1) -> list[str]:
        """Save at most `most` sessions that are due, those with the most unsaved ticks first; returns their names.

        Call it while no tick waits: without a writer it blocks on the disk. After a crash a session continues from its
        newest snapshot, and `Opened.next_index` says which ticks to send again. One that cannot be saved is counted,
        and is due again.
        """
        for session in self._states.written():
            self._settle(session)
        every, most = self.settings.snapshot_every, most - self._states.writing
        if most <= 0:
            return []
        due = [(live.unsaved, name) for name, live in self._live.items() if live.unsaved < 0 or live.unsaved >= every]
        if not every or not due:
            return []
        due.sort(key=lambda of: (of[0] >= 0, -of[0]))
        saved = []
        for _, session in due[:most]:
            live = self._live[session]
            with contextlib.suppress(SnapshotError):  # counted
                if self._states.has_writer:
                    with self._counted():
                        self._states.submit(self._snapshot(session, live), live.token, now_ns)
                    live.unsaved = 0
                else:
                    self._save(session, live, now_ns)
                saved.append(session)
        return saved

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
        """Wait until the session's state in the writer is on disk; where that fails, the session is due again."""
        try:
            with self._counted():
                if self._states.finish(session):
                    self.counts["saved"] += 1
        except SnapshotError:
            if (live := self._live.get(session)) is not None:
                live.unsaved = -1

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

    def sweep(self, now_ns: int) -> int:
        """Delete expired states; returns how many files. A failure is counted; the next call tries again."""
        try:
            return self._states.sweep(now_ns)
        except SnapshotError as e:
            self.counts["unswept"] += 1
            self.last_problem = str(e)
            return 0

    def _snapshot(self, session: str, live: _Live) -> Snapshot:
        state = self.engine.snapshot(session)
        return Snapshot(session, self.engine.spec.sha256, live.last, state, self.extra_of(session))

    def _save(self, session: str, live: _Live, now_ns: int) -> None:
        self._settle(session)
        with self._counted():
            self._states.save(self._snapshot(session, live), live.token, now_ns)
        live.unsaved = 0
        self.counts["saved"] += 1

    # ---- helpers -------------------------------------------------------------------------------------------------

    def _find(self, session: str, now_ns: int) -> _Live:
        live = self._live.get(session)
        if live is None:
            raise self.missing(session, now_ns)
        return live

    def missing(self, session: str, now_ns: int) -> SessionError:
        """The error for a session that is not open: UnknownSession, or Evicted where its state is kept."""
        if self._states.holds(session, now_ns):
            return self._evicted(session)
        self.counts["unknown"] += 1
        return UnknownSession(f"session {session[:80]!r} is not open; open it first")

    def _evicted(self, session: str) -> Evicted:
        self.counts["evicted_asked"] += 1
        return Evicted(f"session {session!r} is not open here, but its state is kept; open it with its resume token")
