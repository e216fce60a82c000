"""The verb `predict`: the predictions of media files as tables."""

from __future__ import annotations

import time
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from stream_mmrnn.cli.convert import Force, progress_bar
from stream_mmrnn.cli.terminal import ConfigFile, Console, Json, ModelName, Provider, print_document, say_on
from stream_mmrnn.core import config
from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.printable import escape
from stream_mmrnn.core.signals import StopFlag


class Format(StrEnum):
    """The values of `--format`."""

    csv, jsonl, parquet = "csv", "jsonl", "parquet"


def predict(
    files: Annotated[list[Path], typer.Argument(help="Media files with sound, picture or both.")],
    model: ModelName = None,
    config_file: ConfigFile = None,
    provider: Annotated[Provider, typer.Option(help="Where the model runs.")] = Provider.cpu,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder of the tables.")] = Path(),
    form: Annotated[Format, typer.Option("--format", help="Of the tables, FILE.predictions.FORMAT.")] = Format.csv,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write the predictions of media files as tables, faster than real time."""
    from stream_mmrnn.core.extras import need
    from stream_mmrnn.offline.convert.predictions import predict_file
    from stream_mmrnn.offline.predictor import Predictor

    if form is Format.parquet:
        need("Parquet", "export", "pyarrow")
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    settings = config.load(config_file)
    targets = [out / f"{path.name}.predictions.{form.value}" for path in files]
    if twice := next((t for t in targets if targets.count(t) > 1), None):
        raise UsageError(f"two files would become {twice}; predict them one by one, each with its own --out")
    if there := next((t for t in targets if t.exists() and not force), None):
        raise FileError(f"{there} is there already; choose another folder, or use --force")
    if there := next((t for t in targets if t.exists() and not t.is_file()), None):
        raise FileError(f"{there} is no regular file, so that nothing can take its place; choose another folder")
    predictor = Predictor(model or settings.engine.model, settings=settings, provider=provider.value)
    alive = StopFlag.unwinding()
    rows: list[dict[str, Any]] = []
    cut = False
    with progress_bar(console) as bar:
        for path, target in zip(files, targets, strict=True):
            task = bar.add_task(escape(path.name), total=_seconds(path))
            began = time.perf_counter()
            progress = partial(_show, bar, task)
            done = predict_file(predictor, path, target, form.value, progress, alive)
            if done is None:
                break
            took_s = time.perf_counter() - began
            times = round(done * predictor.spec.tick_ns / 1e9 / took_s, 1)
            about = {"file": str(path), "out": str(target), "predictions": done, "warnings": predictor.warnings}
            rows.append({**about, "seconds": round(took_s, 3), "times_real_time": times})
            console.print(f"{escape(str(target))}: {done} predictions, {times:g} times real time")
            for warning in predictor.warnings:
                say_on(Console(stderr=True))(warning)
            cut |= predictor.ended_early
    if as_json:
        print_document({"model": predictor.spec.name, "files": rows, "stopped": len(rows) < len(files)})
    if cut or len(rows) < len(files):
        raise typer.Exit(3)


def _show(bar: Any, task: Any, seconds: float) -> None:
    bar.update(task, completed=seconds)


def _seconds(path: Path) -> float | None:
    """The length of a media file, for the bar; None if it does not say."""
    import av

    try:
        with av.open(str(path)) as container:
            return container.duration / av.time_base if container.duration else None
    except (OSError, av.error.FFmpegError):
        return None
