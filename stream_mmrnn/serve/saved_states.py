"""SavedStates: the states of sessions in a store, each bound to its session's token.

Knows nothing about engines, or which sessions are open.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from typing import Protocol, cast

import numpy as np
from msgspec.structs import replace

from stream_mmrnn.core.errors import SnapshotError
from stream_mmrnn.predict.snapshots import Snapshot
from stream_mmrnn.serve.session_table import hash_of
from stream_mmrnn.serve.state_rows import TOKEN_SHA256, StateRows


class Store(Protocol):
    """Where states are saved; StateStore is one."""

    def save(self, snapshot: Snapshot, unix_ns: int) -> object: ...

    def load(self, session: str, unix_ns: int) -> Snapshot | None: ...

    def holds(self, session: str, unix_ns: int) -> bool: ...

    def forget(self, session: str) -> object: ...

    def sweep(self, unix_ns: int) -> int: ...


class BlockStore(Store, Protocol):
    """One that has states of many sessions in one file; StateBlockStore is one. `save` is for one session alone."""

    def save_rows(self, rows: StateRows, unix_ns: int) -> object: ...

    def forget_all(self, sessions: Sequence[str]) -> object: ...


class SavedStates:
    """Times are `now_ns` of the monotonic clock; the store is given Unix time."""

    def __init__(self, store: Store, wall_offset_ns: int) -> None:
        self._store, self._offset_ns = store, wall_offset_ns

    def holds(self, session: str, now_ns: int) -> bool:
        return self._store.holds(session, now_ns + self._offset_ns)

    def load(self, session: str, now_ns: int) -> Snapshot | None:
        return self._store.load(session, now_ns + self._offset_ns)

    def sweep(self, now_ns: int) -> int:
        return self._store.sweep(now_ns + self._offset_ns)

    @staticmethod
    def is_token(snapshot: Snapshot, token: str) -> bool:
        """Whether this is the token of the snapshot's session."""
        expected = snapshot.extra.get(TOKEN_SHA256)
        return isinstance(expected, str) and same_token(hash_of(token), expected)

    def owns(self, session: str, token: str, now_ns: int) -> bool:
        """Whether a state of the session is saved, and this is its token."""
        snapshot = self.load(session, now_ns)
        return snapshot is not None and self.is_token(snapshot, token)

    def save(self, snapshot: Snapshot, token: str, now_ns: int) -> None:
        """Write a state. Raises SnapshotError."""
        self._store.save(bound(snapshot, token), now_ns + self._offset_ns)

    def save_rows(self, rows: StateRows, now_ns: int) -> None:
        """Write the states of many sessions as one file; the store is a BlockStore. Raises SnapshotError."""
        unix_ns = now_ns + self._offset_ns
        self._blocks.save_rows(replace(rows, saved_ns=np.full(len(rows), unix_ns)), unix_ns)

    def save_all(
        self, rows: StateRows | None, alone: Sequence[tuple[Snapshot, str]], now_ns: int
    ) -> dict[str, SnapshotError]:
        """Write what becomes one file, and snapshots that have one each, with their tokens; returns the sessions whose
        state could not be written, and why.
        """
        failed: dict[str, SnapshotError] = {}
        if rows is not None:
            try:
                self.save_rows(rows, now_ns)
            except SnapshotError as e:
                failed |= dict.fromkeys(rows.sessions, e)
        for snapshot, token in alone:
            try:
                self.save(snapshot, token, now_ns)
            except SnapshotError as e:
                failed[snapshot.session] = e
        return failed

    def forget(self, session: str) -> None:
        """Remove a session's state."""
        self._store.forget(session)

    def forget_all(self, sessions: Sequence[str]) -> None:
        """Remove the states of many sessions; the store is a BlockStore. Raises SnapshotError."""
        self._blocks.forget_all(sessions)

    @property
    def _blocks(self) -> BlockStore:
        return cast("BlockStore", self._store)


def bound(snapshot: Snapshot, token: str) -> Snapshot:
    """With the token's hash only: a reader of the disk must not be able to resume the session."""
    return replace(snapshot, extra={**snapshot.extra, TOKEN_SHA256: hash_of(token)})


def same_token(one: str, other: str) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(one.encode("utf-8", "surrogatepass"), other.encode("utf-8", "surrogatepass"))
