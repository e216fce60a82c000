"""Sessions: many sessions over one engine, each with the results of a session alone.

Adds to an engine's slots: validated names, deduplicated ticks, features that are validated before they share a batch,
eviction of idle sessions to disk, resuming by token, and admission control. Each kind of refusal is its own error,
raised at once. Each call is given the time (`now_ns` of the monotonic clock); no clock is read here. Knows nothing
about sockets or clients.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import msgspec
import numpy as np

from stream_mmrnn.core import topics
from stream_mmrnn.core.block import Block, BlockPredictions, Flags, Integers
from stream_mmrnn.core.errors import (
    BadTick,
    Busy,
    DuplicateSession,
    SessionError,
    ShardDied,
    UnknownSession,
)
from stream_mmrnn.core.settings import AdmissionSettings, StateSettings
from stream_mmrnn.core.types import MAX_TICK, Prediction, Tick
from stream_mmrnn.predict.block_runner import predictions_of
from stream_mmrnn.predict.columns import Columns, rounds
from stream_mmrnn.predict.protocols import Engine
from stream_mmrnn.predict.snapshots import NEVER, Snapshot
from stream_mmrnn.serve.admission import Admission
from stream_mmrnn.serve.measure import measure, measure_again
from stream_mmrnn.serve.open_sessions import OpenSessions
from stream_mmrnn.serve.saved_states import BlockStore, Store, same_token
from stream_mmrnn.serve.session_table import OpenSession


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


class Stepped(msgspec.Struct, frozen=True, eq=False):
    """What came of a block of N ticks. A tick that is in neither mask was refused, or its session is lost."""

    predictions: BlockPredictions | None
    """Of the ticks that were stepped, in their order; None where none was."""
    stepped: Flags
    """[N]"""
    late: Flags
    """[N] Their session had them already."""
    lost: tuple[str, ...] = ()
    """Sessions whose state died with a shard."""


class SteppedOne(NamedTuple):
    """What came of one tick."""

    prediction: Prediction | None
    late: bool
    """The session had it already."""
    lost: tuple[str, ...] = ()
    """Sessions whose state died with a shard."""


class Sessions(OpenSessions):
    """Open sessions of one engine, and evicted ones in its store. One store belongs to one engine."""

    def __init__(
        self,
        engine: Engine,
        store: Store | BlockStore,
        settings: StateSettings,
        *,
        admission: AdmissionSettings | None = None,
        wall_offset_ns: int = 0,
        now_ns: int = 0,
        make_token: Callable[[], str] = secrets.token_urlsafe,
        writer: Executor | None = None,
    ) -> None:
        """`admission`: the engine is measured at once (`now_ns`), and never given more sessions than it can serve in
        time; without it, slots are the only limit. `wall_offset_ns` (`clock.wall_offset_ns`) converts `now_ns` to Unix
        time. With a `writer` of `save_queue.WRITERS` threads `save_soon` and `write_states` do not wait for the disk;
        shut it down after `leave`.
        """
        super().__init__(engine, store, settings, wall_offset_ns, writer)
        self._make_token = make_token
        self._sizes = tuple((m.name, (m.size,)) for m in engine.spec.modalities)
        self._columns = Columns(engine.spec.modalities, 0)
        self._retry = admission or AdmissionSettings()
        self.admission: Admission | None = None
        if admission is not None:
            self.admission = Admission(engine.spec.tick_ns, admission.share)
            measure(engine, self.admission, now_ns)

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
            if not self.has_token(session, token):
                self.counts["duplicate"] += 1
                raise DuplicateSession(f"session {session!r} is open already; give its token, or take another name")
            live.active_ns = now_ns
            self._stay(session, live)
            return Opened(session, live.token, live.last + 1, live.last != NEVER)
        snapshot = None
        if token is not None:
            snapshot = self._load(session, token, now_ns)
        elif self.is_kept(session, now_ns):
            raise self._evicted_error(session)
        self._admit(session, now_ns)
        if snapshot is None:
            self._live[session] = live = self._add(session, self._make_token(), now_ns)
            self.counts["opened"] += 1
            return Opened(session, live.token, 0, False)
        assert token is not None
        self._restore(snapshot, token, now_ns)
        return Opened(session, token, snapshot.tick_index + 1, True, snapshot.extra)

    def _add(
        self, session: str, token: str, now_ns: int, last: int = NEVER, unsaved: int = -1, stored: bool = False
    ) -> OpenSession:
        handle = self.engine.handle(session)
        return OpenSession(self._table, session, handle, token, now_ns, last, unsaved, stored)

    def handle(self, session: str) -> int:
        """The number by which blocks name an open session, until it is closed. Raises KeyError."""
        return self._live[session].handle

    def has_token(self, session: str, token: str | None) -> bool:
        """Whether a session is open, and this is its token."""
        live = self._live.get(session)
        return live is not None and token is not None and same_token(token, live.token)

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
        self._live[snapshot.session] = self._add(snapshot.session, token, now_ns, snapshot.tick_index, 0, True)
        self.counts["resumed"] += 1

    def _other_model(self, snapshot: Snapshot) -> SessionError:
        return SessionError(
            f"the state of session {snapshot.session!r} is of model {snapshot.model_sha256[:12]}, this engine's is "
            f"{self.engine.spec.sha256[:12]}; close it with its token to begin anew"
        )

    def _load(self, session: str, token: str, now_ns: int) -> Snapshot:
        """Load the state of a session, if this is its token."""
        snapshot = self._kept(session, now_ns)
        if snapshot is None:
            self.counts["unknown"] += 1
            raise UnknownSession(f"no state of session {session!r} is kept (any more); open it without a token")
        if not self._states.is_token(snapshot, token):
            raise self._evicted_error(session)
        if snapshot.model_sha256 != self.engine.spec.sha256:
            raise self._other_model(snapshot)
        return snapshot

    def _admit(self, session: str, now_ns: int) -> None:
        """Take a slot of the engine, or raise Busy with a hint."""
        why = ""
        if self._live and not self._in_time(len(self._live) + 1, now_ns):
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

    def _in_time(self, sessions: int, now_ns: int) -> bool:
        """Whether so many sessions can be served in time, by no old measurement."""
        admission = self.admission
        if admission is None or admission.admits(sessions, now_ns):
            return True
        if not admission.is_stale(now_ns):
            return False
        try:
            measure_again(self.engine, admission, now_ns)
        except ShardDied as e:
            self._lost += e.sessions
            return False
        return admission.admits(sessions, now_ns)

    def _retry_after_s(self, now_ns: int) -> float:
        """Until the next session would be evicted as idle, within bounds: others may close at any time."""
        oldest_ns = self._table.oldest_ns(now_ns)
        left_s = (oldest_ns + self._idle_ns - now_ns) / 1e9
        return min(max(left_s, self._retry.retry_s), self._retry.retry_max_s)

    # ---- stepping ------------------------------------------------------------------------------------------------

    def step_block(self, block: Block, *, now_ns: int) -> Stepped:
        """Step one tick of each of many open sessions. A tick that its session had already is not stepped and counted;
        one that is not finite or has an index out of bounds is refused.

        The handles are those of open sessions, none twice, and the columns fit the model.

        Raises:
            ProcessError: the engine has failed; a new one continues its sessions from their snapshots. A dead shard is
                no error: `Stepped.lost` has its sessions.

        """
        table, handles, indices = self._table, block.handles, block.indices
        good = block.finite() & (indices >= 0) & (indices <= MAX_TICK)
        table.active_ns[handles if good.all() else handles[good]] = now_ns
        if (leaves := table.leaves[handles] & good).any():
            for handle in handles[leaves].tolist():
                self._stay(name := table.names[handle], self._live[name])
        late = good & (indices <= table.last[handles])
        new = good & ~late
        if late.any():
            again = int(np.count_nonzero(indices[late] == table.last[handles[late]]))
            self.counts["duplicates"] += again
            self.counts["stale"] += int(np.count_nonzero(late)) - again
        if not new.all():
            self.counts["bad_ticks"] += len(block) - int(np.count_nonzero(good))
            block = block.take(new)
        if not len(block):
            return Stepped(None, new, late)
        self.counts["skipped"] += table.stepped(block.handles, block.indices)
        return self._run(block, new, late, now_ns)

    def step_one(self, tick: Tick, handle: int, *, now_ns: int) -> SteppedOne:
        """The same for one tick of an open session, without columns and masks: the usual case where there are few.

        The tick fits the model, and is finite. Raises ProcessError, as `step_block`.
        """
        table, index = self._table, tick.index
        table.active_ns[handle] = now_ns
        if table.leaves[handle]:
            self._stay(tick.session, self._live[tick.session])
        last = table.last.item(handle)
        if index <= last:
            self.counts["duplicates" if index == last else "stale"] += 1
            return SteppedOne(None, True)
        table.last[handle] = index
        unsaved = table.unsaved.item(handle)
        if unsaved >= 0:
            table.unsaved[handle] = unsaved + 1
        if last != NEVER:
            self.counts["skipped"] += index - last - 1
        try:
            (prediction,) = self.engine.step((tick,))
        except ShardDied as e:
            return SteppedOne(None, False, e.sessions)
        self.counts["stepped"] += 1
        if self.admission is not None:
            self.admission.add(1, prediction.step_end_ns - prediction.step_start_ns, now_ns)
        return SteppedOne(prediction, False)

    def _run(self, block: Block, new: Flags, late: Flags, now_ns: int) -> Stepped:
        lost: tuple[str, ...] = ()
        try:
            done = self.engine.step_block(block)
        except ShardDied as e:
            done, lost = e.block, e.sessions
            new[new] = np.isin(block.handles, done.handles)
        self.counts["stepped"] += len(done)
        if self.admission is not None and len(done):
            self.admission.add(len(done), done.step_end_ns - done.step_start_ns, now_ns)
        return Stepped(done if len(done) else None, new, late, lost)

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
            ShardDied: a process of the engine has died; see the error.
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
        out: dict[int, Prediction] = {}
        handles = [self.handle(tick.session) for tick in checked]
        for places in rounds(handles, max(len(handles), 1)):
            some = [checked[i] for i in places]
            found = self.step_block(self._columns.block(some, [handles[i] for i in places]), now_ns=now_ns)
            if skipped is not None:
                for i in np.flatnonzero(found.late).tolist():
                    skipped(some[i])
            stepped = np.flatnonzero(found.stepped).tolist()
            if found.predictions is not None:
                of = found.predictions
                ids = of.model, of.step_start_ns, of.step_end_ns
                made = predictions_of([some[i] for i in stepped], of.heads, *ids)
                out |= zip((places[i] for i in stepped), made, strict=True)
            if found.lost:
                died = ShardDied(f"a process of the engine died, and {len(found.lost)} sessions lost their state")
                died.sessions, died.predictions = found.lost, tuple(out[i] for i in sorted(out))
                raise died
        return [out[i] for i in sorted(out)]

    def observe_input(self, session: str, now_ns: int, due: bool) -> None:
        """A session is not idle, though no tick came of it; `due`: its state is to be saved soon."""
        live = self._live[session]
        live.active_ns = now_ns
        if live.leaving == "idle":
            self._stay(session, live)
        if live.unsaved >= 0:
            # it counts as one tick, for `flush` saves no state that is unchanged
            live.unsaved = max(live.unsaved, self.settings.snapshot_every if due else 0, 1)

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

    def next_indices(self, handles: Integers) -> Integers:
        """The same of many, by their handles."""
        following: Integers = self._table.last[handles] + 1
        return following

    def reset(self, session: str, *, now_ns: int) -> None:
        """Start the session's state anew; tick indices continue. Raises UnknownSession or Evicted."""
        live = self._find(session, now_ns)
        live.active_ns, live.unsaved = now_ns, -1
        self._stay(session, live)
        self.engine.reset(session)

    # ---- closing -------------------------------------------------------------------------------------------------

    def close(
        self, session: str, token: str | None = None, *, now_ns: int, told: Callable[[], None] = lambda: None
    ) -> None:
        """End a session: free its slot and delete its state, then call `told`: now, or with a writer when that is done
        (by `write_states`). For an evicted session its token is needed.

        Raises:
            UnknownSession: it is not open, and no state of it is kept.
            Evicted: it is not open, and the token is not its token.

        """
        live = self._close(session) if session in self._live else None
        if live is None and (token is None or not self._owns(session, token, now_ns)):
            raise self.missing(session, now_ns)
        self.counts["closed"] += 1
        self._forget(session, live, told)

    def _owns(self, session: str, token: str, now_ns: int) -> bool:
        """Whether a state of the session is kept, and this is its token."""
        snapshot = self._kept(session, now_ns)
        return snapshot is not None and self._states.is_token(snapshot, token)

    def drop(self, session: str) -> bool:
        """Forget a session without saving it: another engine has it now. Returns whether it was open."""
        if session not in self._live:
            return False
        self._abandon(session, "another engine has it")
        self._close(session)
        return True
