"""The protocols of an engine, which `StepEngine` and `ShardedEngine` implement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.block import Block, BlockPredictions, Integers, StateBlock
from stream_mmrnn.core.types import ModelSpec, Prediction, Tick

Out = TypeVar("Out", covariant=True)


class Stepper(Protocol[Out]):
    """Opens and closes sessions, and returns one output per tick: all that `predict` needs of an engine."""

    def __contains__(self, session: str) -> bool: ...

    def open(self, session: str) -> None:
        """Raises SessionError if it cannot be opened."""

    def reset(self, session: str) -> None: ...

    def close(self, session: str) -> None: ...

    def step(self, ticks: Sequence[Tick]) -> Sequence[Out]: ...


class Engine(Stepper[Prediction], Protocol):
    """A stepper with a model, whose session states can be saved and restored."""

    @property
    def spec(self) -> ModelSpec: ...

    def __len__(self) -> int:
        """How many sessions are open."""

    def snapshot(self, session: str) -> dict[str, npt.NDArray[np.generic]]: ...

    def restore(self, session: str, state: dict[str, npt.NDArray[np.generic]]) -> None: ...

    def handle(self, session: str) -> int:
        """The number by which blocks name an open session, the same until it is closed; raises UnknownSession."""

    def step_block(self, block: Block) -> BlockPredictions:
        """Step one tick of each of the block's sessions.

        Raises:
            BadTick: the columns do not fit the model or each other, or a session occurs twice.
            UnknownSession: a handle belongs to no open session. After either error no tick was stepped.

        """

    def snapshot_block(self, handles: Integers) -> StateBlock:
        """Copies of the states of these sessions, in their order; raises UnknownSession."""

    def restore_block(self, handles: Integers, states: StateBlock) -> None:
        """Put snapshots back, in the order of `handles`; raises UnknownSession, or SessionError if they do not fit."""
