"""Shared by the verbs: common options, the console, notes, and the JSON document."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment

from stream_mmrnn.core import config
from stream_mmrnn.core.printable import shown, visible

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


class Console(RichConsole):
    """Rich's console, on which text from outside cannot control the terminal, whatever verb prints it.

    Of what is printed only characters that can be seen remain, and those that the output's encoding does not have
    become question marks. Colours and cursor moves are rich's own.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich's, with every piece of text made safe."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=self._safe(segment.text))

    def _safe(self, text: str) -> str:
        return visible(text).encode(self.encoding, "replace").decode(self.encoding)


def say_on(console: Console) -> Callable[[str], None]:
    """A function that prints one sentence as a note."""
    return lambda text: console.print(f"[yellow]![/yellow] {shown(text)}", soft_wrap=True)


def print_document(document: dict[str, Any]) -> None:
    """One line of JSON on stdout."""
    print_json(json.dumps(document, ensure_ascii=False))


def print_json(text: str) -> None:
    """JSON on stdout: what cannot be seen, or what the encoding does not have, as JSON's own escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    if not (text.isprintable() and _has(encoding, text)):
        kept = (c == "\n" or (c.isprintable() and _has(encoding, c)) for c in text)
        text = "".join(c if keep else json.dumps(c)[1:-1] for c, keep in zip(text, kept, strict=True))
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _has(encoding: str, text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True
