"""The verbs for formats of other programs: `view`, `import`, `unpack`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from stream_mmrnn.cli.terminal import Json, print_document, say_on
from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.printable import escape, shown
from stream_mmrnn.core.signals import StopFlag

if TYPE_CHECKING:
    from rich.progress import Progress

Force = Annotated[bool, typer.Option("--force", help="Overwrite existing files.")]


def progress_bar(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _write(path: Path, text: str, force: bool) -> None:
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise FileError(f"{path} is there already; choose another name, or use --force") from None
    except OSError as e:
        raise FileError(f"{path} cannot be written: {e.strerror}; choose another place") from e


def view(
    path: Annotated[Path | None, typer.Argument(help="A recording.")] = None,
    layout: Annotated[
        Path | None, typer.Option("--layout", help="Write a Foxglove layout for it, instead of showing it.")
    ] = None,
    rrd: Annotated[Path | None, typer.Option("--rrd", help="Write it as a Rerun file, instead of showing it.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show a recording in Rerun, or write a layout for Foxglove."""
    from stream_mmrnn.core import config
    from stream_mmrnn.core.topics import PREDICTION
    from stream_mmrnn.core.wire import PredictionMessage, unpack
    from stream_mmrnn.offline.convert import foxglove_layout
    from stream_mmrnn.offline.convert import rerun as rerun_viewer
    from stream_mmrnn.recording.mcap_file import Recording
    from stream_mmrnn.viewers.columns import columns_of

    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    if path is None and (layout is None or rrd is not None):
        raise UsageError("name a recording, or a file for Foxglove's layout with --layout")
    recording = Recording(path) if path is not None else None
    done: dict[str, object] = {"recording": str(path) if path else None}
    if layout is not None:
        made = foxglove_layout.shipped()
        if recording is not None:
            predictions = [e.payload for _, e in zip(range(1), recording.envelopes({PREDICTION}), strict=False)]
            for _ in recording.batches(()):
                pass  # the names of the heads are at the end of the file
            first = unpack(predictions[0], PredictionMessage) if predictions else None
            made = foxglove_layout.for_heads(columns_of(recording, first))
        _write(layout, json.dumps(made, indent=2) + "\n", force)
        done |= {"layout": str(layout), "panels": sorted(made["configById"])}
        console.print(
            f"wrote {escape(str(layout))}: in Foxglove open {escape(str(path or 'a recording'))} as a local file, and "
            "this by Layouts, Import from file"
        )
    if path is not None and (rrd is not None or layout is None):
        rerun = rerun_viewer.find(config.state_folder(config.StateSettings()) / "rerun")
        done["rerun"] = rerun.program
        if rrd is not None:
            if rrd.exists() and not force:
                raise FileError(f"{rrd} is there already; choose another name, or use --force")
            rerun_viewer.convert(path, rrd, rerun)
            done["rrd"] = str(rrd)
            console.print(f"wrote {escape(str(rrd))}")
        else:
            done["exit_code"] = code = rerun_viewer.show(path, rerun)
            if code:
                say_on(Console(stderr=True))(f"Rerun ended with exit code {code}")
    if as_json:
        print_document(done)
    if recording is not None and recording.damage:
        say_on(Console(stderr=True))(f"{recording.damage}; what is whole was read")
        raise typer.Exit(3)
    if done.get("exit_code"):
        raise typer.Exit(1)


def import_(
    path: Annotated[Path, typer.Argument(help="An XDF file, as LabRecorder makes it.")],
    out: Annotated[Path, typer.Argument(help="The MCAP file to make.")],
    chosen: Annotated[
        list[str] | None,
        typer.Option("--as", help="Role of a stream: NAME=audio, text, signal, label or none; repeatable."),
    ] = None,
    session: Annotated[str, typer.Option(help="The session's name.")] = "imported",
    as_json: Json = False,
) -> None:
    """Convert an XDF file to a recording, to replay and to train on."""
    from stream_mmrnn.offline.convert import xdf

    pairs = [entry.rpartition("=") for entry in chosen or []]
    if wrong := next((e for e, (name, _, _) in zip(chosen or [], pairs, strict=True) if not name), None):
        raise UsageError(f"--as needs NAME=ROLE, such as EEG=signal, not {wrong!r}")
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    with progress_bar(console) as bar:
        task = bar.add_task("importing", total=1.0)
        result = xdf.convert(
            path,
            out,
            session,
            {name: role for name, _, role in pairs},
            lambda share: bar.update(task, completed=share),
        )
    if as_json:
        print_document(result)
    else:
        for stream in result["streams"]:
            console.print(
                f"  {shown(stream['name'], 64)} ({shown(stream['type'], 64)}): {stream['samples']} samples, "
                + ("left out" if stream["role"] == "none" else f"as {stream['role']}")
            )
        console.print(f"{escape(str(out))}: {result['seconds']:.1f} s, {sum(result['messages'].values())} messages")
    if result["damage"]:
        say_on(Console(stderr=True))(f"{result['damage']}; what could be read was imported")
        raise typer.Exit(3)


class Codec(StrEnum):
    """The values of `--video`."""

    h264, mjpeg = "h264", "mjpeg"


def unpack(
    path: Annotated[Path, typer.Argument(help="A recording.")],
    folder: Annotated[Path, typer.Argument(help="The folder for the files.")],
    to: Annotated[str, typer.Option("--to", help="Formats, of parquet,wav,mp4,csv.")] = "parquet,wav,mp4,csv",
    video: Annotated[
        Codec, typer.Option("--video", help="h264 plays everywhere; mjpeg keeps every picture as it was recorded.")
    ] = Codec.h264,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a recording as plain files: tables, sound and pictures."""
    from stream_mmrnn.offline.convert import unpack as module

    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    alive = StopFlag.unwinding()
    with progress_bar(console) as bar:
        task = bar.add_task("unpacking", total=None)
        result = module.unpack(
            path,
            folder,
            [name.strip() for name in to.split(",") if name.strip()],
            codec=video.value,
            force=force,
            progress=lambda done, of: bar.update(task, completed=done, total=of),
            alive=alive,
        )
    if as_json:
        print_document(result)
    else:
        for name, about in result["files"].items():
            words = [f"{value} {key.replace('_', ' ')}" for key, value in about.items() if isinstance(value, int)]
            gaps = about.get("gaps", [])
            if gaps:
                words.append(f"{len(gaps)} gaps, {sum(g['seconds'] for g in gaps):.2f} s of silence in them")
            console.print(f"  {escape(name):<28} {', '.join(words)}")
        console.print(f"{len(result['files'])} files of {result['seconds']:.1f} s in {escape(str(folder))}")
    if result["stopped"]:
        say_on(Console(stderr=True))("stopped before the end: nothing was written")
        raise typer.Exit(3)
    if result["damage"]:
        say_on(Console(stderr=True))(
            f"{result['damage']}; everything before the damage was written, stream-mmrnn repair may save more"
        )
        raise typer.Exit(3)
