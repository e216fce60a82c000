"""The verb `label`, and labels and predictions for other programs: formats, tables, scores, replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import toy_model
import toy_recordings
from labelled import GIVEN, NOTES, S, notes, tiers_of
from small_recordings import BEGIN, envelopes, write
from typer.testing import CliRunner

from stream_mmrnn.cli.app import app
from stream_mmrnn.core.errors import FileError, StreamError, UsageError
from stream_mmrnn.offline.convert.unpack import inspect, unpack
from stream_mmrnn.offline.diff.labels import labels_of, score
from stream_mmrnn.offline.diff.tracks import recorded
from stream_mmrnn.offline.labels.attach import LabelOptions, attach
from stream_mmrnn.offline.labels.export import RECORDED, decided, to_labels, to_table
from stream_mmrnn.offline.replay import replay
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.training.tasks.recordings import TypedEvents


@pytest.fixture
def talk(tmp_path: Path) -> Path:
    return write(tmp_path / "talk.mcap", envelopes(0, 200), offset_ns=1_700_000_000 * S - BEGIN)


def command(*args: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["label", *map(str, args)])
    assert done.exception is None or isinstance(done.exception, (SystemExit, StreamError))
    code = done.exception.exit_code if isinstance(done.exception, StreamError) else done.exit_code
    return code, done.output + str(done.exception or "")


def predicted_session(folder: Path, name: str = "live.mcap") -> Path:
    model = toy_model.make(folder / "toy.onnx") if not (folder / "toy.onnx").exists() else folder / "toy.onnx"
    toy_recordings.write(folder / name, model, 4.0, metadata={"model": str(model)})
    return folder / name


@pytest.mark.process
def test_predictions_and_labels_for_other_programs(tmp_path: Path) -> None:
    pytest.importorskip("pympi", reason="pympi-ling (extra labels) is not installed")
    pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow (extra export) is not installed")
    path = predicted_session(tmp_path)
    track = recorded(path)
    spec = next(iter(track.specs.values()))
    names = list(spec.labels) or [spec.name]
    attach(path, [notes(tmp_path, f"begin_s,end_s,label\n1,2,{names[0]}\n2,3.5,{names[-1]}\n")], LabelOptions())
    # an annotation of the decisions, beside the labels
    result = to_labels([path], tmp_path / "live.eaf", RECORDED)
    spans = decided(track)
    assert result["tiers"] == {"label": 2, **{tier: len(found) for tier, found in spans.items() if found}}
    # one row a prediction
    second = predicted_session(tmp_path, "second.mcap")
    table = to_table([path, second], tmp_path / "all.parquet")
    rows = pq.read_table(tmp_path / "all.parquet").to_pylist()
    assert table["rows"] == len(rows) == 2 * len(track.ticks)
    assert {row["recording"] for row in rows} == {"live.mcap", "second.mcap"}
    mine = [row for row in rows if row["recording"] == "live.mcap"]
    zero_ns = inspect(path).zero_ns
    for row, event_ns in zip(mine, track.event_ns.tolist(), strict=True):
        at_s = (event_ns - zero_ns) / S
        assert row["event_ns"] == event_ns
        assert row["seconds"] == pytest.approx(at_s)
        expected = names[0] if 1 <= at_s < 2 else names[-1] if 2 <= at_s < 3.5 else None
        assert row["true.label"] == expected
    numbers = [row[f"{spec.name}.{spec.labels[0] if spec.labels else 0}"] for row in mine]
    assert numbers == pytest.approx(track.heads[spec.name][:, 0].tolist())
    assert all(row["true.label"] is None for row in rows if row["recording"] == "second.mcap")
    with pytest.raises(FileError, match="is there already"):
        to_table([path], tmp_path / "all.parquet")
    code, words = command(path, second, "--to", tmp_path / "x.csv")
    assert (code, "is of one recording, and 2 are named; a .parquet file takes several" in words) == (2, True)


@pytest.mark.process
def test_a_model_is_scored_by_the_tier_that_has_its_labels(tmp_path: Path) -> None:
    path = predicted_session(tmp_path)
    track = recorded(path)
    spec = msgspec.structs.replace(
        next(iter(track.specs.values()), None) or pytest.skip("no spec"), kind="classification", labels=()
    )
    labels = tuple(f"c{i}" for i in range(spec.size)) if spec.size > 1 else ("c0",)
    track.specs[spec.name] = msgspec.structs.replace(spec, labels=labels)
    text = f"tier,begin_s,end_s,label\nother,0,3,x\nown,0,1,{labels[0]}\nown,1,3,{labels[-1]}\n"
    attach(path, [notes(tmp_path, text)], LabelOptions())
    figures = score(track, labels_of(path))[spec.name]
    assert figures["ticks"] == pytest.approx(75, abs=2 if spec.size > 1 else 30)
    attach(path, [notes(tmp_path, "begin_s,label\n0,x\n")], LabelOptions(), force=True)
    with pytest.raises(UsageError, match="has no head for the labels x"):
        score(track, labels_of(path))


@pytest.mark.process
def test_a_labelled_recording_replays_bit_for_bit(tmp_path: Path) -> None:
    path, out = predicted_session(tmp_path), tmp_path / "new.mcap"
    attach(path, [notes(tmp_path, NOTES.replace("4.5", "3"))], LabelOptions(), out)
    attach(path, [notes(tmp_path, NOTES.replace("4.5", "3"))], LabelOptions())
    for each in (path, out):
        result = replay(each, verify=True)
        assert result["identical"], result["first_difference"]
        assert {"gaze", "posture"} < TypedEvents.of(Recording(each)).tiers.keys()


def test_unpack_has_the_labels_with_their_tiers(talk: Path, tmp_path: Path) -> None:
    attach(talk, [notes(tmp_path)], LabelOptions())
    unpack(talk, tmp_path / "out", ["csv"])
    lines = (tmp_path / "out" / "labels.csv").read_text().splitlines()
    assert lines[0] == "event_ns,unix_ns,seconds,label,tier"
    assert [line.split(",")[2:] for line in lines[1:]] == [
        ["0.5", "sitting", "posture"],
        ["1.0", "left", "gaze"],
        ["2.0", "walking", "posture"],
        ["4.5", "none", "posture"],
    ]
    # what was unpacked can be given back
    attach(talk, [tmp_path / "out" / "labels.csv"], LabelOptions(), force=True)
    assert tiers_of(talk) == GIVEN


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".eaf", ".TextGrid"])
def test_the_command_gives_shows_and_writes(talk: Path, tmp_path: Path, suffix: str) -> None:
    if suffix in (".eaf", ".TextGrid"):
        pytest.importorskip("pympi", reason="pympi-ling (extra labels) is not installed")
        pytest.importorskip("praatio", reason="praatio (extra labels) is not installed")
    assert command(talk)[1].strip() == "talk.mcap has no labels; give it some with --from FILE"
    code, words = command(talk, "--to", tmp_path / f"x{suffix}")
    assert (code, "holds no labels to write; give it some with" in words) == (2, True)
    code, words = command(talk, "--from", notes(tmp_path))
    assert code == 0
    assert "posture: sitting (1, 1.5 s), walking (1, 2.5 s)" in words
    assert "talk.mcap itself is as it was" in words
    out = tmp_path / f"out{suffix}"
    assert command(talk, "--to", out)[0] == 0
    before = tiers_of(talk)
    code, words = command(talk, "--from", out, "--force", "--json")
    assert code == 0
    document: dict[str, Any] = json.loads(words.splitlines()[-1])
    assert document["from"] == [str(out)]
    after = tiers_of(talk)
    assert {t: [n for _, n in c if n != "none"] for t, c in after.items()} == {
        t: [n for _, n in c if n != "none"] for t, c in before.items()
    }
    for (at_s, _), (then_s, _) in zip(after["posture"], before["posture"], strict=True):
        assert at_s == pytest.approx(then_s, abs=1e-3)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--fill", "x"], "--fill is for --from FILE; name one"),
        (["--model", "x"], "--model is for --to FILE; name one"),
        (["--from", "a.csv", "--to", "b.csv"], "--from gives labels and --to writes them; use one after the other"),
        (["b.mcap"], "2 recordings are named; labels are given to one at a time"),
        (["--from", "a.csv", "--shift", "1h"], "--shift is '1h': expected seconds such as 1.5 or -0.2"),
        (["--from", "a.csv", "--tier", "x="], "--tier needs NAME or NAME=NEW, each name once, not 'x='"),
        (["--from", "a.csv", "--fill", "none"], "--fill is a label; without it there is none between labels"),
        (["--to", "b.csv", "--tier", "x=y"], "--tier OLD=NEW is for --from; with --to name tiers only"),
        (["--to", "b.parquet", "--clock", "wall"], "a .parquet table has all tiers and both clocks"),
        (["--to", "b.doc"], "b.doc is no format of labels; use a name that ends in"),
        (["--to", "none/b.csv"], "none/b.csv cannot be written: there is no folder none; make it first"),
        (["--from", "a.doc"], "a.doc is no format of labels; use a name that ends in"),
    ],
)
def test_options_that_do_not_fit(talk: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], words: str) -> None:
    monkeypatch.chdir(talk.parent)
    notes(talk.parent, "begin_s,label\n1,a\n", "a.csv")
    code, said = command(talk, *args)
    assert (code, words in said) == (2, True), said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x.eaf", "x.eaf holds labels, not signals: use stream-mmrnn label RECORDING.mcap --from x.eaf"),
        ("x.TextGrid", "x.TextGrid holds labels, not signals: use stream-mmrnn label"),
        ("x.wav", "x.wav is a media file: use stream-mmrnn predict x.wav, or record it"),
    ],
)
def test_import_names_the_verb_for_other_files(name: str, words: str) -> None:
    done = CliRunner().invoke(app, ["import", name, "out.mcap"])
    assert words in str(done.exception)
