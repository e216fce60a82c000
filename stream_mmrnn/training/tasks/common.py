"""Helpers of the tasks: find the data, check the recipe, encode words, split long sequences, count examples."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from stream_mmrnn.capture.encoders import Encoder
from stream_mmrnn.capture.encoders.text import TextEncoder
from stream_mmrnn.core.durations import spoken
from stream_mmrnn.core.errors import ConfigError
from stream_mmrnn.core.types import FloatArray, Sample
from stream_mmrnn.training.data import Ticks, cut
from stream_mmrnn.training.recipe import Recipe

ENOUGH = 2
"""A label that began less often in the training data gets a warning."""
_ARCHIVES = (".tgz", ".tar", ".gz", ".xz", ".bz2", ".zip", ".npz")


def find(places: list[Path], *words: str) -> Path:
    """The archive or folder whose name contains one of the words, in or among the places; else the first folder."""
    for place in places:
        for path in sorted(place.iterdir()) if place.is_dir() else [place]:
            if any(w in path.name.lower() for w in words) and (path.is_dir() or path.suffix in _ARCHIVES):
                return path
    return next((p for p in places if p.is_dir()), places[0])


def find_folder(places: list[Path], word: str) -> Path | None:
    """The folder whose name contains the word, in or among the places; None if there is none."""
    for place in places:
        for path in [place, *sorted(place.iterdir())] if place.is_dir() else []:
            if path.is_dir() and word in path.name.lower():
                return path
    return None


def require(recipe: Recipe, modalities: Mapping[str, int], heads: Mapping[str, tuple[str, ...]]) -> None:
    """Check that the data have what the recipe needs: modalities with their sizes, classes with their labels.

    Raises:
        ConfigError: they do not.

    """
    for name, m in recipe.modalities.items():
        if modalities.get(name) != m.size:
            known = ", ".join(f"{n} of {size}" for n, size in modalities.items())
            raise ConfigError(
                f"data.kind `{recipe.data.kind}` has no modality {name!r} of {m.size} numbers; use {known}"
            )
    for head in recipe.heads:
        labels = heads.get(head.name)
        if labels is None:
            raise ConfigError(
                f"data.kind `{recipe.data.kind}` has no targets for a head {head.name!r}; use {', '.join(heads)}"
            )
        if head.kind != "classification" or head.size != len(labels) or head.labels not in ((), labels):
            raise ConfigError(
                f"the head {head.name!r} does not fit the data: it needs kind `classification`, a size of "
                f"{len(labels)}, and as labels {', '.join(labels)}, or none"
            )


class Words:
    """The features of words, by default WordLlama's vectors; each word is encoded once."""

    def __init__(self, encoder: Encoder | None = None) -> None:
        self._encoder = encoder or TextEncoder()
        self._known: dict[str, FloatArray] = {}
        self.origin, self.size = self._encoder.origin, self._encoder.size

    def __getitem__(self, word: str) -> FloatArray:
        vector = self._known.get(word)
        if vector is None:
            data = self._encoder.encode(Sample(0, 0, word.encode()))[0].data
            assert isinstance(data, np.ndarray)
            vector = self._known[word] = data.astype(np.float32, copy=False)
        return vector


def common_tokens(words: Iterable[str], tokens: Words) -> tuple[int, ...]:
    """The tokens (id + 1) of the words, the most common first."""
    counts: Counter[int] = Counter()
    for word, count in Counter(words).items():
        for token in tokens[word].astype(int).tolist():
            counts[token] += count
    del counts[0]
    return tuple(token for token, _ in counts.most_common())


def pieces(s: Ticks, length: int, rng: np.random.Generator) -> list[Ticks]:
    """Split a long sequence at random points, new in each epoch, so a few recordings fill many lanes."""
    if len(s) <= length:
        return [s]
    first = int(rng.integers(length // 2, length + 1))
    places = [0, *range(first, len(s), length), len(s)]
    return [cut(s, a, b) for a, b in itertools.pairwise(places) if b > a]


def few_examples(recipe: Recipe, *parts: Sequence[Ticks]) -> tuple[str, ...]:
    """A sentence for each label that has too few examples in the sequences for training, validation and test.

    An example is a time that the label began to be true.
    """
    found = []
    names = ("for training", "for validation", "for the test")
    distinct = parts if parts[1] is not parts[2] else parts[:2]
    for head in recipe.heads:
        if head.kind != "classification" or head.size < 2 or not head.labels:
            continue
        for c, label in enumerate(head.labels):
            is_it = [[(s.targets[head.name] == c) & (s.weights[head.name] > 0) for s in part] for part in distinct]
            counts = [sum(int((np.diff(x.astype(np.int8), prepend=0) > 0).sum()) for x in part) for part in is_it]
            if counts[0] >= ENOUGH and all(counts):
                continue
            held = ", ".join(
                f"{n} {name} ({spoken(sum(map(np.count_nonzero, part)) * recipe.tick_ns / 1e9)})"
                for n, name, part in zip(counts, names, is_it, strict=False)
            )
            found.append(
                f"the label {label!r} has few examples: {held}; {ENOUGH} for training and one in every other part are "
                "the least that says something: record it more often, and in every recording"
            )
    return tuple(found)
