"""The verbs of training: `train`, `evaluate`, `export`. Imports torch only when one of them runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stream_mmrnn.cli.evaluate_media import Measure, evaluate_media
from stream_mmrnn.cli.terminal import Console, Json, print_document, say_on
from stream_mmrnn.core.durations import parse_ns
from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.extras import need
from stream_mmrnn.core.printable import shown
from stream_mmrnn.core.signals import StopFlag

_EXTRA = ("torch", "onnx", "onnxscript", "matplotlib", "tomli_w")


def _training(needs: tuple[str, ...]) -> Any:
    """The functions of the verbs; raises UsageError, with the command to install them, if packages are missing."""
    need("this", "train", *needs)
    from stream_mmrnn.training import verbs

    return verbs


Data = Annotated[list[Path] | None, typer.Option("--data", help="The data: recordings, or a folder of them.")]


def train(
    recipe: Annotated[
        Path | None, typer.Argument(help="A recipe.toml or zoo folder; none for your own labels.")
    ] = None,
    data: Data = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the model; trained/NAME without it.")] = None,
    name: Annotated[str, typer.Option(help="Name of a model trained on your own recordings.")] = "own",
    quick: Annotated[bool, typer.Option("--quick", help="A test run of a few minutes.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Write 8-bit weights too.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the random numbers.")] = None,
    forecast: Annotated[
        str | None, typer.Option(help="Without a recipe: forecast these columns, such as temp_max,temp_min.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="How many ticks to --forecast.")] = 1,
    tick: Annotated[
        str, typer.Option(help="The tick of a --forecast, such as 1d; by default the usual time between two rows.")
    ] = "",
    season: Annotated[
        int, typer.Option(min=0, help="Ticks of a season: compare with the value of one season before; 0: no.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Train a model from a recipe, or from your own recordings: of their labels, or a forecast of columns."""
    from stream_mmrnn.cli.progress import TrainingBar

    if forecast is None and (steps != 1 or tick or season):
        raise UsageError("--steps, --tick and --season are for --forecast COLUMNS")
    verbs = _training(_EXTRA)
    wanted = None
    if forecast is not None:
        names = tuple(filter(None, forecast.split(",")))
        if not names:
            raise UsageError("--forecast needs the names of columns, such as temp_max,temp_min")
        wanted = verbs.ForecastRequest(names, steps, parse_ns(tick, "--tick") if tick else 0, season)
    console = Console(stderr=as_json, highlight=False)
    alive = StopFlag.unwinding()
    with TrainingBar(console) as bar:
        result = verbs.train(
            recipe,
            data or [],
            out,
            name=name,
            quick=quick,
            resume=resume,
            int8=int8,
            seed=seed,
            forecast=wanted,
            progress=bar.observe,
            alive=alive,
        )
    if as_json:
        print_document(result)
    else:
        _print_heads(console, result["test"])
        print_streams(console, result)
        console.print(
            f"{result['parameters']:,} weights, {result['epochs']} epochs; run it with --model {result['model']}"
        )
    for text in result["warnings"]:
        say_on(console)(text)
    if result["stopped"]:
        say_on(console)("stopped early: this is the best model so far; --resume continues from the last epoch")
        raise typer.Exit(3)


def _print_heads(console: Console, heads: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table(title="on held-out data", title_justify="left", header_style="dim")
    for column in ("head", "ticks", "figure", "value"):
        table.add_column(column, justify="right" if column in ("ticks", "value") else "left")
    for name, figures in heads.items():
        for key in ("accuracy", "balanced_accuracy", "auc", "r2", "mse", "log_loss", "calibration_error"):
            value = figures.get(key)
            rows = value.items() if isinstance(value, dict) else [("", value)]
            for label, number in rows:
                if number is not None:
                    what = f"{key.replace('_', ' ')} {label}".strip()
                    table.add_row(name, str(figures["ticks"]), what, f"{number:.3f}")
    console.print(table)
    for name, figures in heads.items():
        if figures.get("baselines"):
            _print_errors(console, name, figures)


def print_streams(console: Console, result: dict[str, Any]) -> None:
    """What each stream is worth: the figures with it alone, and without it."""
    from rich.table import Table

    rows = {frozenset(names.split("+")): figures for names, figures in result["by_modalities"].items()}
    if not rows:
        return
    streams = max(rows, key=len)
    table = Table(title="which streams helped", title_justify="left", header_style="dim")
    for column in ("stream", "head", "alone", "without it", ""):
        table.add_column(column, justify="right" if column in ("alone", "without it") else "left")
    for stream in sorted(streams):
        without, alone = rows.get(streams - {stream}, {}), rows.get(frozenset({stream}), {})
        for head in result["test"]:
            numbers = ["–" if f.get(head) is None else f"{f[head]:.3f}" for f in (alone, without)]
            table.add_row(shown(stream, 40), head, *numbers, "not used" if stream in result["ignored"] else "")
    console.print(table)
    if result["ignored"]:
        console.print(
            f"the model does not use {', '.join(result['ignored'])}: it was better without on the validation data"
        )


def _print_errors(console: Console, name: str, figures: dict[str, Any]) -> None:
    """The errors of a forecast beside those of simple rules, on the same ticks."""
    from rich.table import Table

    table = Table(title=f"{name}: mean absolute error", title_justify="left", header_style="dim")
    table.add_column("number")
    columns = {"model": figures, **figures["baselines"]}
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for label in figures.get("mae_by_label", {}):
        table.add_row(shown(label, 64), *(f"{each['mae_by_label'][label]:.3f}" for each in columns.values()))
    for key in ("r2", "mse"):
        numbers = [each[key] for each in columns.values()]
        table.add_row(f"all: {key}", *("" if number is None else f"{number:.3f}" for number in numbers))
    console.print(table)


def evaluate(
    model: Annotated[Path, typer.Argument(help="A model's folder, with step.onnx and recipe.toml.")],
    data: Data = None,
    present: Annotated[str | None, typer.Option(help="Only these modalities, such as audio,text.")] = None,
    changed: Annotated[
        list[str] | None, typer.Option("--set", help="Another option of the data, such as silences=clear.")
    ] = None,
    media: Annotated[
        list[Path] | None,
        typer.Option(help="Instead: recordings of conversations, one person a channel, or folders of them."),
    ] = None,
    microphones: Annotated[
        int, typer.Option(min=1, max=2, help="With --media: 1 if each session hears its own person only.")
    ] = 2,
    measure: Annotated[
        Measure,
        typer.Option(
            help="With --media: silences of conversations, ends of utterances against cuts, or what a face adds."
        ),
    ] = Measure.silences,
    words: Annotated[bool, typer.Option(help="With --media: recognise words (extra `speech`).")] = True,
    plot: Annotated[Path | None, typer.Option(help="With --media: draw cut-ins against delay into this file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a model file on its test data, or on conversations as served, with the engine that serves it."""
    if measure is not Measure.silences and (plot is not None or not media):
        raise UsageError(f"--measure {measure.value} is for --media FILES, and draws no --plot")
    if media:
        evaluate_media(model, media, measure, words=words, microphones=microphones, plot=plot, as_json=as_json)
        return
    result = _training(()).evaluate(model, data or [], present.split(",") if present else None, changed or ())
    if as_json:
        print_document(result)
        return
    console = Console(highlight=False)
    console.print(f"[bold]{result['name']}[/bold] with {', '.join(result['present'])}")
    _print_heads(console, result["test"])


def export(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint (.safetensors); with --triton also a model.")],
    out: Annotated[Path | None, typer.Option(help="The ONNX file; by default beside the checkpoint.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Write 8-bit weights too.")] = False,
    triton: Annotated[
        Path | None, typer.Option(help="Write a model repository for Triton into this folder; needs no torch.")
    ] = None,
    sessions: Annotated[int, typer.Option(min=1, max=1_000_000, help="Concurrent sessions for --triton.")] = 1024,
    as_json: Json = False,
) -> None:
    """Export a checkpoint as an ONNX step graph and check that it computes the same; or a model for Triton."""
    result: dict[str, Any] = {}
    if triton is None or checkpoint.endswith(".safetensors"):
        result = _training(_EXTRA).export(Path(checkpoint), out, int8)
    if triton is not None:
        from stream_mmrnn.core import config
        from stream_mmrnn.offline.convert.triton import write

        model = Path(result["model"]) if result else config.find_model(checkpoint)
        result["triton"] = write(model, triton, sessions)
    if as_json:
        print_document(result)
        return
    if "triton" in result:
        made = result["triton"]
        Console(highlight=False, soft_wrap=True).print(
            f"{made['model']}: {len(made['states'])} states, {len(made['inputs'])} inputs and {len(made['outputs'])} "
            f"outputs in {shown(made['repository'])}"
        )
    if "parity" not in result:
        return
    differences = ", ".join(f"{k} {v:.1e}" for k, v in result["parity"].items())
    Console(highlight=False).print(f"{result['model']}: {result['bytes'] / 1e6:.2f} MB; differences: {differences}")
