"""The verbs that observe a running session: `top` and `predictions`. Exit code 1: no session is running."""

from __future__ import annotations

import contextlib
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from stream_mmrnn.cli.terminal import Console, Json, print_document, say_on
from stream_mmrnn.core.errors import NotRunning
from stream_mmrnn.core.signals import StopFlag

Session = Annotated[str | None, typer.Option("--session", help="The session's name or process id, if several run.")]


class Policy(StrEnum):
    """The values of `--policy`."""

    latest, drop_oldest, block = "latest", "drop_oldest", "block"


def top(
    session: Session = None,
    once: Annotated[
        bool, typer.Option("--once", help="Show it once and exit; the default without a terminal.")
    ] = False,
    every: Annotated[float, typer.Option(min=0.2, max=60.0, help="Seconds between measurements.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Show processes, streams, losses and latency of running sessions. Exit code 1 if none is running."""
    from rich.live import Live

    from stream_mmrnn.viewers.top.show import draw
    from stream_mmrnn.viewers.top.system import Systems

    console = Console(highlight=False)
    alive = StopFlag.unwinding()
    with contextlib.closing(Systems(session)) as systems:
        if as_json or once or not console.is_terminal:
            systems.receive(every)
            systems.poll()
            if not systems.systems:
                raise NotRunning("the session ended while it was measured")
            if as_json:
                print_document(systems.document())
            else:
                console.print(draw(systems, console.width))
            return
        with Live(console=console, screen=True, auto_refresh=False) as screen:
            while alive() and (systems.systems or systems.notes):
                waited_s = 0.0
                while alive() and waited_s < every:
                    systems.receive(0.1)
                    waited_s += 0.1
                    screen.update(draw(systems, console.width, console.height), refresh=True)
                systems.poll()
    if alive():
        say_on(console)("no session is running any more")


def predictions(
    session: Session = None,
    head: Annotated[list[str] | None, typer.Option("--head", help="Only this head; repeatable.")] = None,
    every: Annotated[float, typer.Option(min=0.0, help="Least event time between two lines, in seconds.")] = 0.0,
    count: Annotated[int, typer.Option(min=0, help="Number of lines; 0 for no limit.")] = 0,
    policy: Annotated[Policy, typer.Option(help="What to drop when this reader is too slow.")] = Policy.drop_oldest,
    address: Annotated[str, typer.Option(help="HOST:PORT of a bus over tcp, instead of a session of this user.")] = "",
    keys: Annotated[Path | None, typer.Option(help="The folder with our keys, if that bus needs keys.")] = None,
    server_key: Annotated[str, typer.Option(help="That bus's public key, if it is not in the folder.")] = "",
    wait: Annotated[float, typer.Option(min=0.0, help="Seconds to wait for the session to appear.")] = 0.0,
    as_json: Json = False,
) -> None:
    """Print a running session's predictions as JSON lines, until it ends or the pipe is closed.

    `--json` adds a last line, the only one with the key `predictions`: how many there were, what was lost, and why it
    ended.
    """
    from stream_mmrnn.bus.prediction_reader import document
    from stream_mmrnn.bus.subscription import subscribe

    alive = StopFlag.unwinding()
    say = say_on(Console(stderr=True))
    reader = subscribe(
        session, address=address, keys=keys, server_key=server_key, heads=head or None, policy=policy.value, wait=wait
    )
    printed, passed = 0, 0
    due_ns: dict[str, int] = {}  # by session: the event time from which the next line is due
    with reader:
        while alive() and not (count and printed >= count):
            prediction = reader.receive(0.1)
            if prediction is None:
                if reader.ended:
                    break
                continue
            if prediction.event_ns < due_ns.get(prediction.session, prediction.event_ns):
                passed += 1
                continue
            due_ns[prediction.session] = prediction.event_ns + round(every * 1e9)
            if not _print(document(prediction)):
                return
            printed += 1
        lost = {**reader.lost, **({"passed_over": passed} if passed else {})}
        summary = {"predictions": printed, "lost": lost, "repeated": reader.repeated, "ended": reader.ended}
    if as_json:
        _print(summary)
        return
    if reader.lost:
        say(f"not printed: {', '.join(f'{n} {reason}' for reason, n in reader.lost.items())}")


def _print(line: dict[str, Any]) -> bool:
    """Print one line at once; False if the reader has closed the pipe."""
    try:
        print_document(line)
    except BrokenPipeError:
        # else Python would report at exit that it could not flush its buffer
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())
        os.close(devnull)
        return False
    return True
