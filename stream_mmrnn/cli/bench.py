"""The verbs of `stream-mmrnn bench` at the terminal: each reads its options, runs one bench and shows what it says.

With `--json` the last line of stdout is the document, everything else goes to stderr. Imports a bench only when it
runs. Knows nothing about how anything is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer
from rich.console import Console

from stream_mmrnn.cli.terminal import Json, ModelName, Provider, print_document
from stream_mmrnn.core import config
from stream_mmrnn.core.errors import FileError
from stream_mmrnn.core.printable import escape
from stream_mmrnn.core.signals import StopFlag

if TYPE_CHECKING:
    from stream_mmrnn.bench.measure import Arrivals
    from stream_mmrnn.bench.plots import Pictures

app = typer.Typer(help="Measure this machine: open loop, peers in the same run.", no_args_is_help=True)


class Transport(StrEnum):
    ipc, tcp = "ipc", "tcp"


class Sets(StrEnum):
    audio, all, both = "audio", "all", "both"


class Priority(StrEnum):
    normal, nice, fifo = "normal", "nice", "fifo"


class Phases(StrEnum):
    spread, together = "spread", "together"


Bench: TypeAlias = Literal["step", "sessions", "engine", "transport", "end-to-end", "replay", "serve", "train"]
Run: TypeAlias = "Callable[[Callable[[], bool], Callable[[str], None]], tuple[dict[str, Any], Pictures]]"

Compare = Annotated[
    Path | None, typer.Option("--compare", help="An older document of this bench: print ratios to its figures.")
]
Plots = Annotated[Path | None, typer.Option("--plots", help="Folder for PNG plots (needs matplotlib).")]
Where = Annotated[Provider, typer.Option(help="Where the model runs.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the synthetic streams.")]


def _bench(name: Bench, as_json: bool, base: Path | None, folder: Path | None, run: Run) -> None:
    """What all of them have in common: the base is read before anything is measured, the document comes last."""
    from stream_mmrnn.bench import report
    from stream_mmrnn.cli import bench_tables as show

    before = report.load(base, name) if base else None
    console = show.console(stderr=as_json)
    document, pictures = run(
        StopFlag.unwinding(), lambda text: console.print(f"[dim]{escape(text)}[/dim]", soft_wrap=True)
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
    sessions: Annotated[int, typer.Option(min=1, help="How many at once.")] = 1,
    duration: Annotated[float, typer.Option("--duration", "-d", min=0.2, help="Seconds.")] = 10.0,
    hot: Annotated[bool, typer.Option("--hot", help="As fast as it goes instead of at the real rate.")] = False,
    provider: Where = Provider.auto,
    seed: Seed = 0,
    compare: Compare = None,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """Aligner and engine under synthetic sessions, in one process."""

    def run(alive: Callable[[], bool], _: Callable[[str], None]) -> Any:
        from rich.progress import Progress

        from stream_mmrnn.bench import engine as bench

        console = Console(stderr=as_json, highlight=False)
        with Progress(console=console, transient=True, disable=as_json or not console.is_terminal) as bar:
            task = bar.add_task("running", total=duration)
            return bench.run(
                config.find_model(model or config.Engine().model),
                sessions=sessions,
                duration_s=duration,
                hot=hot,
                provider=provider.value,
                seed=seed,
                alive=alive,
                progress=lambda s: bar.update(task, completed=s),
            )

    _bench("engine", as_json, compare, plots, run)


@app.command()
def transport(
    duration: Annotated[
        float, typer.Option("--duration", "-d", min=0.1, help="Seconds for each contender, size and mode.")
    ] = 3.0,
    size: Annotated[str, typer.Option(help="Of messages; comma-separated.")] = "2kb,30kb,1mb",
    model: ModelName = None,
    compare: Compare = None,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """A message from one process to another, over our bus and others: pyzmq, dora-rs, LSL where they are installed."""

    def run(alive: Callable[[], bool], say: Callable[[str], None]) -> Any:
        from stream_mmrnn.bench import transport as bench

        sizes = size.split(",")
        for name in sizes:
            if name not in bench.SIZES_BYTES:
                raise typer.BadParameter(f"there is no size {name!r}; use {', '.join(bench.SIZES_BYTES)}")
        return bench.run(duration_s=duration, sizes=sizes, model=model, alive=alive, say=say)

    _bench("transport", as_json, compare, plots, run)


@app.command("end-to-end")
def end_to_end(
    model: ModelName = None,
    duration: Annotated[float, typer.Option("--duration", "-d", min=1.0, help="Seconds for each set.")] = 20.0,
    modalities: Annotated[Sets, typer.Option(help="Sound alone, all modalities, or one after the other.")] = Sets.both,
    busy: Annotated[int, typer.Option(min=0, max=64, help="Busy processes to run beside it.")] = 0,
    bus: Annotated[Transport, typer.Option(help="What the bus runs over.")] = Transport.ipc,
    priority: Annotated[Priority, typer.Option(help="Of the processes on the way, the reader among them.")] = (
        Priority.normal
    ),
    page: Annotated[
        bool, typer.Option("--page", help="Serve the live page meanwhile, which costs what it costs.")
    ] = False,
    provider: Where = Provider.auto,
    seed: Seed = 0,
    compare: Compare = None,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """From a sample's event to a readable prediction: a live session's workers, broker and engine, stage by stage."""

    def run(alive: Callable[[], bool], say: Callable[[str], None]) -> Any:
        from stream_mmrnn.bench import end_to_end as bench

        return bench.run(
            model=model,
            duration_s=duration,
            sets=tuple(bench.SETS) if modalities is Sets.both else (modalities.value,),
            busy=busy,
            provider=provider.value,
            transport=bus.value,
            priority=priority.value,
            seed=seed,
            page=page,
            alive=alive,
            say=say,
        )

    _bench("end-to-end", as_json, compare, plots, run)


@app.command()
def replay(
    recording: Annotated[Path | None, typer.Option(help="A recording; without it one is made.")] = None,
    duration: Annotated[float, typer.Option("--duration", "-d", min=1.0, help="Seconds of the one made.")] = 20.0,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is replayed.")] = 10,
    sessions: Annotated[int, typer.Option(min=2, help="How many in lock step.")] = 16,
    model: ModelName = None,
    provider: Where = Provider.cpu,
    compare: Compare = None,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """A recording's features through aligner and engine again: times real time, and whether every bit is the same."""

    def run(alive: Callable[[], bool], say: Callable[[str], None]) -> Any:
        from stream_mmrnn.bench import replay as bench

        return bench.run(
            recording=recording,
            duration_s=duration,
            rounds=rounds,
            sessions=sessions,
            model=model,
            provider=provider.value,
            alive=alive,
            say=say,
        )

    _bench("replay", as_json, compare, plots, run)


@app.command()
def train(
    hidden: Annotated[int, typer.Option(min=1, help="Units of the cell.")] = 128,
    length: Annotated[int, typer.Option(min=1, help="Ticks of a sequence.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is measured.")] = 10,
    compare: Compare = None,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """Training speed of each cell against torch's nn.GRU, where the extra `train` is installed."""

    def run(_: Callable[[], bool], say: Callable[[str], None]) -> Any:
        from stream_mmrnn.bench import train as bench

        return bench.run(hidden=hidden, length=length, batch=batch, threads=threads, rounds=rounds, say=say)

    _bench("train", as_json, compare, plots, run)


def _arrivals(named: str) -> Arrivals:
    """What `--arrivals` names; raises FileError where it is a file that holds no times."""
    if named == "constant":
        return "constant"
    if named == "poisson":
        return "poisson"
    try:
        return [float(line) for line in Path(named).read_text(encoding="utf-8").split()]
    except (OSError, ValueError) as e:
        raise FileError(f"the arrivals {named} are no file with a time in seconds a line: {e}") from e


@app.command()
def step(
    duration: Annotated[
        float, typer.Option("--duration", "-d", min=1.0, help="Seconds of each contender's paced part.")
    ] = 8.0,
    rounds: Annotated[int, typer.Option(min=1, help="How often contenders take turns.")] = 21,
    calls: Annotated[int, typer.Option(min=1, help="Of each contender in a round.")] = 200,
    hidden: Annotated[str, typer.Option(help="Units of the two layers; comma-separated.")] = "256,512,1024",
    arrivals: Annotated[
        str, typer.Option(help="Of the paced part: constant, poisson, or a file with a time in seconds a line.")
    ] = "constant",
    peers: Annotated[bool, typer.Option(help="Run what needs torch, too.")] = True,
    compare: Compare = None,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """One step of one session: against bare IO binding, torch, numpy; cold and prewarmed; 8-bit weights; silero."""

    def run(alive: Callable[[], bool], say: Callable[[str], None]) -> Any:
        from stream_mmrnn.bench import step as bench

        sizes = [int(h) for h in hidden.split(",") if h.isdigit() and int(h) >= 8 and not int(h) % 8]
        if len(sizes) != len(hidden.split(",")):
            raise typer.BadParameter(f"--hidden {hidden!r} must be multiples of 8, separated by commas")
        return bench.run(
            duration_s=duration,
            rounds=rounds,
            calls=calls,
            sizes=sizes,
            arrivals=_arrivals(arrivals),
            peers=peers,
            say=say,
            alive=alive,
        )

    _bench("step", as_json, compare, plots, run)


@app.command()
def sessions(
    model: ModelName = None,
    hidden: Annotated[int, typer.Option(min=8, help="Units of the two layers, without --model.")] = 256,
    duration: Annotated[float, typer.Option("--duration", "-d", min=0.2, help="Seconds of each point.")] = 3.0,
    arrivals: Annotated[Phases, typer.Option(help="Each session at its own phase, or all at once.")] = Phases.spread,
    processes: Annotated[int, typer.Option(min=1, max=64, help="Over how many the engine is spread.")] = 1,
    most: Annotated[int, typer.Option(min=1, max=65536, help="Do not try more.")] = 16384,
    provider: Where = Provider.cpu,
    seed: Seed = 0,
    peers: Annotated[bool, typer.Option(help="Measure Triton, too, where it is (not with --model).")] = True,
    compare: Compare = None,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """How many sessions at 25 Hz before the slowest hundredth is later than its tick; what batching is worth."""

    def run(alive: Callable[[], bool], say: Callable[[str], None]) -> Any:
        from stream_mmrnn.bench import sessions as bench

        return bench.run(
            model=config.find_model(model) if model else None,
            hidden=hidden,
            duration_s=duration,
            arrivals=arrivals.value,
            processes=processes,
            provider=provider.value,
            most=most,
            seed=seed,
            peers=peers,
            say=say,
            alive=alive,
        )

    _bench("sessions", as_json, compare, plots, run)


@app.command()
def serve(
    clients: Annotated[int, typer.Option(min=1, max=4096, help="Each with a session at 25 Hz.")] = 200,
    duration: Annotated[float, typer.Option("--duration", "-d", min=0.5, help="Seconds of each turn.")] = 8.0,
    rounds: Annotated[int, typer.Option(min=1, help="How often contenders take turns.")] = 3,
    hidden: Annotated[int, typer.Option(min=8, help="Units of the two layers.")] = 256,
    seed: Seed = 0,
    peers: Annotated[bool, typer.Option(help="Measure Triton, too, where it is.")] = True,
    compare: Compare = None,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """Clients over the network: ours over ZeroMQ, over NATS, Triton; and who is told busy beyond the capacity."""

    def run(alive: Callable[[], bool], say: Callable[[str], None]) -> Any:
        from stream_mmrnn.bench import serve as bench

        return bench.run(
            clients=clients,
            duration_s=duration,
            rounds=rounds,
            hidden=hidden,
            seed=seed,
            peers=peers,
            say=say,
            alive=alive,
        )

    _bench("serve", as_json, compare, plots, run)
