"""The verbs of `python -m tools.bench`: those of `stream-mmrnn bench` with peers, and `transport`, `serve`, `train`,
`devices`.

`step`, `sessions` and `end-to-end` are the program's own verbs, which find `Peers` in the context; with it they also
measure torch and silero VAD, Triton, and ZeroMQ's own proxy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from stream_mmrnn.bench.peers import Peers
from stream_mmrnn.bench.report import Ratio
from stream_mmrnn.cli import bench as program
from stream_mmrnn.cli.bench import Compare, Plots, Seed, run_bench
from stream_mmrnn.cli.terminal import Json, ModelName
from stream_mmrnn.core.errors import StreamError
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.core.printable import shown

app = typer.Typer(help="Measure this machine, and peers in the same run.", no_args_is_help=True)
VERBS = ("step", "sessions", "end-to-end", "transport", "serve", "train", "devices")


def _servers(
    path: Path, *, duration_s: float, seed: int, say: Callable[[str], None], alive: Callable[[], bool]
) -> tuple[list[dict[str, Any]], dict[str, Ratio]]:
    from tools.bench import servers

    return servers.measure(path, duration_s=duration_s, seed=seed, say=say, alive=alive)


def _bare_hop(size_bytes: int, rate_hz: float, count: int) -> tuple[Histogram, str]:
    from tools.bench.contenders import bare_hop

    return bare_hop(size_bytes, rate_hz, count)


def run(arguments: Sequence[str]) -> None:
    """Run one verb; an error of ours becomes one sentence and an exit code."""
    from tools.bench.step import TorchPeers

    try:
        app(args=list(arguments), prog_name="python -m tools.bench", obj=Peers(TorchPeers(), _servers, _bare_hop))
    except StreamError as e:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/red] {shown(str(e), 2000)}")
        raise SystemExit(e.exit_code) from None


app.command()(program.step)
app.command()(program.sessions)
app.command("end-to-end")(program.end_to_end)


@app.command()
def transport(
    duration: Annotated[
        float, typer.Option("--duration", "-d", min=0.1, help="Seconds for each contender, size and mode.")
    ] = 3.0,
    size: Annotated[str, typer.Option(help="Sizes of messages; comma-separated.")] = "2kb,30kb,1mb",
    model: ModelName = None,
    compare: Compare = None,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """A message from one process to another over our bus, and over pyzmq, dora-rs and LSL if they are installed."""
    from tools.bench import transport as bench

    sizes = size.split(",")
    for name in sizes:
        if name not in bench.SIZES_BYTES:
            raise typer.BadParameter(f"there is no size {name!r}; use {', '.join(bench.SIZES_BYTES)}")
    run = partial(bench.run, duration_s=duration, sizes=sizes, model=model)
    run_bench("transport", as_json, compare, plots, run)


@app.command()
def train(
    hidden: Annotated[int, typer.Option(min=1, help="Units of the cell.")] = 128,
    length: Annotated[int, typer.Option(min=1, help="Ticks of a sequence.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which each cell is measured.")] = 10,
    compare: Compare = None,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """Training speed of each cell against torch's nn.GRU; needs the extra `train`."""
    from tools.bench import train as bench

    def run(*, alive: Callable[[], bool], say: Callable[[str], None]) -> Any:
        return bench.run(hidden=hidden, length=length, batch=batch, threads=threads, rounds=rounds, say=say)

    run_bench("train", as_json, compare, plots, run)


@app.command()
def serve(
    clients: Annotated[int, typer.Option(min=1, max=4096, help="Each with a session at 25 Hz.")] = 200,
    duration: Annotated[float, typer.Option("--duration", "-d", min=0.5, help="Seconds of each turn.")] = 8.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which contenders take turns.")] = 3,
    hidden: Annotated[int, typer.Option(min=8, help="Units of the two layers.")] = 256,
    seed: Seed = 0,
    peers: Annotated[bool, typer.Option(help="Also measure Triton, if it is installed.")] = True,
    capacity: Annotated[
        bool, typer.Option(help="Also how many sessions one core carries, in groups and alone.")
    ] = True,
    compare: Compare = None,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """Clients over the network: ours over ZeroMQ and over NATS, Triton; and how soon a client gets `busy` when full."""
    from tools.bench import serve as bench

    run = partial(
        bench.run,
        clients=clients,
        duration_s=duration,
        rounds=rounds,
        hidden=hidden,
        seed=seed,
        peers=peers,
        capacity=capacity,
    )
    run_bench("serve", as_json, compare, plots, run)


@app.command()
def devices(
    data: Annotated[Path, typer.Argument(help="The folder that holds clips/dialogue.wav and clips/lbbc2a.mpg.")],
    model: ModelName = None,
    duration: Annotated[float, typer.Option("--duration", "-d", min=1.0, help="Seconds of each session.")] = 30.0,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which sessions take turns.")] = 2,
    compare: Compare = None,
    plots: Plots = None,
    as_json: Json = False,
) -> None:
    """A live session on a virtual microphone and camera: cores of all its processes, and the delay of predictions."""
    from tools.bench import devices as bench

    run_bench(
        "devices",
        as_json,
        compare,
        plots,
        partial(bench.run, data=data, model=model, duration_s=duration, rounds=rounds),
    )
