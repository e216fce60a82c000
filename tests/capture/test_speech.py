"""Words from sound: the spectrogram, LocalAgreement, the recogniser and the derivation."""

from __future__ import annotations

import importlib.util
import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from recogniser import needs_recogniser

from stream_mmrnn.capture import sources
from stream_mmrnn.capture.derive import derivation_of
from stream_mmrnn.capture.sources.file import FileSound
from stream_mmrnn.capture.speech.agreement import LocalAgreement, Word
from stream_mmrnn.capture.speech.derivation import Speech
from stream_mmrnn.capture.speech.mel import filters, log_mel
from stream_mmrnn.capture.speech.whisper import find_model
from stream_mmrnn.core import config
from stream_mmrnn.core.errors import ConfigError, ModelError, SourceSpecError, UsageError, WireError
from stream_mmrnn.core.settings import MicrophoneSettings, Settings, SpeechSettings
from stream_mmrnn.core.stream_table import stream_table
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.core.types import Sample

RATE = 16_000
EPOCH_NS = 10**12

Heard = list[tuple[str, int]]


def hear(speech: Speech, sound: np.ndarray, blocks: list[int], *, end: bool = True) -> Heard:
    """The words and their times, from a sound in blocks of these lengths, over and over."""
    words: list[Sample] = []
    at = 0
    for length in itertools.cycle(blocks):
        block = sound[at : at + length]
        at += len(block)
        event_ns = EPOCH_NS + at * 62_500
        made = speech.derive(Sample(event_ns, event_ns, block))
        assert all(w.event_ns <= event_ns for w in made), "no word ends in the future"
        words += made
        if at >= len(sound):
            break
    words += speech.finish() if end else []
    times = [w.event_ns for w in words]
    assert times == sorted(times)
    return [(bytes(w.data).decode(), w.event_ns) for w in words]


@cache
def spoken(clips: Path, name: str) -> np.ndarray:
    source = FileSound(clips / name, MicrophoneSettings(), paced=False)
    source.open()
    blocks = [np.asarray(sample.data) for sample in source.samples(lambda: True, 0)]
    source.close()
    return np.concatenate([*blocks, np.zeros(RATE // 2, np.int16)])


# ---- the spectrogram -------------------------------------------------------------------------------------------------


def test_each_mel_filter_has_the_same_area_and_a_tone_is_in_its_filter() -> None:
    bank = filters(80)
    assert bank.shape == (201, 80)
    assert np.allclose(bank[:, 40:].sum(axis=0) * 40, 1, atol=0.1)  # 40 Hz a bin; low filters have few
    tone = np.sin(2 * np.pi * 2000 * np.arange(RATE) / RATE).astype(np.float32)
    spectrum = log_mel(tone)
    assert spectrum.shape == (80, 100)
    assert spectrum.dtype == np.float32
    assert spectrum[:, 50].argmax() == bank[50].argmax()
    assert spectrum.max() - spectrum.min() <= 2.0


def test_silence_has_the_lowest_value_everywhere() -> None:
    # the last bit of a logarithm depends on the processor
    assert log_mel(np.zeros(1600, np.float32)) == pytest.approx(-1.5, abs=1e-6)


# ---- LocalAgreement --------------------------------------------------------------------------------------------------

_words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=6)


def hypothesis_of(texts: list[str]) -> list[Word]:
    return [Word(text, i / 2, (i + 1) / 2, (i,)) for i, text in enumerate(texts)]


@given(st.lists(_words, max_size=8))
@example([["a", "b"], ["a", "b", "c"], ["c"]])
def test_committed_words_never_change_and_two_hypotheses_agree_on_each(hypotheses: list[list[str]]) -> None:
    agreement = LocalAgreement()
    said: list[str] = []
    before: list[str] = []
    for texts in hypotheses:  # each of what follows the committed words
        made = [word.text for word in agreement.agree(hypothesis_of(texts))]
        assert made == texts[: len(made)] == before[: len(made)]
        assert len(made) == min(len(before), len(texts)) or before[len(made)] != texts[len(made)]
        said += made
        before = texts[len(made) :]
        assert [word.text for word in agreement.pending] == before
        assert len(agreement.said) == len(said)
    assert [word.text for word in agreement.commit()] == before
    assert not agreement.pending


@given(_words, st.lists(st.integers(0, 6), max_size=8))
def test_growing_hypotheses_give_each_word_once(words: list[str], lengths: list[int]) -> None:
    agreement = LocalAgreement()
    said: list[str] = []
    for length in [*sorted(lengths), len(words)]:
        said += [word.text for word in agreement.agree(hypothesis_of(words[len(said) : length]))]
    assert said + [word.text for word in agreement.commit()] == words


def test_the_end_of_a_last_word_is_not_the_end_of_the_sound() -> None:
    agreement = LocalAgreement()
    agreement.agree([Word("so", 0.0, 0.5), Word("a", 0.5, 0.6)])
    assert [word.end_s for word in agreement.agree([Word("so", 0.0, 0.4), Word("a", 0.4, 1.1)])] == [0.4, 0.6]
    agreement.cut(0.5)
    assert (agreement.said, round(agreement.end_s, 3)) == ((), 0.1)


# ---- names and settings ----------------------------------------------------------------------------------------------


def table_of(text: dict[str, object]) -> dict[str, Stream]:
    return stream_table(config.parse(text))


def test_speech_is_made_of_the_first_sound_of_the_same_person() -> None:
    table = table_of({"sources": {"text": "speech", "other_audio": "synthetic", "other_text": "speech"}})
    assert (table["text"].source, table["other_text"].source) == ("from:audio/speech", "from:other_audio/speech")
    assert (table["text"].kind, table["text"].raw, table["text"].dense) == ("text", True, False)
    named = {
        "desk": {"source": "microphone:a", "person": "ana"},
        "door": {"source": "file:a.wav", "kind": "audio", "person": "ana"},
        "words": {"source": "speech", "person": "ana"},
        "more": {"source": "from:door/speech", "person": "ana"},
    }
    table = table_of({"streams": named})
    assert (table["words"].source, table["words"].kind) == ("from:desk/speech", "text")
    assert (table["more"].parent, table["more"].kind) == ("door", "text")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"sources": {"text": "speech", "audio": "none"}}, "`streams.text` is made of the audio of `self`"),
        ({"sources": {"other_text": "speech"}}, "`streams.other_text` is made of the audio of `other`"),
        ({"sources": {"text": "from:vision/speech"}}, "which is made of audio, and `vision` is vision"),
    ],
)
def test_without_a_sound_it_is_one_sentence(table: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        table_of(table)


def test_a_model_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    for name in ("no-such-model", str(tmp_path), "../up"):
        with pytest.raises(ModelError, match="there is no Whisper model"):
            find_model(name)


def test_models_of_the_hugging_face_cache_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models--Systran--faster-whisper-base.en" / "snapshots" / "1"
    folder.mkdir(parents=True)
    for file in ("model.bin", "tokenizer.json"):
        (folder / file).touch()
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert find_model("base.en") == find_model(str(folder)) == folder


def test_without_the_extra_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "ctranslate2" else find(name, *a))
    with pytest.raises(UsageError, match=r"speech recognition needs the extra `speech` \(ctranslate2 missing\)"):
        sources.check("from:audio/speech", "text", "text")


@needs_recogniser
def test_wrong_uses_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SourceSpecError, match="gives text"):
        derivation_of(Stream.of("a", "audio", source="from:audio/speech"), Settings())
    with pytest.raises(ModelError, match="knows only English"):
        Speech("audio", SpeechSettings(language="de")).reset()
    for file in ("model.bin", "tokenizer.json"):
        (tmp_path / file).write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Speech("audio", SpeechSettings(model=str(tmp_path))).reset()
    with pytest.raises(WireError, match="16-bit"):
        Speech("audio", SpeechSettings()).derive(Sample(0, 0, b"ab"))


# ---- sound -> words --------------------------------------------------------------------------------------------------


@needs_recogniser
def test_silence_and_noise_have_no_words_and_are_not_decoded() -> None:
    speech = Speech("audio", SpeechSettings())
    rng = np.random.default_rng(0)
    for sound in (np.zeros(5 * RATE, np.int16), rng.integers(-3000, 3000, 5 * RATE).astype(np.int16)):
        assert hear(speech, sound, [320]) == []
    assert speech.info == {"hypotheses": 0, "skipped": 0}


@pytest.fixture
def sentence(clips: Path) -> np.ndarray:
    """ "lay white by s zero again", 3 s."""
    return spoken(clips, "lwbsza.mpg")


@needs_recogniser
@pytest.mark.slow
@pytest.mark.shared_data
def test_any_blocks_of_the_same_sound_give_the_same_words(sentence: np.ndarray) -> None:
    speech = Speech("audio", SpeechSettings())
    speech.reset()
    expected = hear(speech, sentence, [320])
    assert [word for word, _ in expected][-4:] == ["by", "s", "zero", "again"]
    ends_s = [round((at_ns - EPOCH_NS) / 1e9, 1) for _, at_ns in expected]
    assert ends_s[0] == pytest.approx(0.9, abs=0.2)
    assert ends_s[-1] == pytest.approx(2.4, abs=0.3)

    @settings(max_examples=5)
    @given(st.lists(st.integers(1, 9000), min_size=1, max_size=5))
    @example([48_000])
    @example([511, 513])
    def same(blocks: list[int]) -> None:
        speech.reset()
        assert hear(speech, sentence, blocks) == expected

    same()


@needs_recogniser
@pytest.mark.slow
@pytest.mark.shared_data
def test_words_go_out_before_the_utterance_ends(clips: Path) -> None:
    speech = Speech("audio", SpeechSettings())
    sound = spoken(clips, "speech.mp4")
    words = [word for word, _ in hear(speech, sound, [320])]
    text = "today after two years of negotiations the united states together were international partners has achieved"
    assert " ".join(words).startswith(text)
    early = hear(Speech("audio", SpeechSettings()), sound[: round(7.6 * RATE)], [320], end=False)
    assert len(early) >= 9


@needs_recogniser
@pytest.mark.slow
@pytest.mark.shared_data
def test_a_short_window_and_a_gap_lose_no_words_but_those_they_cut(clips: Path) -> None:
    sound = spoken(clips, "speech.mp4")
    short = [word for word, _ in hear(Speech("audio", SpeechSettings(window_s=3)), sound, [320])]
    assert {"today", "negotiations", "united", "international", "achieved"} <= set(short)
    speech = Speech("audio", SpeechSettings())
    first = speech.derive(Sample(EPOCH_NS, EPOCH_NS, sound[: 2 * RATE]))
    # a gap of ten seconds ends the utterance that it cuts; time that runs backwards does, too
    for at_ns in (EPOCH_NS + 12 * 10**9, EPOCH_NS):
        first += speech.derive(Sample(at_ns, at_ns, sound[: 2 * RATE]))
        assert first[-1].event_ns <= at_ns
    assert [bytes(w.data) for w in first].count(b"today") == 3


@needs_recogniser
@pytest.mark.slow
@pytest.mark.shared_data
def test_a_late_recogniser_leaves_out_hypotheses_and_counts_them(sentence: np.ndarray) -> None:
    in_time = Speech("audio", SpeechSettings(), lambda: EPOCH_NS)
    late = Speech("audio", SpeechSettings(), lambda: EPOCH_NS + 60 * 10**9)
    words = [word for word, _ in hear(in_time, sentence, [320])]
    assert in_time.info["skipped"] == 0 < in_time.info["hypotheses"]
    assert [word for word, _ in hear(late, sentence, [320])][-2:] == words[-2:]
    assert late.info["skipped"] > 0
    assert late.info["hypotheses"] == 1, "only the utterance as a whole is decoded"
