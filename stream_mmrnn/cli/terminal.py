"""What the verbs share at a terminal: notes, one JSON document, and signals as a question that can be asked.

Knows nothing about any verb.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from stream_mmrnn.core import config
from stream_mmrnn.core.printable import shown

COMMAND = "stream-mmrnn"
"""What the command is called, however it was started."""


class Provider(StrEnum):
    """What `--provider` takes."""

    auto, cpu, cuda = "auto", "cpu", "cuda"


ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="The TOML file with the settings.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document as the last line of stdout.")]


def _models(incomplete: str) -> list[str]:
    """For a shell that completes: names of the zoo; a path is the shell's own to complete."""
    return [name for name in config.zoo_names() if name.startswith(incomplete)]


ModelName = Annotated[
    str | None, typer.Option("--model", help="A model of the zoo, or an ONNX file.", autocompletion=_models)
]


def say_on(console: Console) -> Callable[[str], None]:
    """A function that notes one sentence."""
    return lambda text: console.print(f"[yellow]![/yellow] {shown(text)}", soft_wrap=True)


class Alive:
    """True until SIGINT or SIGTERM; a second one ends at once."""

    def __init__(self) -> None:
        self._stopped = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _stop(self, *_: Any) -> None:
        if self._stopped:
            raise SystemExit(130)
        self._stopped = True

    def __call__(self) -> bool:
        return not self._stopped


def print_document(document: dict[str, Any]) -> None:
    """One line of JSON on stdout."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")
    sys.stdout.flush()
