"""The verbs that check and repair a recording: `info`, `verify`, `repair`. Exit code 3: damaged, or not finished."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from stream_mmrnn.cli.terminal import Console, Json, print_document, say_on
from stream_mmrnn.core.durations import spoken
from stream_mmrnn.core.printable import shown

_SELDOM_HZ = 1 / 60
"""Below this rate the interval is shown."""


def info(path: Annotated[Path, typer.Argument(help="A recording.")], as_json: Json = False) -> None:
    """Show the contents of a recording."""
    from rich.table import Table

    from stream_mmrnn.recording import report

    result = report.info(path)
    if as_json:
        print_document(result)
    else:
        console = Console(highlight=False)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(result["started_unix_ns"] / 1e9))
        name = shown(str(path), 400)
        about = f"session {result['session']!r}, {spoken(result['seconds'])}, begun {when}"
        console.print(f"[bold]{name}[/bold]  {about}", soft_wrap=True)
        model = result["model"]
        console.print(f"model {shown(model['name'], 64)} {shown(model['sha256'], 12)}, ended: {shown(result['ended'])}")
        for name, chosen in result["encoders"].items():
            console.print(f"{shown(name, 64)}: {shown(', '.join(chosen['encoders']), 128)}, {chosen['why']}")
        if not result["raw"]:
            console.print("features only (record.raw = false): no pictures, no sound, no words")
        table = Table(header_style="dim")
        for name in ("channel", "messages", "rate", "gaps", "made by"):
            table.add_column(name, justify="right" if name in ("messages", "rate", "gaps") else "left")
        for name, c in result["channels"].items():
            often = f"every {spoken(1 / c['rate_hz'])}" if 0 < c["rate_hz"] < _SELDOM_HZ else f"{c['rate_hz']:.1f} Hz"
            row = (str(c["messages"]), often, str(c["gaps"]))
            table.add_row(shown(name, 64), *row, shown(c["origin"], 48))
        console.print(table)
        if (beside := result["labels_beside"]) and not beside["damage"]:
            tiers = ", ".join(f"{tier} ({count})" for tier, count in beside["tiers"].items())
            console.print(f"labels beside it in {shown(beside['file'])}: {shown(tiers)}", soft_wrap=True)
    if (beside := result["labels_beside"]) and beside["damage"]:
        say_on(Console(stderr=True))(beside["damage"])
    if not result["whole"]:
        say_on(Console(stderr=True))(result["damage"])
        raise typer.Exit(3)


def verify(path: Annotated[Path, typer.Argument(help="A recording.")], as_json: Json = False) -> None:
    """Check whether a recording is complete, and what it has if it is not: exit code 0 or 3.

    To compare predictions, use `replay --verify`.
    """
    from stream_mmrnn.recording import report
    from stream_mmrnn.viewers.terminal_view import verified

    result = report.verify(path)
    if as_json:
        print_document(result)
    else:
        Console(highlight=False).print(verified(result), soft_wrap=True)
    if not result["whole"]:
        say_on(Console(stderr=True))(result["why"])
        raise typer.Exit(3)


def repair(
    path: Annotated[Path, typer.Argument(help="A recording that was cut off or damaged; it is not changed.")],
    out: Annotated[Path, typer.Argument(help="The file to make.")],
    as_json: Json = False,
) -> None:
    """Write the undamaged messages of a recording and its later parts into one file."""
    from stream_mmrnn.recording import repair as module
    from stream_mmrnn.viewers.terminal_view import verified

    result = module.repair(path, out)
    if as_json:
        print_document(result)
        return
    console = Console(highlight=False)
    name, made = shown(str(path), 400), shown(str(out), 400)
    parts = shown(", ".join(result["of"]), 2000)
    console.print(f"{name} was {result['was']}; what is sound in {parts} is in {made}", soft_wrap=True)
    labels = result["labels"]
    if labels["out"]:
        console.print(f"the labels beside {name} are in {shown(labels['out'], 400)}, too", soft_wrap=True)
    elif labels["why"]:
        console.print(f"the labels beside {name} were left out: {shown(labels['why'], 2000)}", soft_wrap=True)
    console.print(verified(result["result"]), soft_wrap=True)
