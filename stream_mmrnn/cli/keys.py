"""The verbs `keys new|allow|remove|list`. Know nothing about how keys are kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from stream_mmrnn.cli.terminal import Json, print_document
from stream_mmrnn.core import config
from stream_mmrnn.core.printable import escape

if TYPE_CHECKING:
    from stream_mmrnn.bus.keys import Folder

app = typer.Typer(help="Who may connect to the bus over tcp (bus.keys).", no_args_is_help=True)
_Folder = Annotated[
    Path | None,
    typer.Option("--folder", help="The folder of keys; without it the default one."),
]


def _opened(folder: Path | None) -> Folder:
    from stream_mmrnn.bus.keys import Folder

    return Folder(folder or config.keys_folder())


@app.command("new")
def new(
    folder: Annotated[Path | None, typer.Argument(help="A folder that is not there yet.")] = None,
    as_json: Json = False,
) -> None:
    """Make a folder with a key pair for the broker and one for our own processes; never overwrites."""
    from stream_mmrnn.bus.keys import Folder

    made = Folder.new(folder or config.keys_folder())
    if as_json:
        print_document(made.list())
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"made {escape(str(made.path))}; name it in bus.keys, and allow others by stream-mmrnn keys allow")
    console.print(f"server key, for those who connect: {escape(made.server)}")
    console.print(f"client key, to be allowed elsewhere: {escape(made.client)}")


@app.command("allow")
def allow(
    name: Annotated[str, typer.Argument(help="Whose key it is, to remove it by.")],
    key: Annotated[str, typer.Argument(help="A public key, or a file with one; after -- where it begins with -.")],
    folder: _Folder = None,
    write: Annotated[bool, typer.Option("--write", help="It may publish, too; a viewer must not.")] = False,
    as_json: Json = False,
) -> None:
    """Let somebody's public key in, to read."""
    done = _opened(folder).allow(name, key, write)
    if as_json:
        print_document(done)
    else:
        Console(highlight=False, soft_wrap=True).print(f"{name} may {' and '.join(done['rights'])}")


@app.command("remove")
def remove(
    name: Annotated[str, typer.Argument(help="As it was allowed.")], folder: _Folder = None, as_json: Json = False
) -> None:
    """Let a key in no more: at once for new connections; those that are open last until they end."""
    done = _opened(folder).remove(name)
    if as_json:
        print_document(done)
    else:
        Console(highlight=False, soft_wrap=True).print(
            f"{name} gets in no more; a connection that it has open lasts until it ends, or the session does"
        )


@app.command("list")
def list_(folder: _Folder = None, as_json: Json = False) -> None:
    """Who may connect; no secrets."""
    from rich.table import Table

    found = _opened(folder).list()
    if as_json:
        print_document(found)
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{escape(found['folder'])}: server key {escape(found['server'])}")
    table = Table(header_style="dim")
    for column in ("name", "may", "public key"):
        table.add_column(column, no_wrap=True)
    for row in found["allowed"]:
        table.add_row(row["name"], " and ".join(row["rights"]), escape(row["public"]))
    console.print(table if found["allowed"] else "nobody else is allowed")
