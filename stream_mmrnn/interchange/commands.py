"""The verbs of other programs' formats at the terminal: `view`, `import`, `unpack`.

Knows nothing about how anything is done.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stream_mmrnn.errors import FileError, UsageError
from stream_mmrnn.terminal import Json, escape, print_document, say_on, shown

Force = Annotated[bool, typer.Option("--force", help="Overwrite what is there.")]


def register(app: typer.Typer) -> None:
    """Add the verbs to the command."""
    app.command()(view)


def _write(path: Path, text: str, force: bool) -> None:
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise FileError(f"{path} is there already; choose another name, or say --force") from None
    except OSError as e:
        raise FileError(f"{path} cannot be written: {e.strerror}; choose another place") from e


def view(
    path: Annotated[Path | None, typer.Argument(help="A recording.")] = None,
    layout: Annotated[
        Path | None, typer.Option("--layout", help="Write Foxglove's layout of panels for it, instead of showing it.")
    ] = None,
    rrd: Annotated[
        Path | None, typer.Option("--rrd", help="Write it as Rerun's own file, instead of showing it.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Show a recording in Rerun, or write what Foxglove needs to show it."""
    from stream_mmrnn import config
    from stream_mmrnn.interchange import foxglove_layout, rerun_viewer
    from stream_mmrnn.interchange.heads import columns_of
    from stream_mmrnn.recording import Recording
    from stream_mmrnn.topics import PREDICTION
    from stream_mmrnn.wire import PredictionMessage, unpack

    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    if path is None and (layout is None or rrd is not None):
        raise UsageError("name a recording, or a file for Foxglove's layout by --layout")
    recording = Recording(path) if path is not None else None
    done: dict[str, object] = {"recording": str(path) if path else None}
    if layout is not None:
        made = foxglove_layout.shipped()
        if recording is not None:
            predictions = [e.payload for _, e in zip(range(1), recording.envelopes({PREDICTION}), strict=False)]
            for _ in recording.batches(()):
                pass  # what the heads are called stands at the end
            first = unpack(predictions[0], PredictionMessage) if predictions else None
            made = foxglove_layout.for_heads(columns_of(recording, first))
        _write(layout, json.dumps(made, indent=2) + "\n", force)
        done |= {"layout": str(layout), "panels": sorted(made["configById"])}
        console.print(
            f"wrote {escape(str(layout))}: in Foxglove open {escape(str(path or 'a recording'))} as a local file, and "
            "this by Layouts, Import from file"
        )
    if path is not None and (rrd is not None or layout is None):
        rerun = rerun_viewer.program()
        env = rerun_viewer.environment(config.state_folder(config.State()) / "rerun", rerun)
        done["rerun"] = str(rerun)
        if rrd is not None:
            if rrd.exists() and not force:
                raise FileError(f"{rrd} is there already; choose another name, or say --force")
            rerun_viewer.convert(path, rrd, rerun, env)
            done["rrd"] = str(rrd)
            console.print(f"wrote {escape(str(rrd))}")
        else:
            done["exit_code"] = code = rerun_viewer.show(path, rerun, env)
            if code:
                say_on(Console(stderr=True))(f"Rerun ended with exit code {code}")
    if as_json:
        print_document(done)
    if recording is not None and recording.damage:
        say_on(Console(stderr=True))(f"{shown(recording.damage)}; what is whole was read")
        raise typer.Exit(3)
    if done.get("exit_code"):
        raise typer.Exit(1)
