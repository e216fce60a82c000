"""The verb `replay`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from stream_mmrnn.cli.terminal import Console, Json, ModelName, Provider, print_document, say_on
from stream_mmrnn.core.durations import spoken
from stream_mmrnn.core.printable import escape, shown
from stream_mmrnn.core.signals import StopFlag


class From(StrEnum):
    features, raw = "features", "raw"


def replay(
    paths: Annotated[list[Path], typer.Argument(help="A recording; several are replayed in lock step.")],
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
    ros_out: Annotated[
        Path | None, typer.Option("--ros-out", help="Write the predictions as a ROS 2 bag, a folder of that name.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a recording through the same pipeline again; with --speed on the live page, with pause and seek."""
    from contextlib import ExitStack, closing

    from rich.progress import Progress

    from stream_mmrnn.offline import replay as module

    if len(paths) > 1:
        if speed is not None or page or source is not From.features or ros_out is not None:
            raise typer.BadParameter(
                "--ros-out, --speed, --page and --from raw take one recording; give one, or leave them out"
            )
        _many(paths, model, provider, verify, as_json)
        return
    if ros_out is not None and (page or speed is not None):
        raise typer.BadParameter("--ros-out is for a replay without --speed and --page, which may be played twice")
    path = paths[0]
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
            ros_out=ros_out,
        )
    if as_json:
        print_document(result)
    else:
        console.print(_speed(result))
        if result["recorded_predictions"]:
            console.print(_verdict(result))
        if ros_out is not None:
            console.print(f"wrote {escape(str(ros_out))}", soft_wrap=True)
    if result["damage"]:
        say_on(Console(stderr=True))(f"{result['damage']}; everything before the damage was replayed")
        raise typer.Exit(3)
    if verify and not result["identical"]:
        raise typer.Exit(1)


def _many(paths: list[Path], model: str | None, provider: Provider, verify: bool, as_json: bool) -> None:
    """Replay several recordings together; the worst of them is the exit code."""
    from rich.progress import Progress

    from stream_mmrnn.offline.replay_many import replay_many

    console = Console(stderr=as_json, highlight=False)
    with Progress(console=console, transient=True, disable=as_json or not console.is_terminal) as progress:
        task = progress.add_task("replaying", total=None)
        result = replay_many(
            paths,
            model=model,
            provider=provider.value,
            verify=verify,
            on_predictions=lambda count: progress.advance(task, count),
            alive=StopFlag.unwinding(),
        )
    if as_json:
        print_document(result)
    else:
        for row in result["recordings"]:
            if row["recorded_predictions"]:
                console.print(f"{shown(row['recording'])}: {_verdict(row)}", soft_wrap=True)
        console.print(f"{len(result['recordings'])} recordings: {_speed(result)}")
    damaged = [row["damage"] for row in result["recordings"] if row["damage"]]
    for damage in damaged:
        say_on(Console(stderr=True))(f"{damage}; everything before the damage was replayed")
    if damaged:
        raise typer.Exit(3)
    if verify and not result["identical"]:
        raise typer.Exit(1)


def _speed(result: dict[str, Any]) -> str:
    return (
        f"{result['predictions']} predictions of {spoken(result['covered_s'])} in {result['seconds']:.2f} s: "
        f"{result['times_real_time']:.0f} times real time"
    )


def _verdict(result: dict[str, Any]) -> str:
    verdict = "identical, bit for bit" if result["identical"] else f"different: {result['first_difference']}"
    return f"compared with {result['recorded_predictions']} recorded ones: {shown(verdict)}"
