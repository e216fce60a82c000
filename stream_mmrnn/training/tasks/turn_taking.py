"""Turn-taking: who will speak in the next two seconds, and is the turn over?

Telephone dialogues, seen from one side: `self` is the person that a session is about, `other` the one who answers. A
tick holds the voice activity of both, and the vector of each word that ends in it; nothing is known before it was said.
Knows nothing about networks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.encoders.audio import MELS, SPEECH, AudioEncoder
from stream_mmrnn.capture.encoders.text import TextEncoder
from stream_mmrnn.core.config import convert
from stream_mmrnn.core.errors import ConfigError
from stream_mmrnn.core.types import FloatArray
from stream_mmrnn.predict.columns import MAX_AGE_S
from stream_mmrnn.training.data import Array, Made, Task, Ticks
from stream_mmrnn.training.datasets.switchboard import Dialogue, Seconds, Switchboard, spoken, voice
from stream_mmrnn.training.recipe import Head, Recipe
from stream_mmrnn.training.tasks.common import Words, find

SILENCE_S = 0.25
"""A mutual silence this long is where shift or hold is decided."""
SINGLE_S = 1.0
"""With `silences = "clear"`: how long one alone speaks before the silence and one alone after it."""

_SIZES = {
    "vision": 1280,
    "audio": MELS + 1,
    "text": TextEncoder.size,
    "other_audio": MELS + 1,
    "other_text": TextEncoder.size,
}
_VOICES, _TEXTS = ("audio", "other_audio"), ("text", "other_text")
_NEVER_S = 1e9
_CLEAR = ", where one alone spoke for a second before it and one alone did after it"

_Count = Annotated[int, msgspec.Meta(ge=0)]


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`data.options`."""

    train: _Count = 0
    """Dialogues of one training epoch, drawn anew for each; 0 takes all. Each is seen from one side, drawn too."""
    validation: _Count = 60
    """The first ones of the split; 0 takes all."""
    test: _Count = 0
    speaking: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.25
    """How much a tick counts in training in which the turn's owner still speaks; a tick of silence counts 1."""
    late_s: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    """In training a voice is heard to end up to so much later than it does, anew each time: detectors are slow."""
    silences: Literal["all", "clear"] = "all"
    """Which mutual silences the test counts: all that end in speech, or, as in the VAP papers, those with one speaker
    alone for a second before and after.
    """


class Side(msgspec.Struct, frozen=True, gc=False):
    """What one person did."""

    voice: Seconds
    """[K, 2] start and end of each stretch of speech."""
    word_end_s: Seconds
    word: tuple[str, ...]


def side_of(dialogue: Dialogue, which: Literal["a", "b"]) -> Side:
    channel = dialogue.a if which == "a" else dialogue.b
    said = [(float(e), w) for e, t in zip(channel.words.end_s, channel.words.token, strict=True) if (w := spoken(t))]
    return Side(voice(channel), np.array([e for e, _ in said], np.float64), tuple(w for _, w in said))


def activity(stretches: Seconds, at_s: Seconds) -> Seconds:
    """How long a voice was heard until each of the times."""
    if not len(stretches):
        return np.zeros(len(at_s))
    edges = stretches.ravel()
    heard = np.repeat(np.concatenate([[0.0], np.cumsum(stretches[:, 1] - stretches[:, 0])]), 2)[1:-1]
    return np.interp(at_s, edges, heard)


class Moments(msgspec.Struct, frozen=True, gc=False):
    """Who holds the turn at each of N times, and what becomes of it."""

    silent: npt.NDArray[np.bool_]
    """Nobody speaks."""
    shift: npt.NDArray[np.bool_]
    """The next one to begin is not the one who holds the turn: who speaks alone, or spoke last."""
    known: npt.NDArray[np.bool_]
    """One person holds the turn, and somebody begins again."""


def moments(one: Seconds, other: Seconds, at_s: Seconds) -> Moments:
    """Of two people's stretches of speech, at these times."""

    def around(stretches: Seconds) -> tuple[npt.NDArray[np.bool_], Seconds, Seconds]:
        starts, ends = stretches[:, 0], stretches[:, 1]
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
    """When shift or hold is decided: `SILENCE_S` into each mutual silence that lasts so long and ends in speech.

    With `clear`, only where one alone spoke for `SINGLE_S` before the silence, and one alone does after it.
    """
    both = np.concatenate([one, other])
    both = both[np.argsort(both[:, 0], kind="stable")]
    if len(both) < 2:
        return np.zeros(0)
    until = np.maximum.accumulate(both[:, 1])[:-1]
    following = both[1:, 0]
    # a millisecond less: times are written with six digits
    long = following - until >= SILENCE_S - 1e-6
    until, following = until[long], following[long]
    if clear:

        def heard(stretches: Seconds, begin: Seconds, end: Seconds) -> npt.NDArray[np.bool_]:
            return activity(stretches, end) - activity(stretches, begin) > 1e-6

        before = heard(one, until - SINGLE_S, until) ^ heard(other, until - SINGLE_S, until)
        after = heard(one, following, following + SINGLE_S) ^ heard(other, following, following + SINGLE_S)
        until = until[before & after]
    return until + SILENCE_S


class Views:
    """Dialogues as sequences of ticks, from either side."""

    def __init__(self, recipe: Recipe, options: Options) -> None:
        self._recipe, self._options = recipe, options
        self._names = list(recipe.modalities)
        self._tick_s = recipe.tick_ns / 1e9
        self.words = Words()

    def ticks(
        self, name: str, sides: tuple[Side, Side], end_s: float, rng: np.random.Generator | None, clear: bool = False
    ) -> Ticks:
        """A whole dialogue; `sides` are self and other. With `rng` as training sees it, else as it is tested."""
        count = int(end_s / self._tick_s)
        edges = np.arange(count + 1, dtype=np.float64) * self._tick_s
        features: dict[str, FloatArray] = {}
        present = np.zeros((count, len(self._names)), np.float32)
        age_s = np.full((count, len(self._names)), MAX_AGE_S, np.float32)
        for side, modality in zip(sides, _VOICES, strict=True):
            if modality in self._names:
                i = self._names.index(modality)
                stretches = side.voice if rng is None else _later(side.voice, self._options.late_s, rng)
                vectors = np.zeros((count, MELS + 1), np.float32)
                vectors[:, SPEECH] = np.diff(activity(stretches, edges)) / self._tick_s
                features[modality] = vectors
                present[:, i], age_s[:, i] = 1, 0
        for side, modality in zip(sides, _TEXTS, strict=True):
            if modality in self._names:
                i = self._names.index(modality)
                features[modality], present[:, i], age_s[:, i] = self._text(side, count)
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
                    # the last tick that ends by then
                    weight[np.minimum(((at + 1e-9) / self._tick_s).astype(int), count) - 1] = 1
                    weights[head.name] = weight * now.known * now.silent
                else:
                    counts = np.where(now.silent, 1.0, self._options.speaking)
                    weights[head.name] = (counts * now.known).astype(np.float32)
        return Ticks(features, present, age_s, targets, weights, name)

    def _text(self, side: Side, count: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """The sum of the words that end in each tick, whether there is one, and the age of the last."""
        vectors = np.zeros((count, TextEncoder.size), np.float32)
        there = np.zeros(count, np.float32)
        at = np.ceil(side.word_end_s / self._tick_s - 1e-6).astype(int) - 1
        for place, word in zip(at.tolist(), side.word, strict=True):
            if 0 <= place < count:
                vectors[place] += self.words[word]
                there[place] = 1
        ends = np.arange(1, count + 1) * self._tick_s
        last = np.concatenate([[-_NEVER_S], side.word_end_s])[np.searchsorted(side.word_end_s, ends + 1e-9, "right")]
        return vectors, there, np.clip(ends - last, 0, MAX_AGE_S).astype(np.float32)


def _later(stretches: Seconds, late_s: float, rng: np.random.Generator) -> Seconds:
    """Each end up to `late_s` later, as far as there is room."""
    if not late_s or not len(stretches):
        return stretches
    ends = stretches[:, 1] + rng.uniform(0, late_s, len(stretches))
    ends[:-1] = np.minimum(ends[:-1], stretches[1:, 0])
    return np.stack([stretches[:, 0], ends], 1)


def _projection(head: Head, sides: Sequence[Side], at_s: Seconds, end_s: float) -> tuple[Array, FloatArray]:
    """For each number of the head: does this person speak in at least half of this interval?"""
    target = np.zeros((len(at_s), head.size), np.float32)
    for j, (begin, end) in enumerate(head.horizons_s):
        stretches = sides[j // (head.size // 2)].voice
        heard = activity(stretches, at_s + end) - activity(stretches, at_s + begin)
        target[:, j] = heard >= 0.5 * (end - begin)
    last = max(end for _, end in head.horizons_s)
    return target, (at_s + last <= end_s).astype(np.float32)


def _require(recipe: Recipe) -> None:
    for name, m in recipe.modalities.items():
        if _SIZES.get(name) != m.size:
            known = ", ".join(f"{n} of {size}" for n, size in _SIZES.items())
            raise ConfigError(f"data.kind `turn_taking` has no modality {name!r} of {m.size} numbers; use {known}")
        if name in _VOICES and m.select != (SPEECH,):
            raise ConfigError(
                f"data.kind `turn_taking` knows of {name!r} only whether somebody speaks: set its select to [{SPEECH}]"
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
    """Switchboard by the splits of the VAP papers; the test sees every other dialogue from the other side."""
    options = convert(recipe.data.options, Options)
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

    def held_out(ids: list[str], clear: bool) -> Made:
        return Made(len(ids), lambda k: seen(ids[k], bool(k % 2), None, clear))

    given = [m for m in recipe.modalities if m in (*_VOICES, *_TEXTS)]
    sets = [
        tuple(m for m in given if m in chosen)
        for chosen in ((*_VOICES, *_TEXTS), _VOICES, (_VOICES[0], _TEXTS[0]), _VOICES[:1])
    ]
    hours = {k: sum(found[i][2] for i in ids) / 3600 for k, ids in wanted.items()}
    share = min(1.0, (options.train or len(wanted["train"])) / max(len(wanted["train"]), 1))
    return Task(
        epoch,
        held_out(wanted["val"], False),
        held_out(wanted["test"], options.silences == "clear"),
        dict.fromkeys(_TEXTS, views.words.origin) | dict.fromkeys(_VOICES, AudioEncoder().origin),
        epoch_ticks=round(share * hours["train"] * 3600e9 / recipe.tick_ns),
        sets=tuple(dict.fromkeys(s for s in sets if s)),
        about="Switchboard telephone dialogues as words with start and end (Godfrey, Holliman and McDaniel 1992; ISIP "
        "alignments of 1998, which come without a licence text: nothing of them is here but what the weights learnt). "
        f"Splits of the Voice Activity Projection papers (Ekstedt and Skantze 2022): {len(wanted['train'])} dialogues "
        f"to train ({hours['train']:.0f} h), {len(wanted['val'])} for validation ({hours['val']:.0f} h), "
        f"{len(wanted['test'])} for the test ({hours['test']:.0f} h), every other one seen from the other side. Voice "
        "activity is that of the word alignments, words closer than 50 ms joined; each word's WordLlama vector comes "
        "in the tick in which the word ends. `turn_over` is scored 250 ms into each mutual silence of that length and "
        f"more that ends in speech{_CLEAR if options.silences == 'clear' else ''}.",
    )
