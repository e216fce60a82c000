"""Turn-taking: who will speak in the next two seconds, and is the turn over?

Telephone dialogues from the view of one side: `self` is the person of the session, `other` the second person. A tick
has the voice activity of both, and the vector of each word that ends in it. All inputs are causal. What a camera sees
is in no dialogue; `turn_taking_faces` has the clips for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.encoders import create_encoder
from stream_mmrnn.capture.encoders.audio import MELS, SPEECH, AudioEncoder
from stream_mmrnn.capture.encoders.face import FaceEncoder
from stream_mmrnn.capture.encoders.text import TextEncoder
from stream_mmrnn.capture.encoders.tokens import TokenEncoder
from stream_mmrnn.core.errors import ConfigError
from stream_mmrnn.core.strict_toml import convert
from stream_mmrnn.core.types import FloatArray
from stream_mmrnn.predict.align_stream import stacked
from stream_mmrnn.predict.columns import MAX_AGE_S
from stream_mmrnn.training.data import Array, LazySequence, Task, Ticks
from stream_mmrnn.training.datasets.switchboard import Dialogue, Seconds, Switchboard, spoken, voice
from stream_mmrnn.training.recipe import HeadRecipe, Recipe
from stream_mmrnn.training.tasks import turn_taking_faces
from stream_mmrnn.training.tasks.common import Words, common_tokens, find, find_folder

SILENCE_S = 0.25
"""Shift or hold is scored this long after the start of a mutual silence."""
SINGLE_S = 1.0
"""With `silences = "clear"`: how long exactly one person speaks before, and exactly one after the silence."""

STACK = 2
"""Words of one tick whose tokens are kept, the newest ones."""

_SIZES = {
    "vision": FaceEncoder.size,
    "audio": MELS + 1,
    "text": TextEncoder.size,
    "text.tokens": STACK * TokenEncoder.size,
    "turn_end": 1,
    "other_audio": MELS + 1,
    "other_text": TextEncoder.size,
    "other_text.tokens": STACK * TokenEncoder.size,
    "other_turn_end": 1,
}
_VOICES, _TEXTS, _TOKENS = ("audio", "other_audio"), ("text", "other_text"), ("text.tokens", "other_text.tokens")
_ENDS = ("turn_end", "other_turn_end")
_NEVER_S = 1e9
_LATE_SHARE = 0.5
_CLEAR = ", where exactly one person spoke for a second before and after it"

_Count = Annotated[int, msgspec.Meta(ge=0)]


class TurnTakingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`data.options`."""

    train: _Count = 0
    """Dialogues per training epoch, drawn again for each; 0 means all. The side is drawn, too."""
    validation: _Count = 60
    """The first ones of the split; 0 means all."""
    test: _Count = 0
    speaking: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.25
    """Training weight of ticks in which the turn's owner still speaks; ticks of silence have weight 1."""
    late_s: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """In training the end of speech is delayed by up to this time, at random, and its start by up to half of it,
    because voice detectors are slow.
    """
    late_words_s: Annotated[float, msgspec.Meta(ge=0, le=5)] = 0.0
    """In half of the training dialogues each word comes 0.3 to 1 of this time after its end, as a recogniser gives
    it."""
    wrong_words: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """In training: the share of words that are missing or another word of the dialogue."""
    alone: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """The share of training dialogues that have no input of the second person, as with one microphone."""
    silences: Literal["all", "clear"] = "all"
    """The mutual silences that the test scores: all that end in speech, or, as in the VAP papers, those with exactly
    one speaker for a second before and after.
    """


class Side(msgspec.Struct, frozen=True, gc=False):
    """Speech and words of one person."""

    voice: Seconds
    """[K, 2] start and end of each segment of speech."""
    word_end_s: Seconds
    word: tuple[str, ...]


def side_of(dialogue: Dialogue, which: Literal["a", "b"]) -> Side:
    channel = dialogue.a if which == "a" else dialogue.b
    words = [(float(e), w) for e, t in zip(channel.words.end_s, channel.words.token, strict=True) if (w := spoken(t))]
    return Side(voice(channel), np.array([e for e, _ in words], np.float64), tuple(w for _, w in words))


def activity(segments: Seconds, at_s: Seconds) -> Seconds:
    """The total duration of speech before each of the times."""
    if not len(segments):
        return np.zeros(len(at_s))
    edges = segments.ravel()
    total = np.repeat(np.concatenate([[0.0], np.cumsum(segments[:, 1] - segments[:, 0])]), 2)[1:-1]
    return np.interp(at_s, edges, total)


class Moments(msgspec.Struct, frozen=True, gc=False):
    """The owner of the turn at each of N times, and how the turn continues."""

    silent: npt.NDArray[np.bool_]
    """Neither person speaks."""
    shift: npt.NDArray[np.bool_]
    """The next to speak is not the owner of the turn (the person who speaks alone, or spoke last)."""
    known: npt.NDArray[np.bool_]
    """The turn has one owner, and someone speaks later."""


def moments(one: Seconds, other: Seconds, at_s: Seconds) -> Moments:
    """Compute them from the speech segments of both people, at these times."""

    def around(segments: Seconds) -> tuple[npt.NDArray[np.bool_], Seconds, Seconds]:
        starts, ends = segments[:, 0], segments[:, 1]
        begun = np.searchsorted(starts, at_s, "right")
        ended = np.searchsorted(ends, at_s, "right")
        last = np.concatenate([[-_NEVER_S], ends])[ended]
        following = np.concatenate([starts, [_NEVER_S]])[begun]
        return begun > ended, last, following

    speaks_1, last_1, next_1 = around(one)
    speaks_2, last_2, next_2 = around(other)
    silent = ~speaks_1 & ~speaks_2
    holds_1 = np.where(silent, last_1 > last_2, speaks_1)
    held = (speaks_1 ^ speaks_2) | (silent & (last_1 != last_2))
    comes = (np.minimum(next_1, next_2) < _NEVER_S) & (next_1 != next_2)
    known = held & comes
    return Moments(silent, known & ((next_2 < next_1) == holds_1), known)


def decisions(one: Seconds, other: Seconds, clear: bool = False) -> Seconds:
    """When shift or hold is scored: `SILENCE_S` into each mutual silence that is as long and ends in speech.

    With `clear`, only if exactly one person spoke for `SINGLE_S` before the silence, and exactly one does after it.
    """
    both = np.concatenate([one, other])
    both = both[np.argsort(both[:, 0], kind="stable")]
    if len(both) < 2:
        return np.zeros(0)
    until = np.maximum.accumulate(both[:, 1])[:-1]
    following = both[1:, 0]
    # one millisecond less, because the times in the files are rounded to six digits
    long = following - until >= SILENCE_S - 1e-6
    until, following = until[long], following[long]
    if clear:

        def speaks(segments: Seconds, begin: Seconds, end: Seconds) -> npt.NDArray[np.bool_]:
            return activity(segments, end) - activity(segments, begin) > 1e-6

        before = speaks(one, until - SINGLE_S, until) ^ speaks(other, until - SINGLE_S, until)
        after = speaks(one, following, following + SINGLE_S) ^ speaks(other, following, following + SINGLE_S)
        until = until[before & after]
    return until + SILENCE_S


class Views:
    """Dialogues as sequences of ticks, from either side."""

    def __init__(self, recipe: Recipe, options: TurnTakingOptions) -> None:
        self._recipe, self._options = recipe, options
        self._names = list(recipe.modalities)
        self._tick_s = recipe.tick_ns / 1e9
        self.words = Words()
        self.tokens = Words(TokenEncoder())

    def ticks(
        self, name: str, sides: tuple[Side, Side], end_s: float, rng: np.random.Generator | None, clear: bool = False
    ) -> Ticks:
        """A whole dialogue; `sides` are self and other. With `rng` augmented for training, else as for the test."""
        count = int(end_s / self._tick_s)
        edges = np.arange(count + 1, dtype=np.float64) * self._tick_s
        features: dict[str, FloatArray] = {}
        present = np.zeros((count, len(self._names)), np.float32)
        age_s = np.full((count, len(self._names)), MAX_AGE_S, np.float32)
        for side, modality in zip(sides, _VOICES, strict=True):
            if modality in self._names:
                i = self._names.index(modality)
                segments = side.voice if rng is None else _later(side.voice, self._options.late_s, rng)
                vectors = np.zeros((count, MELS + 1), np.float32)
                vectors[:, SPEECH] = np.diff(activity(segments, edges)) / self._tick_s
                features[modality] = vectors
                present[:, i], age_s[:, i] = 1, 0
        late_words_s = self._options.late_words_s if rng is not None and rng.random() < _LATE_SHARE else 0.0
        for side, text, tokens in zip(sides, _TEXTS, _TOKENS, strict=True):
            said = side if rng is None else _recognised(side, late_words_s, self._options.wrong_words, rng)
            for modality in {text, tokens} & set(self._names):
                i = self._names.index(modality)
                make = self._text if modality == text else self._ids
                features[modality] = make(said, count)
                present[:, i], age_s[:, i] = self._when(said, count)
        if rng is not None and rng.random() < self._options.alone:
            for modality in self._names:
                if modality.startswith("other_"):
                    i = self._names.index(modality)
                    features.pop(modality, None)
                    present[:, i], age_s[:, i] = 0, MAX_AGE_S
        targets: dict[str, Array] = {}
        weights: dict[str, FloatArray] = {}
        for head in self._recipe.heads:
            if head.kind == "activity_projection":
                targets[head.name], weights[head.name] = _projection(head, sides, edges[1:], end_s)
            else:
                now = moments(sides[0].voice, sides[1].voice, edges[1:])
                targets[head.name] = now.shift.astype(np.float32)
                if rng is None:
                    weight = np.zeros(count, np.float32)
                    at = decisions(sides[0].voice, sides[1].voice, clear)
                    # the last tick that ends at or before that time
                    weight[np.minimum(((at + 1e-9) / self._tick_s).astype(int), count) - 1] = 1
                    weights[head.name] = weight * now.known * now.silent
                else:
                    counts = np.where(now.silent, 1.0, self._options.speaking)
                    weights[head.name] = (counts * now.known).astype(np.float32)
        return Ticks(features, present, age_s, targets, weights, name)

    def _places(self, side: Side, count: int) -> Iterator[tuple[int, str]]:
        """The tick in which each word ends, and the word."""
        at = np.ceil(side.word_end_s / self._tick_s - 1e-6).astype(int) - 1
        return ((place, word) for place, word in zip(at.tolist(), side.word, strict=True) if 0 <= place < count)

    def _text(self, side: Side, count: int) -> FloatArray:
        """Per tick: the sum of the words that end in it."""
        vectors = np.zeros((count, TextEncoder.size), np.float32)
        for place, word in self._places(side, count):
            vectors[place] += self.words[word]
        return vectors

    def _ids(self, side: Side, count: int) -> FloatArray:
        """Per tick: the tokens of the newest words that end in it, the newest last."""
        found = np.zeros((count, STACK * TokenEncoder.size), np.float32)
        for place, word in self._places(side, count):
            found[place] = stacked([found[place, TokenEncoder.size :], self.tokens[word]], found.shape[1])
        return found

    def _when(self, side: Side, count: int) -> tuple[FloatArray, FloatArray]:
        """Per tick: whether a word ends in it, and the age of the last."""
        there = np.zeros(count, np.float32)
        there[[place for place, _ in self._places(side, count)]] = 1
        ends = np.arange(1, count + 1) * self._tick_s
        last = np.concatenate([[-_NEVER_S], side.word_end_s])[np.searchsorted(side.word_end_s, ends + 1e-9, "right")]
        return there, np.clip(ends - last, 0, MAX_AGE_S).astype(np.float32)


def _recognised(side: Side, late_s: float, wrong: float, rng: np.random.Generator) -> Side:
    """The words as a recogniser gives them: each up to `late_s` late, and a share of them missing or wrong."""
    count = len(side.word)
    if not count or not (late_s or wrong):
        return side
    end_s = (
        np.maximum.accumulate(side.word_end_s + rng.uniform(0.3 * late_s, late_s, count)) if late_s else side.word_end_s
    )
    chance, others = rng.random(count), rng.integers(count, size=count)
    word = tuple(side.word[o] if c < wrong / 2 else w for w, c, o in zip(side.word, chance, others, strict=True))
    keep = (chance < wrong / 2) | (chance >= wrong)
    return Side(side.voice, end_s[keep], tuple(w for w, k in zip(word, keep, strict=True) if k))


def _later(segments: Seconds, late_s: float, rng: np.random.Generator) -> Seconds:
    """Delay each end by up to `late_s`, but not into the next segment, and each start by up to half of it."""
    if not late_s or not len(segments):
        return segments
    starts = segments[:, 0] + rng.uniform(0, late_s / 2, len(segments))
    ends = np.maximum(segments[:, 1] + rng.uniform(0, late_s, len(segments)), starts)
    ends[:-1] = np.minimum(ends[:-1], segments[1:, 0])
    starts = np.minimum(starts, ends)
    return np.stack([starts, ends], 1)


def _projection(head: HeadRecipe, sides: Sequence[Side], at_s: Seconds, end_s: float) -> tuple[Array, FloatArray]:
    """For each number of the head: does this person speak in at least half of this interval?"""
    target = np.zeros((len(at_s), head.size), np.float32)
    for j, (begin, end) in enumerate(head.horizons_s):
        segments = sides[j // (head.size // 2)].voice
        speech_s = activity(segments, at_s + end) - activity(segments, at_s + begin)
        target[:, j] = speech_s >= 0.5 * (end - begin)
    last = max(end for _, end in head.horizons_s)
    return target, (at_s + last <= end_s).astype(np.float32)


def _require(recipe: Recipe) -> None:
    for name, m in recipe.modalities.items():
        if _SIZES.get(name) != m.size:
            known = ", ".join(f"{n} of {size}" for n, size in _SIZES.items())
            raise ConfigError(f"data.kind `turn_taking` has no modality {name!r} of {m.size} numbers; use {known}")
        if name in _VOICES and m.select != (SPEECH,):
            raise ConfigError(
                f"data.kind `turn_taking` has for {name!r} only whether that person speaks: "
                f"set its select to [{SPEECH}]"
            )
    if not set(_VOICES) & set(recipe.modalities):
        raise ConfigError(f"data.kind `turn_taking` needs a modality of {' and '.join(_VOICES)}")
    for head in recipe.heads:
        if head.kind == "activity_projection":
            half = head.size // 2
            if head.size % 2 or len(head.horizons_s) != head.size or head.horizons_s[:half] != head.horizons_s[half:]:
                raise ConfigError(
                    f"the head {head.name!r} needs the same horizons_s for self, then for other: an even size"
                )
        elif head.kind != "classification" or head.size != 1:
            raise ConfigError(
                f"the head {head.name!r} does not fit the data; use an activity_projection, or a classification of "
                "size 1 for the end of the turn"
            )


def make(recipe: Recipe, places: list[Path]) -> Task:
    """Switchboard with the splits of the VAP papers; in the test every second dialogue is from the other side."""
    options = convert(recipe.data.options, TurnTakingOptions)
    _require(recipe)
    corpus = Switchboard(find(places, "switchboard", "swb"))
    views = Views(recipe, options)
    splits = corpus.splits()
    wanted = {
        "train": sorted(splits["train"]),
        "val": sorted(splits["val"])[: options.validation or None],
        "test": sorted(splits["test"])[: options.test or None],
    }
    found: dict[str, tuple[Side, Side, float]] = {}
    for d in corpus.dialogues({i for ids in wanted.values() for i in ids}):
        found[d.id] = (side_of(d, "a"), side_of(d, "b"), d.end_s)

    def seen(i: str, turned: bool, rng: np.random.Generator | None, clear: bool = False) -> Ticks:
        a, b, end_s = found[i]
        return views.ticks(f"sw{i} from {'B' if turned else 'A'}", (b, a) if turned else (a, b), end_s, rng, clear)

    def epoch(rng: np.random.Generator) -> Iterator[Ticks]:
        train = wanted["train"]
        for i in rng.permutation(len(train))[: options.train or None]:
            yield seen(train[i], bool(rng.integers(2)), rng)

    def held_out(ids: list[str], clear: bool) -> LazySequence:
        return LazySequence(len(ids), lambda k: seen(ids[k], bool(k % 2), None, clear))

    faces = find_folder(places, "grid") if recipe.late_fusion.modality == "vision" else None
    words = (*_TEXTS, *_TOKENS)
    given = [m for m in recipe.modalities if m in (*_VOICES, *words)]
    sets = [
        tuple(m for m in given if m in chosen)
        for chosen in ((*_VOICES, *words), _VOICES, (_VOICES[0], *words[::2]), _VOICES[:1])
    ]
    hours = {k: sum(found[i][2] for i in ids) / 3600 for k, ids in wanted.items()}
    share = min(1.0, (options.train or len(wanted["train"])) / max(len(wanted["train"]), 1))
    return Task(
        epoch,
        held_out(wanted["val"], False),
        held_out(wanted["test"], options.silences == "clear"),
        dict.fromkeys(_TEXTS, views.words.origin)
        | dict.fromkeys(_TOKENS, views.tokens.origin)
        | dict.fromkeys(_VOICES, AudioEncoder().origin)
        | dict.fromkeys(_ENDS, create_encoder("turn_end").origin)
        | {"vision": FaceEncoder().origin},
        epoch_ticks=round(share * hours["train"] * 3600e9 / recipe.tick_ns),
        common_tokens=common_tokens(
            (word for i in wanted["train"] for side in found[i][:2] for word in side.word), views.tokens
        ),
        late=None if faces is None else lambda: turn_taking_faces.sequences(recipe, faces),
        sets=tuple(dict.fromkeys(s for s in sets if s)),
        about="Switchboard telephone dialogues as words with start and end (Godfrey, Holliman and McDaniel 1992; ISIP "
        "alignments of 1998, which come without a licence text: nothing of them is here but what the weights learnt). "
        f"Splits of the Voice Activity Projection papers (Ekstedt and Skantze 2022): {len(wanted['train'])} dialogues "
        f"to train ({hours['train']:.0f} h), {len(wanted['val'])} for validation ({hours['val']:.0f} h), "
        f"{len(wanted['test'])} for the test ({hours['test']:.0f} h), every other one seen from the other side. Voice "
        "activity is that of the word alignments, words closer than 50 ms joined; each word's WordLlama vector comes "
        "in the tick in which the word ends. `turn_over` is scored 250 ms into each mutual silence of that length and "
        f"more that ends in speech{_CLEAR if options.silences == 'clear' else ''}."
        + ("" if faces is None else f" `vision` was fitted afterwards on clips of faces (GRID): {faces.name}."),
    )
