"""Builds the wheel of `stream-mmrnn-client`: the modules that its public names need, from the checkout's sources."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import grimp
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CHECKOUT = Path(__file__).parents[2]
sys.path.insert(0, str(CHECKOUT))  # grimp, too, looks for the package there

import stream_mmrnn  # noqa: E402  # it imports nothing else

NAMES = (
    *("subscribe", "push", "Client", "AsyncClient"),
    *("SessionTurns", "TurnReader", "PipecatTurnAnalyzer", "LiveKitTurnDetector"),
)
"""The public names that the client is for. Others are in it if their module is."""


def needed_modules() -> set[str]:
    """The modules of the package that `NAMES` need, and by their top names the other packages that these import.

    Imports inside functions count; those for type checkers alone do not.
    """
    package, homes = stream_mmrnn.__name__, stream_mmrnn._HOMES
    graph = grimp.build_graph(
        package, include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )
    waiting, found = {f"{package}.{homes[name]}" for name in NAMES}, set[str]()
    while waiting:
        module = waiting.pop()
        found.add(module)
        parent = module.rpartition(".")[0]  # importing a.b imports a
        waiting |= (graph.find_modules_directly_imported_by(module) | {parent}) - found - {""}
    return found


def file_of(module: str) -> Path:
    """Where a module of the package is in the checkout."""
    path = CHECKOUT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


class ClientModules(BuildHookInterface[Any]):
    """Adds the modules to the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if (self.target_name, version) != ("wheel", "standard"):
            raise RuntimeError(
                "stream-mmrnn-client is built as a wheel only: python -m build --wheel packaging/client"
                " (its sources are those of stream-mmrnn)"
            )
        package = stream_mmrnn.__name__
        modules = [module for module in needed_modules() if module.partition(".")[0] == package]
        files = [*map(file_of, modules), CHECKOUT / package / "py.typed"]
        build_data["force_include"] |= {str(path): path.relative_to(CHECKOUT).as_posix() for path in files}
