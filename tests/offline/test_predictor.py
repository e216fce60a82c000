"""Predictor equals a live session, whatever the chunks; its state goes on elsewhere; what does not fit is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import run
from hypothesis import given, settings
from hypothesis import strategies as st
from places import SHARED

from stream_mmrnn.capture.sources.synthetic import Synthetic
from stream_mmrnn.core import topics
from stream_mmrnn.core.config import parse
from stream_mmrnn.core.errors import ConfigError, FileError, SnapshotError, UsageError
from stream_mmrnn.core.settings import Settings, SyntheticSettings
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.core.types import Prediction
from stream_mmrnn.offline.predictor import Predictor
from stream_mmrnn.recording.mcap_file import Recording

SECONDS = 4


@pytest.fixture(scope="module")
def sound() -> np.ndarray:
    source = Synthetic(Stream.of("audio"), SyntheticSettings(seed=3), paced=False)
    return np.concatenate([s.data for s in itertools.islice(source.samples(lambda: True, 0), 50 * SECONDS)])


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor()


def bits(predictions: Iterable[Prediction]) -> list[tuple[int, tuple[bytes, ...]]]:
    return [(p.tick.event_ns, tuple(v.tobytes() for v in p.heads.values())) for p in predictions]


@pytest.fixture(scope="module")
def whole(predictor: Predictor, sound: np.ndarray) -> list[Any]:
    predictor.reset()
    return bits(predictor.push_audio(sound))


def test_a_prediction_for_each_tick(predictor: Predictor, sound: np.ndarray) -> None:
    predictor.reset()
    made = predictor.push_audio(sound)
    assert [predictor.at_s(p) for p in made] == pytest.approx([0.04 * k for k in range(1, 25 * SECONDS + 1)])
    assert all(p.tick.present["audio"] and not p.tick.present["vision"] for p in made)
    assert predictor.push_audio(sound[:0]) == []
    assert predictor.counts["audio"].used == 50 * SECONDS


@pytest.mark.slow
@settings(max_examples=20)
@given(cuts=st.lists(st.integers(0, 16_000 * SECONDS), max_size=30))
def test_any_chunks_of_the_same_sound_give_the_same_bits(
    predictor: Predictor, sound: np.ndarray, whole: list[Any], cuts: list[int]
) -> None:
    predictor.reset()
    edges = [0, *sorted(cuts), len(sound)]
    made = [p for a, b in itertools.pairwise(edges) for p in predictor.push_audio(sound[a:b])]
    assert bits(made) == whole


@settings(max_examples=10)
@given(cuts=st.lists(st.integers(1, 44_100), max_size=12))
def test_any_chunks_of_stereo_at_another_rate_too(predictor: Predictor, cuts: list[int]) -> None:
    rng = np.random.default_rng(0)
    stereo = (rng.standard_normal((44_100, 2)) * 0.1).astype(np.float32)
    predictor.reset()
    once = bits(predictor.push_audio(stereo, rate_hz=44_100))
    assert len(once) == 24  # the filter holds the last samples back
    predictor.reset()
    edges = [0, *sorted(cuts), len(stereo)]
    pieces = (stereo[a:b] for a, b in itertools.pairwise(edges) if b > a)
    assert bits(p for piece in pieces for p in predictor.push_audio(piece, rate_hz=44_100)) == once


def test_inputs_that_are_named_are_waited_for(sound: np.ndarray) -> None:
    p = Predictor(inputs=["audio", "vision"])
    assert p.push_audio(sound[:16_000]) == []
    picture = np.full((240, 320, 3), 90, np.uint8)
    made = [q for k in range(1, 26) for q in p.push_frame(picture, k * 0.04)]
    assert len(made) == 25
    assert all(q.tick.present["vision"] and q.tick.present["audio"] for q in made)
    # nothing came after one second: time goes on
    assert [p.at_s(q) for q in p.advance(2.0)] == pytest.approx([1 + 0.04 * k for k in range(1, 26)])


def test_words_alone_move_time() -> None:
    p = Predictor()
    made = [q for k, word in enumerate(("so", "we", "go")) for q in p.push_text(word, 0.5 * (k + 1))]
    made += p.advance(2.0)
    assert len(made) == 50
    assert sum(q.tick.present["text"] for q in made) == 3
    assert p.advance(1.0) == []


@pytest.mark.slow
def test_advance_over_an_hour_of_nothing_is_refused_and_in_steps_it_is_not() -> None:
    p = Predictor()
    with pytest.raises(UsageError, match="more than 1 h after what was pushed before"):
        p.push_text("x", 4000)
    assert len(p.advance(1000.0)) == 25_000


def test_with_a_clock_a_late_input_is_waited_for_as_long_as_live(sound: np.ndarray) -> None:
    now = [100.0]
    p = Predictor(clock=lambda: now[0], inputs=["audio", "vision"])
    now[0] += 1.0
    assert len(p.push_audio(sound[:16_000])) == 23  # up to 80 ms ago
    now[0] += 0.5
    assert len(p.advance()) == 12


def test_with_a_clock_sound_after_a_pause_has_the_time_of_the_call(sound: np.ndarray) -> None:
    """Also after a restore. Pieces whose calls tremble follow each other to the sample."""
    now = [100.0]

    def heard(p: Predictor, begin: int, seconds: float, late_s: Iterable[float] = (0.0,)) -> list[Prediction]:
        made, tremble, start_s = [], itertools.cycle(late_s), now[0]
        for k in range(round(seconds * 50)):
            now[0] = start_s + (k + 1) * 0.02 + next(tremble)
            made += p.push_audio(sound[begin + k * 320 :][:320])
        return made

    def pause(p: Predictor) -> list[Prediction]:
        made = []
        for _ in range(10):
            now[0] += 1.0
            made += p.advance()
        return made

    steady, trembling = Predictor(clock=lambda: now[0]), Predictor(clock=lambda: now[0])
    one = heard(steady, 0, 1.0)
    end_ns = steady._sound["audio"].end_ns
    now[0] = 100.0
    trembling.reset()
    other = heard(trembling, 0, 1.0, (0.0, 0.015, 0.005))
    assert sum(p.tick.present["audio"] for p in one) > 15
    count = min(len(one), len(other))
    assert bits(one[:count]) == bits(other[:count])

    # a program that stands still gives what it kept: the same sound, a little later
    stalled = Predictor(clock=lambda: now[0])
    now[0] = 100.0
    stalled.reset()
    third = heard(stalled, 0, 1.0, [0.0] * 10 + [max(0.0, 0.5 - 0.02 * k) for k in range(25)] + [0.0] * 15)
    assert all(p.tick.present["audio"] for p in third[-5:])
    assert stalled._sound["audio"].end_ns == end_ns

    for short_s in (0.4, 0.8):
        paused = Predictor(clock=lambda: now[0])
        heard(paused, 0, 0.5)
        now[0] += short_s
        after = heard(paused, 8_000, 2.0)
        assert all(p.tick.present["audio"] for p in after[-30:])

    pause(steady)
    after = heard(steady, 16_000, 2.0)
    assert sum(p.tick.present["audio"] for p in after) > 40
    restored = Predictor(clock=lambda: now[0])
    restored.restore(steady.snapshot())
    pause(restored)
    after = heard(restored, 16_000, 2.0)
    assert sum(p.tick.present["audio"] for p in after) > 40


def test_reset_forgets_everything(predictor: Predictor, sound: np.ndarray, whole: list[Any]) -> None:
    predictor.push_audio(sound[:5000])
    predictor.push_text("hello")
    predictor.reset()
    assert bits(predictor.push_audio(sound)) == whole


@pytest.mark.slow
@settings(max_examples=8)
@given(at=st.integers(0, 16_000 * SECONDS))
def test_another_predictor_continues_from_a_snapshot_with_the_same_bits(
    predictor: Predictor, sound: np.ndarray, whole: list[Any], at: int
) -> None:
    predictor.reset()
    before = bits(predictor.push_audio(sound[:at]))
    saved = predictor.snapshot()
    other = Predictor()
    other.push_audio(sound[:777])
    other.restore(saved)
    assert before + bits(other.push_audio(sound[at:])) == whole
    assert before + bits(predictor.push_audio(sound[at:])) == whole


def test_a_snapshot_brings_its_own_time_and_no_sound_of_the_predictor_that_takes_it(sound: np.ndarray) -> None:
    first = Predictor(zero_ns=12_345_678_900)
    first.push_text("hello", 1.0)
    saved = first.snapshot()
    now = [50.0]
    other = Predictor(clock=lambda: now[0])
    other.push_audio(sound[:5555])
    other.restore(saved)
    now[0] += 1.0
    made = other.advance()
    assert other.at_s(made[-1]) == pytest.approx(2.0, abs=0.04)
    again = Predictor(zero_ns=12_345_678_900)
    again.push_text("hello", 1.0)
    third = Predictor()
    third.push_audio(sound[:5555])
    third.restore(saved)
    assert bits(third.push_audio(sound, 5.0)) == bits(again.push_audio(sound, 5.0))


def test_what_is_no_snapshot_changes_nothing(predictor: Predictor, sound: np.ndarray, whole: list[Any]) -> None:
    predictor.reset()
    predictor.push_audio(sound[:20_000])
    saved = predictor.snapshot()
    other = Predictor()
    half = bits(other.push_audio(sound[:32_000]))
    for bad in (b"", b"nonsense", saved[:-20], saved[:200] + bytes([saved[200] ^ 1]) + saved[201:]):
        with pytest.raises(SnapshotError):
            other.restore(bad)
    assert half + bits(other.push_audio(sound[32_000:])) == whole
    predictor.reset()
    predictor.push_audio(np.zeros(8000, np.int16), rate_hz=8000)
    with pytest.raises(SnapshotError, match="push sound at 16 kHz"):
        predictor.snapshot()
    predictor.reset()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda p: p.push_audio(np.zeros((2, 3, 4), np.int16)), r"this has \[2, 3, 4\]"),
        (lambda p: p.push_audio(np.zeros(4, np.int32)), "this is int32"),
        (lambda p: p.push_audio(np.array([np.nan, 0.0])), "finite floats"),
        (lambda p: p.push_frame(np.zeros((4, 4), np.uint8)), r"this is uint8 \[4, 4\]"),
        (lambda p: p.push_frame(b"no jpeg"), "vision: "),
        (lambda p: p.push_text("x", -1.0), "expected seconds since the session's start"),
        (lambda p: p.push_text("x", float("nan")), "expected seconds"),
        (lambda p: p.push("wrist", [1.0]), "takes vision, audio, .*; nothing in it is fed by 'wrist'"),
        (lambda p: p.push("audio", np.zeros(3)), "a vector of audio was refused: its features have 3 numbers"),
        (lambda p: p.push_text("x", stream="audio"), "the stream 'audio' is audio, not text"),
        (lambda p: p.file("/no/such.wav").__next__(), "cannot be read"),
    ],
)
def test_what_does_not_fit_is_one_sentence(predictor: Predictor, call: Any, words: str) -> None:
    predictor.reset()
    with pytest.raises(UsageError, match=words) as e:
        call(predictor)
    assert "\n" not in str(e.value)


def test_an_unknown_model_or_input_is_refused() -> None:
    with pytest.raises(ConfigError, match="there is no model 'nix'"):
        Predictor("nix")
    with pytest.raises(UsageError, match="nothing in it is fed by 'smell'"):
        Predictor(inputs=["smell"])


def test_a_signal_and_a_stream_that_feeds(tmp_path: Path) -> None:
    import toy_model

    from stream_mmrnn.core.types import ModalitySpec

    model = toy_model.make(tmp_path / "m.onnx", (ModalitySpec("signal", 3), ModalitySpec("text", 256)))
    p = Predictor(model, settings=parse({"streams": {"wrist": {"source": "lsl:x", "feeds": "signal"}}}))
    made = [q for k in range(1, 51) for q in p.push("wrist", [k, 0, 1], k * 0.02)]
    assert len(made) == 25
    assert made[-1].tick.features["signal"].tolist() == [49.5, 0, 1]


# ---- the same as live ------------------------------------------------------------------------------------------------


# live the end of a turn comes when it has been computed, here with the sound that it is of
NOTHING_DERIVED = parse({"streams": {name: {"source": "none"} for name in ("turn_end", "other_turn_end")}})


def pushed_again(path: Path) -> tuple[list[Any], list[Any]]:
    """The predictions of a recording, and those of its samples pushed in their order."""
    recording = Recording(path)
    envelopes = list(recording.envelopes())
    opened = next(e for e in envelopes if e.topic == topics.SESSION)
    raw = [e for e in envelopes if e.topic.startswith(topics.RAW)]
    inputs = sorted({topics.stream_of(e.topic) for e in raw})
    p = Predictor(inputs=inputs, settings=NOTHING_DERIVED, zero_ns=opened.event_ns)
    made: list[Prediction] = []
    for e in raw:
        if e.event_ns < opened.event_ns:
            continue
        stream, at_s = topics.stream_of(e.topic), p.at_s(e.event_ns)
        if isinstance(e.payload, bytes):
            made += p.push_frame(e.payload, at_s, stream=stream)
        else:
            made += p.push_audio(e.payload, at_s, stream=stream)
    recorded = {
        m.event_ns: tuple(
            np.array([np.nan if v is None else v for v in h], np.float32).tobytes() for h in m.heads.values()
        )
        for m in recording.predictions()
    }
    mine = bits(made)
    return [(at, recorded[at]) for at, _ in mine if at in recorded], [(at, b) for at, b in mine if at in recorded]


CLIPS = sorted(p for p in (SHARED / "data" / "clips").glob("*") if p.suffix in (".mpg", ".mp4", ".wav"))


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: clip.name)
def test_a_clip_pushed_equals_the_clip_live(clip: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    code, summary, err = run(
        *("live", "--source", f"file:{clip}", "--stream", "turn_end=none", "--record", path, "--duration", 6),
        "--no-dashboard",
        timeout=90,
    )
    assert code == 0, err
    if any(row["dropped"] for row in summary["streams"].values()):
        pytest.skip("the machine was too busy: features came after their ticks were closed, which pushing does not do")
    recorded, pushed = pushed_again(path)
    assert len(pushed) >= 0.5 * summary["predictions"]
    assert pushed == recorded
    opened = next(e for e in Recording(path).envelopes({topics.SESSION}))
    if any(row["dropped"] or row["capture"]["dropped"] for row in summary["streams"].values()):
        return  # a busy machine left frames out; those that came were compared above
    whole = {p.tick.event_ns: p for p in Predictor(settings=NOTHING_DERIVED, zero_ns=opened.event_ns).file(clip)}
    there = {m.event_ns: m.present for m in Recording(path).predictions()}
    if any(at in whole and whole[at].tick.present != there[at] for at, _ in recorded):
        return  # a busy machine began a stream later, and the state remembers it
    straight = dict(bits(whole.values()))
    same = [at for at, values in recorded if straight.get(at) == values]
    assert len(same) >= 0.5 * len(recorded)


# ---- the verb --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wav(tmp_path_factory: pytest.TempPathFactory, sound: np.ndarray) -> Path:
    import wave

    path = tmp_path_factory.mktemp("sound") / "talk.wav"
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes(sound.tobytes())
    return path


def test_a_file_equals_its_sound_pushed(predictor: Predictor, wav: Path, whole: list[Any]) -> None:
    assert bits(predictor.file(wav)) == whole


@pytest.mark.process
@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_the_verb_writes_tables(wav: Path, tmp_path: Path, form: str, predictor: Predictor) -> None:
    code, said, err = run("predict", wav, "--out", tmp_path, "--format", form)
    assert code == 0, err
    [row] = said["files"]
    assert row["predictions"] == 25 * SECONDS
    out = Path(row["out"])
    assert out.name == f"talk.wav.predictions.{form}"
    if form == "parquet":
        pq = pytest.importorskip("pyarrow.parquet")
        table = pq.read_table(out).to_pydict()
        expected = [float(p.heads["turn_over"][0]) for p in predictor.file(wav)]
        assert table["turn_over.0"] == expected
        assert table["seconds"][-1] == pytest.approx(SECONDS)
    else:
        lines = out.read_text().splitlines()
        assert len(lines) == 25 * SECONDS + (form == "csv")
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    code, _, err = run("predict", wav, "--out", tmp_path, "--format", form)
    assert (code, "is there already" in err) == (2, True)


@pytest.mark.process
def test_the_verb_leaves_nothing_of_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.wav").write_bytes(b"no sound at all")
    code, _, err = run("predict", tmp_path / "x.wav", "--out", tmp_path)
    assert code == 2
    assert "cannot be read" in err
    assert [p.name for p in tmp_path.iterdir()] == ["x.wav"]


def test_settings_are_the_default() -> None:
    assert Predictor(settings=Settings()).spec.name == "turn_taking"
    with pytest.raises(FileError):
        list(Predictor().file("/no/such"))
