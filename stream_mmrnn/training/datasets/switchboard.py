"""Switchboard: two-party telephone dialogues as words with start and end on each channel (ISIP ms98 release).

Godfrey, Holliman and McDaniel, "SWITCHBOARD", 1992; word alignments by Deshmukh, Ganapathiraju, Gleeson, Hamaker and
Picone, 1998: swb_ms98_transcriptions/20/2001/sw2001A-ms98-a-word.text, lines `id start end token`. The splits
(splits/train.txt, val.txt, test.txt) are those of the Voice Activity Projection papers, Ekstedt and Skantze, 2022.
From a folder or an archive, with one dialogue in memory at a time.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from functools import lru_cache
from itertools import compress, pairwise
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.errors import FileError
from stream_mmrnn.training.datasets.files import files, reason, text

Seconds = npt.NDArray[np.float64]

JOIN_S = 0.05
"""Words closer than this are joined to one segment of speech, as in the VAP papers."""

_WORDS = re.compile(r"(?:^|/)sw(\d{4})([AB])-ms98-a-word\.text$")
_SPLIT = re.compile(r"(?:^|/)splits/(train|val|test)\.txt$")
_MARK = re.compile(r"\[(?!laughter-)[a-z-]+\]|<.*>")
_LAUGHED = re.compile(r"^\[laughter-(.*)\]-?$")
_MISSAID = re.compile(r"\[(.+)/(.+)\](-?)")


class SwitchboardTokens(msgspec.Struct, frozen=True, gc=False, eq=False):
    """Tokens of one person in order of time, without overlaps."""

    start_s: Seconds
    end_s: Seconds
    token: tuple[str, ...]
    """As transcribed; `spoken` converts it to a word."""


class Channel(msgspec.Struct, frozen=True, gc=False, eq=False):
    words: SwitchboardTokens
    marks: SwitchboardTokens
    """[silence], [noise], [vocalized-noise], [laughter] and asides: not words."""


class Dialogue(msgspec.Struct, frozen=True, gc=False, eq=False):
    id: str
    a: Channel
    b: Channel
    end_s: float
    """End of the transcription of the longer channel."""


class Switchboard:
    """The corpus at a path. A pass over an archive takes seconds, so the splits are cached when a pass finds them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._splits: dict[str, tuple[str, ...]] = {}

    def splits(self) -> dict[str, tuple[str, ...]]:
        """Dialogue ids of `train`, `val` and `test`.

        Raises:
            FileError: a split is missing or damaged, or a dialogue is in two of them.

        """
        if len(self._splits) < 3:
            for name, raw in files(self.path, lambda name: bool(_SPLIT.search(name))):
                self._keep_split(name, raw)
        for split in ("train", "val", "test"):
            if split not in self._splits:
                raise FileError(f"{self.path} holds no splits/{split}.txt; give the corpus with its VAP splits")
        everything = sorted(i for ids in self._splits.values() for i in ids)
        for one, other in pairwise(everything):
            if one == other:
                raise FileError(f"{self.path} has dialogue {one} twice in its splits; fetch it again")
        return dict(self._splits)

    def dialogues(self, only: Collection[str] | None = None) -> Iterator[Dialogue]:
        """All dialogues, or those with these ids: sorted in a folder, else in the archive's order.

        Raises:
            FileError: a file is damaged, or a channel or requested dialogue is missing.

        """
        wanted = None if only is None else set(only)
        waiting: dict[str, dict[str, Channel]] = {}
        done: set[str] = set()
        for name, raw in files(self.path, lambda name: bool(_WORDS.search(name) or _SPLIT.search(name))):
            match = _WORDS.search(name)
            if match is None:
                self._keep_split(name, raw)
                continue
            number, side = match[1], match[2]
            if wanted is not None and number not in wanted:
                continue
            sides = waiting.setdefault(number, {})
            if side in sides or number in done:
                raise FileError(f"{self.path} has sw{number}{side}-ms98-a-word.text twice; keep one of them")
            sides[side] = _channel(f"{self.path}/{name}", f"sw{number}{side}-", text(f"{self.path}/{name}", raw))
            if len(sides) == 2:
                done.add(number)
                a, b = waiting[number].pop("A"), waiting.pop(number)["B"]
                yield Dialogue(number, a, b, max(_end(a), _end(b)))
        for number, sides in waiting.items():
            other = "B" if "A" in sides else "A"
            raise FileError(f"{self.path} holds no sw{number}{other}-ms98-a-word.text; fetch the corpus again")
        missing = sorted(wanted - done) if wanted is not None else []
        if missing:
            raise FileError(f"{self.path} holds no dialogue {missing[0]}, which was requested; fetch the corpus again")
        if not done and wanted is None:
            raise FileError(
                f"{self.path} holds no swNNNNA-ms98-a-word.text; give the folder or archive of the ISIP release"
            )

    def _keep_split(self, name: str, raw: bytes) -> None:
        ids = tuple(text(f"{self.path}/{name}", raw).split())
        match = _SPLIT.search(name)
        if match is None or not ids or not all(len(i) == 4 and i.isdigit() for i in ids):
            raise FileError(f"the file {self.path}/{name} is not a list of four-digit dialogues; fetch it again")
        self._splits[match[1]] = ids


def voice(channel: Channel, join_s: float = JOIN_S) -> Seconds:
    """The speech segments of a channel: [K, 2] start and end in seconds. Only words count, not laughter or noise."""
    start, end = channel.words.start_s, channel.words.end_s
    if not len(start):
        return np.zeros((0, 2))
    apart = start[1:] - end[:-1] >= join_s
    stretches = np.stack((start[np.r_[True, apart]], end[np.r_[apart, True]]), axis=1)
    # a few words have no duration in the alignment
    return stretches[stretches[:, 1] > stretches[:, 0]]


@lru_cache(maxsize=65536)
def spoken(token: str) -> str:
    """The word as a listener understands it when the token ends.

    Of a word that is broken off only the spoken part remains: `w[ell]-` is "w", because the speaker never said the
    rest. A swallowed beginning is filled in: `-[y]eah` is "yeah". A slip of the tongue gives the intended word. Marks
    of laughter (`[laughter-yeah]`), coinage (`{exed}`) and pronunciation (`them_1`) are removed.
    """
    word = _LAUGHED.sub(r"\1", token)
    if slip := _MISSAID.fullmatch(word):
        spoken_part, meant, cut = slip.groups()
        word = spoken_part if cut or "[" in spoken_part else meant
    word = re.sub(r"^-\[([^]]*)\]", r"\1", word)
    return re.sub(r"\[[^]]*\]|_\d", "", word).strip("{}-")


def _channel(where: str, prefix: str, content: str) -> Channel:
    tokens = content.split()
    lines = content.count("\n") + (not content.endswith("\n"))
    if not tokens or len(tokens) != 4 * lines or not all(t.startswith(prefix) for t in tokens[::4]):
        raise FileError(f"the file {where} is damaged, expected lines `{prefix}... start end token`; fetch it again")
    try:
        start, end = (np.fromiter(map(float, tokens[i::4]), np.float64, lines) for i in (1, 2))
    except ValueError as e:
        raise FileError(f"the file {where} has a time that is not a number ({reason(e)}); fetch it again") from e
    order = np.stack((start, end), axis=1).ravel()
    if not (np.diff(order, prepend=0.0) > -1e-6).all():  # also false for NaN
        raise FileError(f"the file {where} has words that overlap or go back in time; fetch it again")
    token = tokens[3::4]
    mark = np.fromiter(map(_is_mark, token), np.bool_, lines)
    return Channel(
        SwitchboardTokens(start[~mark], end[~mark], tuple(compress(token, ~mark))),
        SwitchboardTokens(start[mark], end[mark], tuple(compress(token, mark))),
    )


@lru_cache(maxsize=65536)
def _is_mark(token: str) -> bool:
    return _MARK.fullmatch(token) is not None


def _end(channel: Channel) -> float:
    return max(float(tokens.end_s[-1]) for tokens in (channel.words, channel.marks) if len(tokens.end_s))
