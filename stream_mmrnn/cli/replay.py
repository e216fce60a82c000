"""The verb `replay`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stream_mmrnn.cli.terminal import Console, Json, ModelName, Provider, print_document, say_on
from stream_mmrnn.core.durations import spoken
from stream_mmrnn.core.printable import shown
from stream_mmrnn.core.signals import StopFlag


class From(StrEnum):
    features, raw = "features", "raw"


def replay(
    path: Annotated[Path, typer.Argument(help="A recording.")],
    speed: Annotated[
        float | None, typer.Option(min=0.01, help="1 is real time; without it as fast as possible.")
    ] = None,
    source: Annotated[
        From, typer.Option("--from", help="Recorded features, or raw samples encoded again.")
    ] = From.features,
    model: ModelName = None,
    provider: Annotated[Provider, typer.Option(help="Where the model runs.")] = Provider.cpu,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Exit with 0 only if every prediction equals the recorded one, bit for bit."),
    ] = False,
    page: Annotated[
        bool | None, typer.Option("--page/--no-page", help="Show it on the live page; the default with --speed.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The page's port; 0 takes any free one.")] = 0,
    as_json: Json = False,
) -> None:
    """Run a recording through the same pipeline again; with --speed on the live page, with pause and seek."""
    from contextlib import ExitStack, closing

    from rich.progress import Progress

    from stream_mmrnn.offline import replay as module

    console = Console(stderr=as_json, highlight=False)
    alive = StopFlag.unwinding()
    with ExitStack() as stack:
        player = None
        if page or (page is None and speed is not None):
            from stream_mmrnn.offline.player import Player

            player = stack.enter_context(closing(Player(speed or 1.0, alive, port)))
            console.print(f"dashboard: {player.address}")
        progress = stack.enter_context(
            Progress(console=console, transient=True, disable=as_json or not console.is_terminal)
        )
        task = progress.add_task("replaying", total=None)
        result = module.replay(
            path,
            speed=speed,
            source=source.value,
            model=model,
            provider=provider.value,
            verify=verify,
            on_prediction=lambda _: progress.advance(task),
            alive=alive,
            player=player,
        )
    if as_json:
        print_document(result)
    else:
        console.print(
            f"{result['predictions']} predictions of {spoken(result['covered_s'])} in {result['seconds']:.2f} s: "
            f"{result['times_real_time']:.0f} times real time"
        )
        if result["recorded_predictions"]:
            verdict = "identical, bit for bit" if result["identical"] else f"different: {result['first_difference']}"
            console.print(f"compared with {result['recorded_predictions']} recorded ones: {shown(verdict)}")
    if result["damage"]:
        say_on(Console(stderr=True))(f"{result['damage']}; everything before the damage was replayed")
        raise typer.Exit(3)
    if verify and not result["identical"]:
        raise typer.Exit(1)
