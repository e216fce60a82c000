"""`evaluate --media`: measure a model on recordings, as served, and print what was found."""

from __future__ import annotations

from contextlib import nullcontext
from enum import StrEnum
from pathlib import Path
from typing import Any

from rich.table import Table

from stream_mmrnn.cli.terminal import Console, print_document
from stream_mmrnn.core.durations import spoken
from stream_mmrnn.core.printable import shown


class Measure(StrEnum):
    """What is measured."""

    silences, utterances, faces = "silences", "utterances", "faces"


def evaluate_media(
    model: Path, media: list[Path], measure: Measure, *, words: bool, microphones: int, plot: Path | None, as_json: bool
) -> None:
    """Measure and print; `plot` is for silences only."""
    from stream_mmrnn.offline.media import conversations, faces, utterances

    step = model / "step.onnx" if model.is_dir() else model
    console = Console(stderr=True, highlight=False)
    with console.status("starting") if not as_json else nullcontext() as status:

        def progress(name: str) -> None:
            if status is not None:
                status.update(shown(name, 64))

        if measure is Measure.faces:
            result = faces.evaluate(step, media, progress)
        elif measure is Measure.utterances:
            result = utterances.evaluate(step, media, words=words, progress=progress)
        else:
            result = conversations.evaluate(step, media, words=words, microphones=microphones, progress=progress)
    if plot is not None:
        conversations.plot(result, plot)
    if as_json:
        print_document(result)
        return
    show = {Measure.faces: _print_faces, Measure.utterances: _print_utterances, Measure.silences: _print_silences}
    show[measure](Console(highlight=False), result)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _print_faces(console: Console, result: dict[str, Any]) -> None:
    console.print(
        f"[bold]{result['name']}[/bold] as served: {result['ticks']} ticks before speech in {len(result['files'])} "
        f"clips, with a face in {result['with_face']:.0%}"
    )
    table = Table(header_style="dim")
    for column in ("", "AUC without the picture", "with it"):
        table.add_column(column, justify="left" if not column else "right")
    for label, scores in result["labels"].items():
        table.add_row(label, _number(scores["without"]), _number(scores["with_picture"]))
    console.print(table)


def _print_utterances(console: Console, result: dict[str, Any]) -> None:
    words = "recognised words" if result["words"] else "no words"
    console.print(
        f"[bold]{result['name']}[/bold] as served: {result['utterances']} ends of utterances and as many cuts inside "
        f"them, one microphone, {words}"
    )
    table = Table(header_style="dim")
    for column in ("", "read", "utterances", "AUC", "best balanced accuracy"):
        table.add_column(column, justify="left" if column in ("", "read") else "right")
    for place, figures in [("all", result), *result["places"].items()]:
        for key, label in (("turn_over", "model"), ("turn_end", "turn_end alone")):
            for when, scores in figures[key].items():
                numbers = _number(scores["auc"]), _number(scores["best_balanced_accuracy"])
                read = when.replace("_", " ")
                table.add_row(f"{shown(Path(place).name, 32)}: {label}", read, str(figures["utterances"]), *numbers)
    console.print(table)


def _print_silences(console: Console, result: dict[str, Any]) -> None:
    heard = "two microphones" if result["microphones"] > 1 else "one microphone"
    console.print(
        f"[bold]{result['name']}[/bold] as served: {spoken(result['sound_s'])} of sound, {heard}, "
        f"{'recognised words' if result['words'] else 'no words'}; {result['silences']} silences of 250 ms and more, "
        f"{result['shifts']} of them end with the other voice"
    )
    table = Table(header_style="dim")
    for column in ("", "AUC", "best balanced accuracy", "holds cut into at 0.7 s"):
        table.add_column(column, justify="left" if not column else "right")
    for key, label in (("turn_over", "model"), ("turn_end", "turn_end alone")):
        scores = result[key]
        cut = result["cut_in_at_700_ms"][key]
        table.add_row(label, _number(scores["auc"]), _number(scores["best_balanced_accuracy"]), _number(cut))
    table.add_row("silence of 0.7 s", "", "", _number(result["cut_in_at_700_ms"]["silence"]))
    console.print(table)
