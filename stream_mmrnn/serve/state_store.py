"""StateBlockStore: states of many sessions in few files, in a folder that a server has alone.

A file has the states that were due together (`state_rows`), and a number that grows: of two files with a session the
higher one counts. A file without a session that counts is removed; small ones are rewritten as one where there are too
many. Sessions whose state is more than the engine's tensors have a file each, as in `StateStore`, which older releases
wrote for all. One thread writes, another one may read.
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from stream_mmrnn.core.block import StateBlock
from stream_mmrnn.core.errors import SnapshotError
from stream_mmrnn.predict.snapshots import MAX_BYTES, Snapshot, StateStore
from stream_mmrnn.serve.state_rows import StateRows, from_bytes, joined_rows, to_bytes

_SUFFIX, _ALONE = ".states", ".safetensors"
_MOST_FILES = 16
"""With more the smallest ones are rewritten as one."""
_MERGED_BYTES = MAX_BYTES // 4
"""No larger file is made by rewriting."""
_CACHED = 2
"""Files whose content is kept: the sessions of a client that comes back are in the same one."""
_FOREVER_NS = -(2**62)
"""As the present time: nothing has expired."""


class _File:
    """A file, and which of its sessions count."""

    def __init__(self, number: int, path: Path, size: int, rows: StateRows, gone: Iterable[str]) -> None:
        self.number, self.path, self.size, self.model = number, path, size, rows.model_sha256
        self.row = {name: i for i, name in enumerate(rows.sessions)}
        """All of its sessions, also those of which a newer file has the state."""
        self.saved_ns = rows.saved_ns
        self.live = 0
        self.gone = frozenset(gone)

    @property
    def live_bytes(self) -> int:
        return self.size * self.live // max(len(self.row), 1)


class StateBlockStore(StateStore):
    """As StateStore, and `save_rows` and `forget_all` for many sessions at once."""

    def __init__(self, folder: Path, ttl_s: float) -> None:
        """Reads what is in the folder. Raises FileError if it cannot be used."""
        super().__init__(folder, ttl_s)
        self.damaged: list[str] = []
        """Why files in the folder do not count; they are left there."""
        self._lock = threading.Lock()
        """Of what is below; never held while the disk is used."""
        self._files: dict[int, _File] = {}
        self._where: dict[str, _File] = {}
        self._cache: OrderedDict[int, StateRows] = OrderedDict()
        self._next, self._unix_ns = 1, 0
        found: list[tuple[int, Path]] = []
        for path in folder.glob(f"*{_SUFFIX}"):
            if path.stem.isdigit():
                found.append((int(path.stem), path))
        for number, path in sorted(found):
            self._next = number + 1
            try:
                raw = self.read(path, "states of sessions", _FOREVER_NS)
                rows, gone = from_bytes(raw or b"")
            except SnapshotError as e:
                self.damaged.append(f"{path} is damaged, and its states do not count; remove it: {e}")
                continue
            self._add(_File(number, path, len(raw or b""), rows, gone))
        self._alone = {path.name: path for path in folder.glob(f"*{_ALONE}")}
        """Files of one session each, by name."""
        for name, file in list(self._where.items()) if self._alone else ():
            alone = self._alone.get(self.path(name).name)
            if alone is not None and alone.stat().st_mtime_ns > int(file.saved_ns[file.row[name]]):
                self._forget_row(name)  # it was written later, and the server died before it said so

    def _file_of(self, number: int) -> Path:
        return self.folder / f"{number:016d}{_SUFFIX}"

    def _forget_row(self, name: str) -> None:
        before = self._where.pop(name, None)
        if before is not None:
            before.live -= 1

    def _add(self, file: _File) -> None:
        """A file is on the disk: it counts, and not what older ones have of its sessions."""
        with self._lock:
            for name in (*file.row, *file.gone):
                self._forget_row(name)
            self._where.update(dict.fromkeys(file.row, file))
            file.live = len(file.row)
            self._files[file.number] = file

    # ---- reading -------------------------------------------------------------------------------------------------

    def load(self, session: str, unix_ns: int) -> Snapshot | None:
        """The session's newest snapshot; None if there is none, or if it has expired. Raises SnapshotError."""
        while (file := self._where.get(session)) is not None:
            row = file.row[session]
            if self._expired(int(file.saved_ns[row]), unix_ns):
                return None
            rows = self._rows(file)
            if rows is not None:
                return rows.snapshot(row)
        return super().load(session, unix_ns)

    def _rows(self, file: _File) -> StateRows | None:
        """What is in a file; None where it was rewritten meanwhile. Raises SnapshotError."""
        with self._lock:
            if (rows := self._cache.get(file.number)) is not None:
                self._cache.move_to_end(file.number)
                return rows
        raw = self.read(file.path, "states of sessions", _FOREVER_NS)
        if raw is None:
            if self._files.get(file.number) is file:
                raise SnapshotError(
                    f"{file.path} with the states of {file.live} sessions was removed by another program"
                )
            return None
        try:
            rows, _ = from_bytes(raw)
        except SnapshotError as e:
            raise SnapshotError(f"{file.path} is damaged, remove it to begin its sessions anew: {e}") from e
        with self._lock:
            if file.number in self._files:
                self._cache[file.number] = rows
                while len(self._cache) > _CACHED:
                    self._cache.popitem(last=False)
        return rows

    def holds(self, session: str, unix_ns: int) -> bool:
        """Whether the session has a snapshot that has not expired, without reading it."""
        file = self._where.get(session)
        if file is not None:
            return not self._expired(int(file.saved_ns[file.row[session]]), unix_ns)
        return super().holds(session, unix_ns)

    # ---- writing -------------------------------------------------------------------------------------------------

    def save(self, snapshot: Snapshot, unix_ns: int) -> Path:
        """Write the state of one session to a file of its own."""
        self._unix_ns = unix_ns
        path = super().save(snapshot, unix_ns)
        self._alone[path.name] = path
        if snapshot.session in self._where:
            self._write_rows(_none(), [snapshot.session])
        return path

    def save_rows(self, rows: StateRows, unix_ns: int) -> None:
        """Write the states of many sessions as one file; they are on the disk when this returns.

        Raises:
            SnapshotError: they cannot be written; older ones, if any, are still there.

        """
        self._unix_ns = unix_ns
        self._write_rows(rows, ())
        self._forget_alone(rows.sessions)
        self._tidy()

    def forget(self, session: str) -> None:
        with contextlib.suppress(SnapshotError):
            self.forget_all([session])

    def forget_all(self, sessions: Sequence[str]) -> None:
        """Remove the snapshots of these sessions, where there are any. Raises SnapshotError."""
        self._forget_alone(sessions)
        gone = [name for name in sessions if name in self._where]
        if gone:
            self._write_rows(_none(), gone)
            self._tidy()

    def _forget_alone(self, sessions: Sequence[str]) -> None:
        """Remove the files of these sessions that have one of their own: of an older release, or raw ones."""
        for name in sessions if self._alone else ():
            if self._alone.pop(self.path(name).name, None) is not None:
                super().forget(name)

    def _write_rows(self, rows: StateRows, gone: Sequence[str]) -> None:
        number, self._next = self._next, self._next + 1
        raw = to_bytes(rows, gone)
        path = self._file_of(number)
        self.write(path, raw, self._unix_ns, f"the states of {len(rows) or len(gone)} sessions")
        self._add(_File(number, path, len(raw), rows, gone))

    def _tidy(self) -> None:
        """Remove files that do not count any more; where there are too many, rewrite the smallest ones as one."""
        self._remove_old()
        if len(self._files) <= _MOST_FILES:
            return
        by_model: dict[str, list[_File]] = {}
        for file in sorted(self._files.values(), key=lambda of: of.live_bytes):
            some = by_model.setdefault(file.model, [])
            if sum(of.live_bytes for of in some) + file.live_bytes <= _MERGED_BYTES:
                some.append(file)
        some = max(by_model.values(), key=len)
        if len(some) < 2:
            return
        parts = []
        for file in some:
            rows = self._rows(file)
            names = [name for name in file.row if self._where.get(name) is file]
            if rows is not None and names:
                parts.append(rows.take([file.row[name] for name in names]))
        gone = frozenset().union(*(file.gone for file in some))
        older = [of for of in self._files.values() if of not in some]
        left = [name for name in gone if name not in self._where and any(name in of.row for of in older)]
        self._write_rows(joined_rows(parts) if parts else _none(), left)
        self._drop(some)
        self._remove_old()

    def _remove_old(self) -> None:
        """Remove files of which nothing counts, the oldest first: what a newer one replaces must not come back."""
        old = []
        for number in sorted(self._files):
            file = self._files[number]
            earlier = [of for n, of in self._files.items() if n < number and of not in old]
            # what was closed must not come back from an earlier file; of one that goes on, a newer file has the state
            needed = any(name not in self._where and any(name in of.row for of in earlier) for name in file.gone)
            if not file.live and not needed:
                old.append(file)
        self._drop(old)

    def _drop(self, files: Sequence[_File]) -> None:
        for file in sorted(files, key=lambda of: of.number):
            with self._lock:
                del self._files[file.number]
                self._cache.pop(file.number, None)
            with contextlib.suppress(OSError):
                file.path.unlink(missing_ok=True)

    def sweep(self, unix_ns: int) -> int:
        """Remove expired states and stale temporary files; returns how many. Raises SnapshotError."""
        self._unix_ns = unix_ns
        with self._lock:
            expired = [n for n, f in self._where.items() if self._expired(int(f.saved_ns[f.row[n]]), unix_ns)]
        self.forget_all(expired)
        return len(expired) + super().sweep(unix_ns)


def _none() -> StateRows:
    nothing = np.zeros(0, np.int64)
    return StateRows("", [], [], nothing, nothing, StateBlock(np.zeros(0, np.bool_), {}))
