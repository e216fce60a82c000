"""Evaluate: a predictor over sequences, in any set of modalities, and the figures of each head.

Knows nothing about where the sequences come from, plots or cards.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
import torch

from stream_mmrnn.training import metrics
from stream_mmrnn.training.data import Ticks, batches
from stream_mmrnn.training.heads import activate
from stream_mmrnn.training.predictor import Predictor
from stream_mmrnn.training.served import hidden

Array = np.ndarray[Any, Any]
Outputs = dict[str, tuple[Array, Array, Array]]
"""By head: raw outputs [N, size], targets, weights, of the ticks that count."""


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
    found: dict[str, list[tuple[Array, Array, Array]]] = {h.name: [] for h in recipe.heads}
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
                found[h.name].append((said, batch.targets[h.name][counts], batch.weights[h.name][counts]))
    out: Outputs = {}
    for h in recipe.heads:
        rows = found[h.name]
        out[h.name] = (
            np.concatenate([r[0] for r in rows]) if rows else np.zeros((0, h.size), np.float32),
            np.concatenate([r[1] for r in rows]) if rows else np.zeros(0),
            np.concatenate([r[2] for r in rows]) if rows else np.zeros(0, np.float32),
        )
    return out


def figures(predictor: Predictor, outputs: Outputs) -> dict[str, dict[str, Any]]:
    """The scores of each head, from what `collect` gave."""
    result = {}
    for head in predictor.recipe.heads:
        raw, target, _ = outputs[head.name]
        temperature = predictor.heads.temperature(head.name).cpu()
        said = activate(head, torch.from_numpy(raw), temperature).numpy()
        result[head.name] = {
            **metrics.score(head, said, target),
            "temperature": float(temperature),
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


def by_modalities(predictor: Predictor, sequences: list[Ticks]) -> dict[str, dict[str, float]]:
    """The primary figure of each head for every set of modalities present."""
    return {
        "+".join(s): {h: f["primary"] for h, f in evaluate(predictor, sequences, s).items()}
        for s in subsets(predictor.recipe.modalities)
    }
