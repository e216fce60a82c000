"""The protocols of an engine, which `StepEngine` and `ShardedEngine` implement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

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
