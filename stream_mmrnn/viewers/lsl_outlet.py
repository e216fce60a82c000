"""Predictions as a stream of Lab Streaming Layer: one channel a number, at the rate of the ticks.

The stamp of a sample is its prediction's event time, by the library's clock. Knows nothing about the bus.
"""

from __future__ import annotations

import math
import time
from typing import Any

from stream_mmrnn.bus.subscription import model_of
from stream_mmrnn.capture import lsl_runtime as lsl
from stream_mmrnn.core import wire
from stream_mmrnn.core.config import Lsl
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.viewers.columns import columns

_BUFFER_S = 60
"""How much the library keeps for a reader that is slow; then the oldest goes."""
_FLUSH_S = 0.1


class Outlet:
    """The stream; it is there from its making until `close`."""

    def __init__(self, settings: Lsl, session: str, spec: Any) -> None:
        """`spec`: the model as the engine's status has it.

        Raises:
            UsageError: pylsl is not installed.
            WireError: `spec` is not what an engine says.

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
        """One sample; what a head did not say is not a number. Raises WireError where it is another model's."""
        heads = prediction.heads
        try:
            values = [heads[c.head][c.index] for c in self._columns]
        except (KeyError, IndexError):
            raise WireError("a prediction has other heads than the engine says that its model has") from None
        sample = [math.nan if v is None else v for v in values]
        self._outlet.push_sample(sample, (prediction.event_ns - self._offset_ns) / 1e9)
        self.pushed += 1

    def close(self) -> None:
        """End the stream; who reads it has a moment to take what is on its way."""
        if self._outlet.have_consumers():
            time.sleep(_FLUSH_S)
        del self._outlet
