from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from recogniser import needs_recogniser

from stream_mmrnn.capture.speech.derivation import Speech
from stream_mmrnn.core.settings import SpeechSettings
from tools.speech_report import Item, Said, errors, grid_sentence, measure, recognise, table


@pytest.mark.parametrize(
    ("expected", "words", "wrong"),
    [("", "", 0), ("a b c", "a b c", 0), ("a b c", "a c", 1), ("a b", "b a", 2), ("a", "x y z", 3), ("a b", "", 2)],
)
def test_errors_are_the_edit_distance(expected: str, words: str, wrong: int) -> None:
    assert errors(expected.split(), words.split()) == errors(words.split(), expected.split()) == wrong


def test_the_name_of_a_grid_clip_is_its_sentence() -> None:
    assert grid_sentence("bbaf2n") == ["bin", "blue", "at", "f", "two", "now"]


@needs_recogniser
def test_a_clip_without_voice_has_no_words_and_cost() -> None:
    words, cpu_s = recognise(Speech("audio", SpeechSettings()), np.zeros(16_000, np.int16))
    assert words == []
    assert cpu_s > 0


@needs_recogniser
def test_without_any_word_there_is_no_delay() -> None:
    def items() -> Iterator[Item]:
        yield Item(np.zeros(16_000, np.int16), [Said("hello")])

    row = measure(items(), Speech("audio", SpeechSettings()))
    assert (row["words"], row["word_error_rate"], row["delay_p50_s"]) == (1, 1.0, None)
    assert "| silence | 1.0 | 1 | 1.0 | - | - | - |" in table({"silence": row})
