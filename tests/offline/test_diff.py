"""Two models on one recording, with small recordings that are made here and real model files."""

from __future__ import annotations

import itertools
import json
import math
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import toy_model
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper

from stream_mmrnn.bench.engine import synthetic
from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.types import Envelope, FloatArray, HeadSpec
from stream_mmrnn.offline.diff import plots
from stream_mmrnn.offline.diff.compare import compare, decisions, distance, stretches
from stream_mmrnn.offline.diff.labels import labels_of, score
from stream_mmrnn.offline.diff.tracks import PredictionTrack, predicted, recorded
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.pipeline import predict
from stream_mmrnn.recording.recorder import Recorder

pytestmark = pytest.mark.process

BEGIN, SESSION = 10**15, "bench-0"


def write(
    path: Path, model: Path, seconds: float = 4.0, labels: tuple[tuple[float, str], ...] = (), predictions: bool = True
) -> Path:
    """A recording as a live session makes it, with labels (seconds from the beginning, name)."""
    engine = StepEngine(model)
    settings = config.load(None, {"engine.model": str(model)})
    aligner = Aligner.of(engine.spec.modalities, engine.spec.tick_ns, settings)
    about = {"config": msgspec.json.encode(settings).decode(), "model_sha256": engine.spec.sha256, "raw": "false"}
    recorder = Recorder(path, SESSION, {**about, "model": str(model)})
    stream = list(synthetic(engine.spec, 1, seconds, BEGIN, 3))
    for at_s, name in labels:
        at_ns = BEGIN + round(at_s * 1e9)
        stream.append(Envelope(topics.LABEL, SESSION, 0, at_ns, at_ns, at_ns, name.encode()))
    stream[1:-1] = sorted(stream[1:-1], key=lambda e: e.publish_ns)
    waiting: list[bytes] = []

    def heard() -> object:
        for e in stream:
            recorder.write(e)
            recorder.flush_due(e.publish_ns)
            if e.topic != topics.LABEL:
                yield e
            while waiting:
                at_ns = e.publish_ns
                recorder.write(Envelope(topics.PREDICTION, SESSION, 0, at_ns, at_ns, at_ns, waiting.pop(0)))

    for p in predict(heard(), aligner, engine):  # type: ignore[arg-type]
        if predictions:
            waiting.append(wire.pack(wire.prediction_message(p)))
    recorder.close({"ended": "clean", "lost": "{}"})
    return path


def run(*args: object) -> tuple[int, dict[str, object], str]:
    done = subprocess.run(
        [sys.executable, "-m", "stream_mmrnn", "diff", *map(str, args), "--json"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model.make(tmp_path_factory.mktemp("other") / "toy.onnx", seed=1)


@pytest.fixture(scope="module")
def recording(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    labels = ((1.0, "yes"), (2.0, "no"), (3.0, "none"), (3.5, "yes"))
    return write(tmp_path_factory.mktemp("recordings") / "a.mcap", toy, labels=labels)


# --- numbers


def track(heads: dict[str, FloatArray], first: int = 0, specs: tuple[HeadSpec, ...] = ()) -> PredictionTrack:
    count = len(next(iter(heads.values())))
    ticks = np.arange(first, first + count, dtype=np.int64)
    return PredictionTrack("x", "sha", ticks, ticks * 40_000_000, heads, {s.name: s for s in specs})


floats = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6))


@given(floats)
def test_a_track_is_equal_to_itself(values: FloatArray) -> None:
    spec = HeadSpec("h", "activity_projection", values.shape[1])
    found = compare(track({"h": values}, specs=(spec,)), track({"h": values.copy()}, specs=(spec,)))
    row = found["heads"]["h"]
    assert found["equal"]
    assert (row["max"], row["mean"], row["rms"], row["different"], row["decisions"]["ticks"]) == (0, 0, 0, 0, 0)
    json.dumps(found, allow_nan=False)


@given(st.data())
def test_differences_equal_a_plain_count(data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=5))
    number = st.sampled_from([0.0, 0.25, 0.5, 1.0, float("nan"), float("inf"), float("-inf")])
    x, y = (data.draw(hnp.arrays(np.float32, shape, elements=number)) for _ in range(2))
    tolerance = data.draw(st.sampled_from([0.0, 0.3]))
    found = compare(track({"h": x}), track({"h": y}), tolerance)
    row = found["heads"]["h"]
    over, sizes = set(), [0.0]
    for i in range(shape[0]):
        for a, b in zip(x[i].tolist(), y[i].tolist(), strict=True):
            if a == b or (math.isnan(a) and math.isnan(b)):
                continue
            if math.isfinite(a) and math.isfinite(b):
                sizes.append(abs(a - b))
                if abs(a - b) <= tolerance:
                    continue
            over.add(i)
    assert row["different"] == len(over)
    assert found["equal"] == (not over)
    assert row["max"] == max(sizes)
    assert (row["first"]["tick"] if row["first"] else None) == (min(over) if over else None)
    json.dumps(found, allow_nan=False)


@given(st.lists(st.booleans()))
def test_stretches_cover_every_true_value(over: list[bool]) -> None:
    found = stretches(np.array(over, np.bool_))
    assert [i for first, last in found for i in range(first, last + 1)] == [i for i, x in enumerate(over) if x]
    assert all(b[0] > a[1] + 1 for a, b in itertools.pairwise(found))


def test_decisions_are_the_head_s_own() -> None:
    nan = np.nan
    three = HeadSpec("c", "classification", 3, ("a", "b", "c"))
    values = np.array([[0.1, 0.7, 0.2], [nan, 0.1, 0.2], [nan, nan, nan]], np.float32)
    assert decisions(three, values).tolist() == [1, 2, -1]  # type: ignore[union-attr]
    yes = HeadSpec("y", "classification", 1, threshold=0.27)
    assert decisions(yes, np.array([[0.26], [0.28], [nan]], np.float32)).tolist() == [[0], [1], [-1]]  # type: ignore[union-attr]
    for nothing in (None, HeadSpec("r", "regression", 1), HeadSpec("z", "hazard", 1)):
        assert decisions(nothing, np.zeros((1, 1), np.float32)) is None
    x, y = np.array([[0.1], [0.3], [0.3]], np.float32), np.array([[0.1], [0.2], [0.4]], np.float32)
    [found] = compare(track({"y": x}, specs=(yes,)), track({"y": y}))["heads"].values()
    assert found["decisions"] == {
        "ticks": 1, "share": pytest.approx(1 / 3), "first": {"tick": 1, "event_ns": 40_000_000, "s": 0.04},
        "changes": {"yes -> no": 1},
    }  # fmt: skip


def test_heads_and_ticks_of_only_one_are_differences() -> None:
    one = np.zeros((5, 1), np.float32)
    assert compare(track({"h": one}), track({"h": one}))["equal"]
    shifted = compare(track({"h": one}), track({"h": one}, first=2))
    assert (shifted["equal"], shifted["ticks"]) == (False, {"common": 3, "only_a": 2, "only_b": 2})
    assert shifted["max_abs_difference"] == 0
    heads = compare(track({"h": one, "a": one}), track({"h": one, "b": one}))
    assert (heads["equal"], heads["only_a"], heads["only_b"]) == (False, ["a"], ["b"])
    wider = compare(track({"h": one}), track({"h": np.zeros((5, 2), np.float32)}))
    assert (wider["equal"], wider["sizes_differ"], wider["heads"]) == (False, {"h": [1, 2]}, {})
    nothing = compare(track({"h": one}), track({"h": one}, first=50))
    assert (nothing["equal"], nothing["ticks"]["common"], nothing["heads"]) == (False, 0, {})
    gap, unmeasured = distance(np.array([[np.inf]], np.float32), np.array([[np.inf]], np.float32))
    assert (gap.tolist(), unmeasured.tolist()) == ([[0.0]], [[False]])


# --- recordings and models


def test_a_model_equals_itself_and_the_recorded_predictions(toy: Path, other: Path, recording: Path) -> None:
    a, again, then = predicted(recording, str(toy), "cpu"), predicted(recording, str(toy), "cpu"), recorded(recording)
    assert len(a.ticks) == 100
    for same in (again, then):
        found = compare(a, same)
        assert found["equal"]
        assert found["max_abs_difference"] == 0.0
    assert list(then.specs) == ["next"]  # the file that predicted is still there
    b = predicted(recording, str(other), "cpu")
    found = compare(a, b)
    row = found["heads"]["next"]
    direct = np.abs(a.heads["next"].astype(np.float64) - b.heads["next"].astype(np.float64))
    assert not found["equal"]
    assert found["max_abs_difference"] == row["max"] == direct.max()
    assert row["mean"] == pytest.approx(direct.mean())
    assert row["rms"] == pytest.approx(np.sqrt((direct**2).mean()))
    assert row["outputs"]["no"]["max"] == direct[:, 1].max()
    changed = a.heads["next"].argmax(1) != b.heads["next"].argmax(1)
    assert row["decisions"]["ticks"] == changed.sum() == sum(row["decisions"]["changes"].values()) > 0
    assert compare(a, b, tolerance=float(direct.max()))["equal"]
    assert not compare(a, b, tolerance=float(direct.max()) * 0.999)["equal"]


def test_the_zoo_s_models_and_a_version_of_one_with_another_weight(tmp_path: Path) -> None:
    digits = config.find_model("digits")
    path = write(tmp_path / "a.mcap", digits, 3.0)
    a = predicted(path, "digits", "cpu")
    assert compare(a, predicted(path, str(digits), "cpu"))["max_abs_difference"] == 0.0
    assert compare(a, recorded(path))["equal"]
    changed = onnx.load(str(digits))
    weight = next(w for w in changed.graph.initializer if numpy_helper.to_array(w).size > 1000)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.001), weight.name))
    onnx.save(changed, str(tmp_path / "changed.onnx"))
    found = compare(a, predicted(path, str(tmp_path / "changed.onnx"), "cpu"))
    assert not found["equal"]
    assert 0 < found["max_abs_difference"] < 0.2
    assert set(found["heads"]) == {"digit", "next_digit"}
    # another model of the same zoo: other heads, and features that are not its own
    stranger = predicted(path, "turn_taking", "cpu")
    assert any("turn_taking got no" in note and "audio" in note for note in stranger.notes)
    assert compare(a, stranger)["only_b"] == ["activity", "turn_over"]


def test_a_recording_without_predictions_or_ticks(toy: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.mcap", toy, 1.0, predictions=False)
    with pytest.raises(FileError, match="holds no predictions"):
        recorded(path)
    with pytest.raises(FileError, match="holds no labels"):
        labels_of(path)
    settings = msgspec.json.encode(config.load(None, {"engine.model": str(toy)})).decode()
    Recorder(tmp_path / "b.mcap", SESSION, {"config": settings}).close({})
    with pytest.raises(FileError, match="holds no ticks"):
        predicted(tmp_path / "b.mcap", str(toy), "cpu")


# --- labels


def test_a_model_is_scored_by_the_labels(toy: Path, recording: Path) -> None:
    a = predicted(recording, str(toy), "cpu")
    row = score(a, labels_of(recording))["next"]
    since_s = (a.event_ns - BEGIN) / 1e9
    true = np.where(
        (since_s >= 1) & (since_s < 2) | (since_s >= 3.5), 0, np.where((since_s >= 2) & (since_s < 3), 1, -1)
    )
    said = a.heads["next"].argmax(1)
    known = true >= 0
    assert row["ticks"] == known.sum()
    assert row["unknown"] == (~known).sum()
    assert row["accuracy"] == pytest.approx((said == true)[known].mean())
    shares = [(said[true == c] == c).mean() for c in (0, 1)]
    assert row["balanced_accuracy"] == pytest.approx(np.mean(shares))
    table = [[int(((true == t) & (said == s)).sum()) for s in (0, 1)] for t in (0, 1)]
    assert row["confusion"] == {"labels": ["yes", "no"], "true_by_said": table}
    # one change from known to known: at 2 s, from yes to no
    followed = np.flatnonzero((since_s >= 2) & (since_s < 3) & (said == 1))
    assert row["changes"]["count"] == 1
    assert row["changes"]["followed"] == bool(len(followed))
    if len(followed):
        assert row["changes"]["p50_ms"] == pytest.approx((since_s[followed[0]] - 2) * 1000)


def test_a_yes_no_head_and_a_head_that_predicts_the_future(recording: Path) -> None:
    times = BEGIN + 40_000_000 * np.arange(1, 101, dtype=np.int64)
    ticks = np.arange(100, dtype=np.int64)
    true = (times - BEGIN >= 1_000_000_000) & (times - BEGIN < 2_000_000_000) | (times - BEGIN >= 3_500_000_000)
    late = np.roll(true, 3)
    late[:3] = False
    specs = {
        "yes": HeadSpec("yes", "classification", 1),
        "ahead": HeadSpec("ahead", "classification", 2, ("yes", "no"), ((0.0, 0.2),)),
        "other": HeadSpec("other", "classification", 2, ("up", "down")),
    }
    ahead = np.stack([np.roll(true, -5), ~np.roll(true, -5)], 1).astype(np.float32)
    heads = {"yes": late.astype(np.float32)[:, None], "ahead": ahead, "other": ahead}
    found = score(PredictionTrack("x", "sha", ticks, times, heads, specs), labels_of(recording))
    assert set(found) == {"yes", "ahead"}
    assert found["yes"]["ticks"] == int((times - BEGIN >= 1_000_000_000).sum())
    # three ticks late, at the changes at 2.0 and 3.5 s (ticks end at multiples of 40 ms; 3.52 is the first from 3.5 on)
    changes = found["yes"]["changes"]
    assert (changes["count"], changes["followed"], changes["missed"]) == (2, 2, 0)
    assert (changes["p50_ms"], changes["max_ms"]) == (120.0, 140.0)
    assert found["ahead"]["accuracy"] == 1.0
    # it predicts no five ticks before `no` was typed
    assert found["ahead"]["changes"]["p50_ms"] == -200.0
    only = PredictionTrack("x", "sha", ticks, times, {"other": ahead}, specs)
    with pytest.raises(UsageError, match="no head for the labels no, yes; the heads that take labels are"):
        score(only, labels_of(recording))


# --- the plot


@pytest.mark.slow
def test_a_plot_says_in_words_what_differs_and_shows_where(tmp_path: Path) -> None:
    spec = HeadSpec("over", "classification", 1)
    plain = np.full((400, 1), 0.4, np.float32)
    other = plain.copy()
    other[50] = 0.9  # one tick alone
    other[250:290] = 0.6
    other[300] = np.nan
    plots.draw(tmp_path / "a.svg", track({"over": plain}, specs=(spec,)), track({"over": other}, specs=(spec,)))
    # matplotlib writes the text of an SVG as a comment beside its shapes
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert "over: 42 of 400 ticks differ, by up to 0.5; decisions differ on 42 (red)" in text
    assert (found := re.search(r"the 4.0 s that differ most, from ([0-9.]+) s on", text))
    assert 250 - 60 <= round(float(found[1]) / 0.04) <= 250
    assert text.count("<!-- probability -->") == text.count("<!-- seconds from the first common tick -->") == 2
    plots.draw(tmp_path / "b.svg", track({"over": plain}), track({"over": plain}))
    text = (tmp_path / "b.svg").read_text(encoding="utf-8")
    assert "over: the same in both" in text
    assert "differ most" not in text
    short = track({"over": plain[:20]}), track({"over": other[40:60]})
    plots.draw(tmp_path / "c.png", *short)
    plots.draw(tmp_path / "d.png", track({"over": plain}), track({"x": plain}))
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=r"cannot be written: .*; name another place"):
        plots.draw(tmp_path / "file" / "e.png", *short)


# --- the command


def test_exit_codes_of_the_command(toy: Path, other: Path, recording: Path, tmp_path: Path) -> None:
    code, same, err = run(recording, "--model", toy, "--model", toy)
    assert (code, err) == (0, "")
    assert same["comparison"]["equal"]  # type: ignore[index]
    code, then, _ = run(recording, "--model", toy)
    assert code == 0
    assert then["b"]["name"] == "recorded"  # type: ignore[index]
    plot = tmp_path / "plots" / "a.png"
    code, differs, err = run(recording, "--model", toy, "--model", other, "--labels", "--plot", plot)
    assert code == 1, err
    assert differs["comparison"]["heads"]["next"]["different"] > 0  # type: ignore[index]
    assert set(differs["labels"]) == {"a", "b"}  # type: ignore[call-overload]
    assert plot.read_bytes().startswith(b"\x89PNG")
    code, labelled, _ = run(recording, "--labels")
    assert (code, labelled["comparison"], labelled["a"]["name"]) == (0, None, "recorded")  # type: ignore[index]
    content = recording.read_bytes()
    (tmp_path / "cut.mcap").write_bytes(content[: len(content) // 2])
    code, cut, err = run(tmp_path / "cut.mcap", "--model", toy, "--model", other)
    assert code == 3
    assert "cut off" in err
    assert cut["damage"]


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """Restores the signal handlers that the verb replaces."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_table_for_people(toy: Path, other: Path, recording: Path) -> None:
    from typer.testing import CliRunner

    from stream_mmrnn.cli.app import app

    done = CliRunner().invoke(app, ["diff", str(recording), "--model", str(toy), "--model", str(other), "--labels"])
    assert done.exit_code == 1
    for words in (
        "other decisions",
        "first at 0.00 s",
        "different",
        "labelled ticks: accuracy",
        "true label, by prediction",
    ):
        assert words in done.stdout, done.stdout


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "name what to compare"),
        (["--model", "a", "--model", "b", "--model", "c"], "3 models were named"),
        (["--model", "nix", "--model", "nix"], "no model 'nix'"),
        (["--model", "digits", "--plot", "a.txt"], "cannot be a plot"),
    ],
)
def test_wrong_usage_is_an_error(recording: Path, args: list[str], words: str) -> None:
    from typer.testing import CliRunner

    from stream_mmrnn.cli.app import app

    with pytest.raises(UsageError, match=words):
        CliRunner().invoke(app, ["diff", str(recording), *args], catch_exceptions=False)
