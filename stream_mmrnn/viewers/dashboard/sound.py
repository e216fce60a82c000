"""Sound as the page shows it: its level, and a spectrogram of the last 30 s with one column per 40 ms.

Pure and bounded: it is given blocks of samples and their event times.
"""

from __future__ import annotations

from collections import deque
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.topics import AUDIO_RATE_HZ

BANDS = 64
COLUMNS = 750
COLUMN_NS = 40_000_000
_HOP = AUDIO_RATE_HZ * COLUMN_NS // 1_000_000_000
_WINDOW = 1024
_LOWEST_HZ, _HIGHEST_HZ = 60.0, 7600.0
_FLOOR_DB, _RANGE_DB = -95.0, 80.0
"""Of a band: the level that is shown as black, and the range from there to the brightest."""
_QUIET_DB = -96.0
"""The noise floor of 16 bits: levels are not shown below it."""
_FULL = 32768.0


def _mel(hz: float) -> float:
    return 2595.0 * float(np.log10(1 + hz / 700))


@cache
def _filters() -> npt.NDArray[np.float32]:
    """[bins, bands]: triangular mel filters; each sums to one, and has at least one bin."""
    edges = 700 * (10 ** (np.linspace(_mel(_LOWEST_HZ), _mel(_HIGHEST_HZ), BANDS + 2) / 2595) - 1)
    bins = np.fft.rfftfreq(_WINDOW, 1 / AUDIO_RATE_HZ)[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    weights = np.maximum(0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))
    nearest = np.abs(bins - centre).argmin(axis=0)
    empty = weights.sum(axis=0) == 0
    weights[nearest[empty], np.flatnonzero(empty)] = 1
    return np.asarray(weights / weights.sum(axis=0), np.float32)


class Spectrogram:
    """One audio stream. `first` and `columns` are the spectrogram: a column's number is its time divided by 40 ms."""

    def __init__(self) -> None:
        self._samples = np.zeros(_WINDOW, np.float32)
        self._fresh = 0
        """Samples since the last column."""
        self._columns: deque[bytes] = deque(maxlen=COLUMNS)
        self._newest = -1
        self._levels: deque[tuple[float, float]] = deque(maxlen=8)
        self._window = np.hanning(_WINDOW).astype(np.float32)
        # a full-scale sine is 0 dB
        self._scale = 4.0 / float(self._window.sum()) ** 2

    def observe(self, event_ns: int, payload: Any) -> None:
        """Add a block that ends at `event_ns`; a payload that is not 16-bit audio is ignored."""
        if not isinstance(payload, np.ndarray) or payload.dtype != np.int16 or not 0 < payload.size <= AUDIO_RATE_HZ:
            return
        block = payload.reshape(-1).astype(np.float32) / _FULL
        for at in range(0, len(block), _HOP):
            piece = block[at : at + _HOP]
            self._samples = np.concatenate((self._samples, piece))[-_WINDOW:]
            self._fresh += len(piece)
            if self._fresh >= _HOP:
                self._fresh -= _HOP
                left = len(block) - at - len(piece)
                self._add(event_ns - left * 1_000_000_000 // AUDIO_RATE_HZ)

    def _add(self, end_ns: int) -> None:
        number = end_ns // COLUMN_NS
        if not 0 <= number - self._newest < COLUMNS or self._newest < 0:
            self._columns.clear()  # time went back, or there is a long gap
        else:
            # where no sound came the picture is empty, and a clock that is a little off makes two columns one
            self._columns.extend([bytes(BANDS)] * max(0, number - self._newest - 1))
            if number == self._newest and self._columns:
                self._columns.pop()
        power = np.abs(np.fft.rfft(self._samples * self._window)) ** 2 * self._scale
        bands_db = 10 * np.log10(power.astype(np.float32) @ _filters() + 1e-12)
        self._columns.append(np.clip((bands_db - _FLOOR_DB) / _RANGE_DB * 255, 0, 255).astype(np.uint8).tobytes())
        self._newest = number
        recent = self._samples[-_HOP:]
        self._levels.append((float(np.mean(recent**2)), float(np.max(np.abs(recent)))))

    @property
    def first(self) -> int:
        """The number of the oldest column."""
        return self._newest - len(self._columns) + 1

    @property
    def columns(self) -> bytes:
        """`BANDS` bytes per column, the oldest first; low bands first, 0 is silence, 255 the loudest."""
        return b"".join(self._columns)

    def snapshot(self, now_ns: int) -> dict[str, Any]:
        """`level_db` (RMS) and `peak_db` of the last 0.3 s below full scale; where the spectrogram ends, by age."""
        if not self._levels:
            return {"level_db": None, "peak_db": None, "first": 0, "newest": -1, "age_ms": None}
        power, peak = np.mean([p for p, _ in self._levels]), max(p for _, p in self._levels)
        return {
            "level_db": round(max(_QUIET_DB, 10 * float(np.log10(power + 1e-12))), 1),
            "peak_db": round(max(_QUIET_DB, 20 * float(np.log10(peak + 1e-9))), 1),
            "first": self.first,
            "newest": self._newest,
            "age_ms": round((now_ns - (self._newest + 1) * COLUMN_NS) / 1e6),
        }
