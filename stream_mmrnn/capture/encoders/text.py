"""TextEncoder: a text event -> 256 numbers, the mean of WordLlama's token vectors.

Of the package `wordllama` only the weights are read here, and by `tokens` the tokenizer's table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load

from stream_mmrnn.capture.encoders import Stateless, tokens
from stream_mmrnn.core.errors import ModelError
from stream_mmrnn.core.types import Sample

_WEIGHTS = Path("weights") / "l2_supercat_256.safetensors"


class TextEncoder(Stateless):
    """One vector per text event; zeros for an empty text."""

    size = 256

    def __init__(self, read: Callable[[Path], bytes] = tokens.read) -> None:
        """Read the vectors and the tokenizer; raises ModelError if they are missing or damaged."""
        weights, self._tokenizer = read(_WEIGHTS), tokens.Tokenizer(read)
        try:
            # kept as float16: exact once widened, half the memory
            self._vectors = load(weights)["embedding.weight"]
        except Exception as e:  # the library raises plain Exception
            raise ModelError(f"the word vectors of `wordllama` cannot be read: {e}; install it again") from e
        if self._vectors.ndim != 2 or self._vectors.shape[1] != self.size:
            raise ModelError(f"the word vectors of `wordllama` are not {self.size} wide; install another version")
        self.origin = f"wordllama-l2-supercat-256@{hashlib.sha256(weights + self._tokenizer.table).hexdigest()}"

    def encode(self, sample: Sample) -> list[Sample]:
        """The text's vector, with its times; invalid UTF-8 becomes the replacement character."""
        ids = np.array(self._tokenizer.ids(sample), np.int64)
        vector = np.zeros(self.size, np.float32)
        if len(ids):
            np.clip(ids, 0, len(self._vectors) - 1, out=ids)
            np.sum(self._vectors[ids].astype(np.float32), axis=0, dtype=np.float32, out=vector)
            vector /= np.float32(len(ids))
        return [Sample(sample.event_ns, sample.capture_ns, vector, sample.device_ns)]
