"""The verbs that capture: `live` and `record`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from msgspec.structs import replace

from stream_mmrnn.cli.session_output import SessionOutput
from stream_mmrnn.cli.terminal import ConfigFile, Json, ModelName, Provider
from stream_mmrnn.core import config, processes
from stream_mmrnn.core.errors import ConfigError, FileError, StreamError
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.signals import ENDING, held
from stream_mmrnn.core.stream_table import for_model, stream_table
from stream_mmrnn.core.streams import SELF, SHORT_FORMS
from stream_mmrnn.recording.append_file import later_parts, part

if TYPE_CHECKING:
    from stream_mmrnn.live.session import LiveSession


class LogFormat(StrEnum):
    text, json = "text", "json"


Source = Annotated[str | None, typer.Option("--source", "-s", help="All modalities: synthetic, devices, file:CLIP.")]
Vision = Annotated[str | None, typer.Option(help="camera:0, camera:URL, file:PATH, page, push, synthetic or none.")]
Audio = Annotated[
    str | None, typer.Option(help="microphone[:NAME], file:PATH, lsl:NAME, page, push, synthetic or none.")
]
TextSource = Annotated[
    str | None,
    typer.Option("--text", help="stdin, pipe:PATH, tcp:PORT, zmq:PORT, lsl:NAME, page, push, synthetic or none."),
]
Signal = Annotated[str | None, typer.Option(help="A sensor: lsl:NAME, lsl:type=TYPE, push or none.")]
Streams = Annotated[
    list[str] | None,
    typer.Option("--stream", help="Another input: NAME=SOURCE or NAME:KIND=SOURCE, like wrist=lsl:IMU-L; repeatable."),
]
OtherAudio = Annotated[
    str | None, typer.Option("--other-audio", help="The second person's sound, named like --audio; none by default.")
]
OtherText = Annotated[
    str | None, typer.Option("--other-text", help="The second person's words, named like --text; none by default.")
]
Duration = Annotated[float | None, typer.Option("--duration", "-d", min=0.1, help="Seconds; without it until Ctrl-C.")]
SessionName = Annotated[str | None, typer.Option(help="The session's name.")]
Log = Annotated[LogFormat | None, typer.Option("--log", help="Format of log messages: sentences, or JSON lines.")]
Plain = Annotated[bool, typer.Option("--plain", help="One line per second instead of the full view.")]


def live(
    config_file: ConfigFile = None,
    source: Source = None,
    vision: Vision = None,
    audio: Audio = None,
    text: TextSource = None,
    other_audio: OtherAudio = None,
    other_text: OtherText = None,
    signal: Signal = None,
    stream: Streams = None,
    model: ModelName = None,
    provider: Annotated[Provider | None, typer.Option(help="Where the model runs.")] = None,
    duration: Duration = None,
    record: Annotated[Path | None, typer.Option("--record", "-r", help="Record into this MCAP file.")] = None,
    session: SessionName = None,
    dashboard: Annotated[bool | None, typer.Option(help="Serve the live page on loopback.")] = None,
    port: Annotated[int | None, typer.Option(help="The page's port; 0 takes any free one.")] = None,
    host: Annotated[
        str | None, typer.Option(help="The page's address; one that others can reach needs --token-file.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File of the page's token, made if it is not there.")] = None,
    cert: Annotated[Path | None, typer.Option(help="TLS certificate of the page (PEM), with --key.")] = None,
    key: Annotated[Path | None, typer.Option(help="Private key of --cert (PEM).")] = None,
    log: Log = None,
    foxglove: Annotated[bool | None, typer.Option(help="Serve the bus's messages to Foxglove, on loopback.")] = None,
    lsl_out: Annotated[bool | None, typer.Option(help="Publish predictions as a Lab Streaming Layer stream.")] = None,
    plain: Plain = False,
    as_json: Json = False,
) -> None:
    """Capture, predict and show, live."""
    named = _named(vision, audio, text, other_audio, other_text, signal)
    settings = _settings(
        config_file,
        source,
        named,
        stream,
        {
            "engine.model": model,
            "engine.provider": provider.value if provider else None,
            "record.path": str(record) if record else None,
            "session.name": session,
            "dashboard.enabled": dashboard,
            "dashboard.port": port,
            "dashboard.host": host,
            "dashboard.token_file": str(token_file) if token_file else None,
            "dashboard.cert": str(cert) if cert else None,
            "dashboard.key": str(key) if key else None,
            "log.format": log.value if log else None,
            "foxglove.enabled": foxglove,
            "lsl.outlet": lsl_out,
        },
    )
    _start_forkserver()
    settings = _for_model(settings, source, named)
    _run(settings, duration, True, as_json, plain)


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
    stream: Streams = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Record the features that this model asks for.")
    ] = None,
    duration: Duration = None,
    session: SessionName = None,
    log: Log = None,
    plain: Plain = False,
    as_json: Json = False,
) -> None:
    """Capture and record, without an engine."""
    named = _named(vision, audio, text, other_audio, other_text, signal)
    overrides = {
        "engine.model": model,
        "record.path": str(path),
        "session.name": session,
        "log.format": log.value if log else None,
    }
    settings = _settings(config_file, source, named, stream, overrides)
    if model or (config_file is not None and "model" in config.read(config_file).get("engine", {})):
        settings = _for_model(settings, source, named)
    _run(settings, duration, False, as_json, plain)


def _for_model(settings: Settings, source: str | None, named: dict[str, str | None]) -> Settings:
    """The settings with the streams and the encoders that their model takes; refuses a model that does not load."""
    from stream_mmrnn.predict.engine import check_model

    spec = check_model(config.find_model(settings.engine.model), settings.engine.provider)
    modalities = {of: None for m in spec.modalities for of in (m.name, m.name.partition(".")[0])}
    _check_feeds(settings, modalities)
    return for_model(_without_unused(settings, source, named, modalities), spec.modalities)


def _named(
    vision: str | None,
    audio: str | None,
    text: str | None,
    other_audio: str | None,
    other_text: str | None,
    signal: str | None,
) -> dict[str, str | None]:
    """The sources that have an option of their own."""
    return {
        "vision": vision,
        "audio": audio,
        "text": text,
        "other_audio": other_audio,
        "other_text": other_text,
        "signal": signal,
    }


def _settings(
    config_file: Path | None,
    source: str | None,
    named: dict[str, str | None],
    streams: Sequence[str] | None,
    overrides: dict[str, Any],
) -> Settings:
    """The settings of the file, with the options on top; `named` wins over `source`, `streams` adds to both."""
    from stream_mmrnn.capture import encoders, sources
    from stream_mmrnn.capture import lsl_runtime as lsl

    chosen = sources.everything_from(source) if source else {}
    chosen |= {k: v for k, v in named.items() if v}
    overrides = {**{f"sources.{k}": v for k, v in chosen.items()}, **overrides}
    settings = config.load(config_file, overrides, dict(map(_stream, streams or ())))
    captured = processes.captured(settings)
    sources.check_all(captured.values(), settings)
    encoders.check_all(captured.values())
    if settings.lsl.outlet or any(sources.split(s.source)[0] == "lsl" for s in captured.values()):
        lsl.require(settings.lsl)
    return settings


def _stream(text: str) -> tuple[str, dict[str, str]]:
    """`NAME=SOURCE` or `NAME:KIND=SOURCE` as a row of the table `[streams]`."""
    name, is_given, source = text.partition("=")
    name, _, kind = name.partition(":")
    if not (name and is_given and source):
        raise ConfigError(f"--stream {text!r}: expected NAME=SOURCE or NAME:KIND=SOURCE, such as wrist=lsl:IMU-L")
    return name, {"source": source, **({"kind": kind} if kind else {})}


def _without_unused(
    settings: Settings, source: str | None, named: dict[str, str | None], modalities: Collection[str]
) -> Settings:
    """`--source` starts the second person's streams only if the model uses them: each worker slows the start."""
    others = [name for name, (_, person) in SHORT_FORMS.items() if person != SELF]
    unused = [m for m in others if source and not named[m] and m not in modalities]
    return replace(settings, sources=replace(settings.sources, **dict.fromkeys(unused, "none")))


def _check_feeds(settings: Settings, modalities: Collection[str]) -> None:
    """Every `feeds` must name a modality of the model: else a mistyped name would only mask it."""
    for row in processes.captured(settings).values():
        if row.feeds and row.feeds not in modalities:
            raise ConfigError(
                f"`streams.{row.name}.feeds` is {row.feeds!r}, and the model takes {', '.join(modalities)}; "
                "name one of these"
            )


def _start_forkserver() -> None:
    """Let the forkserver import its modules in the background while this process does other work."""
    from stream_mmrnn.live.managed_process import kill_forkserver, process_context

    ENDING.at_once = kill_forkserver
    process_context()


def keep_old(path: Path, say: Callable[[str], None]) -> None:
    """Rename a recording that has this name already, with its later parts, so that nothing is overwritten.

    Raises:
        FileError: what has this name is a device, a pipe, a folder or a link to nothing: it stays as it is.

    """
    from stream_mmrnn.core.log import Note

    if not os.path.lexists(path):
        return
    if not path.is_file():
        raise FileError(f"{path} is no regular file, so that no recording can take its place; choose another name")
    number = 1
    while (old := path.with_name(f"{path.stem}.old{number}{path.suffix}")).exists():
        number += 1
    parts = later_parts(path)
    path.rename(old)
    for number, later in parts.items():
        later.rename(part(old, number - 1))
    text = f"{path} was there already; it was renamed to {old}" + (", and its parts likewise" if parts else "")
    say(Note(text, "recorder", "renamed", old=str(old)))


def _addresses(session: LiveSession) -> dict[str, str]:
    """Where the processes that serve something can be reached, by process."""
    found = {node.name: node.status.detail.get("address") for node in session.supervisor.nodes if node.status}
    return {name: str(address) for name, address in found.items() if address}


def _run(settings: Settings, duration: float | None, with_engine: bool, as_json: bool, plain: bool) -> None:
    """Run a session until its duration is over or a signal comes, and show it."""
    from stream_mmrnn.core.log import Note
    from stream_mmrnn.live.session import LiveSession
    from stream_mmrnn.viewers.terminal_view import watched

    if not processes.captured(settings):
        raise ConfigError("every source is `none`; name at least one, for example --source synthetic")
    if with_engine and settings.trace.ratio:
        from stream_mmrnn.viewers import tracing

        tracing.require()
    ENDING.watch()
    _start_forkserver()
    terminal = SessionOutput(settings, as_json, plain)
    if settings.record.path:
        keep_old(Path(settings.record.path), terminal.say)
    table = stream_table(settings).values()
    watching: tuple[Callable[[Any], None], Collection[str]] = (
        (lambda _: None, ()) if terminal.quiet else (terminal.state.observe, watched(table))
    )
    with held():  # a signal waits until it is known which processes must be ended
        session = LiveSession(
            settings,
            with_engine,
            ENDING.alive,
            terminal.say,
            watching[0],
            lambda: terminal.refresh(_addresses(session)),
            watching[1],
        )
        supervisor = session.supervisor

        def end_at_once() -> None:
            supervisor.end_at_once()
            terminal.restore()

        ENDING.at_once, ENDING.in_order = end_at_once, lambda: supervisor.begun
    try:
        with terminal.screen or contextlib.nullcontext():
            summary = session.run(duration)
    except StreamError as e:
        if terminal.lines is None:
            raise
        terminal.lines(Note(str(e), "supervisor", "error", "error"))
        raise typer.Exit(e.exit_code) from None
    terminal.show_summary(summary)
    if summary["failed"] or summary["partial"]:
        raise typer.Exit(1 if summary["failed"] else 3)
