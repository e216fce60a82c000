"""Sessions: many that come, go, fall asleep and come back, over one engine; each as if it were alone.

On top of an engine's slots: names that are checked, ticks that are never stepped twice, features that are looked at
before they share a batch with others', sessions that are put to disk when they are idle and brought back by a token,
and no more of them than can be served in time. Every refusal is an error of its own, at once. Time is given with each
call (`now_ns` of the monotonic clock); no clock is read here. Knows nothing about sockets or who is at their other end.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Literal, Protocol, TypeAlias

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
from stream_mmrnn.core.types import Prediction, Stamps, Tick
from stream_mmrnn.predict.protocols import Engine
from stream_mmrnn.predict.snapshots import NEVER, Snapshot
from stream_mmrnn.serve.admission import LEAST, Admission

Reason: TypeAlias = Literal["idle", "cancelled", "leaving", "lost"]
"""Why a session lost its slot: it was silent, its peer broke off, the engine goes, or a part of it has died."""

_TOKEN_SHA256 = "token_sha256"  # noqa: S105 a name, not a secret
_MEASURED_ROUNDS, _MEASURED_NS = 16, 1_000_000_000
"""So often is every count stepped, or until it took so long."""
_MEASURED_COUNTS = (1, 2, 4, 8, 16, 32, 64)


class Store(Protocol):
    """What is asked of where states are kept: StateStore is one."""

    def save(self, snapshot: Snapshot, unix_ns: int) -> object: ...

    def load(self, session: str, unix_ns: int) -> Snapshot | None: ...

    def holds(self, session: str, unix_ns: int) -> bool: ...

    def forget(self, session: str) -> object: ...

    def sweep(self, unix_ns: int) -> int: ...


class Opened(msgspec.Struct, frozen=True):
    """What one who opens a session is told."""

    session: str
    token: str
    """Secret: whoever has it can take the session over, here or once it is evicted. It stays the same."""
    next_index: int
    """The first tick that is still to come; earlier ones would be dropped as duplicates or stale."""
    resumed: bool
    """Whether it goes on from a state."""


class Notice(msgspec.Struct, frozen=True):
    """A session has lost its slot; its state is on disk, and its token brings it back while it lives there."""

    session: str
    token: str
    reason: Reason
    next_index: int


class _Live(msgspec.Struct):
    """What is known of an open session."""

    token: str
    heard_ns: int
    last: int = NEVER
    """Index of its newest tick."""
    unsaved: int = -1
    """Ticks since its newest snapshot; -1: there is none."""


class Sessions:
    """Open sessions of one engine, and those of its folder that may come back. One folder serves one engine."""

    def __init__(
        self,
        engine: Engine,
        store: Store,
        settings: config.State,
        *,
        admission: config.Admission | None = None,
        wall_offset_ns: int = 0,
        make_token: Callable[[], str] = secrets.token_urlsafe,
        writer: Executor | None = None,
    ) -> None:
        """`admission`: with it the engine is measured at once, and never given more than it can serve in time; without,
        slots are the only limit. `wall_offset_ns` (`clock.wall_offset_ns`) makes Unix time of the times given. With a
        `writer` of one thread `keep` does not wait for the disk; who ends it does so after `leave`.
        """
        self.engine, self.store, self.settings = engine, store, settings
        self.counts = {
            **dict.fromkeys(("opened", "resumed", "closed", "evicted", "lost", "stepped", "duplicates", "stale"), 0),
            **dict.fromkeys(("skipped", "busy", "unknown", "duplicate", "evicted_asked", "bad_ticks"), 0),
            **dict.fromkeys(("saved", "unsaved"), 0),
        }
        """`duplicates`: ticks that were their session's last one again, `stale`: older ones; both were not stepped.
        `skipped`: ticks that never came. `busy`, `unknown`, `duplicate`, `evicted_asked`: refusals. `unsaved`: states
        that could not be written; a session stays open rather than be evicted so. `lost`: with a part of the engine."""
        self.last_problem = ""
        """Why the newest state could not be written."""
        self._offset_ns = wall_offset_ns
        self._idle_ns = round(settings.idle_s * 1e9)
        self._make_token = make_token
        self._live: dict[str, _Live] = {}
        self._writer = writer
        self._writing: dict[str, Future[object]] = {}
        self._sizes = tuple((m.name, (m.size,)) for m in engine.spec.modalities)
        self._retry = admission or config.Admission()
        self.admission: Admission | None = None
        if admission is not None:
            self.admission = Admission(engine.spec.tick_ns, admission.share)
            self._measure()

    def __contains__(self, session: str) -> bool:
        return session in self._live

    def __len__(self) -> int:
        """How many are open."""
        return len(self._live)

    # ---- coming --------------------------------------------------------------------------------------------------

    def open(self, session: str, token: str | None = None, *, now_ns: int) -> Opened:
        """Begin a session, or go on with one: with its token, open still or evicted.

        Raises:
            Busy: no slot, or no time for one more; `retry_after_s` says when to ask again.
            DuplicateSession: it is open, and the token is not its.
            Evicted: it is not open but its state is kept, and the token is not its.
            UnknownSession: a token, but nothing is kept of the session (any more).
            SessionError: it cannot be called so, or its state is another model's.
            SnapshotError: its state cannot be read.

        """
        if not re.match(topics.SESSION_NAME, session):
            raise SessionError(f"a session cannot be called {session[:80]!r}; expected {topics.SESSION_NAME}")
        live = self._live.get(session)
        if live is not None:
            if token is None or not _equal(token, live.token):
                self.counts["duplicate"] += 1
                raise DuplicateSession(f"session {session!r} is open already; give its token, or take another name")
            live.heard_ns = now_ns
            return Opened(session, live.token, live.last + 1, live.last != NEVER)
        snapshot = None
        if token is not None:
            snapshot = self._kept(session, token, now_ns)
        elif self.store.holds(session, self._unix_ns(now_ns)):
            raise self._evicted(session)
        self._admit(session, now_ns)
        if snapshot is None:
            self._live[session] = live = _Live(self._make_token(), now_ns)
            self.counts["opened"] += 1
            return Opened(session, live.token, 0, False)
        assert token is not None
        self._restore(snapshot, token, now_ns)
        return Opened(session, token, snapshot.tick_index + 1, True)

    def adopt(self, snapshot: Snapshot, token: str, *, now_ns: int) -> None:
        """Go on with a session that was open on another engine, as this one left it; nobody asked for it.

        Raises:
            Busy: no slot, or no time for one more.
            SessionError: its state is another model's.

        """
        if snapshot.model_sha256 != self.engine.spec.sha256:
            raise self._other_model(snapshot)
        self._admit(snapshot.session, now_ns)
        self._restore(snapshot, token, now_ns)

    def _restore(self, snapshot: Snapshot, token: str, now_ns: int) -> None:
        """Into the slot that the session has been given."""
        try:
            self.engine.restore(snapshot.session, snapshot.state)
        except BaseException:
            self.engine.close(snapshot.session)
            raise
        self._live[snapshot.session] = _Live(token, now_ns, snapshot.tick_index, 0)
        self.counts["resumed"] += 1

    def drop(self, session: str) -> bool:
        """It is another engine's now: its slot is free, nothing is written; whether it was open."""
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

    def _kept(self, session: str, token: str, now_ns: int) -> Snapshot:
        """What is on disk of a session whose token this is."""
        snapshot = self.store.load(session, self._unix_ns(now_ns))
        if snapshot is None:
            self.counts["unknown"] += 1
            raise UnknownSession(f"nothing is kept of session {session!r} (any more); open it without a token")
        expected = snapshot.extra.get(_TOKEN_SHA256)
        if not isinstance(expected, str) or not _equal(_sha256(token), expected):
            raise self._evicted(session)
        if snapshot.model_sha256 != self.engine.spec.sha256:
            raise self._other_model(snapshot)
        return snapshot

    def _admit(self, session: str, now_ns: int) -> None:
        """A slot of the engine, or Busy with a hint."""
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
        """Until the next session falls asleep if nobody hears of it, within bounds: others may close any time."""
        oldest_ns = min((live.heard_ns for live in self._live.values()), default=now_ns)
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
        """Predictions for the ticks, in their order, less those that their session has seen, which are counted and
        given to `skipped`.

        Ticks of sessions that are not open, and ticks that do not fit the model, go to `refused` with their error and
        do not hold up the others. Without `refused` the error is raised, and nothing was stepped.

        Raises:
            UnknownSession, Evicted, BadTick: see above.
            ProcessError: the engine has broken; its sessions go on from their snapshots over a new one.

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
        """Whether the session has not seen the tick; from now on it has."""
        live = self._live[tick.session]
        live.heard_ns = now_ns
        if tick.index <= live.last:
            self.counts["duplicates" if tick.index == live.last else "stale"] += 1
            return False
        if live.last != NEVER:
            self.counts["skipped"] += tick.index - live.last - 1
        live.last = tick.index
        live.unsaved += live.unsaved >= 0
        return True

    def _misfit(self, tick: Tick) -> BadTick | None:
        """Two vectors of wrong widths could fill two rows of a batch together: one session would read the other's."""
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
        if not 0 <= tick.index < 1 << 63:
            self.counts["bad_ticks"] += 1
            return BadTick(f"tick {tick.index} of session {tick.session!r}: expected an index from 0 on")
        return None

    def next_index(self, session: str) -> int:
        """The first tick of an open session that is still to come."""
        return self._live[session].last + 1

    def reset(self, session: str, *, now_ns: int) -> None:
        """Start the session's state anew; its ticks count on. Raises UnknownSession or Evicted."""
        live = self._find(session, now_ns)
        live.heard_ns, live.unsaved = now_ns, -1
        self.engine.reset(session)

    # ---- leaving -------------------------------------------------------------------------------------------------

    def close(self, session: str, token: str | None = None, *, now_ns: int) -> None:
        """The session is over: its slot is free and nothing of it is kept. An evicted one wants its token for that.

        Raises:
            UnknownSession: it is not open, and nothing of it is kept.
            Evicted: it is not open, and the token is not its.

        """
        self._settle(session)
        if self._live.pop(session, None) is not None:
            self.engine.close(session)
        elif token is None or not self._owns(session, token, now_ns):
            raise self.missing(session, now_ns)
        self.store.forget(session)
        self.counts["closed"] += 1

    def _owns(self, session: str, token: str, now_ns: int) -> bool:
        snapshot = self.store.load(session, self._unix_ns(now_ns))
        expected = snapshot.extra.get(_TOKEN_SHA256) if snapshot is not None else None
        return isinstance(expected, str) and _equal(_sha256(token), expected)

    def cancel(self, session: str, *, now_ns: int) -> Notice:
        """Break the session off: its slot is free at once, its state is kept for its token.

        Raises:
            UnknownSession, Evicted: it is not open.
            SnapshotError: its state cannot be written; it is open still.

        """
        return self._evict(session, self._find(session, now_ns), "cancelled", now_ns)

    def lose(self, session: str) -> Notice:
        """The engine has lost its state with a part of itself: the slot is free, and what is on disk of it stays."""
        live = self._live.pop(session)
        self._settle(session)
        self.engine.close(session)
        self.counts["lost"] += 1
        return Notice(session, live.token, "lost", 0)

    def evict_idle(self, now_ns: int) -> list[Notice]:
        """Put to disk what was silent for too long. What cannot be written stays, and is counted."""
        return self._evict_all(self.silent(now_ns, self._idle_ns), "idle", now_ns)

    def silent(self, now_ns: int, for_ns: int) -> list[str]:
        """Open sessions that have had no tick for longer."""
        return [name for name, live in self._live.items() if now_ns - live.heard_ns > for_ns]

    def leave(self, now_ns: int) -> list[Notice]:
        """Put all sessions to disk: the engine goes, another one may take them up."""
        return self._evict_all(list(self._live), "leaving", now_ns)

    def _evict_all(self, sessions: Sequence[str], reason: Reason, now_ns: int) -> list[Notice]:
        notices = []
        for session in sessions:
            try:
                notices.append(self._evict(session, self._live[session], reason, now_ns))
            except SnapshotError as e:
                self.last_problem = str(e)
        return notices

    def _evict(self, session: str, live: _Live, reason: Reason, now_ns: int) -> Notice:
        self._save(session, live, now_ns)
        self.engine.close(session)
        del self._live[session]
        self.counts["evicted"] += 1
        return Notice(session, live.token, reason, live.last + 1)

    # ---- keeping -------------------------------------------------------------------------------------------------

    def save(self, now_ns: int, most: int = 1) -> list[str]:
        """Write snapshots of at most `most` sessions that are due, those with the most ticks since their last first.

        For when there is nothing to step: without a writer it waits for the disk. After a crash a session goes on from
        its newest snapshot, and what it is told as `next_index` says which ticks to send again. One that cannot be
        written is counted, and is due again.
        """
        for session in [name for name, writing in self._writing.items() if writing.done()]:
            self._settle(session)
        every, most = self.settings.snapshot_every, most - len(self._writing)
        if most <= 0:
            return []
        due = [(live.unsaved, name) for name, live in self._live.items() if live.unsaved < 0 or live.unsaved >= every]
        if not every or not due:
            return []
        due.sort(key=lambda of: (of[0] >= 0, -of[0]))
        saved = []
        for _, session in due[:most]:
            if self._writer is not None:
                live = self._live[session]
                made = self._snapshot(session, live)
                self._writing[session] = self._writer.submit(self.store.save, made, self._unix_ns(now_ns))
                live.unsaved = 0
                saved.append(session)
                continue
            try:
                self._save(session, self._live[session], now_ns)
                saved.append(session)
            except SnapshotError as e:
                self.last_problem = str(e)
        return saved

    def _settle(self, session: str) -> None:
        """A state that is being written is on disk, or its session is due again: before anything else is done to it."""
        writing = self._writing.pop(session, None)
        if writing is None:
            return
        try:
            writing.result()
            self.counts["saved"] += 1
        except SnapshotError as e:
            self.counts["unsaved"] += 1
            self.last_problem = str(e)
            if (live := self._live.get(session)) is not None:
                live.unsaved = -1

    def flush(self, session: str, *, now_ns: int) -> int:
        """Write the session's state now; the first tick that is not in it.

        Raises:
            UnknownSession, Evicted: it is not open.
            SnapshotError: it cannot be written; it is open still.

        """
        live = self._find(session, now_ns)
        self._settle(session)
        if live.unsaved:
            self._save(session, live, now_ns)
        return live.last + 1

    def sweep(self, now_ns: int) -> int:
        """Remove states that have outlived their time; how many files that were."""
        return self.store.sweep(self._unix_ns(now_ns))

    def _snapshot(self, session: str, live: _Live) -> Snapshot:
        extra: dict[str, bytes | str] = {_TOKEN_SHA256: _sha256(live.token)}  # who reads the disk resumes nothing
        return Snapshot(session, self.engine.spec.sha256, live.last, self.engine.snapshot(session), extra)

    def _save(self, session: str, live: _Live, now_ns: int) -> None:
        self._settle(session)
        try:
            self.store.save(self._snapshot(session, live), self._unix_ns(now_ns))
        except SnapshotError:
            self.counts["unsaved"] += 1
            raise
        live.unsaved = 0
        self.counts["saved"] += 1

    # ---- the rest ------------------------------------------------------------------------------------------------

    def _unix_ns(self, now_ns: int) -> int:
        return now_ns + self._offset_ns

    def _find(self, session: str, now_ns: int) -> _Live:
        live = self._live.get(session)
        if live is None:
            raise self.missing(session, now_ns)
        return live

    def missing(self, session: str, now_ns: int) -> SessionError:
        """What is to be said of a session that is not open: UnknownSession, or Evicted where its state is kept."""
        if self.store.holds(session, self._unix_ns(now_ns)):
            return self._evicted(session)
        self.counts["unknown"] += 1
        return UnknownSession(f"session {session[:80]!r} is not open; open it first")

    def _evicted(self, session: str) -> Evicted:
        self.counts["evicted_asked"] += 1
        return Evicted(f"session {session!r} is not open here, but its state is kept; open it with its resume token")

    def _measure(self) -> None:
        """What steps take, before anybody waits for one; with sessions of nobody, whose slots are free again after."""
        names = []
        try:
            for i in range(max(_MEASURED_COUNTS)):
                self.engine.open(name := f"\0measured {i}")
                names.append(name)
        except SessionError:
            pass
        features = {name: np.zeros(shape, np.float32) for name, shape in self._sizes}
        present, age_ns = dict.fromkeys(features, True), dict.fromkeys(features, 0)
        nowhere = Stamps(0, 0, 0, 0, "")
        ticks = [Tick(name, 0, 0, features, present, age_ns, nowhere) for name in names]
        assert self.admission is not None
        counts = sorted({min(n, len(ticks)) for n in _MEASURED_COUNTS} - {0})
        spent_ns = measured = 0
        try:
            for round_ in range(_MEASURED_ROUNDS + 1):
                for count in counts:
                    said = self.engine.step(ticks[:count])
                    took_ns = said[-1].step_end_ns - said[0].step_start_ns
                    spent_ns += took_ns
                    if round_:  # the first runs also get their memory
                        self.admission.add(count, took_ns)
                        measured += 1
                if measured >= LEAST and spent_ns > _MEASURED_NS:
                    break
            self.admission.settle()
        finally:
            for name in names:
                self.engine.close(name)


def _sha256(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def _equal(one: str, other: str) -> bool:
    """In a time that says nothing about where they differ."""
    return hmac.compare_digest(one.encode("utf-8", "surrogatepass"), other.encode("utf-8", "surrogatepass"))
