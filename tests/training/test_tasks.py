"""Tasks on published data: on tiny files in each layout, and on a few sequences of the real data."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from dataset_files import idx, riff, tar, write, zipped
from places import ROOT, SHARED

from stream_mmrnn.capture.encoders.text import TextEncoder
from stream_mmrnn.capture.encoders.tokens import TokenEncoder
from stream_mmrnn.core.config import models_folder
from stream_mmrnn.core.errors import ConfigError, FileError, UsageError
from stream_mmrnn.graph.runtime import Graph
from stream_mmrnn.predict.columns import MAX_AGE_S
from stream_mmrnn.training import recipe as recipes
from stream_mmrnn.training import tasks
from stream_mmrnn.training.data import Task, Ticks, check
from stream_mmrnn.training.datasets import fsdd, hapt
from stream_mmrnn.training.recipe import Recipe
from stream_mmrnn.training.tasks import activity, digits, mnist, polarity

MODELS = ROOT / "models"
NAMES = ("digits", "activity", "mnist_rows", "polarity")


def recipe(name: str, options: Mapping[str, Any] | None = None, **changes: Any) -> Recipe:
    """The recipe of a model, with other data options."""
    table = msgspec.to_builtins(recipes.load(MODELS / name / "recipe.toml"))
    table["data"]["options"] |= options or {}
    return recipes.parse(table | changes)


def epoch(task: Task, seed: int = 0) -> list[Ticks]:
    return list(task.train(np.random.default_rng(seed)))


def same(one: Sequence[Ticks], other: Sequence[Ticks]) -> bool:
    """All arrays of all sequences, bit for bit."""

    def parts(t: Ticks) -> list[np.ndarray]:
        return [*t.features.values(), t.present, t.age_s, *t.targets.values(), *t.weights.values()]

    return len(one) == len(other) and all(
        np.array_equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(parts(x), parts(y), strict=True)
    )


def fits(task: Task, of: Recipe) -> None:
    """Check the invariants of `Ticks` for every sequence of every part."""
    for ticks in [*epoch(task), *task.validation, *task.test]:
        check(ticks, of)
        count = len(ticks)
        assert ticks.present.shape == ticks.age_s.shape == (count, len(of.modalities))
        assert ticks.present.dtype == ticks.age_s.dtype == np.float32
        assert list(ticks.features) == list(of.modalities)
        assert ticks.age_s.min() >= 0
        assert ticks.age_s.max() <= MAX_AGE_S
        for i, x in enumerate(ticks.features.values()):
            assert x.dtype == np.float32
            assert not x[ticks.present[:, i] == 0].any()
        for head in of.heads:
            target, weight = ticks.targets[head.name], ticks.weights[head.name]
            assert weight.shape == (count,)
            assert weight.dtype == np.float32
            assert target.shape == ((count, head.size) if head.kind == "regression" else (count,))
            if head.kind == "classification":
                assert target.dtype == np.int64
                assert target.min() >= 0
                assert target.max() < head.size
    assert task.about.endswith(".")
    assert "\n" not in task.about


@pytest.mark.parametrize("name", NAMES)
def test_the_models_recipes_are_recipes(name: str) -> None:
    of = recipe(name)
    assert of.name == name
    assert of.data.kind in tasks.KINDS
    quick = recipes.quick(of)
    assert quick.train.epochs < of.train.epochs
    options = {
        "digits": digits.DigitsOptions,
        "activity": activity.ActivityOptions,
        "mnist": mnist.MnistOptions,
        "polarity": polarity.PolarityOptions,
    }
    msgspec.convert(of.data.options, options[of.data.kind])


@pytest.mark.process
def test_the_tasks_need_no_torch() -> None:
    names = ", ".join(f"{tasks.__name__}.{kind}" for kind in tasks.KINDS)
    code = f"import sys, {names}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# ---- digits --------------------------------------------------------------------------------------------------------

DIGITS = {
    "train": 3,
    "validation": 2,
    "test": 2,
    "items": 5,
    "images": 20,
    "complete": 0.3,
    "noise": ["white", "babble"],
}


def image(label: int, number: int) -> np.ndarray:
    """An image that identifies itself: the digit in the first pixel, the image number in the second."""
    out = np.zeros((28, 28), np.uint8)
    out[0, :3] = label, number % 256, 255
    return out


def images(labels: np.ndarray, first: int) -> np.ndarray:
    return np.stack([image(int(label), first + i) for i, label in enumerate(labels)])


def tone(digit: int, index: int, speaker: int) -> np.ndarray:
    seconds = np.arange(2400 + 100 * index) / 8000
    return (8000 * np.sin(2 * np.pi * (300 + 250 * digit + 20 * speaker) * seconds)).astype(np.int16)


@pytest.fixture(scope="module")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images 0 to 39 to train, 40 to 59 to validate, 200 to 219 to test; 3 speakers with 12 recordings per digit."""
    folder = tmp_path_factory.mktemp("digits")
    labels = (np.arange(60) % 10).astype(np.uint8)
    test = (np.arange(20) % 10).astype(np.uint8)
    tree = {
        "package/data/train-images-idx3-ubyte": idx(images(labels, 0)),
        "package/data/train-labels-idx1-ubyte": idx(labels),
        "package/data/t10k-images-idx3-ubyte": idx(images(test, 200)),
        "package/data/t10k-labels-idx1-ubyte": idx(test),
    }
    tar(folder / "mnist.tgz", tree, "w:gz")
    sounds = {
        f"recordings/{d}_{s}_{i}.wav": riff(tone(d, i, n))
        for d in range(10)
        for n, s in enumerate(("george", "theo", "yweweler"))
        for i in range(12)
    }
    write(folder / "fsdd", sounds)
    write(folder, {"another.wav": riff(tone(0, 0, 0)), "mnist.txt": b"nothing"})
    return folder


@pytest.fixture(scope="module")
def digits_task(digits_folder: Path) -> Task:
    return tasks.create(recipe("digits", DIGITS), [digits_folder])


def seen(sequences: Sequence[Ticks]) -> set[tuple[int, int]]:
    """Digit and image number of each image."""
    rows = np.concatenate([t.features["vision"][t.present[:, 0] > 0] for t in sequences])
    return {(round(a * 255), round(b * 255)) for a, b in rows[:, :2].tolist()}


@pytest.mark.slow
def test_digits_are_valid_and_reproducible(digits_task: Task, digits_folder: Path) -> None:
    of = recipe("digits", DIGITS)
    fits(digits_task, of)
    # file by file and with another training seed, validation and test do not change
    other = recipe("digits", DIGITS, train={"seed": 7})
    again = tasks.create(other, [digits_folder / "fsdd", digits_folder / "mnist.tgz"])
    assert same(epoch(digits_task, 3), epoch(again, 3))
    assert same(digits_task.validation, again.validation)
    assert same(digits_task.test, again.test)
    assert not same(digits_task.test, digits_task.validation)
    assert [len(digits_task.validation), len(digits_task.test), len(epoch(digits_task))] == [2, 2, 3]
    assert digits_task.origins["text"] == TextEncoder().origin


@pytest.mark.slow
def test_digits_are_new_in_every_epoch(digits_task: Task) -> None:
    rng = np.random.default_rng(0)
    first, second = list(digits_task.train(rng)), list(digits_task.train(rng))
    assert not same(first, second)
    count = min(len(first[0]), len(second[0]))
    a, b = (t[0].features["audio"][:count] for t in (first, second))
    assert not (np.abs(a - b).max(1) < 1e-4).any()  # noise in every tick, never the same
    assert all(t.present[:, 1].all() for t in first)


@pytest.mark.slow
def test_digits_keep_test_and_validation_out_of_training(digits_task: Task) -> None:
    train = {n for s in range(30) for _, n in seen(epoch(digits_task, s))}
    assert train <= set(range(40))
    assert len(train) > 20
    assert {n for _, n in seen(digits_task.validation)} <= set(range(40, 60))
    assert {n for _, n in seen(digits_task.test)} <= set(range(200, 220))


@pytest.mark.slow
@pytest.mark.parametrize("speakers", ["official", "independent"])
def test_digits_split_the_recordings(digits_folder: Path, speakers: str) -> None:
    found = fsdd.load(digits_folder / "fsdd")
    parts = digits._spoken(found, digits.DigitsOptions(speakers=speakers))  # type: ignore[arg-type]
    keys = [{(r.speaker, r.digit, r.index) for r in part} for part in parts]
    assert sum(map(len, keys)) == len(set().union(*keys)) == len(found)
    if speakers == "official":
        assert [{i for _, _, i in part} for part in keys] == [{10, 11}, set(range(5, 10)), set(range(5))]
    else:
        assert [{s for s, _, _ in part} for part in keys] == [{"george"}, {"yweweler"}, {"theo"}]
    task = tasks.create(recipe("digits", {**DIGITS, "speakers": speakers}), [digits_folder])
    named = {t.groups["speaker"] for t in task.test}
    assert named == {"theo"} or speakers == "official"
    if speakers == "independent":
        assert {t.groups["speaker"] for t in epoch(task)} == {"george"}
        assert "theo for the test" in task.about


def test_digits_targets_follow_the_rule(digits_task: Task) -> None:
    encoder = digits.Words()
    plain = {digit: encoder[word] for digit, word in enumerate(digits.WORDS)}
    exact = 0
    for ticks in [*epoch(digits_task), *digits_task.test]:
        step = digits.RULES[ticks.groups["rule"]]
        now, later = ticks.weights["digit"] > 0, ticks.weights["next_digit"] > 0
        begins = np.flatnonzero(np.diff(now.astype(int), prepend=0) == 1)
        assert len(begins) == 5
        shown = ticks.targets["digit"][begins]
        assert ((np.diff(shown) - step) % 10 == 0).all()
        assert (ticks.targets["next_digit"][later] == (ticks.targets["digit"][later] + step) % 10).all()
        assert np.array_equal(later, now & (np.arange(len(ticks)) >= begins[2]))
        # an image is shown within its item, and at most 0.2 s before the item is scored
        visible = np.flatnonzero(ticks.present[:, 0])
        for k in visible.tolist():
            item = int(np.searchsorted(begins, k + 6, "right")) - 1
            assert round(ticks.features["vision"][k, 0] * 255) == shown[item]
        for k in np.flatnonzero(ticks.present[:, 2]).tolist():
            item = int(np.searchsorted(begins, k + 6, "right")) - 1
            exact += np.array_equal(ticks.features["text"][k], plain[int(shown[item])])
        for i in (0, 2):
            present = ticks.present[:, i] > 0
            assert (ticks.age_s[present, i] < 0.04 + 1e-6).all()
            absent = np.flatnonzero(~present[1:]) + 1
            steps = ticks.age_s[absent, i] - ticks.age_s[absent - 1, i]
            assert np.allclose(steps[ticks.age_s[absent, i] < MAX_AGE_S], 0.04, atol=1e-5)
            if present.any():
                assert (ticks.age_s[: np.flatnonzero(present)[0], i] == MAX_AGE_S).all()
        assert not ticks.age_s[:, 1].any()
    assert exact > 5


@pytest.mark.slow
def test_digits_have_all_sets_of_modalities(digits_folder: Path) -> None:
    every = tasks.create(recipe("digits", {**DIGITS, "complete": 1.0, "typos": 0.0}), [digits_folder])
    for ticks in epoch(every):
        assert ticks.present[:, 2].sum() == 5
        shown = np.flatnonzero(np.diff(ticks.present[:, 0], prepend=0) == 1)
        assert len(shown) >= 5
    # a recipe may use fewer, in another order
    table = msgspec.to_builtins(recipe("digits", DIGITS))
    table["modalities"] = {m: table["modalities"][m] for m in ("text", "vision")}
    table["heads"] = table["heads"][1:]
    less = recipes.parse(table)
    task = tasks.create(less, [digits_folder])
    fits(task, less)
    assert list(task.origins) == ["text"]


@pytest.mark.slow
def test_noise_has_the_given_level() -> None:
    of = recipe("digits", DIGITS)
    rng = np.random.default_rng(0)
    said = tuple((digits._upsampled(tone(d, 0, 0)),) for d in range(10))
    pool = digits.Pool((), {"george": said})
    others = [digits._upsampled(tone(d, i, 1)) for d in range(10) for i in range(4)]

    def level(part: np.ndarray) -> float:
        """Power below 4 kHz."""
        return float((np.abs(np.fft.rfft(part / 32768))[: len(part) // 4] ** 2).sum() / len(part) ** 2 * 2)

    for noise in ("white", "babble"):
        options = digits.DigitsOptions(noise=(noise,))  # type: ignore[arg-type]
        maker = digits.Maker(of, options, others)
        ratios = []
        for _ in range(100):
            sound = maker._sound([(4, 0.0, 1.0)], pool, "george", 3 * digits.RATE, rng).astype(float)
            spoken, rest = sound[1000:4500], sound[digits.RATE :]
            ratios.append(level(spoken) / level(rest) - 1)
        assert abs(10 * np.log10(np.mean(ratios)) + 5) < 1.0
    quiet = digits.Maker(of, digits.DigitsOptions(snr_db=60.0, noise=("white",)), [])
    sound = quiet._sound([(4, 0.5, 0.6)], pool, "george", digits.RATE, rng)
    assert np.abs(sound[: digits.RATE // 2]).max() * 50 < np.abs(sound).max()
    assert np.abs(sound[digits.RATE * 6 // 10 :]).max() * 50 < np.abs(sound).max()  # truncated at the end of its item


def test_logmel_equals_the_runtime() -> None:
    graph = Graph(models_folder() / "encoders" / "logmel80.onnx")
    bound = graph.bind({"samples": (1, digits.WINDOW)}, {"features": (1, digits.MELS)}, {})
    rng = np.random.default_rng(0)
    for level in (0, 20, 1000, 9000):
        samples = np.clip(level * rng.standard_normal(20 * digits.HOP), -32768, 32767).astype(np.int16)
        window = np.zeros(digits.WINDOW, np.float32)
        expected = []
        for hop in samples.reshape(-1, digits.HOP):
            window = np.concatenate([window[digits.HOP :], hop.astype(np.float32) / np.float32(32768)])
            bound.inputs["samples"][0] = window
            bound.run()
            expected.append(bound.outputs["features"][0].copy())
        assert np.abs(digits.logmel(samples) - np.stack(expected)).max() < 2e-6


def test_upsampling_keeps_a_tone() -> None:
    doubled = digits._upsampled(tone(2, 5, 0))
    expected = np.sqrt(2) * np.sin(2 * np.pi * 800 * np.arange(len(doubled)) / 16_000)
    assert len(doubled) == 2 * len(tone(2, 5, 0))
    assert np.abs(doubled - expected)[200:-200].max() < 0.02


def test_misspelling() -> None:
    rng = np.random.default_rng(0)
    assert [digits.misspelt(w, 0.0, rng) for w in digits.WORDS] == list(digits.WORDS)
    typed = [digits.misspelt("seven", 0.2, rng) for _ in range(500)]
    assert 0.2 < np.mean([t == "seven" for t in typed]) < 0.5
    assert {len(t) for t in typed} >= {4, 5}
    assert "esven" in typed
    assert "srven" in typed
    assert all(digits.misspelt("a", 1.0, rng) for _ in range(50))
    near = digits._NEAR
    assert all(a in near[b] for a in near for b in near[a])
    assert set(near["s"]) == set("adwezx")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"trian": 3}, "unknown key `trian`"),
        ({"typos": 2}, "`typos` has a wrong value"),
        ({"noise": []}, "noise is empty"),
        ({"speakers": "independent", "test_speakers": ["nobody"]}, "nobody"),
        ({"speakers": "independent", "test_speakers": ["theo", "george"]}, "training data have no"),
        ({"images": 60}, "training data have no"),
    ],
)
def test_digits_refuse(digits_folder: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigError, FileError, UsageError), match=says):
        tasks.create(recipe("digits", {**DIGITS, **options}), [digits_folder])


def test_recipes_that_do_not_fit_the_data_are_refused(digits_folder: Path) -> None:
    table = msgspec.to_builtins(recipe("digits"))
    for change, says in (
        ({"modalities": {"audio": {"size": 81}}}, "no modality 'audio' of 81"),
        ({"modalities": {"signal": {"size": 80}}}, "no modality 'signal'"),
        ({"heads": [{"name": "mood", "kind": "classification", "size": 10}]}, "a head 'mood'"),
        ({"heads": [{"name": "digit", "kind": "classification", "size": 9}]}, "'digit' does not fit"),
        ({"heads": [{"name": "digit", "kind": "regression", "size": 10}]}, "'digit' does not fit"),
        ({"tick_ms": 20.0}, "ticks of 40 ms"),
    ):
        with pytest.raises(ConfigError, match=says):
            tasks.create(recipes.parse(table | change), [digits_folder])


# ---- activity ------------------------------------------------------------------------------------------------------

SUBJECTS = (1, 2, 3, 7, 8)
STRETCHES = ((4, 10, 309), (7, 310, 400), (5, 401, 1000), (1, 1051, 1200))
"""Activity, first and last sample; samples in between have no label."""
ACTIVITY: dict[str, Any] = {"validation_subjects": [7]}


def motion(subject: int, count: int = 1300) -> np.ndarray:
    return np.random.default_rng(subject).standard_normal((count, 6)).astype(np.float32)


def motion_labels(count: int = 1300) -> np.ndarray:
    labels = np.full(count, hapt.NONE, np.int8)
    for name, first, last in STRETCHES:
        labels[first : last + 1] = name
    return labels


@pytest.fixture(scope="module")
def hapt_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hapt")
    count = 1300
    arrays = {
        f"u{s:02}_e0": np.hstack([motion(s), np.arange(count)[:, None], motion_labels()[:, None]]).astype(np.float32)
        for s in SUBJECTS
    }
    np.savez(folder / "hapt.npz", **arrays)
    return folder


def test_activity_is_the_recording_tick_by_tick(hapt_folder: Path) -> None:
    of = recipe("activity", {**ACTIVITY, "test": "ticks"})
    task = tasks.create(of, [hapt_folder])
    fits(task, of)
    (ticks,) = task.test
    assert ticks.groups == {"subject": "2"}
    signals, labels = motion(2), motion_labels()
    assert len(ticks) == 650
    for k in (0, 5, 649):
        assert np.array_equal(ticks.features["signal"][k], signals[2 * k : 2 * k + 2].ravel())
    held = labels[1::2]
    assert np.array_equal(ticks.weights["activity"] > 0, held != hapt.NONE)
    names = np.array(activity.LABELS)[ticks.targets["activity"]]
    assert set(names[held == 7]) == {"stand_to_sit"}
    assert set(names[held == 5]) == {"standing"}
    forecast, known = ticks.targets["forecast"], ticks.weights["forecast"]
    for k in (0, 77, 624):
        after = signals[2 * k + 2 : 2 * k + 52].reshape(5, 10, 6).mean(1)
        assert np.allclose(forecast[k], after.ravel(), atol=1e-5)
    assert known[:625].all()
    assert not known[625:].any()


def test_activity_windows_are_the_published_ones(hapt_folder: Path) -> None:
    ends = activity.window_ends(motion_labels())
    # 300 samples: windows from 0, 64, 128; 91 samples: none; 600: from 0 to 448; 150: from 0
    assert ends == [
        *range(10 + 127, 310, 64),
        *range(401 + 127, 1001, 64),
        1051 + 127,
    ]
    assert len(ends) == 3 + 8 + 1
    task = tasks.create(recipe("activity", ACTIVITY), [hapt_folder])
    (ticks,) = task.test
    at = np.flatnonzero(ticks.weights["activity"])
    assert at.tolist() == [(e + 1) // 2 - 1 for e in ends]
    assert (2 * at + 1 <= np.array(ends)).all()  # nothing from after the window
    assert set(ticks.targets["activity"][at]) == {0, 3, 4}
    (validation,) = task.validation
    assert validation.weights["activity"].sum() > 500


def test_activity_trains_on_other_subjects_with_new_splits(hapt_folder: Path) -> None:
    of = recipe("activity", ACTIVITY, train={"length": 20})
    task = tasks.create(of, [hapt_folder / "hapt.npz"])
    first, second = epoch(task, 0), epoch(task, 1)
    assert {t.groups["subject"] for t in first} == {"1", "3", "8"}
    assert sum(map(len, first)) == 3 * 650
    assert [len(t) for t in first] != [len(t) for t in second]
    assert same(first, epoch(task, 0))
    for subject in ("1", "8"):
        joined = {tuple(x) for t in first if t.groups["subject"] == subject for x in t.features["signal"].tolist()}
        assert joined == {tuple(x) for x in motion(int(subject)).reshape(650, 12).tolist()}
    noisy = tasks.create(recipe("activity", {**ACTIVITY, "noise": 0.1}, train={"length": 20}), [hapt_folder])
    assert same(noisy.test, task.test)
    assert abs(np.std([a.features["signal"].std() for a in epoch(noisy)])) < 1
    plain, with_noise = (next(t for t in epoch(x) if t.name == first[0].name) for x in (task, noisy))
    difference = plain.features["signal"][:200] - with_noise.features["signal"][:200]
    assert 0.08 < difference.std() < 0.12


def test_activity_of_fewer_classes(hapt_folder: Path) -> None:
    head = {"name": "activity", "kind": "classification", "size": 2, "labels": ["standing", "sitting"]}
    of = recipe("activity", {**ACTIVITY, "test": "ticks"}, heads=[head])
    (ticks,) = tasks.create(of, [hapt_folder]).test
    held = motion_labels()[1::2]
    assert np.array_equal(ticks.weights["activity"] > 0, np.isin(held, (4, 5)))
    assert np.array_equal(ticks.targets["activity"] == 1, held == 4)


def test_activity_refuses(hapt_folder: Path) -> None:
    table = msgspec.to_builtins(recipe("activity", ACTIVITY))
    forecast = {"name": "forecast", "kind": "regression"}
    signal = {"size": 12, "stack": 2, "reduction": "stack"}
    for change, says in (
        ({"modalities": {"signal": {**signal, "stack": 1}}}, "reduction `stack` and stack 2"),
        ({"tick_ms": 20.0}, "set tick_ms to 40"),
        ({"heads": [{**table["heads"][0], "labels": [*activity.LABELS[:-1], "flying"]}]}, "no activity 'flying'"),
        ({"heads": [{"name": "activity", "kind": "classification", "size": 3}]}, "give it the labels"),
        ({"heads": [{**forecast, "size": 6}]}, "needs horizons_s"),
        ({"heads": [{**forecast, "size": 6, "horizons_s": [[0.2, 0.2]] * 6}]}, "needs horizons_s"),
        ({"data": {"kind": "activity", "options": {"noise": -1}}}, "`noise` has a wrong value"),
    ):
        with pytest.raises(ConfigError, match=says):
            tasks.create(recipes.parse(table | change), [hapt_folder])
    for subjects, says in (([2], "subject 2"), ([1, 3, 7, 8], "no recording left to train")):
        with pytest.raises((UsageError, FileError), match=says):
            tasks.create(recipe("activity", {"validation_subjects": subjects}), [hapt_folder])


# ---- mnist ---------------------------------------------------------------------------------------------------------


def mnist_recipe(**options: Any) -> Recipe:
    return recipe("mnist_rows", {"validation": 20, "sequences": 0, "turn": 0, "stretch": 0, "shift": 0, **options})


def test_mnist_by_rows(digits_folder: Path) -> None:
    of = mnist_recipe()
    task = tasks.create(of, [digits_folder])
    fits(task, of)
    assert [len(epoch(task)), len(task.validation), len(task.test)] == [40, 20, 20]
    for i, ticks in enumerate(task.test):
        assert len(ticks) == 28
        assert np.flatnonzero(ticks.weights["digit"]).tolist() == [27]
        assert ticks.targets["digit"][-1] == i % 10
        picture = image(i % 10, 200 + i)
        assert np.array_equal(np.rint(ticks.features["vision"].reshape(28, 28) * 255), picture)
    numbers = [{round(float(t.features["vision"].ravel()[1]) * 255) for t in part} for part in (epoch(task), task.test)]
    assert numbers == [set(range(40)), set(range(200, 220))]
    assert same(epoch(task), epoch(task))
    assert not same(epoch(task, 0), epoch(task, 1))
    some = tasks.create(mnist_recipe(sequences=7, test=5), [digits_folder / "mnist.tgz"])
    assert [len(epoch(some)), len(some.test)] == [7, 5]


def test_mnist_shifts_only_training_images(digits_folder: Path) -> None:
    moved, still = (tasks.create(mnist_recipe(shift=s), [digits_folder]) for s in (2, 0))
    assert same(moved.test, still.test)
    assert same(moved.validation, still.validation)
    pictures = [t.features["vision"] for s in range(9) for t in epoch(moved, s)]
    places = {tuple(p) for x in pictures for p in np.argwhere(x == 1).tolist()}
    assert places == {(y, x) for y in range(3) for x in range(5)}  # from row 0 and column 2, two around
    rng = np.random.default_rng(0)
    dots = np.zeros((300, 28, 28), np.uint8)
    dots[:, 10, 20] = 9
    out = mnist.shifted(dots, 3, rng)
    assert {tuple(p) for p in np.argwhere(out)[:, 1:].tolist()} == {(y, x) for y in range(7, 14) for x in range(17, 24)}
    assert out.sum() == 9 * 300


def test_mnist_refuses(digits_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="60 training images, 5000 are held out"):
        tasks.create(recipe("mnist_rows"), [digits_folder])
    with pytest.raises(ConfigError, match="unknown key `by`"):
        tasks.create(recipe("mnist_rows", {"by": "pixels"}), [digits_folder])
    with pytest.raises(FileError, match="train-images"):
        tasks.create(recipe("mnist_rows"), [tmp_path])


# ---- polarity ------------------------------------------------------------------------------------------------------

LINES = [f"it is film number {' '.join(f'{i:03}')} , a film {'to like' if i % 2 else 'to hate'} ." for i in range(200)]


@pytest.fixture(scope="module")
def polarity_zip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = {
        f"sentence_polarity/rt-polarity.{kind}": "".join(line + "\n" for line in LINES[odd::2]).encode()
        for odd, kind in enumerate(("neg", "pos"))
    }
    return zipped(tmp_path_factory.mktemp("polarity") / "sentence_polarity.zip", tree)


@pytest.mark.slow
def test_polarity_has_one_word_per_tick(polarity_zip: Path) -> None:
    of = recipe("polarity", {"word_dropout": 0.0, "early": 0.2})
    task = tasks.create(of, [polarity_zip.parent])
    fits(task, of)
    assert [len(epoch(task)), len(task.validation), len(task.test)] == [160, 20, 20]
    words, tokens = polarity.Words(), polarity.Words(TokenEncoder())
    texts = {np.stack([words[w] for w in line.split()]).tobytes(): i for i, line in enumerate(LINES)}
    parts = [[texts[t.features["text"].tobytes()] for t in part] for part in (epoch(task), task.validation, task.test)]
    assert sorted(i for part in parts for i in part) == list(range(200))  # every sentence exactly once, in one part
    for part, sequences in zip(parts, (epoch(task), task.validation, task.test), strict=True):
        assert [int(t.targets["polarity"][-1]) for t in sequences] == [i % 2 for i in part]
    for ticks in task.test:
        assert np.flatnonzero(ticks.weights["polarity"]).tolist() == [len(ticks) - 1]
    for ticks in epoch(task):
        weight = ticks.weights["polarity"]
        assert weight[-1] == 1
        assert (np.diff(weight) > 0).all()
        assert weight[-2] < 0.2
    for ticks in task.test:
        said = LINES[texts[ticks.features["text"].tobytes()]].split()
        assert np.array_equal(ticks.features["text.tokens"], np.stack([tokens[w] for w in said]))
    assert task.origins == {"text": TextEncoder().origin, "text.tokens": TokenEncoder().origin}
    learnt = {t for s in epoch(task) for t in s.features["text.tokens"].ravel().astype(int).tolist()}
    assert set(task.common_tokens) == learnt - {0}

    alone = recipe("polarity", modalities={"text": {"size": TextEncoder.size}}, events={})
    fits(tasks.create(alone, [polarity_zip]), alone)


@pytest.mark.slow
def test_polarity_is_seeded(polarity_zip: Path) -> None:
    a, b = (tasks.create(recipe("polarity"), [polarity_zip]) for _ in range(2))
    assert same(a.test, b.test)
    assert same(epoch(a, 5), epoch(b, 5))
    assert not same(epoch(a, 5), epoch(a, 6))
    other = tasks.create(recipe("polarity", {"split_seed": 1}), [polarity_zip])
    assert not same(a.test, other.test)
    dropped = tasks.create(recipe("polarity", {"word_dropout": 0.9}), [polarity_zip])
    assert min(map(len, epoch(dropped))) >= 1
    assert np.mean([len(t) for t in epoch(dropped)]) < 0.6 * np.mean([len(t) for t in dropped.test])
    assert same(dropped.test, a.test)


def test_polarity_needs_enough(tmp_path: Path) -> None:
    write(tmp_path, {"rt-polarity.neg": b"bad\n", "rt-polarity.pos": b"good\n"})
    with pytest.raises(FileError, match="too few"):
        tasks.create(recipe("polarity"), [tmp_path])


# ---- the real data -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> Path:
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    return folder


@pytest.mark.slow
@pytest.mark.shared_data
def test_digits_of_the_real_data(data: Path) -> None:
    of = recipe("digits", {"train": 3, "validation": 2, "test": 2})
    task = tasks.create(of, [data])
    fits(task, of)
    assert 200 < np.mean([len(t) for t in epoch(task)]) < 500


@pytest.mark.slow
@pytest.mark.shared_data
def test_activity_of_the_real_data(data: Path) -> None:
    of = recipe("activity")
    task = tasks.create(of, [data])
    assert sum(t.weights["activity"].sum() for t in task.test) == 3162  # the rows of the published test set
    learnt = {t.groups["subject"] for t in epoch(task)}
    held = {t.groups["subject"] for t in task.validation}
    tested = {int(t.groups["subject"]) for t in task.test}
    assert [len(learnt), len(held), len(tested)] == [17, 4, 9]
    assert not learnt & held
    assert tested == hapt.TEST_SUBJECTS


@pytest.mark.slow
@pytest.mark.shared_data
def test_mnist_and_polarity_of_the_real_data(data: Path) -> None:
    task = tasks.create(recipe("mnist_rows", {"sequences": 2}), [data])
    assert [len(epoch(task)), len(task.validation), len(task.test)] == [2, 5000, 10_000]
    check(task.test[0], recipe("mnist_rows"))
    assert task.test[0].targets["digit"][-1] == 7
    words = tasks.create(recipe("polarity"), [data])
    assert [len(words.validation), len(words.test)] == [1066, 1067]
    assert 0.45 < np.mean([t.targets["polarity"][-1] for t in words.test]) < 0.55
