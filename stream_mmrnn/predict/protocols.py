"""The protocols of an engine: `StepEngine` and `ShardedEngine` fulfil them, and so may a test's stand-in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.types import ModelSpec, Prediction, Tick

Out = TypeVar("Out", covariant=True)


class Stepper(Protocol[Out]):
    """Sessions that come and go, and an output for each of their ticks: all that `predict` asks of an engine."""

    def __contains__(self, session: str) -> bool: ...

    def open(self, session: str) -> None:
        """Raises SessionError where it cannot be opened."""

    def reset(self, session: str) -> None: ...

    def close(self, session: str) -> None: ...

    def step(self, ticks: Sequence[Tick]) -> Sequence[Out]: ...


class Engine(Stepper[Prediction], Protocol):
    """A stepper of a model, whose sessions' states can be taken out and put back."""

    @property
    def spec(self) -> ModelSpec: ...

    def __len__(self) -> int:
        """How many sessions are open."""

    def snapshot(self, session: str) -> dict[str, npt.NDArray[np.generic]]: ...

    def restore(self, session: str, state: dict[str, npt.NDArray[np.generic]]) -> None: ...
