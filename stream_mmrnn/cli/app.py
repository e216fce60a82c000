"""The `stream-mmrnn` command: each verb reads its options, calls one function and shows the result.

Exit codes: 0 done, 1 it ran and found a fault, 2 usage, 3 done in part, 4 busy. With `--json` the last line of stdout
is one JSON document and everything else goes to stderr.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Annotated

import typer

import stream_mmrnn
from stream_mmrnn.cli import bench, config, keys
from stream_mmrnn.cli.convert import import_, unpack, view
from stream_mmrnn.cli.devices import devices
from stream_mmrnn.cli.diff import diff
from stream_mmrnn.cli.doctor import doctor
from stream_mmrnn.cli.label import label
from stream_mmrnn.cli.live import live, record
from stream_mmrnn.cli.page import page
from stream_mmrnn.cli.predict import predict
from stream_mmrnn.cli.recording import info, repair, verify
from stream_mmrnn.cli.replay import replay
from stream_mmrnn.cli.serve import serve
from stream_mmrnn.cli.terminal import COMMAND, Console
from stream_mmrnn.cli.top import predictions, top
from stream_mmrnn.cli.train import evaluate, export, train
from stream_mmrnn.core.errors import StreamError, UsageError
from stream_mmrnn.core.printable import shown
from stream_mmrnn.core.resources import explain_os_error

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

PANELS: dict[str, tuple[Callable[..., None] | typer.Typer, ...]] = {
    "Run": (live, page, record, predict, serve, top, predictions),
    "Recordings": (replay, info, verify, repair, view, label, import_, unpack),
    "Models": (train, evaluate, export, diff),
    "Machine": (devices, doctor, config.app, keys.app, bench.app, config.completion),
}
"""All verbs, in the order of `--help`."""
_GROUPS = {config.app: "config", keys.app: "keys", bench.app: "bench"}

for panel, verbs in PANELS.items():
    for verb in verbs:
        if isinstance(verb, typer.Typer):
            app.add_typer(verb, name=_GROUPS[verb], rich_help_panel=panel)
        else:
            app.command(verb.__name__.rstrip("_"), rich_help_panel=panel)(verb)


def _print_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"{COMMAND} {stream_mmrnn.__version__}\n")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Predict what happens next from camera, microphone and text, tick by tick."""


def run() -> None:
    """The console script: an error of this package, or a refusal of the system, becomes one sentence and an exit code.

    What the output's encoding does not have becomes a question mark, whoever prints it.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        app(prog_name=COMMAND)
    except StreamError as e:
        why, code = str(e), e.exit_code
    except OSError as e:
        why, code = explain_os_error(e), UsageError.exit_code
        if not why:
            raise
    else:
        return
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error:[/red] {shown(why, 2000)}")
    raise SystemExit(code)
