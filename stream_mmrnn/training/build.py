"""Build: a new network for a recipe, with scales and reductions computed from the task's training data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from stream_mmrnn.core.errors import ConfigError, FileError
from stream_mmrnn.training.data import Task, Ticks, check
from stream_mmrnn.training.last_value import LastValue
from stream_mmrnn.training.predictor import PredictorNetwork
from stream_mmrnn.training.recipe import HeadRecipe, Recipe


def build(recipe: Recipe, task: Task, rng: np.random.Generator) -> PredictorNetwork:
    """A new network; its normalisation and reductions are computed from the task's training data."""
    sample: list[Ticks] = []
    seen = 0
    for ticks in task.train(rng):
        check(ticks, recipe)
        sample.append(ticks)
        seen += len(ticks)
        if seen >= 60_000:
            break
    if not sample:
        raise FileError(f"the data of {recipe.name} has no sequence to train on")
    for head in recipe.heads:
        if not any(t.weights[head.name].any() for t in sample):
            raise FileError(f"no tick has a label for the head {head.name!r}; are there any labels?")
    names = list(recipe.modalities)
    scales: dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = {}
    moving: list[str] = []
    bases: dict[str, np.ndarray[Any, Any]] = {}
    unknown: list[int] = []
    for i, name in enumerate(names):
        shown = [t.features[name][t.present[:, i] > 0] for t in sample if name in t.features]
        rows = np.concatenate(shown) if shown else np.zeros((0, 1), np.float32)
        if not len(rows) and name not in recipe.evidence.modalities:  # of the late fusion: until it is fitted
            unknown.append(i)
        unscaled = (*recipe.events.tokens, *recipe.evidence.modalities, recipe.late_fusion.modality)
        if len(rows) < 2 or name in unscaled:
            continue
        if recipe.modalities[name].window_s:
            moving.append(name)
            continue
        mean, std = rows.mean(0), rows.std(0)
        scales[name] = (mean, std)
        if recipe.modalities[name].energy:
            scaled = (rows - mean) / np.where(std > 1e-6, std, 1)
            bases[name] = _principal(scaled[:: max(1, len(scaled) // 20_000)], recipe.modalities[name].energy)
    predictor = PredictorNetwork(recipe, {name: basis.shape[1] for name, basis in bases.items()})
    for name, (mean, std) in scales.items():
        predictor.tokens.set_scale(name, torch.from_numpy(mean), torch.from_numpy(std))
    for name, basis in bases.items():
        predictor.tokens.set_reduction(name, torch.from_numpy(basis))
    for name in moving:
        _fit_movement(predictor, name, sample)
    predictor.known[unknown] = 0
    if predictor.events_table is not None:
        if not task.common_tokens:
            raise ConfigError(f"data.kind `{recipe.data.kind}` does not count tokens; leave events.tokens out")
        predictor.events_table.choose(torch.tensor(task.common_tokens[: recipe.events.vocabulary]))
    for head in recipe.heads:
        if head.standardise:
            rows = np.concatenate([_to_learn(head, recipe, t)[t.weights[head.name] > 0] for t in sample])
            mean, std = _moments(rows.astype(np.float64))
            predictor.heads.set_scale(head.name, torch.from_numpy(mean), torch.from_numpy(std))
    return predictor


def _fit_movement(predictor: PredictorNetwork, name: str, sample: list[Ticks]) -> None:
    """Fit the scales of how a modality moves."""
    place, movement = list(predictor.recipe.modalities).index(name), predictor.movement(name).eval()
    shown = [t for t in sample if name in t.features and t.present[:, place].any()]
    movement.set_scale(torch.from_numpy(np.concatenate([t.features[name][t.present[:, place] > 0] for t in shown])))
    found = []
    for ticks in shown:
        here = torch.from_numpy(ticks.present[:, place]).unsqueeze(0)
        state = torch.zeros(1, *movement.state)
        out, _ = movement(torch.from_numpy(ticks.features[name]).unsqueeze(0), here, state, None)
        found.append(out[here > 0])
    movement.set_output_scale(torch.cat(found))


def _to_learn(head: HeadRecipe, recipe: Recipe, ticks: Ticks) -> np.ndarray[Any, Any]:
    """The numbers [T, size] that the head's layer learns: its targets, or their change from the last known values."""
    target = ticks.targets[head.name]
    if not head.from_last:
        return target
    last = LastValue(head.from_last, list(recipe.modalities))
    features = {name: torch.from_numpy(x).unsqueeze(0) for name, x in ticks.features.items()}
    held = torch.zeros(1, len(head.from_last))
    values, _ = last(features, torch.from_numpy(ticks.present).unsqueeze(0), held, None)
    return target - np.tile(values[0].numpy(), (1, head.size // len(head.from_last)))


def _moments(rows: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Mean and standard deviation of each column of [N, size], without NaN; 0 of a column that has no number."""
    known = ~np.isnan(rows)
    count = np.maximum(known.sum(0), 1)
    mean = np.where(known, rows, 0).sum(0) / count
    variance = np.where(known, (rows - mean) ** 2, 0).sum(0) / count
    return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)


def _principal(rows: np.ndarray[Any, Any], energy: float) -> np.ndarray[Any, Any]:
    """The principal axes [size, k] with at least the share `energy` of the variance."""
    values, vectors = np.linalg.eigh(np.cov(rows.astype(np.float64), rowvar=False))
    values, vectors = values[::-1].clip(min=0), vectors[:, ::-1]
    k = int(np.searchsorted(np.cumsum(values) / max(values.sum(), 1e-12), energy) + 1)
    return np.ascontiguousarray(vectors[:, : min(k, len(values))]).astype(np.float32)
