"""Predictions as a Lab Streaming Layer stream: one channel per number, at the tick rate.

The time stamp of a sample is its prediction's event time on the library's clock. Knows nothing about the bus.
"""

from __future__ import annotations

import math
import time
from typing import Any

from stream_mmrnn.bus.prediction_reader import model_of
from stream_mmrnn.capture import lsl_runtime as lsl
from stream_mmrnn.core import wire
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.settings import LslSettings
from stream_mmrnn.viewers.columns import columns

_BUFFER_S = 60
"""The library's buffer for a slow reader; it drops the oldest."""
_FLUSH_S = 0.1


class Outlet:
    """The stream; other programs can find it until `close`."""

    def __init__(self, settings: LslSettings, session: str, spec: Any) -> None:
        """`spec`: the model's contract from the engine's status.

        Raises:
            UsageError: pylsl is not installed.
            WireError: `spec` is no model's contract.

        """
        model = model_of(spec)
        pylsl = lsl.load(settings)
        self.name = settings.name
        self._columns = columns(model.heads)
        info = pylsl.StreamInfo(
            settings.name,
            "Prediction",
            len(self._columns),
            1e9 / model.tick_ns,
            "float32",
            f"stream_mmrnn.{session}",  # so that readers find the stream again after a restart
        )
        about = info.desc()
        about.append_child_value("manufacturer", "stream_mmrnn")
        about.append_child_value("session", session)
        about.append_child_value("model", model.name)
        about.append_child_value("model_sha256", model.sha256)
        channels = about.append_child("channels")
        for column in self._columns:
            channel = channels.append_child("channel")
            channel.append_child_value("label", column.label)
            channel.append_child_value("type", column.kind)
            channel.append_child_value("unit", column.unit)
            if column.horizon_s is not None:
                channel.append_child_value("from_s", f"{column.horizon_s[0]:g}")
                channel.append_child_value("to_s", f"{column.horizon_s[1]:g}")
        self._outlet = pylsl.StreamOutlet(info, 0, _BUFFER_S)
        self._offset_ns = lsl.clock_offset_ns(pylsl)
        self.pushed = 0

    def push(self, prediction: wire.PredictionMessage) -> None:
        """Send one sample; a missing number becomes NaN. Raises WireError if the prediction is another model's."""
        heads = prediction.heads
        try:
            values = [heads[c.head][c.index] for c in self._columns]
        except (KeyError, IndexError):
            raise WireError("a prediction has other heads than the model in the engine's status") from None
        sample = [math.nan if v is None else v for v in values]
        self._outlet.push_sample(sample, (prediction.event_ns - self._offset_ns) / 1e9)
        self.pushed += 1

    def close(self) -> None:
        """End the stream, after a short wait in which its readers take the last samples."""
        if self._outlet.have_consumers():
            time.sleep(_FLUSH_S)
        del self._outlet
