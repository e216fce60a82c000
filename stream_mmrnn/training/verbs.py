"""The verbs `train`, `evaluate` and `export` as functions that return their results; cli/train.py prints them.

Combines recipe, task, trainer, export gate, report and card. Only `train` and `export` import torch; `evaluate` does
not.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.training import metrics, tasks
from stream_mmrnn.training import recipe as recipes
from stream_mmrnn.training.recipe import Recipe
from stream_mmrnn.training.served import evaluate as evaluate_served

Progress = Callable[[dict[str, Any]], None]


def _command(recipe: Path | None, quick: bool, seed: int | None) -> str:
    """The command that makes the model again, without paths of this machine, because cards are published."""
    where = [] if recipe is None else [recipe.name if recipe.is_absolute() else str(recipe)]
    options = ["--quick"] * quick + ([] if seed is None else ["--seed", str(seed)])
    return " ".join(["stream-mmrnn", "train", *where, "--data", "DATA", *options])


def _versions() -> str:
    names = ("torch", "onnx", "numpy")
    return (
        "Made with " + ", ".join([f"Python {platform.python_version()}", *(f"{n} {version(n)}" for n in names)]) + "."
    )


class ForecastRequest(NamedTuple):
    """What `train` forecasts without a recipe."""

    columns: tuple[str, ...]
    steps: int
    tick_ns: int = 0
    """0: the usual time between two rows of an imported table."""
    season: int = 0
    """Ticks of a season, for the seasonal naive forecast; 0: without."""


def recipe_of(path: Path | None, data: Sequence[Path], name: str, forecast: ForecastRequest | None = None) -> Recipe:
    """The recipe of a file or model folder; if none is given, one made from the user's recordings."""
    if path is None:
        from stream_mmrnn.training.own_recipe import forecast_recipe_for, recipe_for
        from stream_mmrnn.training.tasks.recordings import files_of

        if not data:
            raise UsageError("nothing to train on: give a recipe, or recordings by --data")
        return (
            recipe_for(files_of(data), name)
            if forecast is None
            else forecast_recipe_for(files_of(data), name, *forecast)
        )
    if forecast is not None:
        raise UsageError(f"the recipe {path} says what is forecast; use --forecast without a recipe")
    return recipes.load(path / "recipe.toml" if path.is_dir() else path)


def train(
    recipe_path: Path | None,
    data: Sequence[Path],
    out: Path | None,
    *,
    name: str = "own",
    quick: bool = False,
    resume: bool = False,
    int8: bool = False,
    seed: int | None = None,
    forecast: ForecastRequest | None = None,
    progress: Progress = lambda _: None,
    alive: Callable[[], bool] = lambda: True,
) -> dict[str, Any]:
    """Train, calibrate, export through the gate, and write report, plots and card into `out`.

    Raises:
        UsageError: recipe or data are missing or wrong.
        StreamError: the loss is not finite, or the export gate failed.

    """
    from stream_mmrnn.training import report as reports
    from stream_mmrnn.training.export import export as export_step
    from stream_mmrnn.training.train import Trainer

    recipe = recipe_of(recipe_path, data, name, forecast)
    if seed is not None:
        recipe = recipes.with_seed(recipe, seed)
    given = recipe
    if quick:
        recipe = recipes.quick(recipe)
    folder = out or Path("trained") / recipe.name
    progress({"event": "data"})
    task = tasks.create(recipe, data)
    trainer = Trainer(recipe, task, folder, resume)
    with ExitStack() as stack:
        log = _tensorboard(folder, stack)

        def both(what: dict[str, Any]) -> None:
            log(what)
            progress(what)

        trainer.run(both, alive)
    progress({"event": "report"})
    document = reports.report(trainer.predictor, task, trainer.history, trainer.ignored)
    differences = export_step(trainer.predictor, folder / "step.onnx", task.origins, int8)
    recipes.save(given, folder / "recipe.toml")  # to train again without --quick
    made_by = _command(recipe_path, quick, seed)
    (folder / "card.md").write_text(reports.card(document, differences, made_by, _versions()), encoding="utf-8")
    made = reports.write(document, folder)
    summary = {
        **{k: document[k] for k in ("name", "parameters", "cell", "fusion", "epochs", "test", "by_modalities")},
        **{k: document[k] for k in ("ignored", "warnings")},
        "stopped": trainer.stopped,
        "best_single": {h.name: reports.best_single(document, h.name) for h in recipe.heads},
        "model": str(folder / "step.onnx"),
        "parity": differences,
        "seconds": round(sum(h["seconds"] for h in trainer.history), 1),
        "files": [str(p) for p in made],
    }
    return metrics.clean(summary)


def _tensorboard(folder: Path, stack: ExitStack) -> Progress:
    """A writer of TensorBoard event files; None if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return lambda _: None
    writer = stack.enter_context(SummaryWriter(str(folder / "tensorboard")))

    def log(what: dict[str, Any]) -> None:
        if what["event"] == "epoch":
            for key in ("train_loss", "validation_loss", "learning_rate"):
                writer.add_scalar(key, what[key], what["epoch"])

    return log


def evaluate(
    model: Path, data: Sequence[Path], present: Sequence[str] | None, options: Sequence[str] = ()
) -> dict[str, Any]:
    """The scores of a model folder (step.onnx and recipe.toml) on its test data, run as it is served.

    `options`: other options of the data than the recipe's, as KEY=VALUE.

    Raises:
        ConfigError: an option is unknown, or its value is wrong.
        UsageError: the folder, its data, or a modality of `present` is missing.

    """
    folder = model if model.is_dir() else model.parent
    step = folder / "step.onnx" if model.is_dir() else model
    if not (folder / "recipe.toml").is_file():
        raise FileError(f"{folder} has no recipe.toml, which names the test data")
    recipe = recipes.with_data_options(recipes.load(folder / "recipe.toml"), options)
    unknown = set(present or ()) - set(recipe.modalities)
    if unknown:
        known = ", ".join(recipe.modalities)
        raise UsageError(f"{recipe.name} has no modality {', '.join(sorted(unknown))}; it has {known}")
    task = tasks.create(recipe, data)
    heads = evaluate_served(step, recipe, task.test, present)
    return metrics.clean(
        {
            "name": recipe.name,
            "model": str(step),
            "present": list(present or recipe.modalities),
            "test_ticks": sum(len(t) - t.warm_up for t in task.test),
            "test": heads,
            "about": task.about,
        }
    )


def export(checkpoint: Path, out: Path | None, int8: bool) -> dict[str, Any]:
    """Export the step graph of a checkpoint through the gate; to `out`, by default beside the checkpoint."""
    from stream_mmrnn.training.checkpoints import load
    from stream_mmrnn.training.export import export as export_step

    predictor, origins = load(checkpoint)
    path = out or checkpoint.with_name("step.onnx")
    differences = export_step(predictor, path, origins, int8)
    return {"model": str(path), "bytes": path.stat().st_size, "parity": differences}
