"""SignalEncoder: the numbers of a sensor as they are, one a channel.

There is nothing to learn or to look up: what a model is trained with is what the sensor gives. Knows nothing about
which sensor.
"""

from __future__ import annotations

import hashlib

import numpy as np

from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.types import Sample

_RULE = b"float32, one number a channel, as the stream gives them"


class SignalEncoder:
    """One vector a sample; `size` is 0: it is as long as the stream has channels."""

    size = 0
    origin = f"channels@{hashlib.sha256(_RULE).hexdigest()}"

    def prewarm(self) -> None:
        """Nothing: there is no work to be warm for."""

    def reset(self) -> None:
        """Nothing is kept between samples."""

    def encode(self, sample: Sample) -> list[Sample]:
        """The sample itself; raises WireError where it is no vector of finite numbers."""
        data = sample.data
        if isinstance(data, bytes) or data.ndim != 1 or data.dtype != np.float32:
            raise WireError("a sample of a signal is no vector of float32; send one number a channel")
        if not np.isfinite(data).all():
            raise WireError("a sample of a signal holds a number that is not finite")
        return [sample]
