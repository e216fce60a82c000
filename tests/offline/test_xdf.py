"""Convert XDF files, written by their published layout and read by pyxdf, to recordings."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_model
from harness import COMMAND, run
from hypothesis import given, settings
from hypothesis import strategies as st
from xdf_file import XdfFile

from stream_mmrnn.capture import encoders
from stream_mmrnn.capture.encoders.signal import SignalEncoder
from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import FileError, StreamError, UsageError
from stream_mmrnn.core.types import ModalitySpec
from stream_mmrnn.offline import replay
from stream_mmrnn.offline.convert import xdf, xdf_file
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.report import verify
from stream_mmrnn.recording.settings import streams_of

pytestmark = pytest.mark.process

pyxdf = pytest.importorskip("pyxdf", reason="pyxdf (extra lsl) is not installed")

BEGIN_S = 1000.0
EEG_HZ, SOUND_HZ = 50.0, 8000.0
AHEAD_S, AHEAD_PPM = 4321.5, 200
"""How far the EEG machine's clock is ahead at the beginning, and how much faster it goes."""


def theirs(at_s: np.ndarray) -> np.ndarray:
    """The time of the EEG machine's clock."""
    return at_s + AHEAD_S + (at_s - BEGIN_S) * AHEAD_PPM * 1e-6


def sample_file() -> XdfFile:
    """Twelve seconds: EEG by another machine's clock, a microphone, markers, and words."""
    file = XdfFile()
    file.stream(1, "EEG", "EEG", "float32", 3, EEG_HZ)
    file.stream(2, "Mic", "Audio", "int16", 2, SOUND_HZ)
    file.stream(3, "Task", "Markers", "string", 1, 0)
    file.stream(4, "Transcript", "Text", "string", 1, 0)
    file.stream(5, "Trigger", "Markers", "int32", 1, 0)
    eeg_s = BEGIN_S + np.arange(600) / EEG_HZ
    rows = np.stack([np.arange(600), np.sin(np.arange(600) / 9), np.full(600, -1.5)], axis=1).astype(np.float32)
    for begin in range(0, 600, 50):
        at_s = BEGIN_S + begin / EEG_HZ
        file.clock_offset(1, float(theirs(np.array(at_s))), -float(theirs(np.array(at_s)) - at_s))
        file.clock_offset(2, at_s, 0.0)
        file.samples(1, theirs(eeg_s[begin : begin + 50]).tolist(), rows[begin : begin + 50].tolist())
    count = 8 * int(SOUND_HZ)
    sound_s = BEGIN_S + 0.5 + np.arange(count) / SOUND_HZ
    tone = (8000 * np.sin(2 * np.pi * 440 * np.arange(count) / SOUND_HZ)).astype(np.int16)
    file.samples(2, sound_s.tolist(), np.stack([tone, tone], axis=1).tolist())
    file.samples(3, [BEGIN_S + 1, BEGIN_S + 6], [["rest"], ["walk & talk"]])
    file.samples(4, [BEGIN_S + 2.25, BEGIN_S + 3.5], [["grüß dich"], ["yes of course"]])
    file.samples(5, [BEGIN_S + 9.0], [[7]])
    for number in (1, 2, 3, 4, 5):
        file.footer(number)
    return file


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_file().write(tmp_path_factory.mktemp("xdf") / "lab.xdf")


@pytest.fixture(scope="module")
def imported(source: Path) -> tuple[Path, dict[str, Any]]:
    out = source.with_suffix(".mcap")
    code, document, err = run("import", source, out)
    assert code == 0, err
    return out, document


def of(path: Path, topic: str) -> list[Any]:
    return list(Recording(path).envelopes({topic}))


def test_what_is_imported_is_what_pyxdf_reads(source: Path, imported: tuple[Path, dict[str, Any]]) -> None:
    path, document = imported
    by_name = {s["info"]["name"][0]: s for s in pyxdf.load_xdf(str(source))[0]}
    roles = {"EEG": "signal", "Mic": "audio", "Task": "label", "Transcript": "text", "Trigger": "label"}
    assert {s["name"]: s["role"] for s in document["streams"]} == roles
    assert document["damage"] == ""

    signal = of(path, "feature/signal")
    eeg = by_name["EEG"]
    assert np.array_equal(np.stack([e.payload for e in signal]), eeg["time_series"])
    assert [e.event_ns for e in signal] == [round(t * 1e9) for t in eeg["time_stamps"]]
    # the clock offset was removed: the stamps are the true sampling times
    true_s = BEGIN_S + np.arange(600) / EEG_HZ
    assert np.abs(np.array([e.event_ns for e in signal]) / 1e9 - true_s).max() < 2e-3
    assert {e.origin for e in signal} == {SignalEncoder.origin}

    labels = [(e.event_ns, e.payload.decode()) for e in of(path, topics.LABEL)]
    assert labels == [(round((BEGIN_S + s) * 1e9), name) for s, name in ((1, "rest"), (6, "walk & talk"), (9, "7"))]
    words = [(e.event_ns, e.payload.decode()) for e in of(path, "raw/text")]
    assert words == [(round((BEGIN_S + s) * 1e9), w) for s, w in ((2.25, "grüß dich"), (3.5, "yes of course"))]
    assert {e.origin for e in of(path, "feature/text")} == {encoders.create_encoder("text").origin}

    sound = of(path, "raw/audio")
    begin_s = sound[0].event_ns / 1e9 - len(sound[0].payload) / 16000
    assert abs(begin_s - (BEGIN_S + 0.5)) < 0.01
    assert abs(sound[-1].event_ns / 1e9 - (BEGIN_S + 8.5)) < 0.05
    samples = np.concatenate([e.payload for e in sound]).astype(float)
    spectrum = np.abs(np.fft.rfft(samples[16000:32000]))
    assert int(spectrum.argmax()) == 440
    assert len(of(path, "feature/audio")) >= len(sound) - 2

    with path.open("rb"):
        offsets = json.loads(Recording(path).metadata["clock_offsets_s"])
    assert len(offsets["1:EEG"]) == 12
    assert Recording(path).started_unix_ns == 1_772_366_400 * 10**9  # 2026-03-01T12:00:00Z


def test_the_recording_is_whole_and_replays(imported: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, document = imported
    result = verify(path)
    assert result["state"] == "whole"
    assert result["messages"] == dict(sorted(document["messages"].items()))
    text, audio = encoders.create_encoder("text"), encoders.create_encoder("audio")
    specs = (
        ModalitySpec("signal", 3, SignalEncoder.origin),
        ModalitySpec("audio", audio.size, audio.origin),
        ModalitySpec("text", text.size, text.origin),
    )
    model = toy_model.make(tmp_path / "toy.onnx", specs)
    first = replay.replay(path, model=str(model))
    assert first["predictions"] >= 300
    signal = first["streams"]["signal"]
    assert (signal["received"], signal["delivered"], signal["dropped"]) == (600, 600, {})
    assert first["streams"]["text"]["delivered"] == 2
    assert first["streams"]["audio"]["dropped"] == {}
    raw = replay.replay(path, model=str(model), source="raw")
    assert raw["streams"]["signal"]["delivered"] == 600
    assert raw["streams"]["audio"]["delivered"] == first["streams"]["audio"]["delivered"]


def test_the_recording_can_be_trained_on(imported: tuple[Path, dict[str, Any]]) -> None:
    pytest.importorskip("torch", reason="torch (extra train) is not installed")
    from stream_mmrnn.training.own_recipe import recipe_for
    from stream_mmrnn.training.tasks.recordings import _specs, sequence

    path, _ = imported
    recipe = recipe_for([path], "lab")
    assert recipe.heads[0].labels == ("7", "rest", "walk & talk")
    assert list(recipe.modalities) == ["audio", "text", "signal"]
    ticks = sequence(path, recipe, _specs(recipe))
    held = ticks.targets["label"][ticks.weights["label"] > 0]
    assert {recipe.heads[0].labels[i] for i in held} == {"7", "rest", "walk & talk"}
    assert ticks.present[:, list(recipe.modalities).index("signal")].mean() > 0.9


def test_the_user_chooses_the_roles(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.mcap"
    document = xdf.convert(source, out, "lab-1", {"EEG": "none", "Mic": "other_audio", "3": "text"})
    assert {s["name"]: s["role"] for s in document["streams"]}["Task"] == "text"
    recording = Recording(out)
    assert recording.session == "lab-1"
    assert {e.payload for e in of(out, "raw/text")} >= {b"rest", b"yes of course"}
    assert not of(out, "feature/signal")
    assert of(out, "raw/other_audio")
    # an existing file is never overwritten
    before = out.read_bytes()
    with pytest.raises(FileError, match="cannot be made: File exists"):
        xdf.convert(source, out)
    assert out.read_bytes() == before


def test_several_signals_are_streams_of_their_own_names(tmp_path: Path) -> None:
    file = sample_file()
    for number, name in ((6, "IMU left"), (7, "IMU left"), (8, "Gaze")):
        file.stream(number, name, "Sensor", "float32", 2, 10.0)
        file.samples(number, [BEGIN_S + k / 10 for k in range(100)], [[k, number] for k in range(100)])
        file.footer(number)
    out = tmp_path / "a.mcap"
    document = xdf.convert(file.write(tmp_path / "a.xdf"), out, chosen={"8": "eyes:signal"})
    roles = {s["number"]: s["role"] for s in document["streams"]}
    assert (roles[1], roles[6], roles[7], roles[8]) == (
        "EEG:signal",
        "IMU_left:signal",
        "IMU_left_7:signal",
        "eyes:signal",
    )
    assert [e.payload.tolist() for e in of(out, "feature/IMU_left_7")][:2] == [[0.0, 7.0], [1.0, 7.0]]
    assert len(of(out, "feature/eyes")) == 100
    table = streams_of(Recording(out).metadata)
    assert {name: table[name].kind for name in ("EEG", "IMU_left", "eyes")} == dict.fromkeys(
        ("EEG", "IMU_left", "eyes"), "signal"
    )
    assert table["eyes"].source == "lsl:Gaze"
    assert verify(out)["whole"]


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"EEG": "a b:signal"}, "'a b:signal' is not a role of a stream"),
        ({"EEG": "left:smell"}, "'left:smell' is not a role of a stream"),
        ({"EEG": "left:text"}, "holds numbers, but left:text needs strings"),
        ({"EEG": "left:signal", "Mic": "left:signal"}, "several streams could be the left:signal"),
        ({"Nix": "signal"}, "there is no stream 'Nix'"),
        ({"EEG": "smell"}, "'smell' is not a role of a stream"),
        ({"Task": "signal"}, "holds strings"),
        ({"EEG": "text"}, "holds numbers"),
        ({"Trigger": "audio"}, "no fixed rate"),
        ({"EEG": "audio", "Mic": "none"}, r"'EEG' has 50 samples a second, but audio needs 1000 to 384000"),
        ({"EEG": "signal", "Mic": "signal"}, "several streams could be the signal: 'EEG', 'Mic'"),
        (
            dict.fromkeys(("EEG", "Mic", "Task", "Transcript", "Trigger"), "none"),
            "the file has no stream that can be used",
        ),
    ],
)
def test_an_impossible_role_is_an_error(source: Path, tmp_path: Path, chosen: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        xdf.convert(source, tmp_path / "a.mcap", chosen=chosen)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_xdf(tmp_path: Path) -> None:
    (tmp_path / "a.xdf").write_bytes(b"RIFF")
    for name, words in (("a.xdf", "no XDF file|cannot be read"), ("b.xdf", "cannot be read: No such file")):
        with pytest.raises(FileError, match=words):
            xdf.convert(tmp_path / name, tmp_path / "a.mcap")
    code, _, err = run("import", tmp_path / "a.xdf", tmp_path / "a.mcap", "--as", "signal")
    assert code == 2
    assert "--as needs NAME=ROLE" in err


def test_a_damaged_file_gives_what_is_there(source: Path, tmp_path: Path) -> None:
    data = source.read_bytes()
    cut = tmp_path / "cut.xdf"
    cut.write_bytes(data[: len(data) // 8])
    code, document, err = run("import", cut, tmp_path / "a.mcap")
    assert code == 3, err
    assert "is damaged" in document["damage"]
    assert 0 < len(of(tmp_path / "a.mcap", "feature/signal")) <= 600
    assert verify(tmp_path / "a.mcap")["whole"]


def small_stream(stamps_s: list[float | None]) -> XdfFile:
    file = XdfFile()
    file.stream(1, "EEG", "EEG", "float32", 2, EEG_HZ)
    file.samples(1, stamps_s, [[i, -i] for i in range(len(stamps_s))])
    return file


def first_values(stream: xdf_file.XdfStream) -> list[int]:
    return [int(row[0]) for row in stream.values]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e300])
@pytest.mark.parametrize("at", [0, 50, 199])
@pytest.mark.parametrize("own", [True, False])
def test_a_sample_without_a_time_is_left_out_and_named(tmp_path: Path, bad: float, at: int, own: bool) -> None:
    """Also where the samples after it have no stamps of their own, and take theirs from the one before."""
    stamps: list[float | None] = [BEGIN_S + i / EEG_HZ if own or i % 100 == 0 else None for i in range(200)]
    stamps[at] = bad
    (stream,), _, damage = xdf_file.read(small_stream(stamps).write(tmp_path / "a.xdf"))
    kept = [i for i in range(200) if i != at]
    assert first_values(stream) == kept
    assert np.allclose(stream.times_s, BEGIN_S + np.array(kept) / EEG_HZ, atol=1e-6)
    assert f"sample {at + 1} was left out of the stream 'EEG' (number 1)" in damage
    code, document, err = run("import", tmp_path / "a.xdf", tmp_path / "a.mcap")
    assert (code, document["streams"][0]["samples"]) == (3, 199), err


def test_an_event_without_a_time_is_left_out(tmp_path: Path) -> None:
    file = small_stream([BEGIN_S, BEGIN_S + 1])
    file.stream(2, "Task", "Markers", "string", 1, 0)
    file.samples(2, [BEGIN_S, float("nan"), float("nan"), BEGIN_S + 1], [["a"], ["b"], ["c"], ["d"]])
    streams, _, damage = xdf_file.read(file.write(tmp_path / "a.xdf"))
    assert streams[1].values == [["a"], ["d"]]
    assert "2 samples (2, 3) were left out of the stream 'Task' (number 2)" in damage


def test_sound_without_some_samples_keeps_its_segments(tmp_path: Path) -> None:
    file = XdfFile()
    file.stream(1, "Mic", "Audio", "int16", 1, SOUND_HZ)
    for begin_s, bad in ((BEGIN_S, 10), (BEGIN_S + 20, 30)):
        stamps: list[float | None] = [begin_s + i / SOUND_HZ for i in range(1000)]
        stamps[bad] = float("nan")
        file.samples(1, stamps, [[i] for i in range(1000)])
    (stream,), _, _ = xdf_file.read(file.write(tmp_path / "a.xdf"))
    assert stream.segments == [(0, 998), (999, 1997)]
    assert len(stream.values) == 1998


@pytest.mark.parametrize("rate_hz", [1.0, 1e9, 1e12])
def test_sound_of_an_absurd_rate_is_no_audio(tmp_path: Path, rate_hz: float) -> None:
    file = small_stream([BEGIN_S + i / EEG_HZ for i in range(200)])
    file.stream(2, "Mic", "Audio", "int16", 1, rate_hz)
    file.samples(2, [BEGIN_S, *[None] * 99], [[i] for i in range(100)])
    path = file.write(tmp_path / "a.xdf")
    document = xdf.convert(path, tmp_path / "a.mcap")
    assert {s["name"]: s["role"] for s in document["streams"]} == {"EEG": "signal", "Mic": "none"}
    with pytest.raises(UsageError, match=r"'Mic' has 1(e\+\d+)? samples a second, but audio needs 1000 to 384000"):
        xdf.convert(path, tmp_path / "b.mcap", chosen={"Mic": "audio"})


def test_a_clock_offset_that_is_no_number_is_left_out(tmp_path: Path) -> None:
    file = small_stream([BEGIN_S + i / EEG_HZ for i in range(200)])
    file.clock_offset(1, BEGIN_S, 2.0)
    file.clock_offset(1, BEGIN_S + 1, float("nan"))
    file.clock_offset(1, BEGIN_S + 2, 2.0)
    (stream,), _, damage = xdf_file.read(file.write(tmp_path / "a.xdf"))
    assert abs(stream.times_s[0] - BEGIN_S - 2.0) < 1e-6
    assert "a clock offset of EEG is no number" in damage


@pytest.mark.parametrize("count", ["200.0", "nan", "-1", "many", "1e400"])
def test_the_count_in_a_footer_is_a_hint(tmp_path: Path, count: str) -> None:
    file = small_stream([BEGIN_S + i / EEG_HZ for i in range(200)])
    file.footer(1, count)
    (stream,), _, damage = xdf_file.read(file.write(tmp_path / "a.xdf"))
    assert first_values(stream) == list(range(200))
    assert not damage


@pytest.mark.parametrize("packed", [False, True])
def test_a_cut_anywhere_loses_only_what_was_cut_off(tmp_path: Path, packed: bool) -> None:
    """Every whole sample of the last chunk is imported, and the place is named."""
    import gzip

    file = XdfFile()
    file.stream(1, "EEG", "EEG", "float32", 2, EEG_HZ)
    file.stream(2, "Words", "Text", "string", 1, 0)
    begin = len(file.data)
    file.samples(1, [BEGIN_S, *[None] * 19], [[i, -i] for i in range(20)])
    middle = len(file.data)
    file.samples(2, [BEGIN_S, BEGIN_S + 1], [["one"], ["two"]])
    data = file.data
    for end in range(begin + 12, len(data), 1 if not packed else 17):
        path = tmp_path / ("cut.xdfz" if packed else "cut.xdf")
        path.write_bytes(gzip.compress(data[:end], 1)[:-8] if packed else data[:end])
        streams, _, damage = xdf_file.read(path)
        # after the chunk's length (5), tag and stream (6), count (2); stamps: 9 bytes for the first, 1 for the others
        whole = min(max((end - begin - (2 + 6 + 2) - 8) // 9, 0), 20)
        assert first_values(streams[0]) == list(range(whole)), end
        assert end == middle or f"cut off at byte {end}" in damage or packed
        if packed:
            assert "compressed data was cut off" in damage


@pytest.mark.slow
@pytest.mark.parametrize("gap_s", [90.0, 3e7, 4e9])
def test_a_gap_is_no_ticks(tmp_path: Path, gap_s: float) -> None:
    """The clock jumps over it in a way that a replay follows, and no message is lost by that."""
    stamps: list[float | None] = [BEGIN_S + i / EEG_HZ + (gap_s if i >= 100 else 0) for i in range(200)]
    out = tmp_path / "gap.mcap"
    code, document, err = run("import", small_stream(stamps).write(tmp_path / "gap.xdf"), out)
    assert code == 0, err
    assert "gap.xdf has a gap of" in err
    assert [round(gap["seconds"], -1) for gap in document["gaps"]] == [gap_s]
    assert len(of(out, topics.CLOCK)) < 1000
    model = toy_model.make(tmp_path / "toy.onnx", [ModalitySpec("signal", 2, SignalEncoder.origin)])
    replayed = replay.replay(out, model=str(model))
    assert replayed["predictions"] < 16_000
    assert (replayed["streams"]["signal"]["delivered"], replayed["streams"]["signal"]["dropped"]) == (200, {})


def test_streams_of_one_name_are_told_apart_by_number(tmp_path: Path) -> None:
    file = small_stream([BEGIN_S + i / EEG_HZ for i in range(200)])
    file.stream(5, "EEG", "EEG", "float32", 1, EEG_HZ)
    file.samples(5, [BEGIN_S + i / EEG_HZ for i in range(200)], [[i] for i in range(200)])
    path = file.write(tmp_path / "a.xdf")
    with pytest.raises(UsageError, match=r"'EEG' \(number 1\), 'EEG' \(number 5\).*--as 1=signal.*NUMBER=none"):
        xdf.convert(path, tmp_path / "a.mcap", chosen={"EEG": "signal"})
    code, document, err = run("import", path, tmp_path / "a.mcap", "--as", "5=signal", "--as", "1=none")
    assert code == 0, err
    assert {s["number"]: s["role"] for s in document["streams"]} == {1: "none", 5: "signal"}
    assert "EEG (EEG, number 5)" in err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_leaves_no_partial_file(source: Path, tmp_path: Path) -> None:
    import resource

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    command = [*COMMAND, "import", str(source), str(tmp_path / "a.mcap")]
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=limited, env=env)
    assert done.returncode == 2, done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert not (tmp_path / "a.mcap").exists()


@settings(max_examples=150)
@given(st.data())
def test_random_bytes_are_read_or_rejected(data: st.DataObject) -> None:
    whole = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(4, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(whole)))
    path = FOLDER / "x.xdf"
    path.write_bytes(bytes(whole[: max(end, len(whole) // 2)]))
    try:
        streams, _, _ = xdf_file.read(path)
        xdf.roles(streams, {})
    except StreamError as e:
        assert isinstance(e, FileError | UsageError)  # noqa: PT017
    else:
        assert all(len(s.values) == len(s.times_s) for s in streams)


def _small() -> bytes:
    file = XdfFile()
    file.stream(1, "EEG", "EEG", "float32", 2, 10.0)
    file.stream(2, "Task", "Markers", "string", 1, 0)
    for k in range(4):
        file.clock_offset(1, 100.0 + k, 0.25)
        file.samples(1, [100.0 + k, 100.1 + k], [[1.0, 2.0], [3.0, 4.0]])
        file.samples(2, [100.05 + k], [["a"]])
    return file.data


SMALL = _small()
FOLDER: Path


@pytest.fixture(scope="module", autouse=True)
def _folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    global FOLDER
    FOLDER = tmp_path_factory.mktemp("bytes")
