"""SaveQueue: which session's state is written next by threads, and who is told when it is on disk.

A session has one write at a time. Whoever asks while one waits is told by that one, so any number of requests is one
write. Three kinds take turns: what peers asked for (the peers in turns, too), sessions that leave their slot, and those
that are due. It never waits for the disk, but for `settle`. Knows nothing about engines, clocks and open sessions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future, wait
from functools import partial
from typing import Any, TypeAlias

import msgspec

from stream_mmrnn.core.errors import SnapshotError
from stream_mmrnn.predict.snapshots import Snapshot
from stream_mmrnn.serve.saved_states import SavedStates

Told: TypeAlias = Callable[[SnapshotError | None], None]
"""Called once: the state is on disk, or why it is not."""
WRITERS = 4
"""States that are written at once: a file system syncs several files in hardly more time than one."""


class Written(msgspec.Struct, frozen=True):
    """The writer is done with a session's state."""

    session: str
    error: SnapshotError | None
    told: list[Told]


class SaveQueue:
    """`ask` and `leave` put sessions in, `take` says whose turn it is, `write` writes, `done` says what was written."""

    def __init__(self, states: SavedStates, writer: Executor) -> None:
        """`writer`: of `WRITERS` threads, which begin what they are given in order."""
        self._states, self._writer = states, writer
        self._last: dict[str, Future[Any]] = {}
        """By session, what the writer was given last: the next begins after that."""
        self._asked: dict[bytes, dict[str, None]] = {}
        """By peer, its sessions; the peer and the session whose turn is next are first."""
        self._told: dict[str, list[Told]] = {}
        """Who waits for the next write of a session."""
        self._leaving: dict[str, None] = {}
        self._due: dict[str, None] = {}
        self._routine = ""
        """The newest one that was written because it was due."""
        self._asked_by: dict[str, bytes] = {}
        self._kinds = [("asked", self._take_asked), ("leaving", self._take_leaving), ("due", self._take_due)]
        """In turns: the first is next."""
        self._writing: dict[str, tuple[Future[None], list[Told]]] = {}
        self._removing: list[tuple[Future[None], str, Callable[[], None]]] = []
        self._removed: Counter[str] = Counter()
        """Sessions whose state is being removed."""
        self._sweep: Future[int] | None = None

    @property
    def is_awaited(self) -> bool:
        """Whether somebody waits to be told."""
        return bool(self._told or self._removing or any(told for _, told in self._writing.values()))

    @property
    def has_room(self) -> bool:
        return len(self._writing) < WRITERS

    def is_writing(self, session: str) -> bool:
        return session in self._writing

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
        self._writing[session][1].append(told)
        return True

    def leave(self, session: str) -> None:
        """The session leaves its slot when its state is written."""
        self._leaving[session] = None

    def stay(self, session: str) -> None:
        """It does not leave any more."""
        self._leaving.pop(session, None)

    def add_due(self, sessions: Iterable[str]) -> None:
        self._due.update(dict.fromkeys(sessions))

    @property
    def any_due(self) -> bool:
        return bool(self._due)

    def take(self, may: Callable[[str, str], bool], asked_only: bool = False) -> str | None:
        """The session whose state is to be written now; None for none.

        `may(session, kind)`: whether it still has to be written, and can be now. `asked_only`: what nobody asked for
        waits.
        """
        for i, (kind, take) in enumerate(self._kinds):
            if kind != "asked" and asked_only:
                continue
            session = take(may)
            if session is not None:
                self._kinds.append(self._kinds.pop(i))
                return session
        return None

    def _take_asked(self, may: Callable[[str, str], bool]) -> str | None:
        for peer, sessions in self._asked.items():
            for session in sessions:
                if session not in self._writing and may(session, "asked"):
                    self._had_turn(session)
                    if (others := self._asked.pop(peer, None)) is not None:
                        self._asked[peer] = others  # the last in turn
                    return session
        return None

    def _take_leaving(self, may: Callable[[str, str], bool]) -> str | None:
        for session in self._leaving:
            if session not in self._writing and may(session, "leaving"):
                self._had_turn(session)
                return session
        return None

    def _take_due(self, may: Callable[[str, str], bool]) -> str | None:
        if self._routine in self._writing:
            return None  # one at a time: nobody waits for it, and every thread delays steps a little
        while self._due:
            session = next(iter(self._due))
            if session not in self._writing and may(session, "due"):
                self._had_turn(session)
                self._routine = session
                return session
            del self._due[session]  # it will be due again
        return None

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

    def write(self, snapshot: Snapshot, token: str, now_ns: int) -> None:
        """Give a state to the writer; those who asked for it are told when it is done."""
        session = snapshot.session
        writing = self._submit(session, partial(self._states.save, snapshot, token, now_ns))
        self._writing[session] = writing, self._told.pop(session, [])

    def _submit(self, session: str, call: Callable[[], None]) -> Future[None]:
        before = self._last.get(session)

        def after() -> None:
            if before is not None:
                wait([before])  # it was begun before this
            call()

        self._last[session] = future = self._writer.submit(after)
        return future

    def answered(self, session: str) -> list[Told]:
        """The writer is not needed for this session; returns those who wait for its state, to be told."""
        self._had_turn(session)
        return self._told.pop(session, [])

    def done(self) -> list[Written]:
        """What the writer has done since the last call. Removals are told here."""
        self._last = {session: future for session, future in self._last.items() if not future.done()}
        found = [self._finish(name) for name, (writing, _) in list(self._writing.items()) if writing.done()]
        if self._removing:
            over = [of for of in self._removing if of[0].done()]
            self._removing = [of for of in self._removing if not of[0].done()]
            for _, session, told in over:
                self._removed[session] -= 1
                if not self._removed[session]:
                    del self._removed[session]
                told()
        return found

    def _finish(self, session: str) -> Written:
        writing, told = self._writing.pop(session)
        error = writing.exception()
        if error is not None and not isinstance(error, SnapshotError):
            raise error
        return Written(session, error, told)

    def settle(self, session: str) -> Written | None:
        """Wait for the present write of a session, and take it out; None where there is none."""
        return self._finish(session) if session in self._writing else None

    def drop(self, session: str) -> list[Told]:
        """The session is not open any more; returns those who wait for its state, which may still be written."""
        _, told = self._writing.pop(session, (None, []))
        return told + self.answered(session)

    def remove(self, session: str, told: Callable[[], None]) -> None:
        """Remove the session's state, after what is being written of it."""
        self._removed[session] += 1
        self._removing.append((self._submit(session, partial(self._states.forget, session)), session, told))

    def drain(self) -> None:
        """Wait for all removals."""
        for removing, _, _ in self._removing:
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
