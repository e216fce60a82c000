"""Conversations as served: who speaks when, what an agent would do in each silence, and the whole way from a file."""

from __future__ import annotations

import itertools
import math
import wave
from pathlib import Path

import numpy as np
import pytest

from stream_mmrnn.capture.sources.synthetic import Synthetic
from stream_mmrnn.core.config import find_model
from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.settings import SyntheticSettings
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.offline.media import conversations, sound
from stream_mmrnn.offline.media.conversations import Silence
from stream_mmrnn.offline.media.served import Trace
from stream_mmrnn.offline.media.sound import Conversation


def wav(path: Path, *channels: np.ndarray, rate_hz: int = 16_000) -> Path:
    with wave.open(str(path), "wb") as out:
        out.setnchannels(len(channels))
        out.setsampwidth(2)
        out.setframerate(rate_hz)
        out.writeframes(np.stack(channels, 1).astype("<i2").tobytes())
    return path


def trace(at_s: list[float], turn_over: list[float], quiet: list[bool] | None = None) -> Trace:
    count = len(at_s)
    quiet = quiet or [True] * count
    return Trace(np.array(at_s), np.array(turn_over), np.array(quiet), np.full(count, np.nan))


def test_a_file_with_one_channel_is_refused(tmp_path: Path) -> None:
    mono = wav(tmp_path / "mono.wav", np.zeros(1600))
    with pytest.raises(FileError, match=r"mono\.wav has 1 channel, expected two: .* `--measure utterances`"):
        sound.read(mono)


def test_who_speaks_when_is_read_beside_the_file(tmp_path: Path) -> None:
    path = wav(tmp_path / "call.wav", np.zeros(8000), np.zeros(8000), rate_hz=8000)
    path.with_suffix(".rttm").write_text(
        "SPEAKER call 2 0.700 0.200 <NA> <NA> B <NA> <NA>\n"
        "SPEAKER call 1 0.100 0.400 <NA> <NA> A <NA> <NA>\n"
        "; a remark\n"
    )
    found = sound.read(path)
    assert found.voice[0].tolist() == [[0.1, 0.5]]
    np.testing.assert_allclose(found.voice[1], [[0.7, 0.9]])
    assert len(found.sound[0]) >= 16_000  # 8 kHz became 16
    path.with_suffix(".rttm").write_text("SPEAKER call 3 0.1 0.4\n")
    with pytest.raises(FileError, match=r"call\.rttm, line 1: expected `SPEAKER file channel start duration`"):
        sound.read(path)


def test_the_detector_hears_no_voice_in_silence() -> None:
    assert sound.heard(np.zeros(16_000, np.int16)).shape == (0, 2)


def test_silences_are_those_of_the_person_who_spoke_last() -> None:
    one, other = np.array([[0.0, 1.0], [2.0, 3.0]]), np.array([[4.0, 5.0]])
    traces = (trace([1.0], [0.1]), trace([1.0], [0.2]))
    found = conversations.silences(Conversation("x", (np.zeros(1), np.zeros(1)), (one, other)), traces, True)
    assert [(s.begin_s, s.end_s, s.shift) for s in found] == [(1.0, 2.0, False), (3.0, 4.0, True)]
    assert all(s.trace is traces[0] and s.facing is traces[1] for s in found)
    alone = conversations.silences(Conversation("x", (np.zeros(1), np.zeros(1)), (one, other)), traces, False)
    assert alone[0].facing is None


def test_an_agent_takes_the_turn_at_the_first_quiet_tick_above_the_threshold() -> None:
    seen = trace([0.9, 1.1, 1.2, 1.3, 1.4], [0.9, 0.9, 0.2, 0.6, 0.9], [False, False, True, True, True])
    silence = Silence(1.0, 2.0, True, seen, None)
    assert conversations.fired(silence, seen.turn_over, 0.5) == pytest.approx(0.3)
    assert conversations.fired(silence, seen.turn_over, 0.7) == pytest.approx(0.4)
    assert conversations.fired(silence, seen.turn_over, 0.95) == conversations.LONGEST_S
    assert conversations.fired(silence, seen.turn_end, 0.0) == conversations.LONGEST_S  # there is none


def test_cut_ins_and_delays() -> None:
    seen = trace([1.0], [0.0])
    found = [Silence(0, length, shift, seen, None) for length, shift in ((0.5, False), (1.0, False), (2.0, True))]
    assert conversations.outcome(found, [0.7] * 3) == {"cut_in": 0.5, "delay_p50_s": 0.7}
    assert math.isnan(conversations.outcome(found[:2], [0.7] * 2)["delay_p50_s"])


def test_a_higher_threshold_never_cuts_in_more_often() -> None:
    rng = np.random.default_rng(0)
    at_s = [k * 0.04 for k in range(100)]
    found = [Silence(0.0, 0.3 + k / 5, k % 2 == 0, trace(at_s, rng.random(100).tolist()), None) for k in range(12)]
    points = conversations.curve(found, lambda t: t.turn_over)
    assert points[0]["cut_in"] == 1.0
    for lower, higher in itertools.pairwise(points):
        assert higher["cut_in"] <= lower["cut_in"]
        assert higher["delay_p50_s"] >= lower["delay_p50_s"]


def test_what_is_no_conversation_is_a_sentence(tmp_path: Path) -> None:
    model = find_model("turn_taking")
    with pytest.raises(UsageError, match="holds no WAV file"):
        conversations.evaluate(model, [tmp_path], words=False)
    with pytest.raises(UsageError, match="has no head `turn_over`"):
        conversations.evaluate(find_model("digits"), [wav(tmp_path / "a.wav", np.zeros(9), np.zeros(9))], words=False)


@pytest.mark.slow
@pytest.mark.parametrize("microphones", [1, 2])
def test_from_a_file_to_figures_and_a_plot(tmp_path: Path, microphones: int) -> None:
    channels = []
    for name in ("audio", "other_audio"):
        blocks: list[np.ndarray] = []
        for sample in Synthetic(Stream.of(name), SyntheticSettings(seed=0), paced=False).samples(lambda: True, 0):
            assert isinstance(sample.data, np.ndarray)
            blocks.append(sample.data)
            if sum(map(len, blocks)) >= 20 * 16_000:
                break
        channels.append(np.concatenate(blocks)[: 20 * 16_000])
    wav(tmp_path / "talk.wav", *channels)
    found = conversations.evaluate(find_model("turn_taking"), [tmp_path], words=False, microphones=microphones)
    assert found["files"] == ["talk.wav"]
    assert found["sound_s"] == pytest.approx(20, abs=0.2)
    assert found["silences"] >= 3
    assert 0 < found["shifts"] < found["silences"]
    assert found["turn_over"]["known"] == found["silences"]  # it is known in every silence
    assert 0 <= found["turn_over"]["auc"] <= 1
    assert found["turn_end"]["known"] > 0  # smart-turn was asked
    assert set(found["rules"]) == {"silence_400_ms", "silence_700_ms", "silence_1000_ms"}
    conversations.plot(found, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
