"""A small recipe and its network with seeded weights."""

from __future__ import annotations

import torch

from stream_mmrnn.training import recipe as recipes
from stream_mmrnn.training.predictor import PredictorNetwork


def recipe_of(cell: str = "gru", kind: str = "concat", rare: bool = False, **cell_options: object) -> recipes.Recipe:
    return recipes.parse(
        {
            "name": "toy",
            "modalities": {"vision": {"size": 6}, "audio": {"size": 4}, "text": {"size": 3}},
            "heads": [
                {"name": "now", "kind": "classification", "size": 3, "labels": ["a", "b", "c"]},
                {"name": "vap", "kind": "activity_projection", "size": 2, "horizons_s": [[0, 0.2], [0.2, 0.6]]},
                {"name": "next", "kind": "regression", "size": 2, "unit": "m"},
                {"name": "event", "kind": "hazard", "size": 4},
            ],
            "fusion": {"kind": kind, "width": 8, "heads": 2, "memory": 5},
            "events": {"modalities": ["vision", "text"] if rare else [], "width": 8, "hidden": 8},
            "cell": {"kind": cell, "hidden": 8, "layers": 2, **cell_options},
            "data": {"kind": "none"},
        }
    )


def network(recipe: recipes.Recipe, seed: int = 0) -> PredictorNetwork:
    torch.manual_seed(seed)
    p = PredictorNetwork(recipe).eval()
    # a rectifier's state grows from tick to tick where its U is far from the identity, and rounding with it
    scale = 0.05 if recipe.cell.kind == "rnn_relu" else 0.2
    with torch.no_grad():
        for x in p.parameters():
            x.add_(scale * torch.randn_like(x))
    return p
