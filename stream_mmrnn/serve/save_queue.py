"""SaveQueue: which sessions' states a thread writes next, many in one block, and who is told when they are on disk.

One block is written at a time; what comes meanwhile is in the next one. Whoever asks while a session waits is told by
the same write, so any number of requests is one. Three kinds take turns: what peers asked for (the peers in turns,
too), sessions that leave their slot, and those that are due. It never waits for the disk, but for `settle`. Knows
nothing about engines, clocks and open sessions.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from typing import TypeAlias

import msgspec

from stream_mmrnn.core.errors import SnapshotError
from stream_mmrnn.predict.snapshots import Snapshot
from stream_mmrnn.serve.saved_states import SavedStates
from stream_mmrnn.serve.state_rows import StateRows

Told: TypeAlias = Callable[[SnapshotError | None], None]
"""Called once: the state is on disk, or why it is not."""
May: TypeAlias = Callable[[str, str], bool]
WRITERS = 1
"""Threads: they begin what they are given in order, so that a later state is not written before an earlier one."""
MOST = 512
"""Sessions of a block."""


class Written(msgspec.Struct, frozen=True):
    """The writer is done with a session's state."""

    session: str
    error: SnapshotError | None
    told: list[Told]


class StatesToWrite(msgspec.Struct):
    """What becomes one block, and sessions with a file of their own, each with its token."""

    rows: StateRows | None
    alone: Sequence[tuple[Snapshot, str]] = ()

    @property
    def sessions(self) -> list[str]:
        return [*(self.rows.sessions if self.rows is not None else ()), *(of.session for of, _ in self.alone)]


class SaveQueue:
    """`ask` and `leave` put sessions in, `take` says whose turn it is, `write` writes, `done` says what was written."""

    def __init__(self, states: SavedStates, writer: Executor) -> None:
        """`writer`: of `WRITERS` threads."""
        self._states, self._writer = states, writer
        self._asked: dict[bytes, dict[str, None]] = {}
        """By peer, its sessions; the peer and the session whose turn is next are first."""
        self._asked_by: dict[str, bytes] = {}
        self._told: dict[str, list[Told]] = {}
        """Who waits for the next write of a session."""
        self._leaving: dict[str, None] = {}
        self._due: dict[str, None] = {}
        self._block: Future[dict[str, SnapshotError]] | None = None
        """The block that is being written; its result is the sessions that could not be."""
        self._writing: dict[str, list[Told]] = {}
        """Its sessions, and who waits for them."""
        self._to_remove: list[tuple[str, Callable[[], None]]] = []
        self._removing: list[tuple[Future[None], list[tuple[str, Callable[[], None]]]]] = []
        self._removed: Counter[str] = Counter()
        """Sessions whose state is being removed, or will be."""
        self._sweep: Future[int] | None = None

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits to be told."""
        return bool(self._told or self._removed or any(self._writing.values()))

    @property
    def has_room(self) -> bool:
        """Whether no block is being written."""
        return self._block is None

    @property
    def any_waits(self) -> bool:
        """Whether `take` may find a session."""
        return bool(self._asked or self._leaving or self._due)

    def is_removing(self, session: str) -> bool:
        """Whether the session's state is as good as removed, whatever is still on the disk."""
        return session in self._removed

    # ---- whose turn it is ----------------------------------------------------------------------------------------

    def ask(self, session: str, peer: bytes, told: Told) -> None:
        """A peer wants a state that is not older than now."""
        if session not in self._asked_by:
            self._asked_by[session] = peer
            self._asked.setdefault(peer, {})[session] = None
        self._told.setdefault(session, []).append(told)

    def join(self, session: str, told: Told) -> bool:
        """Be told when the present write is done; False where there is none."""
        if session not in self._writing:
            return False
        self._writing[session].append(told)
        return True

    def leave(self, session: str) -> None:
        """The session leaves its slot when its state is written."""
        self._leaving[session] = None

    def stay(self, session: str) -> None:
        """It does not leave any more."""
        self._leaving.pop(session, None)

    def add_due(self, sessions: Iterable[str]) -> None:
        self._due.update(dict.fromkeys(sessions))

    def take(self, may: May, asked_only: bool = False) -> list[str]:
        """The sessions whose states are to be written now, as one block.

        `may(session, kind)`: whether it still has to be written, and can be now. `asked_only`: what nobody asked for
        waits.
        """
        taken: dict[str, None] = {}
        for session in self._in_turns():
            if len(taken) < MOST // 2 and may(session, "asked"):
                taken[session] = None
        if not asked_only:
            for session in list(self._leaving):
                if len(taken) < MOST // 4 * 3 and may(session, "leaving"):
                    taken[session] = None
            for session in list(self._due):
                if len(taken) >= MOST:
                    break
                del self._due[session]  # one that cannot be written now will be due again
                if may(session, "due"):
                    taken[session] = None
        for session in taken:
            self._had_turn(session)
        return list(taken)

    def _in_turns(self) -> list[str]:
        """What peers asked for, up to a block, one of each in turns; the last ones of this time come last again."""
        found: list[str] = []
        left = {peer: iter(list(sessions)) for peer, sessions in self._asked.items()}
        while left and len(found) < MOST:
            for peer in list(left):
                session = next(left[peer], None)
                if session is None:
                    del left[peer]
                    continue
                found.append(session)
                self._asked[peer] = self._asked.pop(peer)  # the last in turn
                if len(found) >= MOST:
                    break
        return found

    def _had_turn(self, session: str) -> None:
        """It has its turn: it waits for no other one."""
        self._leaving.pop(session, None)
        self._due.pop(session, None)
        peer = self._asked_by.pop(session, None)
        if peer is not None:
            del self._asked[peer][session]
            if not self._asked[peer]:
                del self._asked[peer]

    # ---- writing -------------------------------------------------------------------------------------------------

    def write(self, states: StatesToWrite, now_ns: int) -> None:
        """Give states to the writer; those who asked for them are told when it is done."""
        self._remove_now()  # of a session of the same name
        for session in states.sessions:
            self._writing[session] = self._told.pop(session, [])
        self._block = self._writer.submit(self._states.save_all, states.rows, states.alone, now_ns)

    def answered(self, session: str) -> list[Told]:
        """The writer is not needed for this session; returns those who wait for its state, to be told."""
        self._had_turn(session)
        return self._told.pop(session, [])

    def done(self) -> list[Written]:
        """What the writer has done since the last call. Removals are told here."""
        found: list[Written] = []
        if self._block is not None and self._block.done():
            found = [self._finish(session) for session in list(self._writing)]
            self._block = None
        while self._removing and self._removing[0][0].done():
            _, over = self._removing.pop(0)
            for session, told in over:
                self._removed[session] -= 1
                if not self._removed[session]:
                    del self._removed[session]
                told()
        if not self._removing:
            self._remove_now()
        return found

    def _finish(self, session: str) -> Written:
        assert self._block is not None
        return Written(session, self._block.result().get(session), self._writing.pop(session))

    def settle(self, session: str) -> Written | None:
        """Wait for the present write of a session, and take it out; None where there is none."""
        return self._finish(session) if session in self._writing else None

    def drop(self, session: str) -> list[Told]:
        """The session is not open any more; returns those who wait for its state, which may still be written."""
        return self._writing.pop(session, []) + self.answered(session)

    def remove(self, session: str, told: Callable[[], None]) -> None:
        """Remove the session's state, after what is being written of it."""
        self._removed[session] += 1
        self._to_remove.append((session, told))
        if not self._removing:
            self._remove_now()

    def _remove_now(self) -> None:
        if self._to_remove:
            some, self._to_remove = self._to_remove, []
            self._removing.append((self._writer.submit(self._forget, [session for session, _ in some]), some))

    def _forget(self, sessions: Sequence[str]) -> None:
        with contextlib.suppress(SnapshotError):  # what cannot be removed expires
            self._states.forget_all(sessions)

    def drain(self) -> None:
        """Wait for the present block and all removals."""
        self._remove_now()
        for removing, _ in self._removing:
            removing.result()
        self.done()

    def sweep(self, now_ns: int) -> None:
        """Remove expired states, unless the last time is not over."""
        if self._sweep is None:
            self._sweep = self._writer.submit(self._states.sweep, now_ns)

    def swept(self) -> SnapshotError | None:
        """Why the newest sweep failed; None where it did not, or is not over."""
        if self._sweep is None or not self._sweep.done():
            return None
        error, self._sweep = self._sweep.exception(), None
        if error is not None and not isinstance(error, SnapshotError):
            raise error
        return error
