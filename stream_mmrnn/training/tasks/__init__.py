"""Tasks: what a recipe's `data.kind` names, each a function of the recipe and the data's place that gives a `Task`.

Knows nothing about networks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

from stream_mmrnn.core.errors import ConfigError, UsageError
from stream_mmrnn.training.data import Task
from stream_mmrnn.training.recipe import Recipe

KINDS = ("recordings", "turn_taking", "digits", "activity", "mnist", "polarity")


def create(recipe: Recipe, places: Sequence[Path]) -> Task:
    """The task of a recipe; `places` from the command line take the place of `data.path`.

    Raises:
        ConfigError: no such kind of data.
        UsageError: nobody said where the data is.

    """
    found = list(places) or ([Path(recipe.data.path)] if recipe.data.path else [])
    if not found:
        raise UsageError(f"the recipe {recipe.name} needs data of kind {recipe.data.kind!r}: say where by --data")
    if recipe.data.kind not in KINDS:
        raise ConfigError(f"there is no data of kind {recipe.data.kind!r}; use one of {', '.join(KINDS)}")
    module = importlib.import_module(f"{__name__}.{recipe.data.kind}")
    make: Callable[[Recipe, list[Path]], Task] = module.make
    return make(recipe, found)
