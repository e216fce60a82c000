"""The `stream-mmrnn` command: each verb reads its options, calls one function and shows what it returns.

Exit codes: 0 done, 1 it ran and found a fault, 2 usage, 3 done in part, 4 busy. With `--json` the last line of stdout
is one JSON document and everything else goes to stderr. Knows nothing about how anything is done.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec.structs import replace
from rich.console import Console

from stream_mmrnn.cli import bench as bench
from stream_mmrnn.cli import config as settings_commands
from stream_mmrnn.cli import convert as interchange
from stream_mmrnn.cli import diff as diff_commands
from stream_mmrnn.cli import keys as keys_commands
from stream_mmrnn.cli import top as watch_commands
from stream_mmrnn.cli import train as commands
from stream_mmrnn.cli.devices import devices
from stream_mmrnn.cli.doctor import doctor
from stream_mmrnn.cli.serve import serve
from stream_mmrnn.cli.terminal import COMMAND, Alive, ConfigFile, Json, ModelName, Provider, print_document, say_on
from stream_mmrnn.core import config
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import ConfigError, StreamError
from stream_mmrnn.core.printable import shown
from stream_mmrnn.core.signals import ENDING, held
from stream_mmrnn.recording.append_file import later_parts, part

if TYPE_CHECKING:
    pass

app = typer.Typer(
    help="Predict what happens next from camera, microphone and text, tick by tick.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class LogFormat(StrEnum):
    text, json = "text", "json"


class From(StrEnum):
    features, raw = "features", "raw"


def run() -> None:
    """The console script: errors of ours become one sentence and an exit code."""
    try:
        app(prog_name=COMMAND)
    except StreamError as e:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/red] {shown(str(e), 2000)}")
        raise SystemExit(e.exit_code) from None


def _keep_old(path: Path, say: Callable[[str], None]) -> None:
    """A recording that is already there keeps its content under another name."""
    from stream_mmrnn.core.log import Note

    if not path.exists():
        return
    number = 1
    while (old := path.with_name(f"{path.stem}.old{number}{path.suffix}")).exists():
        number += 1
    parts = later_parts(path)
    path.rename(old)
    for number, later in parts.items():
        later.rename(part(old, number - 1))
    text = f"{path} was there already; it is {old} now" + (", and its parts likewise" if parts else "")
    say(Note(text, "recorder", "renamed", old=str(old)))


def _settings(
    config_file: Path | None,
    source: str | None,
    named: dict[str, str | None],
    overrides: dict[str, Any],
) -> config.Settings:
    """`named`: the modalities' own options, which win over `source`."""
    from stream_mmrnn.capture import lsl_runtime as lsl
    from stream_mmrnn.capture import sources

    chosen = sources.everything_from(source) if source else {}
    chosen |= {k: v for k, v in named.items() if v}
    settings = config.load(config_file, {**{f"sources.{k}": v for k, v in chosen.items()}, **overrides})
    sources.check_all(settings.sources)
    if settings.lsl.outlet or any(sources.split(getattr(settings.sources, m))[0] == "lsl" for m in sources.NAMED):
        lsl.require(settings.lsl)
    return settings


def _without_idle(
    settings: config.Settings, source: str | None, named: dict[str, str | None], taken: Collection[str]
) -> config.Settings:
    """Of the second person `--source` gives only what the model takes: a worker for nobody would slow the start."""
    from stream_mmrnn.capture import sources

    idle = [m for m in sources.OTHER if source and not named[m] and m not in taken]
    chosen = replace(settings.sources, **dict.fromkeys(idle, "none"))
    return replace(settings, sources=chosen)


def _begin_processes() -> None:
    """Let the server of all processes import while we do other things; whoever calls early waits less later."""
    from stream_mmrnn.live.managed_process import kill_forkserver, process_context

    ENDING.at_once = kill_forkserver
    process_context()


def _capture(settings: config.Settings, duration: float | None, with_engine: bool, as_json: bool, plain: bool) -> None:
    """What `live` and `record` have in common."""
    from rich.live import Live

    from stream_mmrnn.capture import sources
    from stream_mmrnn.core.log import JsonLines, Note, at_least
    from stream_mmrnn.live.session import LiveSession
    from stream_mmrnn.viewers.dashboard.state import LiveState
    from stream_mmrnn.viewers.terminal_view import WATCHED, render, summary_table

    if all(getattr(settings.sources, m) == "none" for m in sources.NAMED):
        raise ConfigError("every source is `none`; name at least one, for example --source synthetic")
    if with_engine and settings.trace.ratio:
        from stream_mmrnn.viewers import tracing as traces

        traces.require()
    console = Console(stderr=as_json, highlight=False)
    ENDING.watch()
    _begin_processes()
    notes: list[str] = []
    view = LiveState()
    began_ns = now_ns()
    screen = None
    lines = JsonLines(settings.log.level) if settings.log.format == "json" else None
    if console.is_terminal and not plain and not as_json and lines is None:
        screen = Live(console=console, refresh_per_second=8, transient=True)

    def show(text: str) -> None:
        notes.append(text)
        del notes[:-16]
        if screen is None:
            say_on(console)(text)

    say: Callable[[str], None] = lines or at_least(settings.log.level, show)

    path = Path(settings.record.path) if settings.record.path else None
    if path is not None:
        _keep_old(path, say)
    drawn_ns = line_ns = 0
    addresses: dict[str, str] = {}

    def often() -> None:
        nonlocal drawn_ns, line_ns
        for node in session.supervisor.nodes:
            if node.name not in addresses and node.status and node.status.detail.get("address"):
                found = addresses[node.name] = shown(str(node.status.detail["address"]), 64)
                if lines is not None:
                    lines(Note(f"{node.name}: {found}", node.name, "address", address=found))
                elif screen is None:
                    console.print(f"{node.name}: {found}")
        seconds = (now_ns() - began_ns) / 1e9
        if screen is not None and now_ns() - drawn_ns > 120_000_000:
            drawn_ns = now_ns()
            headline = f"{seconds:6.1f} s   {'  '.join(addresses.values())}"
            screen.update(render(view.snapshot(now_ns()), console.width, headline, notes))
        elif screen is None and lines is None and not as_json and now_ns() - line_ns > 1_000_000_000:
            line_ns = now_ns()
            console.print(_line(seconds, view.snapshot(now_ns())), soft_wrap=True, markup=False)

    # a machine reads the summary: the messages themselves are nobody's then
    see, watch = (lambda _: None, ()) if as_json or lines is not None else (view.observe, WATCHED)
    with held():  # until it is known what must not be left behind
        session = LiveSession(settings, with_engine, ENDING.alive, say, see, often, watch)
        supervisor = session.supervisor

        def end_at_once() -> None:
            supervisor.end_at_once()
            if screen is not None:
                console.show_cursor()

        ENDING.at_once, ENDING.in_order = end_at_once, lambda: supervisor.begun
    try:
        with screen or contextlib.nullcontext():
            summary = session.run(duration)
    except StreamError as e:
        if lines is None:
            raise
        lines(Note(str(e), "supervisor", "error", "error"))
        raise typer.Exit(e.exit_code) from None
    if lines is not None and not as_json:
        level = "error" if summary["failed"] else "info"
        lines(Note(f"the session {summary['session']!r} is over", "supervisor", "summary", level, **summary))
    if as_json:
        print_document(summary)
    elif lines is None:
        console.print(summary_table(summary))
    if summary["failed"]:
        raise typer.Exit(1)


def _line(seconds: float, state: dict[str, Any]) -> str:
    """One line a second, for output that is no terminal."""
    heads = "  ".join(
        f"{name} [{' '.join('–' if v is None else f'{v:.2f}' for v in head['values'])}]"
        for name, head in state["heads"].items()
    )
    here = " ".join(
        f"{s['modality']} {s['rate_hz']:.0f}Hz" for n, s in state["streams"].items() if n.startswith("feature/")
    )
    return f"{seconds:6.1f} s  {here}  {heads}".rstrip()


Source = Annotated[str | None, typer.Option("--source", "-s", help="All modalities: synthetic, devices, file:CLIP.")]
Vision = Annotated[str | None, typer.Option(help="camera:0, camera:URL, file:PATH, synthetic or none.")]
Audio = Annotated[str | None, typer.Option(help="microphone, microphone:NAME, file:PATH, lsl:NAME, synthetic or none.")]
TextSource = Annotated[
    str | None,
    typer.Option("--text", help="stdin, pipe:PATH, tcp:PORT, zmq:PORT, lsl:NAME, page, synthetic or none."),
]
Signal = Annotated[str | None, typer.Option(help="A sensor: lsl:NAME, lsl:type=TYPE or none.")]
OtherAudio = Annotated[
    str | None, typer.Option("--other-audio", help="The second person's sound, named like --audio; none by default.")
]
OtherText = Annotated[
    str | None, typer.Option("--other-text", help="The second person's words, named like --text; none by default.")
]
Duration = Annotated[float | None, typer.Option("--duration", "-d", min=0.1, help="Seconds; without it until Ctrl-C.")]
Log = Annotated[LogFormat | None, typer.Option("--log", help="What is said while it runs: sentences, or JSON lines.")]
Plain = Annotated[bool, typer.Option("--plain", help="A line a second instead of the full view.")]


@app.command()
def live(
    config_file: ConfigFile = None,
    source: Source = None,
    vision: Vision = None,
    audio: Audio = None,
    text: TextSource = None,
    other_audio: OtherAudio = None,
    other_text: OtherText = None,
    signal: Signal = None,
    model: ModelName = None,
    provider: Annotated[Provider | None, typer.Option(help="Where the model runs.")] = None,
    duration: Duration = None,
    record: Annotated[Path | None, typer.Option("--record", "-r", help="Record into this MCAP file.")] = None,
    session: Annotated[str | None, typer.Option(help="The session's name.")] = None,
    dashboard: Annotated[bool | None, typer.Option(help="Serve the live page on loopback.")] = None,
    port: Annotated[int | None, typer.Option(help="The page's port; 0 takes any free one.")] = None,
    log: Log = None,
    foxglove: Annotated[bool | None, typer.Option(help="Serve what is on the bus to Foxglove, on loopback.")] = None,
    lsl_out: Annotated[
        bool | None, typer.Option(help="Give predictions out as a stream of Lab Streaming Layer.")
    ] = None,
    plain: Plain = False,
    as_json: Json = False,
) -> None:
    """Capture, predict and show, live."""
    named = {
        "vision": vision,
        "audio": audio,
        "text": text,
        "other_audio": other_audio,
        "other_text": other_text,
        "signal": signal,
    }
    settings = _settings(
        config_file,
        source,
        named,
        {
            "engine.model": model,
            "engine.provider": provider.value if provider else None,
            "record.path": str(record) if record else None,
            "session.name": session,
            "dashboard.enabled": dashboard,
            "dashboard.port": port,
            "log.format": log.value if log else None,
            "foxglove.enabled": foxglove,
            "lsl.outlet": lsl_out,
        },
    )
    _begin_processes()
    from stream_mmrnn.predict.engine import check_model

    spec = check_model(config.find_model(settings.engine.model), settings.engine.provider)
    settings = _without_idle(settings, source, named, {m.name for m in spec.modalities})
    _capture(settings, duration, True, as_json, plain)


@app.command()
def record(
    path: Annotated[Path, typer.Argument(help="The MCAP file to make.")],
    config_file: ConfigFile = None,
    source: Source = None,
    vision: Vision = None,
    audio: Audio = None,
    text: TextSource = None,
    other_audio: OtherAudio = None,
    other_text: OtherText = None,
    signal: Signal = None,
    duration: Duration = None,
    session: Annotated[str | None, typer.Option(help="The session's name.")] = None,
    log: Log = None,
    plain: Plain = False,
    as_json: Json = False,
) -> None:
    """Capture and record, without an engine."""
    named = {
        "vision": vision,
        "audio": audio,
        "text": text,
        "other_audio": other_audio,
        "other_text": other_text,
        "signal": signal,
    }
    overrides = {"record.path": str(path), "session.name": session, "log.format": log.value if log else None}
    _capture(_settings(config_file, source, named, overrides), duration, False, as_json, plain)


@app.command()
def replay(
    path: Annotated[Path, typer.Argument(help="A recording.")],
    speed: Annotated[
        float | None, typer.Option(min=0.01, help="1 is as it was; without it as fast as it goes.")
    ] = None,
    source: Annotated[
        From, typer.Option("--from", help="Recorded features, or raw samples encoded again.")
    ] = From.features,
    model: ModelName = None,
    provider: Annotated[Provider, typer.Option(help="Where the model runs.")] = Provider.cpu,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Exit 0 only if every prediction is the recorded one, bit for bit."),
    ] = False,
    page: Annotated[
        bool | None, typer.Option("--page/--no-page", help="Serve the live page of it; with --speed it is served.")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="The page's port; 0 takes any free one.")] = 0,
    as_json: Json = False,
) -> None:
    """Run a recording through the same pipeline again; with --speed it is on the live page, to pause and scrub."""
    from contextlib import ExitStack, closing

    from rich.progress import Progress

    from stream_mmrnn.offline import replay as module

    console = Console(stderr=as_json, highlight=False)
    alive = Alive()
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
            see=lambda _: progress.advance(task),
            alive=alive,
            player=player,
        )
    if as_json:
        print_document(result)
    else:
        console.print(
            f"{result['predictions']} predictions of {result['covered_s']:.1f} s in {result['seconds']:.2f} s: "
            f"{result['times_real_time']:.0f} times real time"
        )
        if result["recorded_predictions"]:
            verdict = "identical, bit for bit" if result["identical"] else f"different: {result['first_difference']}"
            console.print(f"compared with {result['recorded_predictions']} recorded ones: {shown(verdict)}")
    if result["damage"]:
        say_on(Console(stderr=True))(f"{result['damage']}; what is whole was replayed")
        raise typer.Exit(3)
    if verify and not result["identical"]:
        raise typer.Exit(1)


@app.command()
def info(path: Annotated[Path, typer.Argument(help="A recording.")], as_json: Json = False) -> None:
    """What is in a recording."""
    from rich.table import Table

    from stream_mmrnn.offline import replay as module

    result = module.info(path)
    if as_json:
        print_document(result)
    else:
        console = Console(highlight=False)
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(result["started_unix_ns"] / 1e9))
        console.print(f"[bold]{path}[/bold]  session {result['session']!r}, {result['seconds']:.1f} s, begun {when}")
        model = result["model"]
        console.print(f"model {shown(model['name'], 64)} {shown(model['sha256'], 12)}, ended: {shown(result['ended'])}")
        if not result["raw"]:
            console.print("features only (record.raw = false): no pictures, no sound, no words")
        table = Table(header_style="dim")
        for name in ("channel", "messages", "rate", "gaps", "made by"):
            table.add_column(name, justify="right" if name in ("messages", "rate", "gaps") else "left")
        for name, c in result["channels"].items():
            row = (str(c["messages"]), f"{c['rate_hz']:.1f} Hz", str(c["gaps"]))
            table.add_row(shown(name, 64), *row, shown(c["origin"], 48))
        console.print(table)
    if not result["whole"]:
        say_on(Console(stderr=True))(result["damage"] or f"{path} was not finished")
        raise typer.Exit(3)


@app.command()
def verify(path: Annotated[Path, typer.Argument(help="A recording.")], as_json: Json = False) -> None:
    """Whether a recording is whole, and what is in it where it is not: exit code 0 or 3.

    `replay --verify` is another thing: it compares predictions.
    """
    from stream_mmrnn.recording import repair as module
    from stream_mmrnn.viewers.terminal_view import verified

    result = module.verify(path)
    if as_json:
        print_document(result)
    else:
        Console(highlight=False).print(verified(result), soft_wrap=True)
    if not result["whole"]:
        say_on(Console(stderr=True))(result["why"])
        raise typer.Exit(3)


@app.command()
def repair(
    path: Annotated[Path, typer.Argument(help="A recording that was cut off or damaged; it stays as it is.")],
    out: Annotated[Path, typer.Argument(help="The file to make.")],
    as_json: Json = False,
) -> None:
    """Write what is sound in a recording and its later parts into one whole file."""
    from stream_mmrnn.recording import repair as module
    from stream_mmrnn.viewers.terminal_view import verified

    result = module.repair(path, out)
    if as_json:
        print_document(result)
        return
    console = Console(highlight=False)
    console.print(f"{path} was {result['was']}; what is sound in {', '.join(result['of'])} is in {out}", soft_wrap=True)
    console.print(verified(result["result"]), soft_wrap=True)


app.command()(serve)
app.command()(devices)
app.command()(doctor)
app.add_typer(settings_commands.app, name="config")
app.command()(settings_commands.completion)
app.add_typer(keys_commands.app, name="keys")
app.add_typer(bench.app, name="bench")
commands.register(app)
diff_commands.register(app)
watch_commands.register(app)
interchange.register(app)
