"""Arena: which session has which slot, and which slots start from the initial state at their next step."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.errors import Busy, DuplicateSession, SessionError, UnknownSession
from stream_mmrnn.predict.cpu_batches import States


class Arena:
    """A fixed number of slots over rows of state tensors."""

    def __init__(self, rows: States, slots: int) -> None:
        self._rows = rows
        self.slots = slots
        self._slot_of: dict[str, int] = {}
        self._free = list(range(slots - 1, -1, -1))
        self.fresh = np.zeros(slots, np.bool_)
        """Slots that start from the initial state at their next step."""

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, session: str) -> bool:
        return session in self._slot_of

    @property
    def sessions(self) -> list[str]:
        """The sessions that have a slot, oldest first."""
        return list(self._slot_of)

    def acquire(self, session: str) -> int:
        """Give a new session a slot; it starts from the model's initial state.

        Raises:
            DuplicateSession: the session is open already.
            Busy: no slot is free.

        """
        if session in self._slot_of:
            raise DuplicateSession(f"session {session!r} is open already; close it, or take another name")
        if not self._free:
            raise Busy(f"all {self.slots} slots are taken; close a session, or raise engine.slots")
        slot = self._free.pop()
        self._slot_of[session] = slot
        self.fresh[slot] = True
        return slot

    def slot(self, session: str) -> int:
        """The slot of an open session; raises UnknownSession."""
        try:
            return self._slot_of[session]
        except KeyError:
            raise UnknownSession(f"session {session!r} is not open; open it first") from None

    def release(self, session: str) -> None:
        self._free.append(self.slot(session))
        del self._slot_of[session]

    def reset(self, session: str) -> None:
        """Start from the initial state at the next step."""
        self.fresh[self.slot(session)] = True

    def snapshot(self, session: str) -> dict[str, npt.NDArray[Any]]:
        """A copy of the session's state tensors, by name, without the slot axis; empty before its first step."""
        slot = self.slot(session)
        return {} if self.fresh[slot] else self._rows.read(slot)

    def restore(self, session: str, state: dict[str, npt.NDArray[Any]]) -> None:
        """Put a snapshot back; an empty one means a session before its first step.

        Raises:
            SessionError: it is not a snapshot of this model; the session's state is unchanged.

        """
        slot = self.slot(session)
        if state:
            for name, (shape, dtype) in self._rows.shapes.items():
                if name not in state or state[name].shape != shape or state[name].dtype != dtype:
                    raise SessionError(f"the snapshot of {session!r} does not fit state {name!r}; is it this model's?")
            self._rows.write(slot, state)
        self.fresh[slot] = not state
