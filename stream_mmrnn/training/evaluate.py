"""Evaluate: a predictor over sequences, in any set of modalities, and the figures of each head.

Knows nothing about where the sequences come from, plots or cards.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from stream_mmrnn.training import metrics
from stream_mmrnn.training.data import Ticks, batches
from stream_mmrnn.training.heads import activate
from stream_mmrnn.training.predictor import Predictor
from stream_mmrnn.training.recipe import Head
from stream_mmrnn.training.served import hidden

Array = np.ndarray[Any, Any]


class Output(NamedTuple):
    """What a head said of the N ticks that count."""

    raw: Array
    """[N, size]."""
    target: Array
    weight: Array
    place: Array
    """Which tick of its sequence each one is."""


Outputs = dict[str, Output]
"""By head."""


def collect(
    predictor: Predictor,
    sequences: Iterable[Ticks],
    present: Collection[str] | None = None,
    device: torch.device | None = None,
) -> Outputs:
    """Raw outputs and targets of every tick that counts."""
    recipe = predictor.recipe
    device = device or next(predictor.parameters()).device
    names = list(recipe.modalities)
    found: dict[str, list[Output]] = {h.name: [] for h in recipe.heads}
    predictor.eval()
    state = None
    with torch.no_grad():
        chosen = (hidden(t, names, present) for t in sequences)
        for batch in batches(chosen, recipe, 32, 256):
            features = {m: torch.from_numpy(x).to(device) for m, x in batch.features.items()}
            raw, state = predictor(
                features,
                torch.from_numpy(batch.present).to(device),
                torch.from_numpy(batch.age_s).to(device),
                state,
                torch.from_numpy(batch.reset).to(device),
            )
            for h in recipe.heads:
                counts = batch.weights[h.name] > 0
                said = raw[h.name].float().cpu().numpy()[counts]
                found[h.name].append(
                    Output(said, batch.targets[h.name][counts], batch.weights[h.name][counts], batch.place[counts])
                )
    nothing = {h.name: Output(np.zeros((0, h.size), np.float32), *np.zeros((3, 0))) for h in recipe.heads}
    return {
        name: Output(*(np.concatenate(part) for part in zip(*rows, strict=True))) if rows else nothing[name]
        for name, rows in found.items()
    }


def served(predictor: Predictor, head: Head, raw: Array) -> tuple[Array, float]:
    """What is served for raw outputs, and the threshold of a head that says yes or no."""
    said = activate(head, torch.from_numpy(raw), predictor.heads.temperature(head.name).cpu()).numpy()
    return said, float(predictor.heads.threshold(head.name))


def figures(predictor: Predictor, outputs: Outputs) -> dict[str, dict[str, Any]]:
    """The scores of each head, from what `collect` gave."""
    result = {}
    for head in predictor.recipe.heads:
        said, threshold = served(predictor, head, outputs[head.name].raw)
        result[head.name] = {
            **metrics.score(head, said, outputs[head.name].target, threshold),
            "temperature": float(predictor.heads.temperature(head.name)),
        }
        result[head.name]["primary"] = metrics.primary(head, result[head.name])
    return result


def subsets(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Every set of modalities but the empty one, the largest first."""
    names = list(names)
    return [s for n in range(len(names), 0, -1) for s in itertools.combinations(names, n)]


def evaluate(
    predictor: Predictor, sequences: Iterable[Ticks], present: Collection[str] | None = None
) -> dict[str, dict[str, Any]]:
    """The scores of each head on sequences, with only the modalities of `present` (None: all there are)."""
    return figures(predictor, collect(predictor, sequences, present))


def by_modalities(
    predictor: Predictor, sequences: Sequence[Ticks], sets: Iterable[tuple[str, ...]] = ()
) -> dict[str, dict[str, float]]:
    """The primary figure of each head for these sets of modalities present, or for every one."""
    return {
        "+".join(s): {h: f["primary"] for h, f in evaluate(predictor, sequences, s).items()}
        for s in sets or subsets(predictor.recipe.modalities)
    }
