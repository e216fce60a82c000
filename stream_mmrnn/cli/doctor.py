"""The verb `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stream_mmrnn.cli.terminal import ConfigFile, Console, Json, ModelName, Provider, print_document
from stream_mmrnn.core import config
from stream_mmrnn.core.printable import shown

_MARKS = {"ok": "[green]✓[/green]", "absent": "[dim]–[/dim]", "warning": "[yellow]![/yellow]", "fault": "[red]✗[/red]"}


def doctor(
    config_file: ConfigFile = None,
    model: ModelName = None,
    provider: Annotated[Provider | None, typer.Option(help="The provider that must work; without it any.")] = None,
    record: Annotated[Path | None, typer.Option("--record", "-r", help="The recording that you want to make.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Timeout for each probe in seconds.")] = 10.0,
    as_json: Json = False,
) -> None:
    """Check what a session can use on this machine, and how to fix the rest; exit code 1 if something is broken.

    A missing device is reported but is no fault: a session runs without it.
    """
    from rich.progress import Progress, TextColumn
    from rich.table import Table

    from stream_mmrnn.cli import doctor_checks as checks

    overrides = {
        "engine.model": model,
        "engine.provider": provider.value if provider else None,
        "record.path": str(record) if record else None,
    }
    request = checks.Request(config.load(config_file, overrides), timeout)
    console = Console(stderr=as_json, highlight=False)
    columns = (*Progress.get_default_columns()[:2], TextColumn("{task.completed}/{task.total}"))
    with Progress(*columns, console=console, transient=True, disable=as_json or not console.is_terminal) as progress:
        task = progress.add_task("checking", total=len(checks.CHECKS), completed=-1)
        found = checks.run(request, lambda name: progress.update(task, advance=1, description=name))
    if as_json:
        print_document(checks.document(found))
    else:
        table = Table.grid(padding=(0, 1))
        for f in found:
            do = f"\n[dim]{shown(f.do)}[/dim]" if f.do else ""
            table.add_row(_MARKS[f.state], shown(f.name, 40), shown(f.says) + do)
        console.print(table)
    if any(f.state == "fault" for f in found):
        raise typer.Exit(1)
