"""MouthMovement: how much a mouth moves, from its lips and measures in picture after picture.

Lips have a shape of their own in every face; how far they leave their own mean, and how fast, is comparable between
people (measured: models/turn_taking/card.md). Knows nothing about pictures and networks.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.types import FloatArray

SIZE = 4
MEAN_S = 4 / 3
"""Time constant of the running means."""
BACK_S = 0.16
"""How far back the lips are compared."""
_PICTURE_S = 0.04
"""Movement from picture to picture is scaled to this time between them."""
_LEAST = (0.003, 0.003, 0.002, 0.002)
"""Added before the logarithm: about the noise of a still face, in distances of the eyes."""
_KEPT = 16
"""Pictures: of a faster camera than 100 pictures a second, what is compared is less far back."""
_LIPS, _MOUTH = 80, 4

CONSTANTS = repr((MEAN_S, BACK_S, _PICTURE_S, _LEAST, _KEPT))
"""All that the numbers depend on, as text."""


class MouthMovement:
    """Of one face, since it was found."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Another face, or the same one found again."""
        self._count = 0
        self._mean = np.zeros(_LIPS + _MOUTH, np.float32)
        self._lips = np.zeros((_KEPT, _LIPS), np.float32)
        self._event_ns = np.zeros(_KEPT, np.int64)

    def feed(self, lips: FloatArray, mouth: FloatArray, event_ns: int) -> FloatArray:
        """The natural logarithms [4] of: how far the measures of the mouth [4], and the points of the lips [80], are
        from their running means; how far the points have moved within `BACK_S`; and since the last picture, per 40 ms.
        Each is a mean over the numbers. Pictures come in order of time.
        """
        now = np.concatenate([lips, mouth])
        before = (self._count - 1) % _KEPT
        passed_s = (event_ns - int(self._event_ns[before])) / 1e9 if self._count else 0.0
        share = max(1 - math.exp(-passed_s / MEAN_S), 1 / (self._count + 1))
        self._mean += (now - self._mean) * np.float32(share)
        away = np.abs(now - self._mean)
        moved = step = 0.0
        if self._count:
            known = min(self._count, _KEPT)
            places = (self._count - 1 - np.arange(known)) % _KEPT  # the newest first
            old = np.flatnonzero(event_ns - self._event_ns[places] >= BACK_S * 1e9)
            moved = float(np.abs(lips - self._lips[places[old[0] if len(old) else -1]]).mean())
            if passed_s > 0:
                step = float(np.abs(lips - self._lips[before]).mean()) * min(_PICTURE_S / passed_s, 1e3)
        at = self._count % _KEPT
        self._lips[at], self._event_ns[at] = lips, event_ns
        self._count += 1
        found = (float(away[_LIPS:].mean()), float(away[:_LIPS].mean()), moved, step)
        return np.log(np.add(found, _LEAST)).astype(np.float32)

    def snapshot(self) -> dict[str, npt.NDArray[Any]]:
        """The running means, and the newest pictures."""
        return {
            "mean": self._mean.copy(),
            "lips": self._lips.copy(),
            "times": np.array([self._count, *self._event_ns], np.int64),
        }

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Continue from a snapshot, which has been checked to have the shapes of one."""
        self._mean, self._lips = state["mean"].copy(), state["lips"].copy()
        self._count, self._event_ns = max(int(state["times"][0]), 0), state["times"][1:].copy()
