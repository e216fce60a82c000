"""The verbs `keys new|allow|remove|list`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stream_mmrnn.cli.terminal import Console, Json, print_document
from stream_mmrnn.core import config
from stream_mmrnn.core.printable import escape

if TYPE_CHECKING:
    from stream_mmrnn.bus.keys import KeyFolder

app = typer.Typer(help="Who may connect to the bus over tcp (bus.keys).", no_args_is_help=True)
_Folder = Annotated[
    Path | None,
    typer.Option("--folder", help="The folder of keys; without it the default one."),
]


def _opened(folder: Path | None) -> KeyFolder:
    from stream_mmrnn.bus.keys import KeyFolder

    return KeyFolder(folder or config.keys_folder())


@app.command("new")
def new(
    folder: Annotated[Path | None, typer.Argument(help="A folder that does not exist yet.")] = None,
    as_json: Json = False,
) -> None:
    """Make a folder with a key pair for the broker and one for the session's own processes; never overwrites."""
    from stream_mmrnn.bus.keys import KeyFolder

    made = KeyFolder.new(folder or config.keys_folder())
    if as_json:
        print_document(made.list())
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"made {escape(str(made.path))}; name it in bus.keys, and allow others with stream-mmrnn keys allow")
    console.print(f"server key, for those who connect: {escape(made.server)}")
    console.print(f"client key, to be allowed elsewhere: {escape(made.client)}")


@app.command("allow")
def allow(
    name: Annotated[str, typer.Argument(help="A name for the key, to remove it with.")],
    key: Annotated[str, typer.Argument(help="A public key, or a file with one; after -- if it begins with -.")],
    folder: _Folder = None,
    write: Annotated[bool, typer.Option("--write", help="Allow publishing, too; not for viewers.")] = False,
    as_json: Json = False,
) -> None:
    """Allow a public key to connect and read."""
    done = _opened(folder).allow(name, key, write)
    if as_json:
        print_document(done)
    else:
        Console(highlight=False, soft_wrap=True).print(f"{name} may {' and '.join(done['rights'])}")


@app.command("remove")
def remove(
    name: Annotated[str, typer.Argument(help="Its name, as given to `allow`.")],
    folder: _Folder = None,
    as_json: Json = False,
) -> None:
    """Revoke a key: new connections are refused at once; open ones last until they end."""
    done = _opened(folder).remove(name)
    if as_json:
        print_document(done)
    else:
        Console(highlight=False, soft_wrap=True).print(
            f"{name} may no longer connect; a connection that is open lasts until it or the session ends"
        )


@app.command("list")
def list_(folder: _Folder = None, as_json: Json = False) -> None:
    """List the keys that may connect; prints no secrets."""
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
    console.print(table if found["allowed"] else "no other keys are allowed")
