"""Sound as programs give it -> mono int16, as the system has it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.errors import UsageError


def mono(pcm: npt.ArrayLike) -> npt.NDArray[np.int16]:
    """Sound of shape [samples]: the mean of the channels of int16, or floats in -1 to 1, of shape [samples] or
    [samples, channels].

    Raises:
        UsageError: it is neither.

    """
    sound: npt.NDArray[Any] = np.asarray(pcm)
    if sound.ndim not in (1, 2) or not 1 <= (sound.shape[1] if sound.ndim == 2 else 1) <= 64:
        raise UsageError(f"sound has shape [samples] or [samples, channels], this has {list(sound.shape)}")
    if np.issubdtype(sound.dtype, np.floating) and np.isfinite(sound).all():
        sound = sound * 32767.0
    elif sound.dtype != np.int16:
        raise UsageError(f"sound is int16, or finite floats from -1 to 1; this is {sound.dtype}")
    if sound.ndim == 2:
        sound = sound[:, 0] if sound.shape[1] == 1 else sound.astype(np.float64).mean(1)
    # a channel cut out of several has gaps in memory, which libraries refuse
    sound = np.ascontiguousarray(sound)
    return sound if sound.dtype == np.int16 else np.clip(np.rint(sound), -32768, 32767).astype(np.int16)
