"""The verb `label`: give labels to a recording afterwards, or write its labels and predictions for other programs."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stream_mmrnn.cli.convert import Force
from stream_mmrnn.cli.terminal import Console, Json, ModelName, Provider, print_document, say_on
from stream_mmrnn.core.durations import spoken
from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.printable import shown
from stream_mmrnn.core.signals import StopFlag

if TYPE_CHECKING:
    from stream_mmrnn.offline.labels.attach import LabelOptions


class ClockOption(StrEnum):
    """The values of `--clock`."""

    session, wall = "session", "wall"


def label(
    files: Annotated[list[Path], typer.Argument(help="A recording; several with --to TABLE.parquet.")],
    sources: Annotated[
        list[Path] | None,
        typer.Option("--from", help="Labels to give it: .csv, .tsv, .eaf, .TextGrid, .rttm, .ctm; repeatable."),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", help="Write its labels in one of these formats, or with predictions as .parquet."),
    ] = None,
    clock: Annotated[
        ClockOption, typer.Option(help="What times count from: the session's start, or a date (wall).")
    ] = ClockOption.session,
    timezone: Annotated[str, typer.Option(help="Zone of dates without one, such as Europe/Berlin.")] = "UTC",
    shift: Annotated[str, typer.Option(help="Seconds to add to each time of --from.")] = "0",
    tiers: Annotated[
        list[str] | None, typer.Option("--tier", help="Only this tier; NAME=NEW renames it; repeatable.")
    ] = None,
    fill: Annotated[str, typer.Option(help="The label of the time between labels, such as silence.")] = "",
    apart: Annotated[bool, typer.Option("--apart", help="A tier for each label, so that they may overlap.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write a new recording, not labels beside it.")] = None,
    predictions: Annotated[bool, typer.Option("--predictions", help="With --to: also the recorded ones.")] = False,
    model: ModelName = None,
    provider: Annotated[Provider, typer.Option(help="Where the model runs.")] = Provider.cpu,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Give a recording labels afterwards, show them, or write them and predictions in the same formats."""
    if sources and to is not None:
        raise UsageError("--from gives labels and --to writes them; use one after the other")
    _check_use("--from", bool(sources), {"--shift": shift != "0", "--fill": fill, "--apart": apart, "--out": out})
    _check_use("--to", to is not None, {"--predictions": predictions, "--model": model})
    if len(files) > 1 and to is None:
        raise UsageError(f"{len(files)} recordings are named; labels are given to one at a time")
    console = Console(stderr=as_json, highlight=False, soft_wrap=True)
    if sources:
        from stream_mmrnn.offline.labels.attach import LabelOptions

        options = LabelOptions(
            clock=clock.value,
            timezone=timezone,
            shift_ns=_shift_ns(shift),
            tiers=_renamed(tiers),
            fill=fill.strip(),
            apart=apart,
        )
        result = _give(files[0], sources, options, out, force, console)
    elif to is not None:
        chosen = [name for name, new in _renamed(tiers).items() if not new]
        if len(chosen) < len(tiers or []):
            raise UsageError("--tier OLD=NEW is for --from; with --to name tiers only")
        wanted = model or ("recorded" if predictions else "")
        result = _write(files, to, wanted, chosen, clock, provider, force, console)
    else:
        result = _show(files[0], console)
    if as_json:
        print_document(result)
    if result["damage"]:
        say_on(Console(stderr=True))(f"{result['damage']}; what is whole was used")
        raise typer.Exit(3)


def _check_use(needed: str, is_there: bool, options: dict[str, Any]) -> None:
    given = [name for name, value in options.items() if value]
    if given and not is_there:
        raise UsageError(f"{given[0]} is for {needed} FILE; name one")


def _renamed(tiers: list[str] | None) -> dict[str, str]:
    """By tier its new name, or ""."""
    found: dict[str, str] = {}
    for entry in tiers or []:
        name, _, new = entry.partition("=")
        if not name or name in found or (not new and "=" in entry):
            raise UsageError(f"--tier needs NAME or NAME=NEW, each name once, not {entry[:80]!r}")
        found[name] = new
    return found


def _give(
    path: Path, sources: list[Path], options: LabelOptions, out: Path | None, force: bool, console: Console
) -> dict[str, Any]:
    from stream_mmrnn.offline.labels.attach import attach

    result = attach(path, sources, options, out, force)
    for note in result["notes"]:
        say_on(Console(stderr=True))(note)
    for tier, labels in result["tiers"].items():
        _print_tier(console, tier, labels)
    parts = [
        (result["clipped"], "labels were cut to the recording's span"),
        (result["empty"], "without text: no label is true there"),
        (sum(result["replaced"].values()), "typed labels of the same tiers are not used any more"),
    ]
    for count, what in parts:
        if count:
            console.print(f"{count} {what}")
    console.print(f"wrote {shown(result['written'])}; {shown(path.name)} itself is as it was")
    return result


def _shift_ns(text: str) -> int:
    try:
        value = Decimal(text)
        if value.is_finite() and abs(value) < 10**9:
            return int(value * 10**9)
    except InvalidOperation:
        pass
    raise UsageError(f"--shift is {text[:40]!r}: expected seconds such as 1.5 or -0.2")


def _print_tier(console: Console, tier: str, labels: dict[str, dict[str, Any]]) -> None:
    found = [f"{shown(name, 64)} ({row['count']}, {spoken(row['seconds'])})" for name, row in labels.items()]
    more = f", and {len(found) - 12} more" if len(found) > 12 else ""
    console.print(f"  {shown(tier, 64)}: {', '.join(found[:12]) or 'no label'}{more}")


def _write(
    files: list[Path],
    to: Path,
    model: str,
    chosen: list[str],
    clock: ClockOption,
    provider: Provider,
    force: bool,
    console: Console,
) -> dict[str, Any]:
    from stream_mmrnn.offline.labels import export

    alive = StopFlag.unwinding()
    if to.suffix.lower() == export.TABLE:
        if chosen or clock is ClockOption.wall:
            raise UsageError(f"a {export.TABLE} table has all tiers and both clocks; leave --tier and --clock out")

        def progress(name: str) -> None:
            console.print(f"  {shown(name)}")

        result = export.to_table(
            files, to, model or export.RECORDED, provider=provider.value, force=force, progress=progress, alive=alive
        )
        console.print(f"wrote {shown(str(to))}: {result['rows']} predictions, labels of {len(result['tiers'])} tiers")
        return result
    result = export.to_labels(
        files,
        to,
        model,
        chosen=chosen,
        clock=clock.value,
        provider=provider.value,
        force=force,
        alive=alive,
    )
    tiers = ", ".join(f"{shown(tier, 64)} ({count})" for tier, count in result["tiers"].items())
    console.print(f"wrote {shown(str(to))}: {tiers}")
    return result


def _show(path: Path, console: Console) -> dict[str, Any]:
    from stream_mmrnn.offline.labels.attach import described, existing

    seen, tiers = existing(path)
    found = {tier: described(changes, seen.end_ns) for tier, changes in tiers.items()}
    for tier, labels in found.items():
        _print_tier(console, tier, labels)
    if not found:
        console.print(f"{shown(path.name)} has no labels; give it some with --from FILE")
    return {"recording": str(path), "tiers": found, "damage": seen.damage}
