"""Shared by the verbs: common options, notes, the JSON document, and a flag that signals clear."""

from __future__ import annotations

import json
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
"""The command's name in all output, however it was started."""


class Provider(StrEnum):
    """The values of `--provider`."""

    auto, cpu, cuda = "auto", "cpu", "cuda"


ConfigFile = Annotated[Path | None, typer.Option("--config", "-c", help="The TOML file with the settings.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document as the last line of stdout.")]


def _models(incomplete: str) -> list[str]:
    """Shell completion for models of the zoo; the shell itself completes paths."""
    return [name for name in config.zoo_names() if name.startswith(incomplete)]


ModelName = Annotated[
    str | None, typer.Option("--model", help="A model of the zoo, or an ONNX file.", autocompletion=_models)
]


def say_on(console: Console) -> Callable[[str], None]:
    """A function that prints one sentence as a note."""
    return lambda text: console.print(f"[yellow]![/yellow] {shown(text)}", soft_wrap=True)


def print_document(document: dict[str, Any]) -> None:
    """One line of JSON on stdout."""
    sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")
    sys.stdout.flush()
