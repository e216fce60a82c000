"""Default recipes for the user's own recordings: a classifier of their labels, or a forecast of columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import FileError
from stream_mmrnn.core.message_columns import Integers
from stream_mmrnn.core.streams import KINDS, made_by
from stream_mmrnn.core.types import ModalitySpec
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.mcap_format import number
from stream_mmrnn.recording.settings import streams_of
from stream_mmrnn.training.recipe import Recipe, parse
from stream_mmrnn.training.tasks import forecast
from stream_mmrnn.training.tasks.recordings import FORECAST, columns_of, ticks_of

_TICK_NS = 40_000_000
WINDOW_S = 1.0
"""Movements of people: two swings or more of what is slower than walking."""
MOST_STACKED = 40
"""Samples of a tick that a model gets one by one; of a faster signal it gets the newest of them."""


def _modalities(recordings: Sequence[Recording]) -> dict[str, dict[str, Any]]:
    """The modalities that recordings have, as a recipe states them."""
    modalities: dict[str, dict[str, Any]] = {}
    order: dict[str, None] = {}
    for recording in recordings:
        table = streams_of(recording.metadata)
        names = {
            topics.FEATURE + features: row.modality_of(features)
            for row in table.values()
            for features in row.features()
        }
        order |= dict.fromkeys(names.values())
        for e in recording.envelopes(names):
            modality = names[e.topic]
            if made_by(e.origin, "tokens"):  # numbers of words: they mean nothing as amounts
                order.pop(modality, None)
            elif modality not in modalities and not isinstance(e.payload, bytes):
                modalities[modality] = {"size": len(e.payload), "encoder": e.origin}
            if len(modalities) == len(order):
                break
    return {m: modalities[m] for m in order if m in modalities}


def _with_windows(
    modalities: dict[str, dict[str, Any]], recordings: Sequence[Recording], tick_ns: int
) -> dict[str, dict[str, Any]]:
    """The same, and of a signal that is measured also how it moves; of a fast one every sample of a tick."""
    signals: dict[str, str] = {}
    for recording in recordings:
        for row in streams_of(recording.metadata).values():
            if row.kind == "signal" and row.reduction == KINDS["signal"].reduction:
                signals |= {topics.FEATURE + row.features()[0]: row.modality_of(row.features()[0])}
    gaps: dict[str, list[Integers]] = {}
    for recording in recordings:
        for messages in recording.columns(signals):
            for channel in messages.channels:
                gaps.setdefault(signals[channel.topic], []).append(np.diff(channel.event_ns))
    found = dict(modalities)
    for name, parts in gaps.items():
        between = np.concatenate(parts)
        if name not in found or not len(between):
            continue
        stack = min(max(round(tick_ns / max(float(np.median(between)), 1.0)), 1), MOST_STACKED)
        found[name] = {**found[name], "window_s": WINDOW_S}
        if stack > 1:
            found[name] |= {"size": found[name]["size"] * stack, "reduction": "stack", "stack": stack}
    return found


def recipe_for(paths: Sequence[Path], name: str) -> Recipe:
    """A default recipe for recordings: their modalities, and a head for each tier of their labels.

    A label that is true in no tick is no class.

    Raises:
        FileError: there are no labels, or a recording has no ticks.

    """
    recordings = [Recording(path) for path in paths]
    modalities = _modalities(recordings)
    specs = [ModalitySpec(m, about["size"], about["encoder"], "", 1) for m, about in modalities.items()]
    tiers: dict[str, set[str]] = {}
    for path in paths:
        ticks = ticks_of(path, specs, _TICK_NS)
        for tier in ticks.events.tiers:
            tiers.setdefault(tier, set()).update(ticks.labels(tier))
    classes = {tier: sorted(labels) for tier, labels in tiers.items() if len(labels) > 1}
    if not classes:
        found = ", ".join(sorted(set().union(*tiers.values()))) or "none"
        raise FileError(
            f"a classifier needs two labels or more, the recordings hold {found}; type `/label NAME` while recording, "
            "or give labels afterwards with stream-mmrnn label"
        )
    heads = {_head_name(tier): tier for tier in classes}
    if len(heads) < len(classes):
        raise FileError(f"two of the tiers {', '.join(classes)} differ in case or hyphens alone; rename one by --tier")
    return parse(
        {
            "name": name,
            "modalities": _with_windows(modalities, recordings, _TICK_NS),
            "heads": [
                {"name": head, "kind": "classification", "size": len(classes[tier]), "labels": classes[tier]}
                for head, tier in heads.items()
            ],
            "data": {
                "kind": "recordings",
                "options": {"targets": {head: f"label/{tier}" for head, tier in heads.items() if tier != topics.LABEL}},
            },
            "fusion": {"kind": "attention", "width": 48, "modality_dropout": 0.5, "choose": True},
            "cell": {"kind": "gru", "hidden": 64},
            "train": {"epochs": 40, "batch": 16, "length": 25, "learning_rate": 3e-3, "patience": 10},
            "quick": {"epochs": 12},
        }
    )


def _head_name(tier: str) -> str:
    """A head's name for a tier: heads are written in small letters."""
    name = tier.lower().replace("-", "_")
    return name if name[0].isalpha() else f"tier_{name}"


def forecast_recipe_for(
    paths: Sequence[Path], name: str, columns: Sequence[str], steps: int, tick_ns: int = 0, season: int = 0
) -> Recipe:
    """A default recipe that forecasts the next `steps` values of `columns` from all signals of the recordings.

    `tick_ns`: 0 is the usual time between two rows of an imported table. `season`: see `forecast.Forecast`.

    Raises:
        ConfigError: there is no such column.
        FileError: the tick is not known.

    """
    recordings = [Recording(path) for path in paths]
    modalities = _modalities(recordings)
    sizes = {m: about["size"] for m, about in modalities.items()}
    places = [forecast.place_of(column, columns_of(recordings[0]), sizes) for column in columns]
    tick_ns = tick_ns or forecast.tick_of([number(r.metadata, "step_ns") for r in recordings])
    head = forecast.head_of(columns, places, steps, tick_ns, "huber")
    return parse(
        {
            "name": name,
            "tick_ms": tick_ns / 1e6,
            "modalities": modalities,
            "heads": [head],
            "data": {
                "kind": "recordings",
                "options": {
                    "targets": {head["name"]: FORECAST},
                    "forecast": {"columns": list(columns), "season": season},
                },
            },
            "fusion": {"kind": "concat", "width": 32, "modality_dropout": 0.0},
            "cell": {"kind": "gru", "hidden": 32},
            "train": {"epochs": 150, "batch": 8, "length": 60, "learning_rate": 3e-3, "patience": 25},
            "quick": {"epochs": 20},
        }
    )
