"""StateBlockStore: states of many sessions in few files, in a folder that a server has alone.

A file has the states that were due together (`state_rows`), and a number that grows: of two files with a session the
higher one counts. A file without a session that counts is removed; small ones are rewritten as one where there are too
many. Sessions whose state is more than the engine's tensors have a file each, as in `StateStore`, which older releases
wrote for all. One thread writes, another one may read. In memory a session that is kept takes some 30 bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.block import StateBlock
from stream_mmrnn.core.errors import SnapshotError
from stream_mmrnn.predict.snapshots import MAX_BYTES, Snapshot, StateStore
from stream_mmrnn.serve.state_rows import Keys, StateRows, from_bytes, joined_rows, to_bytes

_SUFFIX, _ALONE = ".states", ".safetensors"
_MOST_FILES = 16
"""With more the smallest ones are rewritten as one."""
_MERGED_BYTES = MAX_BYTES // 4
"""No larger file is made of several sessions."""
_FOREVER_NS = -(2**62)
"""As the present time: nothing has expired."""


def _key(session: str) -> int:
    return int.from_bytes(hashlib.sha256(session.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _keys(sessions: Sequence[str]) -> Keys:
    return np.array([_key(session) for session in sessions], np.uint64)


class _File:
    """A file, and which of its sessions count."""

    def __init__(self, number: int, path: Path, size: int, rows: StateRows, gone: Keys) -> None:
        self.number, self.path, self.size, self.model = number, path, size, rows.model_sha256
        self.keys = _keys(rows.sessions)
        """By row."""
        self.order = np.argsort(self.keys)
        self.sorted = self.keys[self.order]
        self.saved_ns = np.array(rows.saved_ns)
        self.live = np.ones(len(rows), np.bool_)
        """By row: no newer file has the session."""
        self.gone = gone
        self.unread = False
        """It was to be rewritten, and could not be read; that is not tried again."""

    @property
    def live_bytes(self) -> int:
        return self.size * int(np.count_nonzero(self.live)) // max(len(self.keys), 1)

    def find(self, key: int) -> int:
        """The row of a session that counts; -1 where there is none."""
        at = int(np.searchsorted(self.sorted, np.uint64(key)))
        if at == len(self.sorted) or int(self.sorted[at]) != key:
            return -1
        row = int(self.order[at])
        return row if self.live[row] else -1


class StateBlockStore(StateStore):
    """As StateStore, and `save_rows` and `forget_all` for many sessions at once."""

    def __init__(self, folder: Path, ttl_s: float) -> None:
        """Reads what is in the folder. Raises FileError if it cannot be used."""
        super().__init__(folder, ttl_s)
        self.damaged: list[str] = []
        """Why files in the folder do not count, or cannot be rewritten; they are left there."""
        self._lock = threading.Lock()
        """Of what is below; never held while the disk is used."""
        self._files: tuple[_File, ...] = ()
        """The newest one is last. The tuple is replaced, not changed: who reads it needs no lock."""
        self._cached: tuple[_File, StateRows] | None = None
        """What was read last: the sessions of a client that comes back are in the same file."""
        self._next, self._unix_ns = 1, 0
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            if not path.stem.isdigit():
                continue
            self._next = int(path.stem) + 1
            try:
                raw = self.read(path, "states of sessions", _FOREVER_NS) or b""
                rows, gone = from_bytes(raw)
            except SnapshotError as e:
                self.damaged.append(f"{path} is damaged, and its states do not count; remove it: {e}")
                continue
            self._add(_File(int(path.stem), path, len(raw), rows, gone))
        self._any_alone = False
        """Whether there may be files of one session each."""
        for path in folder.glob(f"*{_ALONE}"):
            self._any_alone = True
            with contextlib.suppress(ValueError, OSError):
                found = self._find(int(path.stem[:16], 16))
                if found is not None and path.stat().st_mtime_ns > int(found[0].saved_ns[found[1]]):
                    found[0].live[found[1]] = False  # it was written later, and the server died before it said so

    def _add(self, file: _File) -> None:
        """A file is on the disk: it counts, and not what older ones have of its sessions."""
        keys = np.concatenate([file.keys, file.gone])
        with self._lock:
            before, self._files = self._files, (*self._files, file)
            for older in before:  # after the new one is there: who reads meanwhile finds one of the two
                older.live &= ~np.isin(older.keys, keys)
            self._cached = None

    def _find(self, key: int) -> tuple[_File, int] | None:
        """The file of a session, and its row there."""
        while True:
            files = self._files
            for file in reversed(files):
                row = file.find(key)
                if row >= 0:
                    return file, row
            if files is self._files:  # else the session may be in the file that was added meanwhile
                return None

    # ---- reading -------------------------------------------------------------------------------------------------

    def load(self, session: str, unix_ns: int) -> Snapshot | None:
        """The session's newest snapshot; None if there is none, or if it has expired. Raises SnapshotError."""
        while (found := self._find(_key(session))) is not None:
            file, row = found
            if self._expired(int(file.saved_ns[row]), unix_ns):
                return None
            rows = self._rows(file)
            if rows is not None:
                return rows.snapshot(row) if rows.sessions[row] == session else None
        return super().load(session, unix_ns)

    def _rows(self, file: _File) -> StateRows | None:
        """What is in a file; None where it was rewritten meanwhile. Raises SnapshotError."""
        cached = self._cached
        if cached is not None and cached[0] is file:
            return cached[1]
        raw = self.read(file.path, "states of sessions", _FOREVER_NS)
        if raw is None:
            if file in self._files:
                raise SnapshotError(f"{file.path} with the states of sessions was removed by another program")
            return None
        try:
            rows, _ = from_bytes(raw)
        except SnapshotError as e:
            raise SnapshotError(f"{file.path} is damaged, remove it to begin its sessions anew: {e}") from e
        self._cached = file, rows
        return rows

    def holds(self, session: str, unix_ns: int) -> bool:
        """Whether the session has a snapshot that has not expired, without reading it."""
        found = self._find(_key(session))
        if found is not None:
            return not self._expired(int(found[0].saved_ns[found[1]]), unix_ns)
        return super().holds(session, unix_ns)

    # ---- writing -------------------------------------------------------------------------------------------------

    def save(self, snapshot: Snapshot, unix_ns: int) -> Path:
        """Write the state of one session to a file of its own."""
        self._unix_ns, self._any_alone = unix_ns, True
        path = super().save(snapshot, unix_ns)
        key = _key(snapshot.session)
        if self._find(key) is not None:
            self._write_rows(_none(), np.array([key], np.uint64))
        return path

    def save_rows(self, rows: StateRows, unix_ns: int) -> None:
        """Write the states of many sessions as one file, or several of `_MERGED_BYTES`; they are on the disk when this
        returns.

        Raises:
            SnapshotError: not all can be written; older ones of those, if any, are still there.

        """
        self._unix_ns = unix_ns
        size = sum(of.nbytes for of in rows.states.states.values()) // max(len(rows), 1)
        most = max(_MERGED_BYTES // max(size, 1), 1)
        for at in range(0, len(rows), most):
            part = rows if most >= len(rows) else rows.take(range(at, min(at + most, len(rows))))
            self._write_rows(part, np.zeros(0, np.uint64))
        self._forget_alone(rows.sessions)
        self._tidy()

    def forget(self, session: str) -> None:
        with contextlib.suppress(SnapshotError):
            self.forget_all([session])

    def forget_all(self, sessions: Sequence[str]) -> None:
        """Remove the snapshots of these sessions, where there are any. Raises SnapshotError."""
        self._forget_alone(sessions)
        self._forget_keys(_keys(sessions))

    def _forget_keys(self, keys: Keys) -> None:
        gone = np.array([key for key in keys.tolist() if self._find(key) is not None], np.uint64)
        if len(gone):
            self._write_rows(_none(), gone)
            self._tidy()

    def _forget_alone(self, sessions: Sequence[str]) -> None:
        """Remove the files of these sessions that have one of their own: of an older release, or raw ones."""
        for name in sessions if self._any_alone else ():
            super().forget(name)

    def _write_rows(self, rows: StateRows, gone: Keys) -> None:
        number, self._next = self._next, self._next + 1
        raw = to_bytes(rows, gone)
        path = self.folder / f"{number:016d}{_SUFFIX}"
        self.write(path, raw, self._unix_ns, f"the states of {len(rows) or len(gone)} sessions")
        self._add(_File(number, path, len(raw), rows, gone))

    def _tidy(self) -> None:
        """Remove files that do not count any more; where there are too many, rewrite the smallest ones as one.

        What cannot be read or written here is no error: the states that were to be saved are on the disk.
        """
        self._remove_old()
        files = [of for of in self._files if not of.unread]
        if len(files) <= _MOST_FILES:
            return
        by_model: dict[str, list[_File]] = {}
        for file in sorted(files, key=lambda of: of.live_bytes):
            some = by_model.setdefault(file.model, [])
            if sum(of.live_bytes for of in some) + file.live_bytes <= _MERGED_BYTES:
                some.append(file)
        some = max(by_model.values(), key=len)
        if len(some) < 2:
            return
        parts = []
        for file in some:
            try:
                rows = self._rows(file) if file.live.any() else None
            except SnapshotError as e:
                self.damaged.append(str(e))
                file.unread = True
                continue
            if rows is not None:
                parts.append(rows.take(np.flatnonzero(file.live).tolist()))
        some = [of for of in some if not of.unread]
        if not some:
            return
        others = [of for of in self._files if of not in some]
        gone = np.unique(np.concatenate([of.gone for of in some]))
        older = [
            key for key in gone.tolist() if self._find(key) is None and _are_in(np.array([key], np.uint64), others)
        ]
        try:
            self._write_rows(joined_rows(parts) if parts else _none(), np.array(older, np.uint64))
        except SnapshotError:
            return  # the files are still there
        self._drop(some)
        self._remove_old()

    def _remove_old(self) -> None:
        """Remove files of which nothing counts, the oldest first: what a newer one replaces must not come back."""
        old: list[_File] = []
        for i, file in enumerate(self._files):
            earlier = [of for of in self._files[:i] if of not in old]
            if not file.live.any() and not _are_in(file.gone, earlier):
                old.append(file)
        self._drop(old)

    def _drop(self, files: Sequence[_File]) -> None:
        with self._lock:
            self._files = tuple(of for of in self._files if of not in files)
            self._cached = None
        for file in sorted(files, key=lambda of: of.number):
            with contextlib.suppress(OSError):
                file.path.unlink(missing_ok=True)

    def sweep(self, unix_ns: int) -> int:
        """Remove expired states and stale temporary files; returns how many. Raises SnapshotError."""
        self._unix_ns = unix_ns
        expired = [of.keys[of.live & (unix_ns - of.saved_ns > self.ttl_ns)] for of in self._files]
        keys = np.concatenate([np.zeros(0, np.uint64), *expired])
        self._forget_keys(keys)
        return len(keys) + super().sweep(unix_ns)


def _are_in(keys: Keys, files: Sequence[_File]) -> bool:
    return len(keys) > 0 and any(np.isin(of.keys, keys).any() for of in files)


def _none() -> StateRows:
    nothing: npt.NDArray[np.int64] = np.zeros(0, np.int64)
    return StateRows("", [], [], nothing, nothing, StateBlock(np.zeros(0, np.bool_), {}))
