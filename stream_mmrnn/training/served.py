"""Evaluate a model file as it is served: the ONNX step over sequences in lanes, and the scores of its heads.

Does not import torch: it measures the model file, not the network that it was exported from.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from stream_mmrnn.core.errors import ModelError
from stream_mmrnn.graph.runtime import Graph, Provider
from stream_mmrnn.predict.columns import MAX_AGE_S
from stream_mmrnn.predict.contract import read_contract
from stream_mmrnn.training import metrics
from stream_mmrnn.training.data import Ticks, baselines_of, batches
from stream_mmrnn.training.recipe import Recipe

_LANES, _LENGTH = 32, 64


_MAX_ALL_SETS = 5
"""Nine modalities have 511 sets: with more than this, only all of them, all but one, and each alone."""


def subsets(names: Iterable[str], most: int = _MAX_ALL_SETS) -> list[tuple[str, ...]]:
    """The non-empty sets of modalities that are compared, the largest first; all, all but one and each alone if there
    are more modalities than `most`.
    """
    names = list(names)
    sizes = range(len(names), 0, -1) if len(names) <= max(most, 2) else (len(names), len(names) - 1, 1)
    return [s for n in sizes for s in itertools.combinations(names, n)]


def hidden(ticks: Ticks, names: list[str], present: Collection[str] | None) -> Ticks:
    """The sequence with all other modalities than `present` masked."""
    if present is None:
        return ticks
    keep = np.array([n in present for n in names], np.float32)
    features = {n: ticks.features[n] for n, k in zip(names, keep, strict=True) if k and n in ticks.features}
    age_s = np.where(keep > 0, ticks.age_s, np.float32(MAX_AGE_S)).astype(np.float32)
    return replace(ticks, features=features, present=ticks.present * keep, age_s=age_s)


def check(graph: Graph, recipe: Recipe) -> None:
    """Check that the model file and its recipe have the same inputs and outputs; raises ModelError."""
    spec = read_contract(graph)
    says = {m.name: m.size for m in spec.modalities}
    wants = {name: m.size for name, m in recipe.modalities.items()}
    if says != wants or list(says) != list(wants):
        raise ModelError(f"{graph.path} takes {says}, its recipe gives {wants}; export it again")
    heads = [(h.name, h.size) for h in spec.heads]
    if heads != [(h.name, h.size) for h in recipe.heads]:
        raise ModelError(f"{graph.path} has the heads {heads}, its recipe others; export it again")


def collect(
    graph: Graph, recipe: Recipe, sequences: Iterable[Ticks], present: Collection[str] | None = None
) -> dict[str, tuple[Any, Any, dict[str, Any]]]:
    """By head: the model's outputs on the ticks with a weight, their targets, and what simple rules forecast."""
    spec = read_contract(graph)
    names = [m.name for m in spec.modalities]
    inputs: dict[str, tuple[int, ...]] = {
        "active": (_LANES,),
        "reset": (_LANES,),
        "present": (_LANES, len(names)),
        "age": (_LANES, len(names)),
        **{f"input.{m.name}": (_LANES, m.size) for m in spec.modalities},
    }
    binding = graph.bind(
        inputs,
        {f"head.{h.name}": (_LANES, h.size) for h in spec.heads},
        {f"state.{s.name}": (f"next.{s.name}", (_LANES, *s.shape)) for s in spec.states},
    )
    binding.inputs["active"][...] = 1
    chunks: dict[str, list[Any]] = {h.name: [] for h in recipe.heads}
    true: dict[str, list[Any]] = {h.name: [] for h in recipe.heads}
    simple: dict[str, dict[str, list[Any]]] = {h.name: {} for h in recipe.heads}
    chosen = (hidden(t, names, present) for t in sequences)
    for batch in batches(chosen, recipe, _LANES, _LENGTH):
        outputs = {h.name: np.empty((_LANES, _LENGTH, h.size), np.float32) for h in recipe.heads}
        for name in names:
            binding.inputs[f"input.{name}"][...] = 0
        for t in range(_LENGTH):
            for name, vectors in batch.features.items():
                binding.inputs[f"input.{name}"][...] = vectors[:, t]
            binding.inputs["present"][...] = batch.present[:, t]
            binding.inputs["age"][...] = batch.age_s[:, t]
            binding.inputs["reset"][...] = batch.reset[:, t]
            binding.run()
            for name, out in outputs.items():
                out[:, t] = binding.outputs[f"head.{name}"]
        for name, out in outputs.items():
            counts = batch.weights[name] > 0
            chunks[name].append(out[counts])
            true[name].append(batch.targets[name][counts])
            for rule, values in baselines_of(batch.targets, name).items():
                simple[name].setdefault(rule, []).append(values[counts])
    return {
        h.name: (
            np.concatenate(chunks[h.name]) if chunks[h.name] else np.zeros((0, h.size), np.float32),
            np.concatenate(true[h.name]) if true[h.name] else np.zeros(0),
            {rule: np.concatenate(values) for rule, values in simple[h.name].items()},
        )
        for h in recipe.heads
    }


def evaluate(
    path: Path,
    recipe: Recipe,
    sequences: Iterable[Ticks],
    present: Collection[str] | None = None,
    provider: Provider = "cpu",
) -> dict[str, dict[str, Any]]:
    """The scores of each head of the model file on sequences, with only the modalities of `present`.

    Raises:
        ModelError: the file is not a model, or does not fit the recipe.

    """
    graph = Graph(path, provider)
    check(graph, recipe)
    thresholds = {h.name: h.threshold for h in read_contract(graph).heads}
    found = collect(graph, recipe, sequences, present)
    out = {}
    for head in recipe.heads:
        outputs, target, simple = found[head.name]
        scores = metrics.score(head, outputs, target, thresholds[head.name], simple)
        out[head.name] = {**scores, "primary": metrics.primary(head, scores)}
    return out
