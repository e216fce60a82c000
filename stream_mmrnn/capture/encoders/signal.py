"""SignalEncoder: a sensor's numbers unchanged, one per channel."""

from __future__ import annotations

import hashlib

import numpy as np

from stream_mmrnn.capture.encoders import Stateless
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.types import Sample

_RULE = b"float32, one number a channel, as the stream gives them"


class SignalEncoder(Stateless):
    """One vector per sample; `size` is 0 because a vector is as long as the stream has channels."""

    size = 0
    origin = f"channels@{hashlib.sha256(_RULE).hexdigest()}"

    def encode(self, sample: Sample) -> list[Sample]:
        """The sample itself; raises WireError if it is not a vector of finite numbers."""
        data = sample.data
        if isinstance(data, bytes) or data.ndim != 1 or data.dtype != np.float32:
            raise WireError("a sample of a signal is not a vector of float32; send one number per channel")
        if not np.isfinite(data).all():
            raise WireError("a sample of a signal holds a number that is not finite")
        return [sample]
