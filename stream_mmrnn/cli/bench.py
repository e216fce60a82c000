"""The verbs of `stream-mmrnn bench`: each reads its options, runs one benchmark and shows its document.

With `--json` the last line of stdout is the document; everything else goes to stderr. A benchmark is imported when it
runs. `python -m tools.bench` runs the same verbs with `Peers` as the context's object, and has some of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from stream_mmrnn.bench.peers import Peers
from stream_mmrnn.cli.terminal import Console, Json, ModelName, Provider, print_document
from stream_mmrnn.core import config
from stream_mmrnn.core.errors import FileError
from stream_mmrnn.core.printable import escape
from stream_mmrnn.core.settings import EngineSettings
from stream_mmrnn.core.signals import StopFlag

if TYPE_CHECKING:
    from stream_mmrnn.bench.measure import Arrivals
    from stream_mmrnn.bench.plots import Pictures

app = typer.Typer(help="Measure this machine, in an open loop.", no_args_is_help=True)


class TransportName(StrEnum):
    ipc, tcp = "ipc", "tcp"


class Sets(StrEnum):
    audio, all, both = "audio", "all", "both"


class Priority(StrEnum):
    normal, nice, fifo = "normal", "nice", "fifo"


class Phases(StrEnum):
    spread, together = "spread", "together"


Run: TypeAlias = "Callable[..., tuple[dict[str, Any], Pictures]]"
"""A benchmark with its options; it is called with `alive` and `say`."""

Compare = Annotated[
    Path | None, typer.Option("--compare", help="An older document of this bench: print ratios to its figures.")
]
Plots = Annotated[Path | None, typer.Option("--plots", help="Folder for PNG plots (needs matplotlib).")]
Where = Annotated[Provider, typer.Option(help="Where the model runs.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the synthetic streams.")]


def run_bench(name: str, as_json: bool, base: Path | None, folder: Path | None, run: Run) -> None:
    """Run one benchmark: read the base to compare with first, print the document last."""
    from stream_mmrnn.bench import report
    from stream_mmrnn.cli import bench_tables as show

    before = report.load(base, name) if base else None
    console = show.console(stderr=as_json)
    document, pictures = run(
        alive=StopFlag.unwinding(), say=lambda text: console.print(f"[dim]{escape(text)}[/dim]", soft_wrap=True)
    )
    notes = document.setdefault("notes", [])
    if before is not None:
        document["compared"] = report.compare(before, document)
        notes += report.cautions(before, document)
    if folder is not None:
        made, note = pictures.write(folder, name)
        document["plots"] = [path.name for path in made]
        notes += [note] if note else [f"{len(made)} plots are in {folder}"]
    show.show(console, document)
    if as_json:
        print_document(document)


@app.command()
def engine(
    model: ModelName = None,
    sessions: Annotated[int, typer.Option(min=1, help="Number of sessions.")] = 1,
    duration: Annotated[float, typer.Option("--duration", "-d", min=0.2, help="Seconds.")] = 10.0,
    hot: Annotated[bool, typer.Option("--hot", help="As fast as possible instead of at the real rate.")] = False,
    provider: Where = Provider.auto,
    seed: Seed = 0,
    compare: Compare = None,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """Aligner and engine under synthetic sessions, in one process."""
    from rich.progress import Progress

    from stream_mmrnn.bench import engine as bench

    def run(*, alive: Callable[[], bool], say: Callable[[str], None]) -> Any:
        console = Console(stderr=as_json, highlight=False)
        with Progress(console=console, transient=True, disable=as_json or not console.is_terminal) as bar:
            task = bar.add_task("running", total=duration)
            return bench.run(
                config.find_model(model or EngineSettings().model),
                sessions=sessions,
                duration_s=duration,
                hot=hot,
                provider=provider.value,
                seed=seed,
                alive=alive,
                progress=lambda s: bar.update(task, completed=s),
            )

    run_bench("engine", as_json, compare, plots, run)


@app.command("end-to-end")
def end_to_end(
    context: typer.Context,
    model: ModelName = None,
    duration: Annotated[float, typer.Option("--duration", "-d", min=1.0, help="Seconds for each set.")] = 20.0,
    modalities: Annotated[Sets, typer.Option(help="Sound alone, all modalities, or one after the other.")] = Sets.both,
    busy: Annotated[int, typer.Option(min=0, max=64, help="Busy processes to run beside it.")] = 0,
    bus: Annotated[TransportName, typer.Option(help="Transport of the bus.")] = TransportName.ipc,
    priority: Annotated[Priority, typer.Option(help="Of the processes on the way, and of the reader.")] = (
        Priority.normal
    ),
    page: Annotated[bool, typer.Option("--page", help="Also serve the live page, which takes CPU time.")] = False,
    provider: Where = Provider.auto,
    seed: Seed = 0,
    compare: Compare = None,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """From a sample's event to a readable prediction: a live session's workers, broker and engine, stage by stage."""
    peers = context.find_object(Peers)

    from stream_mmrnn.bench import end_to_end as bench

    run = partial(
        bench.run,
        model=model,
        duration_s=duration,
        sets=tuple(bench.SETS) if modalities is Sets.both else (modalities.value,),
        busy=busy,
        provider=provider.value,
        transport=bus.value,
        priority=priority.value,
        seed=seed,
        page=page,
        bare_hop=peers.bare_hop if peers else bench.no_bare_hop,
    )
    run_bench("end-to-end", as_json, compare, plots, run)


@app.command()
def replay(
    recording: Annotated[Path | None, typer.Option(help="A recording; without it, one is made.")] = None,
    duration: Annotated[float, typer.Option("--duration", "-d", min=1.0, help="Seconds, if one is made.")] = 20.0,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is replayed.")] = 10,
    sessions: Annotated[int, typer.Option(min=2, help="Number of sessions in lock step.")] = 16,
    model: ModelName = None,
    provider: Where = Provider.cpu,
    compare: Compare = None,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """A recording's features through aligner and engine again: times real time, and whether every bit is the same."""
    from stream_mmrnn.bench import replay as bench

    run = partial(
        bench.run,
        recording=recording,
        duration_s=duration,
        rounds=rounds,
        sessions=sessions,
        model=model,
        provider=provider.value,
    )
    run_bench("replay", as_json, compare, plots, run)


def _arrivals(named: str) -> Arrivals:
    """The value of `--arrivals`; raises FileError if it is a file that does not hold times."""
    if named == "constant":
        return "constant"
    if named == "poisson":
        return "poisson"
    try:
        return [float(line) for line in Path(named).read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as e:
        raise FileError(f"--arrivals {named} is not a file with one time in seconds per line: {e}") from e


@app.command()
def step(
    context: typer.Context,
    duration: Annotated[
        float, typer.Option("--duration", "-d", min=1.0, help="Seconds of each contender's paced part.")
    ] = 8.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which contenders take turns.")] = 21,
    calls: Annotated[int, typer.Option(min=1, help="Calls of each contender in a round.")] = 200,
    hidden: Annotated[str, typer.Option(help="Units of the two layers; comma-separated.")] = "256,512,1024",
    arrivals: Annotated[
        str, typer.Option(help="Of the paced part: constant, poisson, or a file with one time in seconds per line.")
    ] = "constant",
    compare: Compare = None,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """One step of one session against bare IO binding; cold and prewarmed; 8-bit weights."""
    peers = context.find_object(Peers)

    from stream_mmrnn.bench import step as bench

    sizes = [int(h) for h in hidden.split(",") if h.isdigit() and int(h) >= 8 and not int(h) % 8]
    if len(sizes) != len(hidden.split(",")):
        raise typer.BadParameter(f"--hidden {hidden!r} must be multiples of 8, separated by commas")

    run = partial(
        bench.run,
        duration_s=duration,
        rounds=rounds,
        calls=calls,
        sizes=sizes,
        arrivals=_arrivals(arrivals),
        peers=peers.step if peers else None,
    )
    run_bench("step", as_json, compare, plots, run)


@app.command()
def sessions(
    context: typer.Context,
    model: ModelName = None,
    hidden: Annotated[int, typer.Option(min=8, help="Units of the two layers, without --model.")] = 256,
    duration: Annotated[float, typer.Option("--duration", "-d", min=0.2, help="Seconds of each point.")] = 3.0,
    arrivals: Annotated[Phases, typer.Option(help="Each session at its own phase, or all at once.")] = Phases.spread,
    processes: Annotated[int, typer.Option(min=1, max=64, help="Processes over which the engine is spread.")] = 1,
    most: Annotated[int, typer.Option(min=1, max=65536, help="Upper limit of the search.")] = 16384,
    provider: Where = Provider.cpu,
    seed: Seed = 0,
    compare: Compare = None,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """How many sessions at 25 Hz until the p99 latency exceeds a tick; the gain of batching."""
    peers = context.find_object(Peers)

    from stream_mmrnn.bench import sessions as bench

    run = partial(
        bench.run,
        model=config.find_model(model) if model else None,
        hidden=hidden,
        duration_s=duration,
        arrivals=arrivals.value,
        processes=processes,
        provider=provider.value,
        most=most,
        seed=seed,
        servers=peers.servers if peers else None,
    )
    run_bench("sessions", as_json, compare, plots, run)
