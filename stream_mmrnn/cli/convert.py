"""The verbs for formats of other programs: `view`, `import`, `unpack`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from stream_mmrnn.cli.terminal import Console, Json, print_document, say_on
from stream_mmrnn.core import topics
from stream_mmrnn.core.durations import parse_ns, spoken
from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.printable import escape, shown
from stream_mmrnn.core.settings import StateSettings
from stream_mmrnn.core.signals import StopFlag

if TYPE_CHECKING:
    from rich.progress import Progress

    from stream_mmrnn.offline.convert.table_file import TableOptions

T = TypeVar("T")
_MEDIA = (".wav", ".flac", ".mp3", ".ogg", ".m4a", ".mp4", ".mov", ".mkv", ".avi", ".webm")
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
        rerun = rerun_viewer.find(config.state_folder(StateSettings()) / "rerun")
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
    path: Annotated[
        Path, typer.Argument(help="An XDF file, as LabRecorder makes it, a table (.csv, .parquet) or a ROS 2 bag.")
    ],
    out: Annotated[Path, typer.Argument(help="The MCAP file to make.")],
    chosen: Annotated[
        list[str] | None,
        typer.Option(
            "--as",
            help="XDF, ROS 2: NAME=audio, text, signal, label, none, or a stream's name and kind: NAME=wrist:signal; "
            "NAME is a stream's name or number, or a topic.",
        ),
    ] = None,
    session: Annotated[str, typer.Option(help="The session's name.")] = "imported",
    time: Annotated[str, typer.Option(help="Table: the column with the time of each row.")] = "",
    unit: Annotated[str, typer.Option(help="Table: of times that are numbers since 1970: s, ms, us, ns.")] = "",
    timezone: Annotated[
        str, typer.Option(help="Table: zone of times without one, such as Europe/Berlin; UTC unless given.")
    ] = "",
    time_format: Annotated[str, typer.Option(help="Table: pattern of times that are not ISO, such as %d.%m.%Y.")] = "",
    covers: Annotated[
        str, typer.Option(help="Table: how long a row covers from its time on, such as 1d; it counts from the end.")
    ] = "",
    streams: Annotated[
        list[str] | None,
        typer.Option("--stream", help="Table: a stream and its columns, NAME=COLUMN,COLUMN; repeatable."),
    ] = None,
    by: Annotated[str, typer.Option(help="Table: the column that says of which stream a row is.")] = "",
    max_gap: Annotated[str, typer.Option(help="Table: the longest gap between rows to accept, such as 90d.")] = "",
    as_json: Json = False,
) -> None:
    """Convert an XDF file, a table or a ROS 2 bag to a recording, to replay and to train on."""
    from stream_mmrnn.offline.convert import table_file

    if verb := _other_verb(path):
        raise UsageError(verb)
    if session is not None and not re.match(topics.SESSION_NAME, session):
        raise UsageError(f"--session is {session[:80]!r}: expected up to 64 letters, digits, `.`, `_` or `-`")
    for_tables = {
        "--time": time, "--unit": unit, "--timezone": timezone, "--time-format": time_format, "--covers": covers,
        "--stream": streams, "--by": by, "--max-gap": max_gap,
    }  # fmt: skip
    given = [option for option, value in for_tables.items() if value]
    is_table = path.suffix.lower() in table_file.SUFFIXES
    if given and not is_table:
        raise UsageError(f"{given[0]} is for tables ({', '.join(table_file.SUFFIXES)}), and {path.name} is none")
    if chosen and is_table:
        raise UsageError(
            "--as is for XDF files and bags; choose the columns of a table with --stream NAME=COLUMN,COLUMN"
        )
    if is_table and not time:
        raise UsageError(f"name the column with the times of {path.name} by --time COLUMN")
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    with progress_bar(console) as bar:
        task = bar.add_task("importing", total=1.0)

        def progress(share: float) -> None:
            bar.update(task, completed=share)

        if is_table:
            options = table_file.TableOptions(
                time=time,
                unit=unit,
                timezone=timezone or "UTC",
                time_format=time_format,
                covers_ns=parse_ns(covers, "--covers") if covers else 0,
                streams=_pairs("--stream", "NAME=COLUMN,COLUMN", streams, lambda columns: tuple(columns.split(","))),
                by=by,
                max_gap_ns=parse_ns(max_gap, "--max-gap") if max_gap else 0,
            )
            result = _import_table(path, out, options, session, progress, console)
        elif path.is_dir() or path.suffix.lower() == ".mcap":
            result = _import_bag(path, out, _pairs("--as", "TOPIC=ROLE", chosen, str), session, progress, console)
        else:
            result = _import_xdf(path, out, _pairs("--as", "NAME=ROLE", chosen, str), session, progress, console)
    seconds, count = spoken(result["seconds"]), sum(result["messages"].values())
    console.print(f"{escape(str(out))}: {seconds}, {count} messages")
    if as_json:
        print_document(result)
    if result.get("damage"):
        say_on(Console(stderr=True))(f"{result['damage']}; what could be read was imported")
        raise typer.Exit(3)


def _other_verb(path: Path) -> str:
    """What to use instead of `import` for a file of another kind; "" if `import` may take it."""
    from stream_mmrnn.offline.labels.formats import is_of_labels

    name, suffix = shown(path.name, 200), path.suffix.lower()
    if is_of_labels(path):
        return f"{name} holds labels, not signals: use stream-mmrnn label RECORDING.mcap --from {name}"
    if suffix in _MEDIA:
        return (
            f"{name} is a media file: use stream-mmrnn predict {name}, or record it with stream-mmrnn record OUT.mcap "
            f"--source file:{name}"
        )
    return ""


def _pairs(option: str, form: str, given: list[str] | None, convert: Callable[[str], T]) -> dict[str, T]:
    """The values of a repeatable option `NAME=VALUE`, by name."""
    found: dict[str, T] = {}
    for entry in given or []:
        # a stream of an XDF file may have "=" in its name, a stream of a session may not
        name, _, value = entry.partition("=") if option == "--stream" else entry.rpartition("=")
        if not name or not value:
            raise UsageError(f"{option} needs {form}, not {entry!r}")
        if name in found:
            raise UsageError(f"{option} names {name!r} twice; give it once")
        found[name] = convert(value)
    return found


def _import_xdf(
    path: Path, out: Path, chosen: dict[str, str], session: str, progress: Callable[[float], None], console: Console
) -> dict[str, Any]:
    from stream_mmrnn.offline.convert import xdf

    result = xdf.convert(path, out, session, chosen, progress)
    names = [stream["name"] for stream in result["streams"]]
    for stream in result["streams"]:
        number = f", number {stream['number']}" if names.count(stream["name"]) > 1 else ""
        console.print(
            f"  {shown(stream['name'], 64)} ({shown(stream['type'], 64)}{number}): {stream['samples']} samples, "
            + ("left out" if stream["role"] == "none" else f"as {stream['role']}")
        )
    _say_gaps(path, result["gaps"])
    return result


def _say_gaps(path: Path, gaps: list[dict[str, float]]) -> None:
    if not gaps:
        return
    longest = max(gaps, key=lambda gap: gap["seconds"])
    more = f"; there are {len(gaps)} such gaps" if len(gaps) > 1 else ""
    say_on(Console(stderr=True))(
        f"{path.name} has a gap of {spoken(longest['seconds'])} without a sample, {spoken(longest['after_s'])} "
        f"after its beginning; the recording's clock jumps over it, so look whether its stamps are right{more}"
    )


def _import_bag(
    path: Path, out: Path, chosen: dict[str, str], session: str, progress: Callable[[float], None], console: Console
) -> dict[str, Any]:
    from stream_mmrnn.offline.convert import ros

    result = ros.convert(path, out, session, chosen, progress)
    for stream in result["streams"]:
        why = f": {shown(stream['why'], 200)}" if stream["why"] else ""
        restamped = f", {stream['restamped']} of them by the time of the recording: their stamps do not fit it"
        console.print(
            f"  {shown(stream['name'], 64)} ({shown(stream['type'], 64)}): {stream['samples']} messages, "
            + (f"left out{why}" if stream["role"] == "none" else f"as {stream['role']}")
            + (restamped if stream["restamped"] and stream["role"] != "none" else "")
        )
    for why, count in result["refused"].items():
        say_on(Console(stderr=True))(f"{shown(why, 200)} ({count} messages)")
    _say_gaps(path, result["gaps"])
    return result


def _import_table(
    path: Path, out: Path, options: TableOptions, session: str, progress: Callable[[float], None], console: Console
) -> dict[str, Any]:
    from stream_mmrnn.offline.convert import table

    result = table.convert(path, out, options, session, progress)
    for stream in result["streams"]:
        absent = stream["rows"] - stream["samples"]
        console.print(
            f"  {stream['name']}: {stream['samples']} samples of {shown(', '.join(stream['columns']), 200)}, one every "
            f"{spoken(stream['step_s'])}"
            + (f"; gaps: {stream['gaps']}, the longest {spoken(stream['longest_gap_s'])}" if stream["gaps"] else "")
            + (f"; {absent} rows miss a value and are no sample" if absent else "")
        )
    for column, why in result["left_out"].items():
        console.print(f"  left out: the column {shown(column, 64)} {shown(why)}")
    if result["shift_s"]:
        console.print(f"  all times are {spoken(result['shift_s'])} later: a recording has none before 1970")
    return result


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
        console.print(f"{len(result['files'])} files of {spoken(result['seconds'])} in {escape(str(folder))}")
    if result["stopped"]:
        say_on(Console(stderr=True))("stopped before the end: nothing was written")
        raise typer.Exit(3)
    if result["damage"]:
        say_on(Console(stderr=True))(
            f"{result['damage']}; everything before the damage was written, stream-mmrnn repair may save more"
        )
        raise typer.Exit(3)
