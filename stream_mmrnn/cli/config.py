"""The verbs `config schema`, `config check`, `config show` and `completion` at the terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from stream_mmrnn.cli.terminal import COMMAND, ConfigFile, Json, print_document
from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.printable import shown

app = typer.Typer(help="The settings: their schema, what is wrong with a file, and which hold.", no_args_is_help=True)


@app.command()
def schema(as_json: Json = False) -> None:
    """The JSON Schema of the settings' TOML file, for editors: the same text with and without `--json`."""
    from stream_mmrnn.core.config_schema import schema as made

    if as_json:
        print_document(made())
    else:
        sys.stdout.write(json.dumps(made(), indent=2, ensure_ascii=False) + "\n")


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A TOML file of settings.", metavar="FILE")], as_json: Json = False
) -> None:
    """Everything that is wrong with a file of settings: exit code 0 where nothing is, else 2."""
    from stream_mmrnn.cli.config_effective import faults

    found = faults(path)
    if as_json:
        print_document({"file": str(path), "ok": not found, "faults": found})
    else:
        console = Console(stderr=bool(found), highlight=False, soft_wrap=True)
        for fault in found:
            console.print(f"[red]✗[/red] {shown(fault['says'], 2000)}")
        if not found:
            console.print(f"[green]✓[/green] {shown(str(path))} is sound")
    if found:
        raise typer.Exit(2)


@app.command()
def show(config_file: ConfigFile = None, as_json: Json = False) -> None:
    """All settings as they hold, as a TOML file with a comment where each comes from."""
    from stream_mmrnn.cli.config_effective import as_toml, effective

    values = effective(config_file)
    if as_json:
        print_document(values)
    else:
        sys.stdout.write(as_toml(values))


class Shell(StrEnum):
    bash, zsh, fish = "bash", "zsh", "fish"


def completion(context: typer.Context, shell: Shell, as_json: Json = False) -> None:
    """The script that lets a shell complete verbs, options and names of models.

    For bash: `eval "$(stream-mmrnn completion bash)"`. `--install-completion` writes it where the current shell
    looks for it.
    """
    # the door that the shells use: without an entry of ours in the libraries' insides
    variable = f"_{COMMAND}_COMPLETE".replace("-", "_").upper()
    os.environ[variable] = f"source_{shell.value}"
    script = io.StringIO()
    try:
        with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
            context.find_root().command.main(args=[], prog_name=COMMAND)
    finally:
        del os.environ[variable]
    if not script.getvalue().strip():
        raise UsageError(f"there is no completion for {shell.value} in this version of typer; use another shell")
    if as_json:
        print_document({"shell": shell.value, "script": script.getvalue()})
    else:
        sys.stdout.write(script.getvalue())
