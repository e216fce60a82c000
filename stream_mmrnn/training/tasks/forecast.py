"""Forecasts of columns: the values of the next K ticks as targets, the simple forecasts to compare with, and the split.

The recipe's head has K numbers of each column, tick by tick: `size` is K times the number of columns. Numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.errors import ConfigError, FileError
from stream_mmrnn.core.strict_toml import convert
from stream_mmrnn.core.types import FloatArray
from stream_mmrnn.training.data import Array, Ticks, baselines_of, cut
from stream_mmrnn.training.recipe import HeadRecipe, Recipe

TRAIN, VALIDATION = 0.6, 0.15
"""Shares of a recording, from its beginning; the rest is the test part."""
PERSISTENCE, SEASONAL = "persistence", "seasonal_naive"


class Forecast(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`data.options.forecast`."""

    columns: tuple[str, ...]
    """`COLUMN` or `STREAM.COLUMN` of an imported table; `STREAM.NUMBER` of any signal, from 0."""
    season: Annotated[int, msgspec.Meta(ge=0, le=10**9)] = 0
    """Ticks of a season, for the seasonal naive forecast: the value one season before. 0: without."""


def options_of(recipe: Recipe) -> Forecast:
    """Raises ConfigError."""
    options = recipe.data.options.get("forecast")
    if not options:
        raise ConfigError('a forecast needs its columns: give data.options.forecast, such as {columns = ["temp"]}')
    return convert(options, Forecast)


def place_of(column: str, columns: Mapping[str, Sequence[str]], sizes: Mapping[str, int]) -> tuple[str, int]:
    """Modality and index of a column; `columns`: names by modality, `sizes`: numbers by modality.

    Raises:
        ConfigError: there is no such column, or several.

    """
    found = [(m, names.index(column)) for m, names in columns.items() if column in names and m in sizes]
    modality, _, rest = column.partition(".")
    if modality in sizes and rest in columns.get(modality, ()):
        found = [(modality, columns[modality].index(rest))]
    elif not found and modality in sizes and rest.isdecimal() and int(rest) < sizes[modality]:
        found = [(modality, int(rest))]
    if len(found) == 1:
        return found[0]
    if found:
        both = ", ".join(f"{m}.{column}" for m, _ in found)
        raise ConfigError(f"several streams have a column {column!r}; name one of {both}")
    known = [name for m, names in columns.items() if m in sizes for name in names]
    known = known or [f"{m}.0 to {m}.{size - 1}" for m, size in sizes.items()]
    raise ConfigError(f"there is no column {column!r}; use {', '.join(known[:50])}")


def targets(
    head: HeadRecipe,
    index: npt.NDArray[np.int64],
    features: Mapping[str, FloatArray],
    present: FloatArray,
    columns: Mapping[str, Sequence[str]],
    recipe: Recipe,
) -> tuple[dict[str, Array], FloatArray]:
    """For T ticks: the head's targets [T, size] and those of its baselines, and the weight of each tick [T].

    `index`: the ticks' places on the grid; `columns`: names by modality. An unknown number is NaN.

    Raises:
        ConfigError: the head or the options do not fit the data.

    """
    options = options_of(recipe)
    sizes = {name: m.size for name, m in recipe.modalities.items()}
    places = [place_of(column, columns, sizes) for column in options.columns]
    count, rest = divmod(head.size, len(places))
    if rest:
        raise ConfigError(
            f"the head {head.name!r} has {head.size} numbers, expected a multiple of the {len(places)} columns that it "
            "forecasts"
        )
    if head.from_last and tuple(places) != head.from_last:
        raise ConfigError(
            f"the head {head.name!r} has from_last = {head.from_last}, and its columns are {tuple(places)}; are the "
            "columns of this recording in another order?"
        )
    names = list(recipe.modalities)
    values = np.stack([np.where(present[:, names.index(m)] > 0, features[m][:, i], np.nan) for m, i in places], 1)
    steps = range(1, count + 1)
    made = {head.name: _stacked(_at(index, values, index + h) for h in steps)}
    made[f"{head.name}.{PERSISTENCE}"] = _stacked(_held(values) for _ in steps)
    if options.season:
        before = (_at(index, values, index + h - options.season * -(-h // options.season)) for h in steps)
        made[f"{head.name}.{SEASONAL}"] = _stacked(before)
    return dict(made), _weight(made[head.name])


def _stacked(steps: Any) -> FloatArray:
    return np.concatenate(list(steps), axis=1, dtype=np.float32)


def _at(index: npt.NDArray[np.int64], values: FloatArray, wanted: npt.NDArray[np.int64]) -> FloatArray:
    """The values of these ticks; NaN where there is no such tick."""
    place = np.minimum(np.searchsorted(index, wanted), len(index) - 1)
    found: FloatArray = values[place].astype(np.float32)
    found[index[place] != wanted] = np.nan
    return found


def _held(values: FloatArray) -> FloatArray:
    """The last known value of each column at each tick."""
    newest = np.where(np.isnan(values), 0, np.arange(len(values))[:, None])
    held: FloatArray = np.take_along_axis(values, np.maximum.accumulate(newest, 0), 0)
    return held


def _weight(target: Array) -> FloatArray:
    """1 where a number of the target is known."""
    return np.asarray((~np.isnan(target.astype(np.float64))).any(axis=1), np.float32)


def for_training(s: Ticks, heads: Mapping[str, int]) -> Ticks:
    """The sequence without baselines, and without targets that lie after its end (in the part that is held out)."""
    kept = {name: target for name, target in s.targets.items() if "." not in name}
    return _within(replace(s, targets=kept), heads)


def for_test(s: Ticks, heads: Mapping[str, int], warm_up: int = 0) -> Ticks:
    """The sequence with only those targets that every baseline forecasts, so that all are scored on the same numbers.

    The first `warm_up` ticks are not scored: the model sees them as a session that has been running does.
    """
    found = dict(s.targets)
    for head in heads:
        for values in baselines_of(s.targets, head).values():
            found[head] = np.where(np.isnan(values.astype(np.float64)), np.float32(np.nan), found[head])
    weights = {name: weight.copy() for name, weight in s.weights.items()}
    for head in heads:
        weights[head] = weights[head] * _weight(found[head])
    for weight in weights.values():
        weight[:warm_up] = 0
    return replace(s, targets=found, weights=weights, warm_up=warm_up)


def _within(s: Ticks, heads: Mapping[str, int]) -> Ticks:
    """The sequence without targets after its end."""
    found, weights, count = dict(s.targets), dict(s.weights), len(s)
    for head, steps in heads.items():
        target = found[head].copy()
        for h, numbers in enumerate(np.split(np.arange(target.shape[1]), steps), start=1):
            target[max(count - h, 0) :, numbers] = np.nan
        found[head], weights[head] = target, weights[head] * _weight(target)
    return replace(s, targets=found, weights=weights)


def split(s: Ticks, heads: Mapping[str, int], warm_up: int) -> tuple[Ticks, Ticks, Ticks]:
    """The training, validation and test part of a recording, in time order. `heads`: those that forecast, with their
    number of steps; `warm_up`: at most so many ticks before a held-out part are shown to the model.
    """
    a, b = round(TRAIN * len(s)), round((TRAIN + VALIDATION) * len(s))
    train = for_training(cut(s, 0, a), heads)
    validation = for_test(_within(cut(s, max(a - warm_up, 0), b), heads), heads, min(a, warm_up))
    test = for_test(cut(s, max(b - warm_up, 0), len(s)), heads, min(b, warm_up))
    return train, validation, test


def is_known(part: Sequence[Ticks], head: str) -> bool:
    """Whether each of the head's numbers is known in some tick that counts."""
    rows = np.concatenate([s.targets[head][s.weights[head] > 0] for s in part]).astype(np.float64)
    return bool((~np.isnan(rows)).any(axis=0).all())


def head_of(
    columns: Sequence[str], places: Sequence[tuple[str, int]], steps: int, tick_ns: int, loss: str
) -> dict[str, Any]:
    """The head of a recipe that forecasts the next `steps` values of each column, which are at these `places`."""
    tick_s = tick_ns / 1e9
    numbers = [(column, h) for h in range(1, steps + 1) for column in columns]
    return {
        "name": "next",
        "kind": "regression",
        "size": len(numbers),
        "labels": [f"{column}+{h}" for column, h in numbers],
        "horizons_s": [[(h - 1) * tick_s, h * tick_s] for _, h in numbers],
        "unit": "as in the data",
        "loss": loss,
        "standardise": True,
        "from_last": [list(place) for place in places],
    }


def tick_of(steps_ns: Sequence[int]) -> int:
    """The tick for recordings with these usual steps; raises FileError if none is known."""
    known = [step for step in steps_ns if step]
    if not known:
        raise FileError("the recordings do not say how often they have a row; give the tick by --tick, such as 1d")
    return min(known)
