"""A recording as plain files, read back by the libraries of those formats and compared with the recording."""

from __future__ import annotations

import csv
import io
import itertools
import json
import subprocess
import sys
import wave
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from harness import run
from places import ROOT

from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.streams import SHORT_FORMS
from stream_mmrnn.core.types import Envelope, Stamps
from stream_mmrnn.offline.convert.unpack import unpack
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.recorder import Recorder

pytestmark = pytest.mark.process

pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow (extra export) is not installed")

BEGIN = 7_000_000_000_000
MS = 1_000_000
LOST_BLOCKS = range(40, 55)
LATE_FRAME = 30


def picture(k: int, side: int = 64) -> bytes:
    """A JPEG whose brightness says which one it is."""
    frame = av.VideoFrame.from_ndarray(np.full((side, side + 1, 3), 2 * k + 20, np.uint8), format="rgb24")
    out = io.BytesIO()
    with av.open(out, "w", format="mjpeg") as file:
        stream = file.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = side + 1, side, "yuvj420p"
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return out.getvalue()


def session_of() -> list[Envelope]:
    """Four seconds: sound with a gap of 0.3 s, pictures at their own times, words, labels, predictions."""
    rng = np.random.default_rng(1)
    out: list[Envelope] = []
    seq: dict[str, itertools.count[int]] = {}

    def add(topic: str, at: int, payload: Any) -> None:
        owner = topics.EVERYONE if topic == topics.CLOCK else "live"
        number = next(seq.setdefault(topic, itertools.count()))
        out.append(Envelope(topic, owner, number, at, at + 1, at + 2, payload, "test"))

    add(topics.SESSION, BEGIN, wire.pack(wire.SessionMessage("open", BEGIN, ("audio",))))
    for k in range(200):
        at = BEGIN + (k + 1) * 20 * MS
        add(topics.CLOCK, at, b"")
        if k not in LOST_BLOCKS:
            jitter = int(rng.integers(-2 * MS, 2 * MS))
            add("raw/audio", at + jitter, rng.integers(-(2**15), 2**15, 320).astype("<i2"))
        add("feature/audio", at, rng.standard_normal(81).astype("<f4"))
        if k % 2:
            shown = at + (37 * MS if k // 2 == LATE_FRAME else int(rng.integers(0, 5 * MS)))
            add("raw/vision", shown, picture(k // 2))
            closed = Stamps(at, at, at, at, "clock")
            seen, age = {"audio": True, "vision": k > 50}, {"audio": 3, "vision": -1}
            heads = {"next": [float(np.float32(0.1 * k)), None], "more": [1.5]}
            prediction = wire.PredictionMessage(k // 2, at, heads, seen, age, closed, at + 5, at + 9, "sha")
            add(topics.PREDICTION, at, wire.pack(prediction))
            if k == 101:  # published twice, as by an engine that resumed after a crash
                add(topics.PREDICTION, at, wire.pack(prediction))
    add("raw/text", BEGIN + 500 * MS, 'grüß dich, "du"\nda'.encode())
    add("raw/other_text", BEGIN + 900 * MS, b"yes")
    add(topics.LABEL, BEGIN + 700 * MS, b"sitting")
    return out


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "a.mcap"
    recorder = Recorder(path, "live", {"config": "{}"}, chunk_ms=100)
    for k, e in enumerate(session_of()):
        recorder.write(e)
        if k % 100 == 99:
            recorder.flush_due(2**62)
    recorder.close({"ended": "clean", "lost": "{}"})
    return path


@pytest.fixture(scope="module")
def unpacked(recorded: Path) -> tuple[Path, dict[str, Any]]:
    folder = recorded.parent / "out"
    code, document, err = run("unpack", recorded, folder)
    assert code == 0, err
    return folder, document


def of(path: Path, topic: str) -> list[Envelope]:
    return list(Recording(path).envelopes({topic}))


def test_the_files_are_those_that_it_names(unpacked: tuple[Path, dict[str, Any]]) -> None:
    folder, document = unpacked
    assert {p.name for p in folder.iterdir()} == {*document["files"], "manifest.json"}
    assert set(document["files"]) == {
        *("audio.wav", "vision.mp4", "features_audio.parquet", "ticks.parquet", "predictions.parquet"),
        *("text.csv", "labels.csv", "predictions.csv"),
    }
    assert document["zero_ns"] <= BEGIN
    said = json.loads((folder / "manifest.json").read_text())
    assert said["files"] == document["files"]
    assert said["damage"] == ""


def test_features_and_ticks_as_parquet(recorded: Path, unpacked: tuple[Path, dict[str, Any]]) -> None:
    folder, document = unpacked
    table = pq.read_table(folder / "features_audio.parquet").to_pydict()
    sent = of(recorded, "feature/audio")
    assert document["files"]["features_audio.parquet"] == {"rows": len(sent)}
    for name in ("seq", "event_ns", "capture_ns", "publish_ns", "device_ns", "origin"):
        assert table[name] == [getattr(e, name) for e in sent]
    assert np.array_equal(np.array(table["values"], np.float32), np.stack([e.payload for e in sent]))
    offset_ns = document["zero_unix_ns"] - document["zero_ns"]
    assert offset_ns == Recording(recorded).started_unix_ns - int(Recording(recorded).metadata["started_ns"])
    assert table["unix_ns"] == [e.event_ns + offset_ns for e in sent]
    assert table["seconds"] == [(e.event_ns - document["zero_ns"]) / 1e9 for e in sent]

    table = pq.read_table(folder / "ticks.parquet").to_pydict()
    assert len(of(recorded, topics.PREDICTION)) == 101
    assert table["tick"] == list(range(100)), "each once"
    assert table["present.vision"] == [2 * k + 1 > 50 for k in range(100)]
    assert set(table["age_ns.vision"]) == {-1}
    assert set(table["present.text"]) == {None}


def test_a_recording_with_a_tick_channel_gives_the_same_table(tmp_path: Path) -> None:
    """Release 0.1.0 recorded each tick twice: in a message of its own, and in its prediction."""
    path = ROOT / "tests" / "data" / "release_0_1_0" / "session.mcap"
    unpack(path, tmp_path, ["parquet"])
    table = pq.read_table(tmp_path / "ticks.parquet").to_pydict()
    ticks = [wire.unpack(e.payload, wire.TickMessage) for e in of(path, topics.TICK)]
    assert len(ticks) == 67
    for source in (ticks, list(Recording(path).predictions())):
        assert table["tick"] == [t.tick for t in source]
        assert table["event_ns"] == [t.event_ns for t in source]
        assert table["closed_by"] == [t.closed.by for t in source]
        for modality in SHORT_FORMS:
            assert table[f"present.{modality}"] == [t.present.get(modality) for t in source]
            assert table[f"age_ns.{modality}"] == [t.age_ns.get(modality) for t in source]


def test_predictions_as_parquet_and_csv(recorded: Path, unpacked: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = unpacked
    sent = {p.tick: p for p in Recording(recorded).predictions()}
    table = pq.read_table(folder / "predictions.parquet").to_pydict()
    assert table["tick"] == list(sent)
    assert table["event_ns"] == [p.event_ns for p in sent.values()]
    assert table["step_end_ns"] == [p.step_end_ns for p in sent.values()]
    assert table["next.0"] == [p.heads["next"][0] for p in sent.values()]
    assert set(table["next.1"]) == {None}
    with (folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["tick"]) for r in rows] == list(sent)
    assert [int(r["event_ns"]) for r in rows] == [p.event_ns for p in sent.values()]
    assert [float(r["next.0"]) for r in rows] == [p.heads["next"][0] for p in sent.values()]
    assert {r["next.1"] for r in rows} == {""}
    assert {r["more.0"] for r in rows} == {"1.5"}


def test_words_and_labels_as_csv(unpacked: tuple[Path, dict[str, Any]]) -> None:
    folder, document = unpacked
    with (folder / "text.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["event_ns"]), r["modality"], r["text"]) for r in rows] == [
        (BEGIN + 500 * MS, "text", 'grüß dich, "du"\nda'),
        (BEGIN + 900 * MS, "other_text", "yes"),
    ]
    assert float(rows[0]["seconds"]) == (BEGIN + 500 * MS - document["zero_ns"]) / 1e9
    with (folder / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["event_ns"]), r["label"]) for r in rows] == [(BEGIN + 700 * MS, "sitting")]


def test_sound_is_every_sample_at_its_time(recorded: Path, unpacked: tuple[Path, dict[str, Any]]) -> None:
    folder, document = unpacked
    with wave.open(str(folder / "audio.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16000)
        sound = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    about = document["files"]["audio.wav"]
    [gap] = about["gaps"]
    silent = len(LOST_BLOCKS) * 320
    assert abs(gap["seconds"] * 16000 - silent) < 100  # the stamps jitter by 2 ms
    first, length = round(gap["at_s"] * 16000), round(gap["seconds"] * 16000)
    assert not sound[first : first + length].any()
    heard = np.concatenate([sound[:first], sound[first + length :]])
    assert np.array_equal(heard, np.concatenate([e.payload for e in of(recorded, "raw/audio")]))
    assert (about["samples"], about["cut"]) == (len(heard), 0)
    # a block is at the time of its stamp, before and after the gap
    for e in (of(recorded, "raw/audio")[k] for k in (10, 100, 180)):
        place = round((e.event_ns - document["zero_ns"]) * 16000 / 1e9) - 320
        found = next(i for i in range(place - 100, place + 100) if np.array_equal(sound[i : i + 320], e.payload))
        assert abs(found - place) < 100


def pictures(path: Path, zero_ns: int) -> list[tuple[float, int]]:
    with av.open(str(path)) as file:
        return [
            (float(f.pts * f.time_base) * 1e9 + zero_ns, int(f.to_ndarray(format="gray").mean()))
            for f in file.decode(video=0)
        ]


def test_pictures_are_shown_at_their_times(recorded: Path, unpacked: tuple[Path, dict[str, Any]]) -> None:
    folder, document = unpacked
    sent = of(recorded, "raw/vision")
    got = pictures(folder / "vision.mp4", document["zero_ns"])
    assert len(got) == len(sent) == document["files"]["vision.mp4"]["frames"] == 100
    assert all(abs(at_ns - e.event_ns) < 20_000 for (at_ns, _), e in zip(got, sent, strict=True))
    greys = [grey for _, grey in got]
    assert all(a < b for a, b in itertools.pairwise(greys)), "each picture is its own, in order"

    again = folder.parent / "jpegs"
    assert set(unpack(recorded, again, ["mp4"], codec="mjpeg")["files"]) == {"vision.mp4"}
    with av.open(str(again / "vision.mp4")) as file:
        packets = [p for p in file.demux(video=0) if p.size]
    assert [bytes(p) for p in packets] == [e.payload for e in sent], "not one byte of a picture is another"
    at_ns = [float(p.pts * p.time_base) * 1e9 + document["zero_ns"] for p in packets]
    assert all(abs(t - e.event_ns) < 20_000 for t, e in zip(at_ns, sent, strict=True))


def test_a_damaged_recording_gives_what_is_there(recorded: Path, tmp_path: Path) -> None:
    data = recorded.read_bytes()
    (tmp_path / "cut.mcap").write_bytes(data[: len(data) // 2])
    code, document, err = run("unpack", tmp_path / "cut.mcap", tmp_path / "out", "--to", "csv,wav")
    assert code == 3, err
    assert "was cut off" in document["damage"]
    assert "repair may save more" in err
    cut = Recording(tmp_path / "cut.mcap")
    assert document["files"]["predictions.csv"]["rows"] == len({p.tick for p in cut.predictions()}) > 10


def test_nothing_is_overwritten_without_force(recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("mine")
    with pytest.raises(FileError, match=r"has labels\.csv already"):
        unpack(recorded, tmp_path, ["csv"])
    assert [p.name for p in tmp_path.iterdir()] == ["labels.csv"]
    assert (tmp_path / "labels.csv").read_text() == "mine"
    unpack(recorded, tmp_path, ["csv"], force=True)
    assert "sitting" in (tmp_path / "labels.csv").read_text()


def test_a_stopped_unpack_leaves_nothing(recorded: Path, tmp_path: Path) -> None:
    asked = itertools.count()
    told: list[tuple[int, int]] = []
    result = unpack(recorded, tmp_path, progress=lambda *p: told.append(p), alive=lambda: next(asked) < 3)
    assert (result["stopped"], result["files"]) == (True, {})
    assert not list(tmp_path.iterdir())
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert all(done <= of for done, of in told)


def test_errors_are_one_sentence(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no format 'ogg'"):
        unpack(recorded, tmp_path, ["csv", "ogg"])
    with pytest.raises(UsageError, match="there is no format ''"):
        unpack(recorded, tmp_path, [])
    with pytest.raises(FileError, match="cannot be read"):
        unpack(tmp_path / "nix.mcap", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"cannot be written: (Not a directory|File exists)"):
        unpack(recorded, tmp_path / "file")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("kind", ["wav", "mp4", "parquet", "csv"])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(recorded: Path, tmp_path: Path, kind: str) -> None:
    """A limit on the file size makes writes fail like a full disk."""
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from stream_mmrnn.offline.convert.unpack import unpack\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "try: unpack(Path(sys.argv[1]), Path(sys.argv[2]), [sys.argv[3]])\n"
        "except Exception as e: print(type(e).__name__, e)\n"
    )
    command = [sys.executable, "-c", code, str(recorded), str(tmp_path / "out"), kind]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("FileError "), done.stdout + done.stderr
    assert "cannot be written" in done.stdout
    assert not list((tmp_path / "out").iterdir())
