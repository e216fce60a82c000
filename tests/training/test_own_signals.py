"""Own recordings of a sensor: a quick model learns what is plainly there, and says which streams helped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from harness import run
from shaken_recordings import SHAKE, STILL, Experiment, Movement, recordings

from stream_mmrnn.training import recipe as recipes
from stream_mmrnn.training import tasks
from stream_mmrnn.training.own_recipe import recipe_for

SHORT = Experiment(picture=False, seconds=6.0, bout_s=1.5)


@pytest.mark.process
@pytest.mark.slow
def test_a_shake_is_told_from_rest_beside_an_unrelated_picture(tmp_path: Path) -> None:
    """Record, label, train by the verbs: .95 on a recording in which the sensor is held another way."""
    recordings(tmp_path / "sessions", Experiment())
    out = tmp_path / "mine"
    code, trained, err = run("train", "--data", tmp_path / "sessions", "--out", out, "--quick", timeout=900)
    assert code == 0, err
    assert trained["test"]["label"]["balanced_accuracy"] >= 0.95
    assert trained["ignored"] == ["camera"]
    assert trained["warnings"] == []
    assert trained["by_modalities"]["imu"]["label"] > trained["by_modalities"]["camera"]["label"]
    report = json.loads((out / "report.json").read_text())
    assert report["labels"] == {"label": ["shake", "still"]}
    assert "better without on the validation data: camera" in (out / "card.md").read_text()
    assert (out / "confusion_label.png").is_file()
    code, measured, err = run("evaluate", out, "--data", tmp_path / "sessions", timeout=120)
    assert code == 0, err
    assert measured["test"]["label"]["balanced_accuracy"] >= 0.95, "the file that is served"


@pytest.mark.parametrize(("rate_hz", "stack"), [(100.0, 4), (50.0, 2), (30.0, 1), (10.0, 1)])
def test_a_fast_signal_is_read_sample_by_sample(tmp_path: Path, rate_hz: float, stack: int) -> None:
    paths = recordings(tmp_path / "r", replace(SHORT, rate_hz=rate_hz), count=1)
    imu = recipe_for(paths, "mine").modalities["imu"]
    assert (imu.stack, imu.size, imu.reduction) == (stack, 3 * stack, "stack" if stack > 1 else "")
    assert imu.window_s > 0


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (2, "the label 'spin' has few examples: 0 for training (0.0 s), 0 for validation (0.0 s), "),
        (0, "0 for validation (0.0 s), 0 for the test (0.0 s)"),
    ],
)
def test_a_label_with_too_few_examples_is_named_with_the_numbers(tmp_path: Path, number: int, words: str) -> None:
    three = {"shake": SHAKE, "still": STILL, "spin": Movement(6.0, 0.8)}
    paths = recordings(tmp_path / "r", replace(SHORT, movements=three, only_in={"spin": number}))
    task = tasks.create(recipes.quick(recipe_for(paths, "mine")), paths)
    [found] = [text for text in task.warnings if "'spin'" in text]
    assert words in found
    assert found.endswith("record it more often, and in every recording")
