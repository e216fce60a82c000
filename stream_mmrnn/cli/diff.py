"""The verb `diff`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stream_mmrnn.cli.terminal import Console, Json, Provider, print_document, say_on
from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.printable import shown
from stream_mmrnn.core.signals import StopFlag

if TYPE_CHECKING:
    from stream_mmrnn.offline.diff.tracks import PredictionTrack


def diff(
    path: Annotated[Path, typer.Argument(help="A recording.")],
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="A model of the zoo, or an ONNX file; the second one, or the recorded predictions, is b.",
        ),
    ] = None,
    provider: Annotated[Provider, typer.Option(help="Where the models run.")] = Provider.cpu,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Ignore differences up to this.")] = 0.0,
    labels: Annotated[
        bool,
        typer.Option("--labels", help="Score the models, or the recorded predictions, by the labels."),
    ] = False,
    plot: Annotated[Path | None, typer.Option("--plot", help="Plot it into this file (needs matplotlib).")] = None,
    as_json: Json = False,
) -> None:
    """Compare two models on one recording, or one with the recorded predictions or labels.

    Exit code 0: equal within the tolerance; 1: they differ; 2: usage; 3: only part of the recording could be read.
    """
    from stream_mmrnn.offline.diff import compare, plots
    from stream_mmrnn.offline.diff import labels as labelled

    names = model or []
    if len(names) > 2:
        raise UsageError(f"{len(names)} models were named; --model is given once or twice")
    if not names and not labels:
        raise UsageError("name what to compare: --model twice, once (with the recorded predictions), or --labels")
    if plot is not None:
        plots.check(plot)
    if plot is not None and labels and len(names) < 2:
        raise UsageError("a plot shows two models, or one and the recorded predictions; leave out --labels")
    events = labelled.labels_of(path) if labels else None
    console = Console(stderr=as_json, highlight=False)
    alive = StopFlag.unwinding()
    tracks = _tracks(path, names, provider, console, alive, with_recorded=len(names) < (1 if labels else 2))
    sides = dict(zip("ab", tracks, strict=False))
    document: dict[str, Any] = {
        "recording": str(path),
        **{side: {"name": t.name, "sha256": t.sha256, "ticks": len(t.ticks)} for side, t in sides.items()},
        "comparison": compare.compare(tracks[0], tracks[1], tolerance) if len(tracks) == 2 else None,
        "labels": {side: labelled.score(t, events) for side, t in sides.items()} if events is not None else None,
        "notes": [note for t in tracks for note in t.notes],
        "stopped": not alive(),
        "damage": next((t.damage for t in tracks if t.damage), ""),
        "plot": None,
    }
    if plot is not None:
        plots.draw(plot, tracks[0], tracks[1])
        document["plot"] = str(plot)
    if as_json:
        print_document(document)
    else:
        _show(console, document)
    errors = say_on(Console(stderr=True))
    for note in document["notes"]:
        errors(note)
    if document["stopped"] or document["damage"]:
        errors(f"{document['damage'] or 'it was stopped'}; everything before was compared")
        raise typer.Exit(3)
    if document["comparison"] is not None and not document["comparison"]["equal"]:
        raise typer.Exit(1)


def _tracks(
    path: Path, names: list[str], provider: Provider, console: Console, alive: StopFlag, with_recorded: bool
) -> list[PredictionTrack]:
    from rich.progress import Progress

    from stream_mmrnn.offline.diff import tracks

    # the recorded ones first: reading them is quick, and they may be missing
    recorded = [tracks.recorded(path)] if with_recorded else []
    total = len(recorded[0].ticks) if recorded else None
    made = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for name in names:
            task = progress.add_task(f"replaying through {name}", total=total)
            made.append(
                tracks.predicted(path, name, provider.value, lambda task=task: progress.advance(task), alive)  # type: ignore[misc]
            )
            total = len(made[0].ticks)
    return [*made, *recorded]


def _show(console: Console, document: dict[str, Any]) -> None:
    for side in ("a", "b"):
        if side in document:
            about = document[side]
            console.print(
                f"[bold]{side}[/bold]  {shown(about['name'], 200)}  {about['sha256'][:12]}  {about['ticks']} ticks"
            )
    if document["comparison"] is not None:
        _show_comparison(console, document["comparison"])
    for side, heads in (document["labels"] or {}).items():
        _show_labels(console, side, heads)
    if document["plot"]:
        console.print(f"drawn in {shown(document['plot'])}", soft_wrap=True)


def _show_comparison(console: Console, found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(header_style="dim")
    for column in ("head", "ticks", "differ", "max", "mean", "rms", "other decisions"):
        table.add_column(column, justify="left" if column == "head" else "right")
    for name, h in found["heads"].items():
        decided = h["decisions"]
        table.add_row(
            shown(name, 64),
            str(h["ticks"]),
            f"{h['different']} ({h['share']:.1%})",
            *(f"{h[k]:.3g}" for k in ("max", "mean", "rms")),
            "–" if decided is None else f"{decided['ticks']} ({decided['share']:.1%})",
        )
    console.print(table)
    for name, h in found["heads"].items():
        if first := h["first"]:
            where = shown(f"{name}, {first['output']}" if len(h["outputs"]) > 1 else name, 128)
            console.print(
                f"{where}: first at {first['s']:.2f} s, {first['a']} in a, {first['b']} in b",
                soft_wrap=True,
            )
        for stretch in sorted(h["where"], key=lambda s: -s["max"])[:3]:
            begin_s, end_s = stretch["from"]["s"], stretch["to"]["s"]
            console.print(f"{shown(name, 64)}: {begin_s:.2f} to {end_s:.2f} s, up to {stretch['max']:.3g}")
        for change, n in (h["decisions"] or {"changes": {}})["changes"].items():
            console.print(f"{shown(name, 64)}: {n} times {shown(change, 200)}")
    for side, other in (("a", "b"), ("b", "a")):
        if found[f"only_{side}"]:
            console.print(f"only {side} has the heads {shown(', '.join(found[f'only_{side}']))}")
        if found["ticks"][f"only_{side}"]:
            console.print(f"{found['ticks'][f'only_{side}']} ticks of {side} are not in {other}")
    for name, (x, y) in found["sizes_differ"].items():
        console.print(f"the head {shown(name, 64)} has {x} numbers in a and {y} in b")
    within = f"equal within {found['tolerance']:g}" if found["tolerance"] else "equal, bit for bit"
    console.print(within if found["equal"] else "different", style="bold")


def _show_labels(console: Console, side: str, heads: dict[str, Any]) -> None:
    from rich.table import Table

    for name, h in heads.items():
        changes, confusion = h["changes"], h["confusion"]

        def share(key: str, h: dict[str, Any] = h) -> str:
            return "–" if h.get(key) is None else f"{h[key]:.3f}"

        late = f", half within {changes['p50_ms']:.0f} ms" if changes["followed"] else ""
        console.print(
            f"[bold]{side}, {shown(name, 64)}[/bold]  {h['ticks']} labelled ticks: accuracy {share('accuracy')}, "
            f"balanced {share('balanced_accuracy')}; "
            f"{changes['followed']} of {changes['count']} changes followed{late}",
            soft_wrap=True,
        )
        table = Table(header_style="dim")
        table.add_column("true label, by prediction")
        for label in confusion["labels"]:
            table.add_column(shown(label, 48), justify="right")
        for label, row in zip(confusion["labels"], confusion["true_by_said"], strict=True):
            if any(row):
                table.add_row(shown(label, 48), *map(str, row))
        console.print(table)
