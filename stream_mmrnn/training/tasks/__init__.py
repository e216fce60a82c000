"""Tasks: one module per `data.kind` of a recipe; its `make` builds the `Task` from recipe and paths."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

from stream_mmrnn.core import plugins
from stream_mmrnn.core.errors import ConfigError, UsageError
from stream_mmrnn.training.data import Task
from stream_mmrnn.training.recipe import Recipe

KINDS = ("recordings", "turn_taking", "digits", "activity", "mnist", "polarity")


def create(recipe: Recipe, places: Sequence[Path]) -> Task:
    """The task of a recipe; `places` from the command line override `data.path`.

    Raises:
        ConfigError: the kind of data is unknown.
        UsageError: the path of the data is missing.

    """
    found = list(places) or ([Path(recipe.data.path)] if recipe.data.path else [])
    if not found:
        raise UsageError(f"the recipe {recipe.name} needs data of kind {recipe.data.kind!r}; give its path with --data")
    if recipe.data.kind not in KINDS:
        plugin = plugins.find("tasks", recipe.data.kind)
        if plugin is not None:
            task: Task = plugins.call(plugin, recipe, found)
            return task
        known = ", ".join([*KINDS, *plugins.names("tasks")])
        raise ConfigError(f"there is no data of kind {recipe.data.kind!r}; use one of {known}")
    module = importlib.import_module(f"{__name__}.{recipe.data.kind}")
    make: Callable[[Recipe, list[Path]], Task] = module.make
    return make(recipe, found)
