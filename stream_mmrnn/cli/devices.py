"""The verb `devices`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from stream_mmrnn.cli.probes import SILENCE_DBFS, THUMBNAIL
from stream_mmrnn.cli.terminal import Console, Json, print_document, say_on
from stream_mmrnn.core.printable import shown

_METER_COLUMNS = 40
_METER_DBFS = -60.0
_GREYS = " .:-=+*#%@"


def devices(
    named: Annotated[list[str] | None, typer.Argument(help="Further devices: camera:URL, microphone:NAME.")] = None,
    look: Annotated[bool, typer.Option("--look", help="Show each camera's picture, each microphone's level.")] = False,
    pictures: Annotated[Path | None, typer.Option(help="Folder to save the pictures in, one JPEG per camera.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Timeout for each device in seconds.")] = 10.0,
    as_json: Json = False,
) -> None:
    """List cameras and microphones, for `--vision camera:...` and `--audio microphone:...`."""
    from stream_mmrnn.cli import device_preview as module

    console = Console(stderr=as_json, highlight=False)
    found = module.found(named or (), timeout)
    for title in ("cameras", "microphones"):
        if not as_json:
            console.print(f"[bold]{title}[/bold]" + ("" if found[title] else ": none"))
        for device in found[title]:
            if not as_json:
                console.print(f"  {shown(device['source'], 200):<24} {shown(device['is'])}", soft_wrap=True)
            if title == "cameras" and (look or pictures):
                _camera(device, pictures, timeout, console, as_json)
            elif title == "microphones" and look:
                _microphone(device, timeout, console, as_json)
    if as_json:
        print_document(found)
    elif found["problem"]:
        say_on(console)(found["problem"])


def _camera(device: dict[str, Any], folder: Path | None, timeout_s: float, console: Console, as_json: bool) -> None:
    from stream_mmrnn.cli import device_preview as module

    with console.status("taking a picture"):
        jpeg = module.picture(device, timeout_s)
    small = device.pop("rgb", b"")
    if jpeg and folder is not None:
        device["picture"] = str(module.save(jpeg, device["source"], folder))
    if as_json:
        return
    if small:
        console.print(half_blocks(small, *THUMBNAIL, coloured=console.color_system is not None))
        size = f"{device['width']}x{device['height']}"
        console.print(f"  {size}" + (f", in {shown(device['picture'])}" if folder else ""), soft_wrap=True)
    else:
        say_on(console)(device["problem"])


def _microphone(device: dict[str, Any], timeout_s: float, console: Console, as_json: bool) -> None:
    from rich.live import Live

    from stream_mmrnn.cli import device_preview as module

    if as_json or not console.is_terminal:
        module.level(device, timeout_s)
    else:
        with Live(console=console, transient=True, refresh_per_second=20) as live:
            module.level(device, timeout_s, lambda dbfs: live.update(meter(dbfs)))
    if as_json:
        return
    if "problem" in device:
        say_on(console)(device["problem"])
    else:
        console.print(meter(device["rms_dbfs"], device["peak_dbfs"]), soft_wrap=True)


def meter(rms_dbfs: float, peak_dbfs: float | None = None) -> Text:
    """A bar from -60 to 0 dBFS, and the numbers."""

    def columns(dbfs: float) -> int:
        return round(_METER_COLUMNS * min(max(1 - dbfs / _METER_DBFS, 0), 1))

    full, peak = columns(rms_dbfs), columns(rms_dbfs if peak_dbfs is None else peak_dbfs)
    text = Text("  ")
    text.append("█" * full, "green").append("▒" * (peak - full), "yellow").append("·" * (_METER_COLUMNS - peak), "dim")
    if peak_dbfs is not None and peak_dbfs <= SILENCE_DBFS:
        return text.append("  silence: is it muted?")
    text.append(f"  {rms_dbfs:.0f} dBFS")
    return text if peak_dbfs is None else text.append(f", peak {peak_dbfs:.0f}")


def half_blocks(rgb: bytes, columns: int, rows: int, *, coloured: bool) -> Text:
    """A picture of `rows` x `columns` x 3 bytes as text: each character shows two rows, in colour or as one grey."""
    text = Text(no_wrap=True)
    for row in range(0, rows - 1, 2):
        text.append("  ")
        for column in range(columns):
            above, below = (rgb[3 * (r * columns + column) :][:3] for r in (row, row + 1))
            if coloured:
                (r, g, b), (r2, g2, b2) = above, below
                text.append("▀", f"rgb({r},{g},{b}) on rgb({r2},{g2},{b2})")
            else:
                text.append(_GREYS[(sum(above) + sum(below)) * (len(_GREYS) - 1) // (6 * 255)])
        text.append("\n" if row + 2 < rows - 1 else "")
    return text
