from __future__ import annotations

import itertools
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import toy_model
from harness import check_summary, run, ticks_of, verify
from hypothesis import example, given, settings
from hypothesis import strategies as st
from places import SHARED

from stream_mmrnn.capture import encoders
from stream_mmrnn.capture.encoders import prosody
from stream_mmrnn.capture.encoders.hops import HOP, RATE
from stream_mmrnn.capture.encoders.prosody import (
    LOUDNESS,
    LOUDNESS_ABOVE,
    PITCH,
    SIZE,
    SLOPED,
    SLOPES_200,
    SLOPES_600,
    SPEAKING_RATE,
    TILT,
    VOICED,
    VOICING,
    ProsodyEncoder,
)
from stream_mmrnn.core import config
from stream_mmrnn.core.errors import SnapshotError, UsageError
from stream_mmrnn.core.stream_table import stream_table
from stream_mmrnn.core.types import Envelope, ModalitySpec, Sample
from stream_mmrnn.recording.mcap_file import Recording

SAMPLE_NS = 62_500
START_NS = 5_000_000_000
CLIPS = SHARED / "data" / "clips"

Sound = npt.NDArray[np.int16]
Wave = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]


def sine(turns: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.sin(2 * np.pi * turns)


def sawtooth(turns: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return 2 * (turns % 1) - 1


def harmonic(turns: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Eight harmonics, the second three times as strong as the first, as in a vowel."""
    return sum(a * sine(k * turns + k / 7) for k, a in enumerate((1, 3, 2, 1, 0.7, 0.5, 0.3, 0.2), 1)) / 9


def tone(
    hz: float | npt.NDArray[np.float64], shape: Wave = harmonic, seconds: float = 1.0, peak: float = 8000
) -> Sound:
    """A tone, or a glide where `hz` is an array of its frequencies."""
    turns = np.cumsum(np.broadcast_to(hz, round(seconds * RATE))) / RATE
    return np.rint(peak * shape(turns)).astype(np.int16)


def noise(samples: int, seed: int = 0, smooth: int = 1) -> Sound:
    """White noise, or noise whose high frequencies a mean over `smooth` samples has taken away."""
    white = np.random.default_rng(seed).standard_normal(samples) * 3000
    return np.convolve(white, np.ones(smooth) / smooth, "same").astype(np.int16)


def blocks_of(sound: Sound, cuts: list[int]) -> list[Sample]:
    edges = [0, *sorted(c for c in cuts if c < len(sound)), len(sound)]
    return [
        Sample(START_NS + b * SAMPLE_NS, START_NS + b * SAMPLE_NS, sound[a:b]) for a, b in itertools.pairwise(edges)
    ]


def encoded(sound: Sound, cuts: list[int] | None = None) -> npt.NDArray[np.float32]:
    """The vectors [hops, SIZE] of a new encoder."""
    encoder = ProsodyEncoder()
    return np.array([out.data for sample in blocks_of(sound, cuts or []) for out in encoder.encode(sample)])


def pitch_hz(sound: Sound) -> npt.NDArray[np.float64]:
    """The pitch of each hop once the window is full, by the function behind the encoder: without the running mean."""
    found = []
    for end in range(1600, len(sound) + 1, HOP):
        frame = sound[end - prosody._FRAME : end][::-1].astype(np.float64)
        octaves, voicing = prosody._pitch(frame, np.cumsum(frame**2))
        assert voicing >= VOICED
        found.append(2**octaves)
    return np.array(found)


# --- what the numbers say


@pytest.mark.parametrize("shape", [sine, sawtooth, harmonic])
@pytest.mark.parametrize("hz", [62, 80, 97, 121, 160, 203, 250, 311, 350, 390])
def test_the_pitch_of_a_tone_is_right_and_in_its_octave(hz: float, shape: Wave) -> None:
    assert pitch_hz(tone(hz, shape)) == pytest.approx(hz, rel=0.005)


@pytest.mark.parametrize("level", [50, 32767])
def test_pitch_does_not_depend_on_level_or_dc(level: int) -> None:
    assert pitch_hz(tone(180, peak=level)) == pytest.approx(180, rel=0.01)
    assert pitch_hz(tone(180, peak=100) + np.int16(20_000)) == pytest.approx(180, rel=0.01)


def test_pitch_is_relative_to_the_voice() -> None:
    steady = encoded(tone(200, seconds=2))
    assert np.abs(steady[5:, PITCH]).max() < 0.01
    up = encoded(np.concatenate([tone(150, seconds=8), tone(300, seconds=0.2)]))
    assert up[-1, PITCH] == pytest.approx(1, abs=0.05)
    # the voice of another person becomes the mean, with a time constant of 10 s
    other = encoded(np.concatenate([tone(150, seconds=15), tone(300, seconds=10)]))
    assert other[-1, PITCH] == pytest.approx(np.exp(-1), abs=0.03)


@pytest.mark.parametrize(("begin", "end"), [(120, 240), (240, 120)])
def test_a_glide_has_the_slope_of_its_pitch(begin: float, end: float) -> None:
    glide = begin * (end / begin) ** (np.arange(RATE) / RATE)  # an octave a second
    out = encoded(tone(glide))
    expected = np.sign(end - begin)
    assert out[-1, SLOPES_200] == pytest.approx(expected, abs=0.05)
    assert out[-1, SLOPES_600] == pytest.approx(expected, abs=0.05)


def test_pauses_are_no_part_of_the_slope_of_pitch() -> None:
    octaves = np.arange(RATE) / RATE
    glide = tone(120 * 2**octaves)
    glide[11_200:12_800] = noise(1_600)
    out = encoded(glide)
    assert out[-1, SLOPES_600] == pytest.approx(1, abs=0.05)
    silent = encoded(np.concatenate([glide, np.zeros(9_600, np.int16)]))
    assert silent[-1, SLOPES_200] == silent[-1, SLOPES_600] == 0


def test_noise_and_silence_have_no_voice() -> None:
    for smooth in (1, 4, 16):
        out = encoded(noise(5 * RATE, smooth=smooth))
        assert out[:, VOICING].max() < VOICED
        assert out[:, VOICING].mean() < 0.4
        assert not out[:, PITCH].any()
        assert not out[:, LOUDNESS_ABOVE].any()
        assert not out[:, SPEAKING_RATE].any()
    for still in (np.zeros(RATE, np.int16), np.full(RATE, -32768, np.int16), noise(RATE) // 3000):
        assert encoded(still)[:, VOICING].max() < 0.4


def test_hum_below_the_voice_is_none() -> None:
    assert encoded(tone(40, sine))[5:, VOICING].max() < VOICED


@pytest.mark.parametrize("db", [-3, -20, -40, -60])
def test_loudness_is_in_decibels_of_full_scale(db: float) -> None:
    peak = min(32767, 32768 * 2**0.5 * 10 ** (db / 20))
    out = encoded(tone(200, sine, peak=peak))
    assert out[5:, LOUDNESS] == pytest.approx(db, abs=0.2)
    shifted = encoded(tone(200, sine, peak=peak / 2) + np.int16(10_000))
    assert shifted[5:, LOUDNESS] == pytest.approx(db - 6.02, abs=0.2)


def test_silence_is_quieter_than_any_sound() -> None:
    assert encoded(np.zeros(RATE, np.int16))[-1, LOUDNESS] == pytest.approx(-101.1, abs=0.1)
    assert encoded(np.tile(np.array([0, 1], np.int16), RATE // 2))[-1, LOUDNESS] > -97


def test_loudness_is_also_relative_to_the_voice_and_has_slopes() -> None:
    loud, soft = tone(200, seconds=4), tone(200, seconds=0.3, peak=800)
    out = encoded(np.concatenate([loud, soft, np.zeros(RATE, np.int16)]))
    assert out[100, LOUDNESS_ABOVE] == pytest.approx(0, abs=0.5)
    assert out[213, LOUDNESS_ABOVE] == pytest.approx(-20, abs=2)
    assert out[-1, LOUDNESS_ABOVE] < -70
    fading = (loud * 10 ** (-np.arange(len(loud)) / RATE / 4)).astype(np.int16)  # 5 dB a second
    at = SLOPED.index(LOUDNESS)
    assert encoded(fading)[-1, [SLOPES_200 + at, SLOPES_600 + at]] == pytest.approx(-5, abs=0.3)


def test_tilt_tells_dark_from_bright() -> None:
    dark, bright = encoded(noise(RATE, smooth=16))[:, TILT], encoded(np.diff(noise(RATE)))[:, TILT]
    assert dark.mean() > 5
    assert bright.mean() < -10
    assert encoded(noise(RATE))[:, TILT].mean() == pytest.approx(10 * np.log10(31 / 128), abs=0.5)  # bins of each band


@pytest.mark.parametrize("hz", [2, 4, 6, 8])
def test_speaking_rate_counts_voiced_peaks(hz: float) -> None:
    seconds = np.arange(5 * RATE) / RATE
    syllables = tone(120, seconds=5) * (1 - 0.6 * np.cos(2 * np.pi * hz * seconds)) / 2
    out = encoded(syllables.astype(np.int16))
    assert out[200:, SPEAKING_RATE].mean() == pytest.approx(hz, rel=0.1)
    rustle = noise(5 * RATE) * (1 - 0.6 * np.cos(2 * np.pi * hz * seconds))
    assert not encoded(rustle.astype(np.int16))[:, SPEAKING_RATE].any()


def test_a_change_has_no_effect_on_what_was_before() -> None:
    first = tone(150)
    a, b = (encoded(np.concatenate([first, after])) for after in (noise(RATE), np.zeros(RATE, np.int16)))
    assert a[:50].tobytes() == b[:50].tobytes()
    assert a[50].tobytes() != b[50].tobytes()


@pytest.mark.shared_data
@pytest.mark.skipif(not CLIPS.exists(), reason="needs the data folder beside the checkout")
def test_speech_is_voiced_and_pauses_are_not() -> None:
    with wave.open(str(CLIPS / "dialogue.wav")) as file:
        out = encoded(np.frombuffer(file.readframes(file.getnframes()), np.int16))
    turns = [line.split()[3:5] for line in (CLIPS / "dialogue.rttm").read_text().splitlines()]
    at_s = (np.arange(len(out)) + 0.5) * 0.02
    speech = np.any([(at_s > float(t)) & (at_s < float(t) + float(length)) for t, length in turns], axis=0)
    voiced = out[:, VOICING] >= VOICED
    assert voiced[speech].mean() > 0.6
    assert voiced[~speech].mean() < 0.05
    assert out[speech, LOUDNESS].mean() > out[~speech, LOUDNESS].mean() + 20
    assert out[speech & voiced, TILT].mean() > out[~speech, TILT].mean() + 3
    assert 2 < out[speech, SPEAKING_RATE].mean() < 6


# --- the same bits however the sound comes


def speechlike(samples: int) -> Sound:
    at_s = np.arange(samples) / RATE
    voice = tone(140 + 40 * np.sin(9 * at_s), sawtooth, samples / RATE) * (1 - np.cos(25 * at_s)) / 2
    return (voice + noise(samples) / 20).astype(np.int16)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 9600), max_size=12), st.integers(1, 9600))
def test_vectors_do_not_depend_on_the_block_length(cuts: list[int], length: int) -> None:
    sound = speechlike(length)
    whole, parts = encoded(sound), encoded(sound, cuts)
    assert len(whole) == length // HOP
    assert whole.tobytes() == parts.tobytes()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-32768, 32767), min_size=1, max_size=300), st.lists(st.integers(0, 4000), max_size=3))
@example([-32768, 32767], [])
@example([32767] * 150 + [-32768] * 150, [])
@example([0] * 299 + [1], [1])
def test_any_sound_gives_finite_numbers(pattern: list[int], cuts: list[int]) -> None:
    out = encoded(np.resize(np.array(pattern, np.int16), 4000), cuts)
    assert out.shape == (12, SIZE)
    assert out.dtype == np.float32
    assert np.isfinite(out).all()
    assert ((out[:, VOICING] >= 0) & (out[:, VOICING] <= 1)).all()
    assert np.abs(out[:, PITCH]).max() <= np.log2(400 / 60) + 0.1


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9600), st.lists(st.integers(0, 9600), max_size=4))
def test_a_snapshot_goes_on_with_the_same_bits(at: int, cuts: list[int]) -> None:
    sound = speechlike(9600)
    whole = encoded(sound)
    first, second = ProsodyEncoder(), ProsodyEncoder()
    blocks = blocks_of(sound, [*cuts, at])
    before = [b for b in blocks if b.event_ns <= START_NS + at * SAMPLE_NS]
    made = [out.data for b in before for out in first.encode(b)]
    second.encode(Sample(0, 0, noise(1000)))  # what it has heard does not matter
    second.restore(first.snapshot())
    made += [out.data for b in blocks[len(before) :] for out in second.encode(b)]
    assert np.array(made).tobytes() == whole.tobytes()


def test_reset_forgets_the_voice() -> None:
    encoder = ProsodyEncoder()
    fresh = encoder.snapshot()
    encoder.encode(Sample(START_NS, START_NS, speechlike(10_000)))
    encoder.reset()
    after = encoder.snapshot()
    for of in (fresh, after):
        of.pop("hop")  # samples behind its fill are never read
    after["values"][...] = 0  # nor values that are not present
    assert {name: values.tobytes() for name, values in after.items()} == {n: v.tobytes() for n, v in fresh.items()}


@pytest.mark.parametrize(
    ("name", "at", "value"), [("voice", 0, -1.0), ("voice", 1, np.nan), ("frame", 3, np.inf), ("filled", 0, HOP)]
)
def test_a_snapshot_that_cannot_be_is_refused(name: str, at: int, value: float) -> None:
    encoder = ProsodyEncoder()
    state = encoder.snapshot()
    state[name][at] = value
    with pytest.raises(SnapshotError):
        encoder.restore(state)
    with pytest.raises(SnapshotError):
        encoder.restore({"hop": np.zeros(HOP, np.float32)})


def test_after_a_gap_the_mean_of_the_voice_is_kept() -> None:
    encoder = ProsodyEncoder()
    encoder.encode(Sample(START_NS, START_NS, tone(200, seconds=3)))
    later_ns = START_NS + 300_000_000  # 100 ms are missing
    out = encoder.encode(Sample(later_ns, later_ns, tone(400, sine, 0.2)))
    assert [o.event_ns for o in out][-1] == later_ns
    assert out[5].data[PITCH] == pytest.approx(1, abs=0.05)
    assert not out[1].data[SLOPES_200:].any()
    # a second later it is another voice
    again_ns = later_ns + 2_000_000_000
    out = encoder.encode(Sample(again_ns, again_ns, tone(300, sine, 0.2)))
    assert out[5].data[PITCH] == pytest.approx(0, abs=0.01)


# --- as an encoder of a stream


def test_streams_of_sound_may_name_it() -> None:
    settings = config.parse({"streams": {"talk": {"source": "microphone", "encoders": ["audio", "prosody"]}}})
    talk = stream_table(settings)["talk"]
    encoders.check_all([talk])
    made = encoders.encoders_of(talk)
    assert list(made) == ["talk", "talk.prosody"]
    assert isinstance(made["talk.prosody"], ProsodyEncoder)
    name, _, digest = made["talk.prosody"].origin.partition("@")
    assert (name, len(digest), made["talk.prosody"].size) == ("prosody", 64, SIZE)


def test_other_streams_may_not() -> None:
    settings = config.parse({"streams": {"door": {"source": "camera:1", "encoders": ["prosody"]}}})
    table = stream_table(settings)
    with pytest.raises(UsageError, match="'door' has an encoder 'prosody', which is not known; use one of vision"):
        encoders.check_all(table.values())


@pytest.mark.process
def test_recorded_verified_and_replayed_from_raw(tmp_path: Path) -> None:
    """A session of a model that takes both vectors of one microphone."""
    file, path = tmp_path / "s.toml", tmp_path / "a.mcap"
    file.write_text(
        '[streams.audio]\nsource = "synthetic"\nencoders = ["audio", "prosody"]\n[dashboard]\nenabled = false\n'
    )
    specs = tuple(
        ModalitySpec(name, e.size, e.origin)
        for name, e in (("audio", encoders.create_encoder("audio")), ("audio.prosody", ProsodyEncoder()))
    )
    model = toy_model.make(tmp_path / "toy.onnx", specs)
    code, summary, err = run("live", "--config", file, "--duration", 4, "--model", model, "--record", path)
    assert code == 0, err
    check_summary(summary)
    assert set(summary["streams"]) == {"audio", "audio.prosody"}
    assert sum(t.present["audio.prosody"] for t in ticks_of(path)) > 50
    sent: dict[str, list[Envelope]] = {"raw/audio": [], "feature/audio.prosody": []}
    for e in Recording(path).envelopes():
        sent.get(e.topic, []).append(e)
    encoder = ProsodyEncoder()
    blocks = [Sample(e.event_ns, e.capture_ns, e.payload) for e in sent["raw/audio"]]
    again = [(out.event_ns, out.data.tobytes()) for b in blocks for out in encoder.encode(b)]
    assert again == [(e.event_ns, e.payload.tobytes()) for e in sent["feature/audio.prosody"]]
    assert {e.origin for e in sent["feature/audio.prosody"]} == {encoder.origin}
    verify(path, summary["predictions"])
    code, raw, err = run("replay", path, "--from", "raw")
    assert (code, raw["predictions"], raw["identical"]) == (0, summary["predictions"], True), (err, raw)
