"""The synthetic dialogue, generated from a seed: one person's turns of sentences with pauses between them, and another
person's answers in the pauses that are long enough.

Each turn depends only on the seed and its number, so that several processes generate the same dialogue without
exchanging messages. Pure: knows nothing about sound, pictures or the clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_SENTENCES = (
    "so what do you think about that",
    "i think we should go now",
    "well it is not very far",
    "do you want to come along",
    "yes of course",
    "we had a long day at work",
    "my sister lives near the river",
    "that sounds really good to me",
    "no i do not know",
    "maybe we can meet again tomorrow",
    "have you seen the new film",
    "it was a little too loud",
    "the children were playing in the garden",
    "how many people were there",
    "i remember it very well",
    "let me tell you a story",
    "we never found the reason",
    "could you say that again",
    "all right then",
    "you are right about the weather",
)
_ANSWERS = (
    "yes of course",
    "all right then",
    "no i do not know",
    "you are right",
    "i think so too",
    "could you say that again",
    "that sounds really good to me",
)
_PAUSE_S = (0.4, 2.5)
_SENTENCE_GAP_S = (0.12, 0.25)
_ANSWER_GAP_S = (0.2, 0.35)
"""Time between the end of a turn and its answer."""
_ROOM_S = 0.2
"""Least time between an answer and the next turn."""
_PITCH_HZ, _OTHER_PITCH_HZ = 135.0, 210.0
_OTHER = 20
"""Keeps the random streams of the answers independent of those of the sources."""
VOWELS = "aeiouy"
_OPENNESS = {"a": 1.0, "e": 0.7, "i": 0.45, "o": 0.8, "u": 0.4, "y": 0.45}


class Phone(NamedTuple):
    """One letter, spoken."""

    letter: str
    start_s: float
    end_s: float
    pitch_hz: float
    """At its start."""


class Word(NamedTuple):
    text: str
    start_s: float
    end_s: float
    phones: tuple[Phone, ...]


class Turn(NamedTuple):
    """Continuous speech with silence before and after."""

    number: int
    start_s: float
    end_s: float
    words: tuple[Word, ...]


def _word(text: str, start_s: float, pitch_hz: float, rng: np.random.Generator) -> Word:
    phones: list[Phone] = []
    at = start_s
    for i, letter in enumerate(text):
        same = i > 0 and (letter == text[i - 1] or (letter in VOWELS and text[i - 1] in VOWELS))
        if same:  # "ee", "ou": one long sound
            at += 0.04
            phones[-1] = phones[-1]._replace(end_s=at)
            continue
        length = rng.uniform(0.09, 0.15) if letter in VOWELS else rng.uniform(0.04, 0.07)
        phones.append(Phone(letter, at, at + length, pitch_hz * rng.uniform(0.96, 1.04)))
        at += length
    return Word(text, start_s, at, tuple(phones))


def _sentence(text: str, start_s: float, pitch_hz: float, rng: np.random.Generator) -> list[Word]:
    words: list[Word] = []
    texts = text.split()
    asks = texts[0] in ("so", "do", "have", "how", "could")
    for i, word in enumerate(texts):
        # the pitch falls during a statement, and rises at the end of a question
        share = i / max(1, len(texts) - 1)
        pitch = pitch_hz * (1.12 - 0.3 * share + (0.45 * share**4 if asks else 0.0))
        words.append(_word(word, words[-1].end_s if words else start_s, pitch, rng))
    return words


def turns(seed: int) -> Iterator[Turn]:
    """The turns from second 0 on, endless."""
    at = 0.0
    index = 0
    while True:
        rng = np.random.default_rng((seed, index))
        at += rng.uniform(*_PAUSE_S)
        start = at
        words: list[Word] = []
        for k in range(int(rng.integers(1, 4))):
            if k:
                at += rng.uniform(*_SENTENCE_GAP_S)
            words += _sentence(_SENTENCES[int(rng.integers(len(_SENTENCES)))], at, _PITCH_HZ, rng)
            at = words[-1].end_s
        yield Turn(index, start, at, tuple(words))
        index += 1


def answers(seed: int) -> Iterator[Turn]:
    """The other person's turns, before and between the `turns` of the same seed, in pauses that are long enough."""
    ended_s = 0.0
    for turn in turns(seed):
        rng = np.random.default_rng((seed, _OTHER, turn.number))
        start = ended_s + rng.uniform(*_ANSWER_GAP_S)
        for i in rng.permutation(len(_ANSWERS)):
            words = _sentence(_ANSWERS[i], start, _OTHER_PITCH_HZ, rng)
            if words[-1].end_s <= turn.start_s - _ROOM_S:
                yield Turn(turn.number, start, words[-1].end_s, tuple(words))
                break
        ended_s = turn.end_s


def openness(turn: Turn, at_s: float) -> float:
    """How far the mouth is open at a time of this turn, 0 to 1; the loudness of the voice follows the same envelope."""
    if not turn.start_s <= at_s < turn.end_s:
        return 0.0
    for word in turn.words:
        if word.start_s <= at_s < word.end_s:
            for phone in word.phones:
                if phone.start_s <= at_s < phone.end_s:
                    share = (at_s - phone.start_s) / (phone.end_s - phone.start_s)
                    return _OPENNESS.get(phone.letter, 0.15) * (0.4 + 0.6 * float(np.sin(np.pi * share)))
    return 0.0
