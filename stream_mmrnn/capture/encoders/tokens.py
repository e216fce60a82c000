"""TokenEncoder: a text event -> the numbers of its tokens, for a model that looks up vectors of its own.

Tokens are those of WordLlama's tokenizer, from the table in the package `wordllama`. Its vectors are not read here, and
its Python code is not imported, which saves 0.4 s and its logging set-up. Every text has tokens: rare words are split
into sub-words and bytes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as _Tokenizer

from stream_mmrnn.capture.encoders import Stateless
from stream_mmrnn.core.errors import ModelError, WireError
from stream_mmrnn.core.streams import ORIGIN_NAMES
from stream_mmrnn.core.types import Sample

TOKENS = 8
"""Numbers of an event; of a longer text the last tokens are kept."""
TABLE = Path("tokenizers") / "l2_supercat_tokenizer_config.json"
_CONSTANTS = (TOKENS, "id + 1 in order, then zeros; the last ones of a longer text")


def read(file: Path) -> bytes:
    """A file of the package `wordllama`; raises ModelError if it is missing."""
    spec = importlib.util.find_spec("wordllama")
    if spec is None or not spec.submodule_search_locations:
        raise ModelError("the package `wordllama`, which carries the word vectors, is missing; install wordllama")
    try:
        return (Path(spec.submodule_search_locations[0]) / file).read_bytes()
    except OSError as e:
        raise ModelError(f"the package `wordllama` lacks its file {file}; install wordllama again") from e


class Tokenizer:
    """The ids of a text's tokens."""

    def __init__(self, reading: Callable[[Path], bytes] = read) -> None:
        """Read the table; raises ModelError if it is missing or damaged."""
        table = reading(TABLE)
        try:
            self._tokenizer = _Tokenizer.from_str(table.decode())
            # without its layout: versions of the package differ only in line breaks
            self.table = json.dumps(json.loads(table), sort_keys=True, separators=(",", ":")).encode()
        except Exception as e:  # the library raises plain Exception
            raise ModelError(f"the tokenizer of `wordllama` cannot be read: {e}; install it again") from e
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def ids(self, sample: Sample) -> list[int]:
        """The ids of a text event; invalid UTF-8 becomes the replacement character. Raises WireError if it is none."""
        if not isinstance(sample.data, bytes):
            raise WireError("a text event is not bytes; send UTF-8")
        text = sample.data.decode("utf-8", errors="replace")
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


class TokenEncoder(Stateless):
    """For each text event, id + 1 of its tokens in order, then zeros; of more than `TOKENS` the last ones."""

    size = TOKENS

    def __init__(self, reading: Callable[[Path], bytes] = read) -> None:
        """Read the tokenizer; raises ModelError if it is missing or damaged."""
        self._tokenizer = Tokenizer(reading)
        digest = hashlib.sha256(self._tokenizer.table + repr(_CONSTANTS).encode()).hexdigest()
        self.origin = f"{ORIGIN_NAMES['tokens']}@{digest}"

    def encode(self, sample: Sample) -> list[Sample]:
        """The text's tokens, with its times."""
        last = self._tokenizer.ids(sample)[-TOKENS:]
        vector = np.zeros(TOKENS, np.float32)  # exact up to 2^24, and the table has 32,000 tokens
        vector[: len(last)] = last
        vector[: len(last)] += 1
        return [Sample(sample.event_ns, sample.capture_ns, vector, sample.device_ns)]
