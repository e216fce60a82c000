"""Training: it learns, resumes, keeps the last good checkpoint, and exports what it learned."""

from __future__ import annotations

import os
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import COMMAND, Running, recording_grows, run, subprocess

from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.training import metrics
from stream_mmrnn.training import recipe as recipes
from stream_mmrnn.training.checkpoints import load
from stream_mmrnn.training.data import Task, Ticks
from stream_mmrnn.training.evaluate import evaluate
from stream_mmrnn.training.export import export
from stream_mmrnn.training.served import evaluate as evaluate_served
from stream_mmrnn.training.train import Diverged, Trainer, TrainingStopped

pytestmark = pytest.mark.process

NAMES = ("audio", "text")


def recipe_of(**train: object) -> recipes.Recipe:
    return recipes.parse(
        {
            "name": "parity",
            "modalities": {"audio": {"size": 4, "energy": 0.9}, "text": {"size": 2}},
            "heads": [
                {"name": "more", "kind": "classification", "size": 2, "labels": ["no", "yes"]},
                {"name": "level", "kind": "regression", "size": 1},
            ],
            "fusion": {"kind": "gated", "width": 16, "modality_dropout": 0.1},
            "cell": {"kind": "gru", "hidden": 16},
            "train": {"epochs": 6, "batch": 8, "length": 20, "learning_rate": 0.01, **train},
            "data": {"kind": "none"},
        }
    )


def ticks(rng: np.random.Generator, length: int = 60) -> Ticks:
    """Were there more ups than downs in the last ticks? Both modalities show it; each is sometimes absent."""
    up = rng.choice([-1.0, 1.0], length).astype(np.float32)
    level = np.convolve(up, 0.7 ** np.arange(12))[:length].astype(np.float32)
    present = (rng.random((length, 2)) < 0.9).astype(np.float32)
    audio = np.stack([up, -up, up * 0.5, np.zeros_like(up)], 1) + 0.05 * rng.standard_normal((length, 4))
    features = {"audio": audio.astype(np.float32), "text": np.stack([up, up * 2], 1)}
    features = {n: x * present[:, i : i + 1] for i, (n, x) in enumerate(features.items())}
    age = np.where(present > 0, 0, 1).astype(np.float32)
    one = np.ones(length, np.float32)
    targets = {"more": (level > 0).astype(np.int64), "level": level[:, None]}
    return Ticks(features, present, age, targets, {"more": one, "level": one}, "made")


def task(nan: bool = False) -> Task:
    held = [ticks(np.random.default_rng(i)) for i in range(8)]

    def train(rng: np.random.Generator) -> list[Ticks]:
        made = [ticks(rng) for _ in range(24)]
        if nan:
            made[3].targets["level"][5] = np.inf
        return made

    return Task(train, held[:4], held[4:], {"audio": "mel@1"}, "Made up.")


def test_it_learns_and_the_exported_file_equals_the_network(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = []
    t = task()
    trainer = Trainer(recipe_of(), t, tmp_path)
    trainer.run(rows.append)
    losses = [r["validation_loss"] for r in rows if r["event"] == "epoch"]
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.predictor.tokens.reduced["audio"] == 2  # three of the four numbers are equal, the fourth is noise
    scores = evaluate(trainer.predictor, t.test)
    assert scores["more"]["accuracy"] > 0.85
    assert scores["level"]["r2"] > 0.7
    assert scores["more"]["calibration_error"] < 0.15
    export(trainer.predictor, tmp_path / "step.onnx", t.origins)
    served = evaluate_served(tmp_path / "step.onnx", recipe_of(), t.test)
    for head in ("more", "level"):
        assert served[head]["primary"] == pytest.approx(scores[head]["primary"], abs=2e-3)
    alone = evaluate_served(tmp_path / "step.onnx", recipe_of(), t.test, ["text"])
    assert alone["more"]["accuracy"] == pytest.approx(
        evaluate(trainer.predictor, t.test, ["text"])["more"]["accuracy"], abs=5e-3
    )
    again, origins = load(tmp_path / "best.safetensors")
    assert origins == {"audio": "mel@1"}
    assert evaluate(again, t.test)["more"]["log_loss"] == pytest.approx(scores["more"]["log_loss"], abs=1e-6)


def test_a_stopped_run_resumes_with_the_same_result(tmp_path: Path) -> None:
    whole = Trainer(recipe_of(epochs=4), task(), tmp_path / "whole")
    whole.run()
    first = Trainer(recipe_of(epochs=4), task(), tmp_path / "cut")
    seen: list[object] = []

    def in_the_third() -> bool:
        return seen.count("epoch") == 2 and seen[-1] == "step"

    first.run(lambda what: seen.append(what["event"]), lambda: not in_the_third())
    assert first.stopped
    assert first.epoch == 2
    second = Trainer(recipe_of(epochs=4), task(), tmp_path / "cut", resume=True)
    assert second.epoch == 2
    second.run()
    for name, value in whole.predictor.state_dict().items():
        assert torch.equal(value, second.predictor.state_dict()[name]), name
    with pytest.raises(UsageError, match="was made with another recipe"):
        Trainer(recipe_of(epochs=5), task(), tmp_path / "cut", resume=True)


def test_a_run_stopped_in_its_first_epoch_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped, match="stopped in its first epoch"):
        Trainer(recipe_of(), task(), tmp_path).run(alive=lambda: False)
    assert not (tmp_path / "best.safetensors").exists()


def test_a_loss_that_is_not_finite_ends_training_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    Trainer(recipe_of(epochs=1), task(), tmp_path).run()
    before = (tmp_path / "best.safetensors").read_bytes()
    with pytest.raises(Diverged, match="the last good checkpoint is in"):
        Trainer(recipe_of(), task(nan=True), tmp_path).run()
    assert (tmp_path / "best.safetensors").read_bytes() == before
    load(tmp_path / "best.safetensors")


def test_files_that_are_not_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="there is no checkpoint"):
        load(tmp_path / "no.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"hello")
    with pytest.raises(FileError, match="is not a checkpoint of this program"):
        load(tmp_path / "bad.safetensors")
    Trainer(recipe_of(epochs=1), task(), tmp_path).run()
    whole = (tmp_path / "best.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FileError, match="is not a checkpoint of this program"):
        load(tmp_path / "cut.safetensors")


def test_data_without_targets_are_refused(tmp_path: Path) -> None:
    empty = ticks(np.random.default_rng(0))
    unlabelled = Ticks(
        empty.features, empty.present, empty.age_s, empty.targets, {n: w * 0 for n, w in empty.weights.items()}
    )
    with pytest.raises(FileError, match="no tick has a label for the head 'more'"):
        Trainer(recipe_of(), Task(lambda _: [unlabelled], [], []), tmp_path)
    with pytest.raises(FileError, match="has no sequence"):
        Trainer(recipe_of(), Task(lambda _: [], [], []), tmp_path)


def test_scores_follow_their_definitions() -> None:
    score = np.array([0.1, 0.4, 0.35, 0.8])
    truth = np.array([0, 0, 1, 1])
    assert metrics.auc(score, truth) == 0.75
    assert metrics.auc(np.ones(4), truth) == 0.5
    assert metrics.balanced_accuracy(np.array([0, 0, 0, 1]), truth) == 0.75
    assert metrics.best_threshold(np.array([0.1, 0.2, 0.8, 0.9]), truth) == 0.2
    error, curve = metrics.calibration(np.full(10, 0.7), np.arange(10) < 7)
    assert error == pytest.approx(0)
    assert curve == [(pytest.approx(0.7), pytest.approx(0.7), 10)]
    assert metrics.confusion(np.array([0, 1, 1]), np.array([0, 0, 1]), 2).tolist() == [[1, 1], [0, 1]]


def speak(fifo: int, seconds: float, phase: float) -> None:
    """Lines as a person would type them: words during the label `busy`, none during `calm`."""
    begin = time.monotonic()
    label = ""
    while (at := time.monotonic() - begin) < seconds:
        now = "busy" if int((at + phase) / 1.5) % 2 == 0 else "calm"
        if now != label:
            label = now
            os.write(fifo, f"/label {now}\n".encode())
        if now == "busy":
            os.write(fifo, b"go\n")
        time.sleep(0.1)


def test_record_label_train_and_run_on_own_data(tmp_path: Path) -> None:
    """The commands of the README, on recordings whose labels depend on the typed words."""
    folder = tmp_path / "sessions"
    folder.mkdir()
    with ExitStack() as stack:
        pipes, lives = [], []
        for i in range(3):
            read, write = os.pipe()
            path = folder / f"{i}.mcap"
            args = ("record", path, "--vision", "none", "--audio", "none", "--text", "stdin")
            live = Running(*args, stdin=read, verb=())
            stack.callback(live.close)
            os.close(read)
            live.wait_for(lambda path=path: recording_grows(path, 5_000))
            pipes.append(write)
            lives.append(live)
        typing = [threading.Thread(target=speak, args=(p, 12.0, 0.4 * i)) for i, p in enumerate(pipes)]
        for t in typing:
            t.start()
        for t in typing:
            t.join()
        for live in lives:
            code, summary, _ = live.end()
            assert code == 0
            assert summary["recording"]["messages"] > 500
        for p in pipes:
            os.close(p)
    code, info, _ = run("info", folder / "0.mcap")
    assert info["channels"]["label"]["messages"] >= 7
    # a label is not text: the model must not see it
    assert info["channels"]["feature/text"]["messages"] == info["channels"]["raw/text"]["messages"]

    out = tmp_path / "mine"
    code, trained, err = run("train", "--data", folder, "--out", out, "--name", "mine", timeout=240)
    assert code == 0, err
    # chance is a half; a busy machine types late, and comes to .8
    assert trained["test"]["label"]["accuracy"] > 0.7, "on an unseen recording"
    for name in ("step.onnx", "recipe.toml", "card.md", "report.json", "learning.png", "best.safetensors"):
        assert (out / name).is_file(), name
    assert recipes.load(out / "recipe.toml").heads[0].labels == ("busy", "calm")

    code, measured, err = run("evaluate", out, "--data", folder)
    assert code == 0, err
    assert measured["test"]["label"]["accuracy"] == pytest.approx(trained["test"]["label"]["accuracy"], abs=5e-3)
    code, _, err = run("evaluate", out, "--data", folder, "--present", "smell")
    assert (code, "no modality smell" in err) == (2, True)

    path = tmp_path / "live.mcap"
    code, live_summary, err = run(
        "live", "--vision", "none", "--audio", "synthetic", "--text", "synthetic", "--duration", "2",
        "--model", out / "step.onnx", "--record", path,
    )  # fmt: skip
    assert code == 0, err
    assert live_summary["predictions"] > 40
    code, replayed, _ = run("replay", path, "--verify")
    assert (code, replayed["identical"]) == (0, True)

    code, exported, err = run("export", out / "best.safetensors", "--out", tmp_path / "again.onnx", "--int8")
    assert code == 0, err
    assert max(exported["parity"].values()) <= 1e-5


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train"], "nothing to train on"),
        (["train", "/no/recipe.toml"], "/no/recipe.toml cannot be read"),
        (["train", "--data", "/no/such.mcap"], "/no/such.mcap cannot be read"),
        (["evaluate", "/no/model"], "has no recipe.toml"),
        (["export", "/no/best.safetensors"], "there is no checkpoint"),
    ],
)
def test_usage_errors_of_training_verbs(args: list[str], words: str) -> None:
    done = subprocess.run([*COMMAND, *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_recordings_without_labels_say_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    code, _, _ = run("record", path, "--vision", "none", "--audio", "synthetic", "--text", "none", "--duration", "1")
    assert code == 0
    done = subprocess.run([*COMMAND, "train", "--data", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "type `/label NAME` while recording" in done.stderr
    recipe = {
        "name": "vap",
        "modalities": {"audio": {"size": 81}},
        "heads": [{"name": "act", "kind": "classification", "size": 2, "labels": ["sitting", "flying"]}],
        "data": {"kind": "recordings"},
    }
    (tmp_path / "recipe.toml").write_text(recipes.msgspec.toml.encode(recipe).decode())
    done = subprocess.run(
        [*COMMAND, "train", str(tmp_path / "recipe.toml"), "--data", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "has a target for the head 'act' (sitting, flying)" in done.stderr


def test_held_out_ticks_without_labels_are_an_error(tmp_path: Path) -> None:
    """One recording: its last quarter is held out, and only its first half has labels."""
    path = tmp_path / "a.mcap"
    read, write = os.pipe()
    live = Running("record", path, "--vision", "none", "--audio", "synthetic", "--text", "stdin", stdin=read, verb=())
    try:
        os.close(read)
        live.wait_for(lambda: recording_grows(path, 20_000))
        for line in ("/label sitting", "/label walking", "/label none"):
            os.write(write, f"{line}\n".encode())
            time.sleep(0.3)
        time.sleep(3)
        assert live.end()[0] == 0
    finally:
        os.close(write)
        live.close()
    done = subprocess.run([*COMMAND, "train", "--data", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "(the last quarter of each recording) has a target for the head 'label'" in " ".join(done.stderr.split())
