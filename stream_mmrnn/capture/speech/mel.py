"""The log-mel spectrogram that Whisper was trained on.

Source: A. Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision", 2022, and `whisper/audio.py` of
github.com/openai/whisper. The mel scale is that of M. Slaney's Auditory Toolbox, 1998.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.topics import AUDIO_RATE_HZ
from stream_mmrnn.core.types import FloatArray

WINDOW = 400
"""Samples of the Hann window: 25 ms."""
HOP = 160
"""Samples per frame: 10 ms."""
_MAX_HZ = AUDIO_RATE_HZ / 2
_LINEAR_HZ = 1000.0
"""Below, the mel scale is linear; above, logarithmic."""
_MEL_HZ = 200.0 / 3
_LOG_STEP = np.log(6.4) / 27


def _mel(hz: float) -> float:
    if hz < _LINEAR_HZ:
        return hz / _MEL_HZ
    return float(_LINEAR_HZ / _MEL_HZ + np.log(hz / _LINEAR_HZ) / _LOG_STEP)


@functools.cache
def filters(bins: int) -> npt.NDArray[np.float64]:
    """Triangular mel filters of equal area, [WINDOW // 2 + 1, bins]."""
    mels = np.linspace(0.0, _mel(_MAX_HZ), bins + 2)
    knee = _LINEAR_HZ / _MEL_HZ
    hz = np.where(mels < knee, mels * _MEL_HZ, _LINEAR_HZ * np.exp(_LOG_STEP * (np.maximum(mels, knee) - knee)))
    at = np.fft.rfftfreq(WINDOW, 1 / AUDIO_RATE_HZ)[:, None]
    low, middle, high = hz[:-2], hz[1:-1], hz[2:]
    triangles = np.maximum(0, np.minimum((at - low) / (middle - low), (high - at) / (high - middle)))
    bank: npt.NDArray[np.float64] = triangles * 2 / (high - low)
    return bank


@functools.cache
def _hann() -> npt.NDArray[np.float64]:
    window: npt.NDArray[np.float64] = np.hanning(WINDOW + 1)[:-1]
    return window


def log_mel(sound: npt.NDArray[Any], bins: int = 80) -> FloatArray:
    """Sound at 16 kHz, at least WINDOW long -> float32 [bins, len(sound) // HOP].

    Computed in the sound's own type, float32 or float64.
    """
    of = sound.dtype.type
    padded = np.pad(sound, WINDOW // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][: len(sound) // HOP]
    power = np.square(np.abs(np.fft.rfft(frames * _hann().astype(of), axis=1))).astype(of)
    # not `@`: its last bits depend on the number of threads, and a replay must hear the same
    energy = np.einsum("fk,kb->fb", power, filters(bins).astype(of))
    log = np.log10(np.maximum(energy, of(1e-10)))
    log = np.maximum(log, log.max() - of(8))
    scaled = ((log + of(4)) / of(4)).T
    return np.ascontiguousarray(scaled, np.float32)
