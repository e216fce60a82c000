"""TextEncoder: a text event -> 256 numbers, the mean of WordLlama's token vectors.

Only the weights and the tokenizer's table of the package `wordllama` are read; its Python code is not imported, which
saves 0.4 s and its logging set-up. Every text has a vector: rare words are split into sub-words and bytes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load
from tokenizers import Tokenizer

from stream_mmrnn.core.errors import ModelError, WireError
from stream_mmrnn.core.types import Sample

_WEIGHTS = Path("weights") / "l2_supercat_256.safetensors"
_TOKENS = Path("tokenizers") / "l2_supercat_tokenizer_config.json"


def _read(file: Path) -> bytes:
    spec = importlib.util.find_spec("wordllama")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("the package `wordllama`, which carries the word vectors, is missing; install wordllama")
    try:
        return (Path(spec.submodule_search_locations[0]) / file).read_bytes()
    except OSError as e:
        raise ModelError(f"the package `wordllama` lacks its file {file}; install wordllama again") from e


def _canonical(tokens: bytes) -> bytes:
    """The tokenizer's table without its layout: versions of the package differ only in line breaks."""
    return json.dumps(json.loads(tokens), sort_keys=True, separators=(",", ":")).encode()


class TextEncoder:
    """One vector per text event; zeros for an empty text."""

    size = 256

    def __init__(self, read: Callable[[Path], bytes] = _read) -> None:
        """Read the vectors and the tokenizer; raises ModelError if they are missing or damaged."""
        weights, tokens = read(_WEIGHTS), read(_TOKENS)
        try:
            # kept as float16: exact once widened, half the memory
            self._vectors = load(weights)["embedding.weight"]
            self._tokenizer = Tokenizer.from_str(tokens.decode())
        except Exception as e:  # both libraries raise plain Exception
            raise ModelError(f"the word vectors of `wordllama` cannot be read: {e}; install it again") from e
        if self._vectors.ndim != 2 or self._vectors.shape[1] != self.size:
            raise ModelError(f"the word vectors of `wordllama` are not {self.size} wide; install another version")
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.origin = f"wordllama-l2-supercat-256@{hashlib.sha256(weights + _canonical(tokens)).hexdigest()}"

    def prewarm(self) -> None:
        """Does nothing: it is not known when the next text comes."""

    def reset(self) -> None:
        """Does nothing: there is no state."""

    def snapshot(self) -> dict[str, npt.NDArray[Any]]:
        """Empty: there is no state."""
        return {}

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Does nothing: there is no state."""

    def encode(self, sample: Sample) -> list[Sample]:
        """The text's vector, with its times; invalid UTF-8 becomes the replacement character."""
        if not isinstance(sample.data, bytes):
            raise WireError("a text event is not bytes; send UTF-8")
        text = sample.data.decode("utf-8", errors="replace")
        ids = np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int64)
        vector = np.zeros(self.size, np.float32)
        if len(ids):
            np.clip(ids, 0, len(self._vectors) - 1, out=ids)
            np.sum(self._vectors[ids].astype(np.float32), axis=0, dtype=np.float32, out=vector)
            vector /= np.float32(len(ids))
        return [Sample(sample.event_ns, sample.capture_ns, vector, sample.device_ns)]
