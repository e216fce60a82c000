"""Ends of utterances against cuts inside them: which places are chosen, what is heard there, and the whole way."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
from recogniser import needs_recogniser
from typer.testing import CliRunner

from stream_mmrnn.cli.app import app
from stream_mmrnn.core.config import find_model
from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.offline.media import sound, utterances
from stream_mmrnn.offline.media.served import Served
from stream_mmrnn.offline.media.utterances import Utterance

NOBODY = np.zeros((0, 2))


def spans(*given: tuple[float, float]) -> np.ndarray:
    return np.array(given, np.float64).reshape(-1, 2)


def alone(own: np.ndarray, end_s: float = 60.0) -> list[Utterance]:
    return utterances.spoken(own, NOBODY, one_channel=False, end_s=end_s)


def test_a_short_pause_is_inside_an_utterance_and_a_long_one_ends_it() -> None:
    found = alone(spans((1.0, 3.0), (3.9, 6.0), (7.1, 9.0)))
    assert [(u.begin_s, u.end_s) for u in found] == [(1.0, 6.0), (7.1, 9.0)]


def test_cuts_lie_in_speech_far_from_both_ends_and_before_no_pause() -> None:
    [found] = alone(spans((1.0, 3.0), (3.5, 6.0)))
    cuts = np.array(found.cuts_s)
    assert cuts.min() >= 1.0 + utterances.FROM_START_S - 1e-9
    assert cuts.max() < 6.0 - utterances.TO_END_S
    assert not np.any((cuts > 3.0 - utterances.IN_SPEECH_S + 1e-9) & (cuts < 3.5))
    assert np.any(cuts < 3.0)
    assert np.any(cuts > 3.5)


def test_what_is_too_short_to_be_cut_or_cut_off_by_the_file_does_not_count() -> None:
    assert alone(spans((1.0, 2.2))) == []
    assert alone(spans((1.0, 4.0)), end_s=4.05) == []
    assert len(alone(spans((1.0, 4.0)), end_s=5.0)) == 1


def test_an_utterance_ends_only_where_another_person_is_next() -> None:
    own, other = spans((0.0, 3.0), (5.0, 8.0)), spans((8.5, 9.0))
    found = utterances.spoken(own, other, one_channel=False, end_s=60)
    assert [(u.begin_s, u.end_s) for u in found] == [(5.0, 8.0)]  # after the first, the same person goes on
    interrupted = utterances.spoken(spans((0.0, 3.0), (3.8, 8.0)), spans((3.1, 3.5)), one_channel=False, end_s=60)
    assert [(u.begin_s, u.end_s) for u in interrupted] == [(0.0, 3.0)]  # another one speaks in that pause


def test_who_is_heard_in_the_same_channel_ends_an_utterance_earlier_and_is_in_no_cut() -> None:
    own, other = spans((0.0, 4.0)), spans((1.5, 2.0), (3.8, 6.0))
    [found] = utterances.spoken(own, other, one_channel=True, end_s=60)
    assert found.end_s == 3.8
    assert not any(1.5 <= cut < 2.0 for cut in found.cuts_s)
    [apart] = utterances.spoken(own, other, one_channel=False, end_s=60)
    assert apart.end_s == 4.0
    assert any(1.5 <= cut < 2.0 for cut in apart.cuts_s)
    assert utterances.spoken(own, spans((3.0, 6.0)), one_channel=True, end_s=60) == []  # spoken over for too long


def test_words_with_times_are_cut_between_words(tmp_path: Path) -> None:
    path = tmp_path / "bbaf3s.align"
    path.write_text(
        "0 25000 sil\n25000 30000 bin\n30000 35000 blue\n35000 40000 at\n40000 50000 soon\n50000 75000 sil\n"
    )
    assert utterances.aligned(path) == [Utterance(1.0, 2.0, (1.4, 1.6))]
    path.write_text("0 25000\n")
    with pytest.raises(FileError, match=r"bbaf3s\.align is no word alignment of GRID"):
        utterances.aligned(path)


def test_the_silence_of_an_item_sounds_like_the_file_where_nobody_speaks() -> None:
    rng = np.random.default_rng(0)
    heard = (rng.standard_normal(3 * 16_000) * 20).astype(np.int16)
    quiet = utterances.quiet(heard, 20_000)
    assert len(quiet) == 20_000
    assert 15 < quiet.std() < 25
    assert not utterances.quiet(heard[:1600], 100).any()  # too short to tell


def test_an_item_is_the_sound_up_to_a_place_and_its_places_are_drawn_by_name() -> None:
    rng = np.random.default_rng(0)
    heard = (rng.standard_normal(20 * 16_000) * 20).astype(np.int16)
    said = [Utterance(1.0, 15.0, tuple(np.arange(2.0, 10.0, 0.01).tolist()))]
    ends, cut = utterances.items("a", heard, said)
    assert (ends.ends, cut.ends) == (True, False)
    before = round(10.0 * 16_000)
    np.testing.assert_array_equal(ends.sound[: before - 160], heard[5 * 16_000 : 15 * 16_000 - 160])
    assert len(ends.sound) > before + utterances.READ_S[-1] * 16_000
    again, other = utterances.items("a", heard, said), utterances.items("b", heard, said)
    np.testing.assert_array_equal(again[1].sound, cut.sound)
    assert len(other[1].sound) != len(cut.sound)


def test_silence_alone_is_a_sentence(tmp_path: Path) -> None:
    with wave.open(str(tmp_path / "quiet.wav"), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(bytes(32_000))
    with pytest.raises(UsageError, match="holds no utterance that is long enough"):
        utterances.evaluate(find_model("turn_taking"), [tmp_path], words=False)


def test_one_channel_and_clips_are_read(clips: Path) -> None:
    [(heard, said)] = utterances.read(clips / "dialogue.wav")
    assert len(heard) == pytest.approx(30 * 16_000, abs=3200)
    assert [(round(u.begin_s, 2), round(u.end_s, 2)) for u in said] == [(8.32, 14.49), (14.49, 17.92), (18.05, 21.49)]
    assert len(sound.channels(clips / "sbwe5n.mpg")) == 1
    assert heard.std() > 300
    assert utterances.quiet(heard, 8000).std() < 30  # where nobody speaks


@pytest.mark.slow
@pytest.mark.shared_data
def test_from_files_to_figures(clips: Path) -> None:
    media = [clips / "dialogue.wav", clips / "sbwe5n.mpg"]
    found = utterances.evaluate(find_model("turn_taking"), media, words=False, most=2)
    assert found["files"] == ["dialogue.wav", "sbwe5n.mpg"]
    assert [place["utterances"] for place in found["places"].values()] == [2, 1]
    assert (found["utterances"], found["microphones"], found["words"]) == (3, 1, False)
    for name in ("turn_over", "turn_end"):
        for scores in found[name].values():
            assert 0 <= scores["auc"] <= 1
        assert found[name]["after_500_ms"]["known"] == 6
    alone = utterances.evaluate(find_model("turn_taking"), media[1:], words=False, most=2)
    assert alone["places"][str(media[1])] == found["places"][str(media[1])]  # a session leaves nothing to the next one


def test_it_is_asked_for_with_media_and_without_a_plot(tmp_path: Path) -> None:
    for more in ([], ["--media", str(tmp_path), "--plot", "x.png"]):
        done = CliRunner().invoke(app, ["evaluate", "models/turn_taking", "--measure", "utterances", *more])
        assert isinstance(done.exception, UsageError)
        assert "--measure utterances is for --media FILES, and draws no --plot" in str(done.exception)


@pytest.mark.slow
@pytest.mark.shared_data
def test_the_command_prints_a_table(clips: Path) -> None:
    folder = find_model("turn_taking").parent
    args = ["--media", str(clips / "sbwe5n.mpg"), "--measure", "utterances", "--no-words"]
    done = CliRunner().invoke(app, ["evaluate", str(folder), *args])
    assert done.exit_code == 0, done.output
    assert "1 ends of utterances and as many cuts inside them" in " ".join(done.output.split())
    assert "sbwe5n.mpg" in done.output


@pytest.mark.slow
@pytest.mark.shared_data
@needs_recogniser
def test_words_are_recognised_and_change_the_figures(clips: Path) -> None:
    media, model = [clips / "sbwe5n.mpg"], find_model("turn_taking")
    served = [Served(model, microphones=1, words=words) for words in (True, False)]
    heard = sound.channels(media[0])[0]
    with_words, without = (each.trace(heard) for each in served)
    assert with_words.at_s.tolist() == without.at_s.tolist()
    assert not np.array_equal(with_words.turn_over, without.turn_over)
    assert utterances.evaluate(model, media, words=True)["words"]
