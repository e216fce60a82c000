"""Evaluate: run a predictor over sequences, with any set of modalities present, and score each head."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from stream_mmrnn.training import metrics
from stream_mmrnn.training.data import Ticks, baselines_of, batches
from stream_mmrnn.training.predictor import PredictorNetwork
from stream_mmrnn.training.recipe import HeadRecipe
from stream_mmrnn.training.served import hidden, subsets

Array = np.ndarray[Any, Any]


class Output(NamedTuple):
    """The raw outputs of a head on the N ticks with a weight."""

    raw: Array
    """[N, size]."""
    target: Array
    weight: Array
    place: Array
    """Index of each tick in its sequence."""
    baselines: dict[str, Array] = {}  # noqa: RUF012 never changed
    """By the name of a simple rule, what it forecasts, [N, size]."""


Outputs = dict[str, Output]
"""By head."""


def collect(
    predictor: PredictorNetwork,
    sequences: Iterable[Ticks],
    present: Collection[str] | None = None,
    device: torch.device | None = None,
) -> Outputs:
    """Raw outputs and targets of all ticks with a weight."""
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
                values = raw[h.name].float().cpu().numpy()[counts]
                found[h.name].append(
                    Output(
                        values,
                        batch.targets[h.name][counts],
                        batch.weights[h.name][counts],
                        batch.place[counts],
                        {name: x[counts] for name, x in baselines_of(batch.targets, h.name).items()},
                    )
                )
    nothing = {h.name: Output(np.zeros((0, h.size), np.float32), *np.zeros((3, 0))) for h in recipe.heads}
    return {name: _joined(rows) if rows else nothing[name] for name, rows in found.items()}


def _joined(rows: Sequence[Output]) -> Output:
    raw, target, weight, place = (np.concatenate(part) for part in zip(*(row[:4] for row in rows), strict=True))
    baselines = {name: np.concatenate([row.baselines[name] for row in rows]) for name in rows[0].baselines}
    return Output(raw, target, weight, place, baselines)


def served(predictor: PredictorNetwork, head: HeadRecipe, raw: Array) -> tuple[Array, float]:
    """The served outputs for raw outputs, and the threshold of a binary head."""
    device = next(predictor.parameters()).device
    scores = predictor.heads.served(head, torch.from_numpy(raw).to(device)).cpu().numpy()
    return scores, float(predictor.heads.threshold(head.name))


def figures(predictor: PredictorNetwork, outputs: Outputs) -> dict[str, dict[str, Any]]:
    """The scores of each head, from the result of `collect`."""
    result = {}
    for head in predictor.recipe.heads:
        scores, threshold = served(predictor, head, outputs[head.name].raw)
        result[head.name] = {
            **metrics.score(head, scores, outputs[head.name].target, threshold, outputs[head.name].baselines),
            "temperature": float(predictor.heads.temperature(head.name)),
        }
        result[head.name]["primary"] = metrics.primary(head, result[head.name])
    return result


def evaluate(
    predictor: PredictorNetwork, sequences: Iterable[Ticks], present: Collection[str] | None = None
) -> dict[str, dict[str, Any]]:
    """The scores of each head on sequences, with only the modalities of `present` (None: all)."""
    return figures(predictor, collect(predictor, sequences, present))


def by_modalities(
    predictor: PredictorNetwork, sequences: Sequence[Ticks], sets: Iterable[tuple[str, ...]] = ()
) -> dict[str, dict[str, float]]:
    """The primary figure of each head, for each of these sets of present modalities (default: `subsets`)."""
    return {
        "+".join(s): {h: f["primary"] for h, f in evaluate(predictor, sequences, s).items()}
        for s in sets or subsets(predictor.recipe.modalities)
    }
