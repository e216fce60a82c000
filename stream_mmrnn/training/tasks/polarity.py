"""Sentence polarity, one word per tick: is the sentence for or against the film?

Each word is the vector from the runtime's TextEncoder, the ids from its TokenEncoder, or both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from stream_mmrnn.capture.encoders.text import TextEncoder
from stream_mmrnn.capture.encoders.tokens import TokenEncoder
from stream_mmrnn.core.errors import FileError
from stream_mmrnn.core.strict_toml import convert
from stream_mmrnn.training.data import Task, Ticks
from stream_mmrnn.training.datasets import polarity
from stream_mmrnn.training.recipe import Recipe
from stream_mmrnn.training.tasks.common import Words, common_tokens, find, require

LABELS = ("negative", "positive")

_GIVEN = {"text": "its WordLlama vector", "text.tokens": "the ids of its tokens"}
_Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]


class PolarityOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`data.options`."""

    early: _Share = 0.1
    """Training weight of ticks before the last word, as a maximum; 0 trains on the last word only."""
    word_dropout: _Share = 0.0
    """Probability that a word is left out in training; new in every epoch."""
    split_seed: Annotated[int, msgspec.Meta(ge=0)] = 0


def split(count: int, seed: int) -> tuple[list[int], list[int], list[int]]:
    """80, 10 and 10 %, drawn from a seed."""
    order = np.random.default_rng(seed).permutation(count).tolist()
    a, b = count * 8 // 10, count * 9 // 10
    return order[:a], order[a:b], order[b:]


def make(recipe: Recipe, places: list[Path]) -> Task:
    """A seeded split, because there is no official one; validation and test are scored at the last word only."""
    options = convert(recipe.data.options, PolarityOptions)
    require(recipe, {"text": TextEncoder.size, "text.tokens": TokenEncoder.size}, {"polarity": LABELS})
    place = find(places, "sentence_polarity", "rt-polarity")
    found = polarity.sentences(place)
    train, validation, test = ([found[i] for i in part] for part in split(len(found), options.split_seed))
    if not validation or not test:
        raise FileError(f"{place} has {len(found)} sentences, too few to split; give the whole data set")
    words, tokens = Words(), Words(TokenEncoder())
    read = {name: {"text": words, "text.tokens": tokens}[name] for name in recipe.modalities}

    def ticks(sentence: polarity.Sentence, kept: Sequence[str], early: float, name: str) -> Ticks:
        count = len(kept)
        weight = np.linspace(0, early, count, endpoint=False, dtype=np.float32)
        weight[-1] = 1
        return Ticks(
            {name: np.stack([encoded[w] for w in kept]) for name, encoded in read.items()},
            np.ones((count, len(read)), np.float32),
            np.zeros((count, len(read)), np.float32),
            {"polarity": np.full(count, int(sentence.positive), np.int64)},
            {"polarity": weight},
            name,
        )

    def epoch(rng: np.random.Generator) -> Iterator[Ticks]:
        for i in rng.permutation(len(train)):
            spoken = train[i].text.split()
            keep = rng.random(len(spoken)) >= options.word_dropout
            kept = [w for w, k in zip(spoken, keep, strict=True) if k] or spoken
            yield ticks(train[i], kept, options.early, f"train {i}")

    return Task(
        epoch,
        [ticks(s, s.text.split(), 0.0, f"validation {i}") for i, s in enumerate(validation)],
        [ticks(s, s.text.split(), 0.0, f"test {i}") for i, s in enumerate(test)],
        {name: encoded.origin for name, encoded in read.items()},
        f"Sentence polarity v1.0 (Pang and Lee 2005, as nltk_data packs it; CC BY 4.0): {len(found)} sentences of film "
        "reviews in English, half for and half against, labelled by the review they are from. One word per tick, split "
        f"at spaces as published, each as {' and '.join(_GIVEN[name] for name in recipe.modalities)}. There is no "
        f"official split: {len(train)} sentences to train, {len(validation)} for validation and {len(test)} for the "
        f"test were drawn by seed {options.split_seed}, so figures of other splits and of ten folds are near but not "
        "the same thing. "
        "Scored at the last word alone.",
        epoch_ticks=sum(len(s.text.split()) for s in train),
        common_tokens=common_tokens((word for s in train for word in s.text.split()), tokens),
    )
