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

from stream_mmrnn.cli.terminal import COMMAND, ConfigFile, Console, Json, print_document, print_json
from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.printable import shown

app = typer.Typer(help="Print the settings' schema, check a file, or show the values in effect.", no_args_is_help=True)


@app.command()
def schema(as_json: Json = False) -> None:
    """Print the JSON Schema of the settings' TOML file, for editors; `--json` prints it on one line."""
    from stream_mmrnn.core.config_schema import schema as made

    if as_json:
        print_document(made())
    else:
        print_json(json.dumps(made(), indent=2, ensure_ascii=False))


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="A TOML file of settings.", metavar="FILE")], as_json: Json = False
) -> None:
    """Check a file of settings and list every error: exit code 0 without errors, else 2."""
    from stream_mmrnn.cli.config_effective import faults

    found = faults(path)
    if as_json:
        print_document({"file": str(path), "ok": not found, "faults": found})
    else:
        console = Console(stderr=bool(found), highlight=False, soft_wrap=True)
        for fault in found:
            console.print(f"[red]✗[/red] {shown(fault['says'], 2000)}")
        if not found:
            console.print(f"[green]✓[/green] {shown(str(path))} is valid")
    if found:
        raise typer.Exit(2)


@app.command()
def show(config_file: ConfigFile = None, as_json: Json = False) -> None:
    """Print all settings in effect as a TOML file, with a comment for the origin of each."""
    from stream_mmrnn.cli.config_effective import as_toml, effective

    values = effective(config_file)
    if as_json:
        print_document(values)
    else:
        sys.stdout.write(as_toml(values))


class Shell(StrEnum):
    bash, zsh, fish = "bash", "zsh", "fish"


def completion(context: typer.Context, shell: Shell, as_json: Json = False) -> None:
    """Print the shell's completion script for verbs, options and model names.

    For bash: `eval "$(stream-mmrnn completion bash)"`. `--install-completion` installs it for the current shell.
    """
    # the public interface that shells use, so that we need no private functions of typer and click
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
