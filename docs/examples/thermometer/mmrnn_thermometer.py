"""A thermometer as a source, and the mean and slope of a signal as an encoder, for stream_mmrnn.

    [streams.room]
    source = "thermometer:/sys/class/thermal/thermal_zone0/temp"
    encoders = ["mean_slope"]

The file holds thousandths of a degree, as Linux writes them; `thermometer:demo` needs no device.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stream_mmrnn import Sample, SourceError, Stream, WireError, now_ns

PERIOD_S = 0.1


class Thermometer:
    """One number a sample, ten times a second: degrees Celsius."""

    def __init__(self, argument: str, stream: Stream) -> None:
        """`argument`: what follows `thermometer:` in the settings."""
        self.origin = f"thermometer:{argument}"
        self.info: dict[str, Any] = {"got": {"rate_hz": 1 / PERIOD_S, "unit": "degree Celsius"}}
        self._file = None if argument == "demo" else Path(argument)

    def open(self) -> None:
        """Read once, so that a missing device is known at once; the session opens it again until it is there."""
        self._read()

    def samples(self, alive: Callable[[], bool], epoch_ns: int) -> Iterator[Sample]:
        """Stamp each reading with the session's clock, as soon as it is there."""
        while alive():
            event_ns = now_ns()
            value = np.array([self._read()], np.float32)
            yield Sample(event_ns, now_ns(), value)
            time.sleep(PERIOD_S)

    def close(self) -> None:
        """Nothing is held open."""

    def _read(self) -> float:
        if self._file is None:
            return 20.0 + math.sin(time.monotonic() / 10)
        try:
            return int(self._file.read_text()) / 1000
        except (OSError, ValueError) as e:
            raise SourceError(f"{self.origin} cannot be read: {e}; name a file with thousandths of a degree") from e


class MeanSlope:
    """The mean of each channel over the last second, and its slope per second."""

    size = 0  # twice as many numbers as the signal has channels
    window_ns = 1_000_000_000

    def __init__(self) -> None:
        # a model names the encoder that it was trained with: another version of this code is another encoder
        code = inspect.getsource(type(self)).encode()
        self.origin = f"mean_slope@{hashlib.sha256(code).hexdigest()}"
        self._kept: deque[tuple[int, np.ndarray]] = deque()

    def encode(self, sample: Sample) -> list[Sample]:
        """One vector for each sample, with its times."""
        if isinstance(sample.data, bytes) or sample.data.ndim != 1:
            raise WireError("mean_slope takes a vector of float32, one number for each channel")
        self._kept.append((sample.event_ns, sample.data))
        while self._kept[0][0] <= sample.event_ns - self.window_ns:
            self._kept.popleft()
        at_s = np.array([(t - sample.event_ns) / 1e9 for t, _ in self._kept])
        values = np.stack([v for _, v in self._kept]).astype(np.float64)
        apart_s = at_s - at_s.mean()
        spread = float(apart_s @ apart_s)
        slope = apart_s @ values / spread if spread else np.zeros(values.shape[1])
        vector = np.concatenate([values.mean(0), slope]).astype(np.float32)
        return [Sample(sample.event_ns, sample.capture_ns, vector, sample.device_ns)]

    def prewarm(self) -> None:
        """There is nothing to warm up."""

    def reset(self) -> None:
        """The device was opened again: what came before does not count."""
        self._kept.clear()

    def snapshot(self) -> dict[str, np.ndarray]:
        """What `restore` continues from: needed by `Predictor.snapshot` only."""
        times = np.array([t for t, _ in self._kept], np.int64)
        return {"event_ns": times, "values": np.array([v for _, v in self._kept], np.float32)}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        self._kept = deque(zip(state["event_ns"].tolist(), state["values"], strict=True))
