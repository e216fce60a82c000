"""Forecasts of columns: targets, simple forecasts, the split in time order, and the streaming step equal to offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from typer.testing import CliRunner
from vega_files import vega_file

from stream_mmrnn.cli.app import app
from stream_mmrnn.core.errors import ConfigError, FileError, UsageError
from stream_mmrnn.core.types import ModalitySpec
from stream_mmrnn.offline import replay
from stream_mmrnn.offline.convert import table
from stream_mmrnn.offline.convert.table_file import TableOptions
from stream_mmrnn.training import recipe as recipes
from stream_mmrnn.training import tasks, verbs
from stream_mmrnn.training.checkpoints import load
from stream_mmrnn.training.data import Task, Ticks
from stream_mmrnn.training.heads import loss
from stream_mmrnn.training.last_value import LastValue
from stream_mmrnn.training.tasks import forecast
from stream_mmrnn.training.tasks.recordings import sequence
from stream_mmrnn.training.train import build

pytest.importorskip("pyarrow", reason="pyarrow (extra export) is not installed")

HOUR_NS = 3_600_000_000_000
NAN = np.float32(np.nan)


def recipe_of(columns: tuple[str, ...], steps: int, season: int = 0, **more: Any) -> recipes.Recipe:
    places = [("signal", i) for i in range(len(columns))]
    return recipes.parse(
        {
            "name": "made",
            "tick_ms": HOUR_NS / 1e6,
            "modalities": {"signal": {"size": 2}},
            "heads": [{**forecast.head_of(columns, places, steps, HOUR_NS, "huber"), **more}],
            "data": {
                "kind": "recordings",
                "options": {"targets": {"next": "forecast"}, "forecast": {"columns": columns, "season": season}},
            },
            "fusion": {"kind": "concat", "width": 16, "modality_dropout": 0.0},
            "cell": {"kind": "gru", "hidden": 16},
            "train": {"epochs": 30, "batch": 8, "length": 48, "learning_rate": 0.01, "patience": 0},
        }
    )


def imported(path: Path, rows: list[tuple[int, float, float]]) -> Path:
    """A recording of hourly rows: (hour, warm, wet); NaN is missing."""
    lines = [f"{hour},{'' if np.isnan(a) else a},{'' if np.isnan(b) else b}" for hour, a, b in rows]
    source = path.with_suffix(".csv")
    source.write_text("\n".join(["at,warm,wet", *lines]), encoding="utf-8")
    table.convert(source, path, TableOptions(time="at", unit="h"))
    return path


def daily(count: int, seed: int = 0) -> list[tuple[int, float, float]]:
    """A daily curve with noise that lasts for hours: what persistence and the day before forecast badly."""
    rng = np.random.default_rng(seed)
    noise = np.convolve(rng.standard_normal(count + 20), 0.6 ** np.arange(20))[20 : count + 20]
    hours = np.arange(1000, 1000 + count)
    warm = 10 + 5 * np.sin(2 * np.pi * hours / 24) + 0.5 * noise
    wet = 60 - 2 * warm + rng.standard_normal(count)
    return list(zip(hours.tolist(), warm.tolist(), wet.tolist(), strict=True))


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = daily(900)
    del rows[300:340]  # a gap
    rows[50] = (rows[50][0], NAN, 3.0)
    return imported(tmp_path_factory.mktemp("table") / "made.mcap", rows)


@pytest.fixture(scope="module")
def trained(recording: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("trained")
    recipes.save(recipe_of(("warm", "wet"), 3, 24), folder / "recipe.toml")
    return folder / "out", verbs.train(folder / "recipe.toml", [recording], folder / "out")


# ---- targets --------------------------------------------------------------------------------------------------------


def targets_of(values: list[float], index: list[int], steps: int, season: int) -> dict[str, np.ndarray]:
    here = np.array([[not np.isnan(v)] for v in values], np.float32)
    features = {"signal": np.nan_to_num(np.array([[v, 0] for v in values], np.float32))}
    recipe = recipe_of(("warm",), steps, season)
    made, weight = forecast.targets(
        recipe.heads[0], np.array(index), features, here, {"signal": ["warm", "wet"]}, recipe
    )
    assert np.array_equal(weight > 0, ~np.isnan(made["next"]).all(1))
    return made


def test_targets_are_the_values_of_the_next_ticks_and_gaps_are_unknown() -> None:
    made = targets_of([1, 2, NAN, 4, 5], [10, 11, 12, 13, 14], 2, 3)
    expected = [[2, NAN], [NAN, 4], [4, 5], [5, NAN], [NAN, NAN]]
    assert np.array_equal(made["next"], np.array(expected, np.float32), equal_nan=True)
    held = [[1, 1], [2, 2], [2, 2], [4, 4], [5, 5]]
    assert np.array_equal(made["next.persistence"], np.array(held, np.float32))
    before = [[NAN, NAN], [NAN, 1], [1, 2], [2, NAN], [NAN, 4]]  # three ticks before what is forecast
    assert np.array_equal(made["next.seasonal_naive"], np.array(before, np.float32), equal_nan=True)


def test_a_season_shorter_than_the_forecast_uses_the_last_known_one() -> None:
    made = targets_of([1, 2, 3, 4, 5, 6], list(range(6)), 3, 2)
    assert made["next.seasonal_naive"][3].tolist() == [3, 4, 3]


def test_ticks_that_were_left_out_are_no_neighbours() -> None:
    made = targets_of([1, 2, 3], [10, 11, 500], 1, 0)
    assert np.array_equal(made["next"], np.array([[2], [NAN], [NAN]], np.float32), equal_nan=True)


def test_no_training_target_lies_in_the_held_out_part_and_all_are_scored_on_the_same_numbers() -> None:
    count, steps = 200, 4
    values = np.arange(count, dtype=np.float32)
    values[150] = NAN
    made = targets_of(values.tolist(), list(range(count)), steps, 24)
    weight = (~np.isnan(made["next"])).any(1).astype(np.float32)
    zeros = np.zeros((count, 1), np.float32)
    whole = Ticks({"signal": np.zeros((count, 2), np.float32)}, zeros, zeros, dict(made), {"next": weight})
    train, validation, test = forecast.split(whole, {"next": steps}, 20)
    assert np.nanmax(train.targets["next"]) == 119  # the last value of the first 60 %
    assert np.nanmax(validation.targets["next"]) == 149
    assert set(train.targets) == {"next"}
    assert (validation.warm_up, test.warm_up) == (20, 20)
    assert not test.weights["next"][:20].any()
    first = int(np.flatnonzero(test.weights["next"])[0])
    assert first >= 20
    scored = test.targets["next"][test.weights["next"] > 0]
    for name in ("persistence", "seasonal_naive"):
        simple = test.targets[f"next.{name}"][test.weights["next"] > 0]
        assert not np.isnan(simple[~np.isnan(scored)]).any()


def test_the_scale_is_of_the_training_part_only(recording: Path) -> None:
    recipe = recipe_of(("warm",), 3, 24)
    scales = []
    for factor in (1.0, 100.0):
        s = sequence(recording, recipe, [ModalitySpec("signal", 2)])
        a = round(forecast.TRAIN * len(s))
        s.features["signal"][a:] *= factor
        index = np.arange(len(s))
        made, weight = forecast.targets(
            recipe.heads[0], index, s.features, s.present, {"signal": ["warm", "wet"]}, recipe
        )
        parts = forecast.split(Ticks(s.features, s.present, s.age_s, made, {"next": weight}), {"next": 3}, 10)
        task = Task(lambda rng, parts=parts: [parts[0]], [parts[1]], [parts[2]])
        predictor = build(recipe, task, np.random.default_rng(0))
        scales.append([predictor.heads.mean_next, predictor.heads.std_next, predictor.tokens.std_signal])
    for one, other in zip(*scales, strict=True):
        assert torch.equal(one, other)


# ---- network --------------------------------------------------------------------------------------------------------


def test_an_unknown_number_has_no_part_in_the_loss() -> None:
    head = recipe_of(("warm",), 2).heads[0]
    raw = torch.tensor([[1.0, 5.0], [2.0, 3.0]], requires_grad=True)
    value = loss(head, raw, torch.tensor([[2.0, float("nan")], [2.0, 3.0]]), torch.ones(2))
    value.backward()
    assert value.item() == pytest.approx(0.25)
    assert raw.grad is not None
    assert raw.grad[0, 1] == 0
    assert torch.isfinite(raw.grad).all()


def test_the_last_value_is_the_same_over_a_sequence_and_step_by_step() -> None:
    generator = torch.Generator().manual_seed(0)
    last = LastValue([("b", 1), ("a", 0), ("b", 0)], ["a", "b"])
    for _ in range(20):
        features = {m: torch.randn(3, 30, 2, generator=generator) for m in ("a", "b")}
        present = (torch.rand(3, 30, 2, generator=generator) < 0.3).float()
        reset = torch.rand(3, 30, generator=generator) < 0.1
        held = torch.randn(3, 3, generator=generator)
        whole, after = last(features, present, held, reset)
        for t in range(30):
            held = torch.where(reset[:, t : t + 1], torch.zeros_like(held), held)
            held = last.step({m: x[:, t] for m, x in features.items()}, present[:, t], held)
            assert torch.equal(whole[:, t], held)
        assert torch.equal(after, held)


@pytest.mark.slow
def test_the_streaming_step_equals_the_offline_forecast(recording: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    """Replayed tick by tick through the ONNX step: what the network computes over the whole recording at once."""
    folder, _ = trained
    predictor, _ = load(folder / "best.safetensors")
    recipe = predictor.recipe
    s = sequence(recording, recipe, [ModalitySpec("signal", 2)])
    with torch.no_grad():
        features = {"signal": torch.from_numpy(s.features["signal"]).unsqueeze(0)}
        present, age_s = (torch.from_numpy(x).unsqueeze(0) for x in (s.present, s.age_s))
        raw, _ = predictor.eval()(features, present, age_s)
        offline = predictor.heads.activate(raw)["next"][0].numpy()
    made: list[Any] = []
    replay.replay(recording, model=str(folder / "step.onnx"), on_prediction=made.append)
    streamed = np.stack([p.heads["next"] for p in made])
    assert len(streamed) == len(s) == 900
    assert np.abs(streamed - offline).max() / np.abs(offline).max() < 1e-5


@pytest.mark.slow
def test_it_beats_simple_forecasts_where_there_is_something_to_learn(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, document = trained
    head = document["test"]["next"]
    assert head["baselines"].keys() == {"persistence", "seasonal_naive"}
    for simple in head["baselines"].values():
        assert head["r2"] > simple["r2"]
        assert head["mae_by_label"].keys() == simple["mae_by_label"].keys()
    assert (folder / "forecast_next.png").stat().st_size > 10_000
    report = json.loads((folder / "report.json").read_text())
    assert report["test_ticks"] == 225  # a quarter of 900
    card = (folder / "card.md").read_text()
    assert "| persistence | r2 |" in card
    assert "| seasonal naive | mse |" in card


@pytest.mark.slow
def test_evaluate_scores_the_file_like_the_network(recording: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    folder, document = trained
    found = verbs.evaluate(folder, [recording], None)["test"]["next"]
    expected = document["test"]["next"]
    assert found["mae"] == pytest.approx(expected["mae"], rel=1e-4)
    assert found["baselines"] == expected["baselines"]
    printed = CliRunner().invoke(app, ["evaluate", str(folder), "--data", str(recording)]).output
    for words in ("persistence", "seasonal naive", "warm+1", "wet+3", "all: r2"):
        assert words in printed


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_wrong_recipes_and_data_are_one_sentence(recording: Path, tmp_path: Path) -> None:
    short = imported(tmp_path / "short.mcap", daily(12))
    for recipe, path, sentence in (
        (recipe_of(("cold",), 1), recording, "there is no column 'cold'; use warm, wet"),
        (recipe_of(("signal.2",), 1), recording, "there is no column 'signal.2'"),
        (
            recipe_of(("warm", "wet"), 2, size=3, labels=[], horizons_s=[], from_last=[]),
            recording,
            "expected a multiple",
        ),
        (recipe_of(("warm",), 9), short, "the recordings are too short for the head 'next'"),
        (recipe_of(("warm",), 1, 5000), recording, "use a season shorter than 5000 ticks"),
    ):
        with pytest.raises((ConfigError, FileError)) as caught:
            tasks.create(recipe, [path])
        assert sentence in str(caught.value)
        assert "\n" not in str(caught.value)
    source = tmp_path / "swapped.csv"
    source.write_text("at,wet,warm\n1,2,3\n2,3,4\n")
    table.convert(source, tmp_path / "swapped.mcap", TableOptions(time="at", unit="h"))
    with pytest.raises(FileError, match=r"swapped.mcap has the columns wet, warm, that of made.mcap has warm, wet"):
        tasks.create(recipe_of(("warm",), 1), [recording, tmp_path / "swapped.mcap"])
    with pytest.raises(ConfigError, match="are the columns of this recording in another order"):
        tasks.create(recipe_of(("warm",), 1), [tmp_path / "swapped.mcap"])
    with pytest.raises(ConfigError, match="which is no input of the recipe"):
        recipe_of(("warm",), 1, from_last=[("signal", 2)])
    with pytest.raises(ConfigError, match="it needs standardise = true"):
        recipe_of(("warm",), 1, standardise=False)
    both = {"a": ["x"], "b": ["x"]}
    with pytest.raises(ConfigError, match=r"several streams have a column 'x'; name one of a.x, b.x"):
        forecast.place_of("x", both, {"a": 1, "b": 1})
    assert forecast.place_of("b.x", both, {"a": 1, "b": 1}) == ("b", 0)
    assert forecast.place_of("a.0", {}, {"a": 1}) == ("a", 0)


def test_options_of_train_that_do_not_fit(recording: Path, tmp_path: Path) -> None:
    recipes.save(recipe_of(("warm",), 1), tmp_path / "recipe.toml")
    for args, sentence in (
        (["--data", recording, "--steps", "2"], "--steps, --tick and --season are for --forecast COLUMNS"),
        (["--data", recording, "--forecast", ","], "--forecast needs the names of columns"),
        (["--data", recording, "--forecast", "cold"], "there is no column 'cold'"),
        (["--data", recording, "--forecast", "warm", "--tick", "often"], "--tick is 'often': expected a duration"),
        ([tmp_path, "--data", recording, "--forecast", "warm"], "use --forecast without a recipe"),
    ):
        done = CliRunner().invoke(app, ["train", *map(str, args), "--out", str(tmp_path / "out")])
        assert isinstance(done.exception, UsageError), done.output
        assert sentence in str(done.exception)
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_recipe_of_a_quick_run_is_the_whole_one(recording: Path, tmp_path: Path) -> None:
    """It is there to change and train again."""
    recipe = msgspec.structs.replace(recipe_of(("warm",), 1), quick={"epochs": 1})
    recipes.save(recipe, tmp_path / "recipe.toml")
    given = recipes.load(tmp_path / "recipe.toml")
    found = verbs.train(tmp_path / "recipe.toml", [recording], tmp_path / "out", quick=True, seed=7)
    assert found["epochs"] == 1
    assert recipes.load(tmp_path / "out" / "recipe.toml") == recipes.with_seed(given, 7)


# ---- real data ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_real_weather_and_prices(tmp_path: Path) -> None:
    """A year of Seattle's weather is forecast better than by persistence; no such thing is expected of prices."""
    day = TableOptions(time="date", time_format="%Y/%m/%d", covers_ns=24 * HOUR_NS)
    table.convert(vega_file("seattle-weather.csv"), tmp_path / "weather.mcap", day)
    wanted = verbs.ForecastRequest(("temp_max", "temp_min"), 3, season=365)
    found = verbs.train(None, [tmp_path / "weather.mcap"], tmp_path / "weather", quick=True, forecast=wanted)
    head = found["test"]["next"]
    assert head["ticks"] > 350
    assert head["r2"] > head["baselines"]["persistence"]["r2"] > head["baselines"]["seasonal_naive"]["r2"]

    # months have no fixed length: rows in the middle of a mean month are one in each tick
    month = TableOptions(time="date", time_format="%b %d %Y", by="symbol", covers_ns=15 * 24 * HOUR_NS)
    table.convert(vega_file("stocks.csv"), tmp_path / "stocks.mcap", month)
    wanted = verbs.ForecastRequest(("MSFT.price", "GOOG.price"), 2, round(30.4375 * 24 * HOUR_NS), 12)
    found = verbs.train(None, [tmp_path / "stocks.mcap"], tmp_path / "stocks", quick=True, forecast=wanted)
    head = found["test"]["next"]
    assert head["ticks"] > 25
    assert head["baselines"].keys() == {"persistence", "seasonal_naive"}
    assert np.isfinite([head["r2"], *(simple["r2"] for simple in head["baselines"].values())]).all()
