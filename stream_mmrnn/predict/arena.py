"""Arena: which session has which slot, and which slots start from the initial state at their next step."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.block import Flags, Integers, StateBlock
from stream_mmrnn.core.errors import BadTick, Busy, DuplicateSession, SessionError, UnknownSession
from stream_mmrnn.predict.cpu_batches import Shapes, States


class SlotTable:
    """A fixed number of slots and the sessions that have one."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self._slot_of: dict[str, int] = {}
        self._free = list(range(slots - 1, -1, -1))
        self._taken = np.zeros(slots, np.bool_)
        self._place = np.zeros(slots, np.int64)
        """Scratch of `check`."""

    def __len__(self) -> int:
        return len(self._slot_of)

    def __contains__(self, session: str) -> bool:
        return session in self._slot_of

    @property
    def sessions(self) -> list[str]:
        """The sessions that have a slot, oldest first."""
        return list(self._slot_of)

    def acquire(self, session: str) -> int:
        """Give a new session a slot.

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
        self._taken[slot] = True
        return slot

    def slot(self, session: str) -> int:
        """The slot of an open session; raises UnknownSession."""
        try:
            return self._slot_of[session]
        except KeyError:
            raise UnknownSession(f"session {session!r} is not open; open it first") from None

    def release(self, session: str) -> None:
        slot = self.slot(session)
        self._free.append(slot)
        self._taken[slot] = False
        del self._slot_of[session]

    def check(self, slots: Integers) -> None:
        """Raises UnknownSession if one of `slots` [N] belongs to no open session, BadTick if one occurs twice."""
        if len(slots) == 1:  # without the arrays below, which cost as much as the checks of hundreds
            if not self._open(slots.item()):
                raise _unknown(slots.item())
            return
        if not len(slots):
            return
        if slots.min() < 0 or slots.max() >= self.slots or not self._taken[slots].all():
            raise _unknown(next(slot for slot in slots.tolist() if not self._open(slot)))
        place = np.arange(len(slots))
        self._place[slots] = place
        if not np.array_equal(self._place[slots], place):
            twice = int(slots[self._place[slots] != place][0])
            raise BadTick(f"handle {twice} occurs twice in a block; a block has one tick of each session")

    def _open(self, slot: int) -> bool:
        return 0 <= slot < self.slots and self._taken.item(slot)


def _unknown(slot: int) -> UnknownSession:
    return UnknownSession(f"handle {slot} belongs to no open session; open one and ask for its handle")


class Arena(SlotTable):
    """A fixed number of slots over rows of state tensors."""

    def __init__(self, rows: States, slots: int) -> None:
        super().__init__(slots)
        self._rows = rows
        self.fresh: Flags = np.zeros(slots, np.bool_)
        """Slots that start from the initial state at their next step."""

    def acquire(self, session: str) -> int:
        """Give a new session a slot; it starts from the model's initial state. Raises as `SlotTable.acquire`."""
        slot = super().acquire(session)
        self.fresh[slot] = True
        return slot

    def reset(self, session: str) -> None:
        """Start from the initial state at the next step."""
        self.fresh[self.slot(session)] = True

    def snapshot(self, session: str) -> dict[str, npt.NDArray[Any]]:
        """A copy of the session's state tensors, by name, without the slot axis; empty before its first step."""
        slot = self.slot(session)
        if self.fresh[slot]:
            return {}
        return {name: rows[0, ...] for name, rows in self._rows.read(np.array([slot])).items()}

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
            self._rows.write(np.array([slot]), {name: array[None] for name, array in state.items()})
        self.fresh[slot] = not state

    def snapshot_block(self, slots: Integers) -> StateBlock:
        """The states of N slots as [N, ...], in their order."""
        self.check(slots)
        fresh = self.fresh[slots]
        states = self._rows.read(slots)
        if fresh.any():
            for rows in states.values():
                rows[fresh] = 0
        return StateBlock(fresh, states)

    def restore_block(self, slots: Integers, block: StateBlock) -> None:
        """Put the states of N slots back.

        Raises:
            SessionError: they are not N states of this model; nothing was changed.

        """
        self.check(slots)
        check_states(block, len(slots), self._rows.shapes)
        held = ~block.fresh
        if held.all():
            self._rows.write(slots, block.states)
        elif held.any():
            self._rows.write(slots[held], {name: rows[held] for name, rows in block.states.items()})
        self.fresh[slots] = block.fresh


def check_states(block: StateBlock, count: int, shapes: Shapes) -> None:
    """Raises SessionError if these are not the states of `count` sessions of the model with `shapes`."""
    if block.fresh.shape != (count,) or block.fresh.dtype != np.bool_:
        raise SessionError(f"expected the states of {count} sessions, got those of {len(block.fresh)}")
    for name, (shape, dtype) in shapes.items():
        rows = block.states.get(name)
        if rows is None or rows.shape != (count, *shape) or rows.dtype != dtype:
            raise SessionError(f"the snapshots of {count} sessions do not fit state {name!r}; are they this model's?")
