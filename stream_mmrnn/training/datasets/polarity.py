"""Sentence polarity v1.0 and movie reviews v2.0, as nltk_data packs them: a zip, or the folder that it unpacks to.

Pang and Lee, "Seeing stars", 2005 (rt-polarity.pos and .neg, one sentence per line) and "A sentimental education", 2004
(pos/cvNNN_ID.txt and neg/, one sentence per line); CC BY 4.0. Neither has an official test split: the reviews have ten
official folds, the sentences none.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from stream_mmrnn.core.errors import FileError
from stream_mmrnn.training.datasets.files import complete, files, text

SENTENCES = 10_662
REVIEWS = 2_000
"""As published, half positive, half negative."""

_LINES = re.compile(r"(?:^|/)rt-polarity\.(pos|neg)$")
_REVIEW = re.compile(r"(?:^|/)(pos|neg)/cv(\d{3})_\d+\.txt$")


class Sentence(msgspec.Struct, frozen=True, gc=False):
    text: str
    positive: bool


class PolarityReview(msgspec.Struct, frozen=True, gc=False):
    text: str
    positive: bool
    index: int
    """0 to 999 in each class."""

    @property
    def fold(self) -> int:
        """0 to 9: the fold in the 2004 paper is the hundreds digit of the file's number."""
        return self.index // 100


def sentences(path: Path) -> list[Sentence]:
    """Negative before positive, in the file's order.

    Raises:
        FileError: a file is missing, truncated or has an empty line, or the classes have different sizes.

    """
    found: dict[str, list[str]] = {}
    for name, raw in files(path, lambda name: bool(_LINES.search(name))):
        where, kind = f"{path}/{name}", name[-3:]
        # not splitlines: it would also cut at control characters inside a sentence
        lines = [line.strip() for line in text(where, raw).split("\n")]
        if lines.pop() or not lines:
            raise FileError(f"the file {where} does not end with a complete line; fetch it again")
        if not all(lines):
            raise FileError(f"the file {where} has no sentence in line {lines.index('') + 1}; fetch it again")
        found[kind] = lines
    for kind in ("neg", "pos"):
        if kind not in found:
            raise FileError(f"{path} holds no rt-polarity.{kind}; give sentence_polarity.zip or its folder")
    _as_many(path, len(found["neg"]), len(found["pos"]))
    return [Sentence(line, kind == "pos") for kind in ("neg", "pos") for line in found[kind]]


def reviews(path: Path) -> list[PolarityReview]:
    """Negative before positive, by index.

    Raises:
        FileError: there are none, one is missing or empty, or the classes have different sizes.

    """
    found: list[PolarityReview] = []
    for name, raw in files(path, lambda name: bool(_REVIEW.search(name))):
        match = _REVIEW.search(name)
        content = text(f"{path}/{name}", raw).strip()
        if match is None or not content:
            raise FileError(f"the file {path}/{name} is empty, expected a review; fetch it again")
        found.append(PolarityReview(content, match[1] == "pos", int(match[2])))
    if not found:
        raise FileError(f"{path} holds no pos/cvNNN_ID.txt and neg/cvNNN_ID.txt; give movie_reviews.zip or its folder")
    for positive, kind in ((False, "neg"), (True, "pos")):
        complete(f"{path}/{kind}", "review", (r.index for r in found if r.positive == positive))
    positives = sum(r.positive for r in found)
    _as_many(path, len(found) - positives, positives)
    return sorted(found, key=lambda r: (r.positive, r.index))


def _as_many(path: Path, negative: int, positive: int) -> None:
    if negative != positive:
        raise FileError(
            f"{path} has {negative} negative and {positive} positive texts, expected as many of each; fetch it again"
        )
