"""Large Movie Review Dataset: (train|test)/(pos|neg)/ID_RATING.txt and train/unsup/ID_0.txt, in aclImdb or its tar.gz.

Maas et al., "Learning word vectors for sentiment analysis", 2011. Texts are as published, with `<br />` in them.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from stream_mmrnn.core.errors import FileError
from stream_mmrnn.training.datasets.files import choose, complete, files, text

COUNTS = {"train": 25_000, "test": 25_000, "unsup": 50_000}
"""As published; the first two half positive, half negative."""

_RATINGS = {"pos": range(7, 11), "neg": range(1, 5), "unsup": range(1)}
_NAME = re.compile(r"(?:^|/)(train|test)/(pos|neg|unsup)/([^/]+)\.txt$")
_REVIEW = re.compile(r"(\d+)_(\d+)")


class ImdbReview(msgspec.Struct, frozen=True, gc=False):
    text: str
    positive: bool | None
    """None in `unsup`, which has no labels."""
    rating: int
    """Stars, 1 to 4 and 7 to 10; 0 in `unsup`."""
    id: int
    """From 0 in each class of each split."""


def load(path: Path, split: str) -> list[ImdbReview]:
    """The reviews of `train`, `test` or `unsup`: negative before positive, by id.

    Raises:
        FileError: a class or a review is missing, the classes are not of one size, or a rating does not fit its class.

    """
    choose("the IMDB split", split, COUNTS)
    folder, classes = ("train", ("unsup",)) if split == "unsup" else (split, ("neg", "pos"))

    def wanted(name: str) -> bool:
        match = _NAME.search(name)
        return match is not None and match[1] == folder and match[2] in classes

    found: dict[str, list[ImdbReview]] = {kind: [] for kind in classes}
    for name, raw in files(path, wanted):
        where, kind, stem = f"{path}/{name}", name.split("/")[-2], name.split("/")[-1].removesuffix(".txt")
        match = _REVIEW.fullmatch(stem)
        if match is None or int(match[2]) not in _RATINGS[kind]:
            allowed = _RATINGS[kind]
            raise FileError(
                f"the file {where} is not called ID_RATING.txt with a rating of {allowed[0]} to {allowed[-1]}; "
                "fetch it again"
            )
        positive = None if kind == "unsup" else kind == "pos"
        found[kind].append(ImdbReview(text(where, raw), positive, int(match[2]), int(match[1])))
    for kind, reviews in found.items():
        if not reviews:
            raise FileError(f"{path} holds no {folder}/{kind}/ID_RATING.txt; give the unpacked aclImdb folder")
        complete(f"{path}/{folder}/{kind}", "review", (r.id for r in reviews))
    counts = {kind: len(reviews) for kind, reviews in found.items()}
    if len(set(counts.values())) > 1:
        raise FileError(
            f"{path}/{folder} has {counts['neg']} negative and {counts['pos']} positive reviews, expected as many of "
            "each; fetch it again"
        )
    return [r for kind in classes for r in sorted(found[kind], key=lambda r: r.id)]
