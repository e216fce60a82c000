"""The late fusion: what it adds, when it counts, and that fitting it changes nothing else."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from stream_mmrnn.core.errors import ConfigError, FileError
from stream_mmrnn.training import late_fusion
from stream_mmrnn.training import recipe as recipes
from stream_mmrnn.training.checkpoints import load, save
from stream_mmrnn.training.data import Ticks
from stream_mmrnn.training.export import export
from stream_mmrnn.training.predictor import PredictorNetwork

HEAD = {
    "name": "activity",
    "kind": "activity_projection",
    "size": 2,
    "labels": ["soon", "later"],
    "horizons_s": [[0.0, 0.2], [0.2, 0.6]],
}


def table(**late: object) -> dict[str, object]:
    return {
        "name": "looks",
        "modalities": {"sight": {"size": 3, "select": [0, 1]}, "voice": {"size": 1}},
        "heads": [HEAD],
        "data": {"kind": "recordings"},
        "fusion": {"width": 8},
        "cell": {"hidden": 8},
        "late_fusion": {
            "modality": "sight",
            "present": [2],
            "head": "activity",
            "labels": ["soon"],
            "silent": [["voice", 0]],
            **late,
        },
    }


def network() -> PredictorNetwork:
    torch.manual_seed(0)
    return PredictorNetwork(recipes.parse(table())).eval()


def clips(count: int, seed: int, informative: bool = True) -> list[Ticks]:
    """Sequences in which the first number of `sight` says whether the target comes."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        target = (rng.random((40, 2)) < 0.4).astype(np.float32)
        sight = rng.standard_normal((40, 3)).astype(np.float32)
        sight[:, 0] += 2 * target[:, 0] * informative
        sight[:, 2] = rng.random(40) < 0.8
        voice = (rng.random((40, 1)) < 0.3).astype(np.float32)
        present = np.ones((40, 2), np.float32)
        weights = {"activity": np.ones(40, np.float32)}
        made.append(Ticks({"sight": sight, "voice": voice}, present, 1 - present, {"activity": target}, weights))
    return made


def outputs(p: PredictorNetwork, ticks: Ticks, sees: bool = True) -> torch.Tensor:
    features = {name: torch.from_numpy(x)[None] for name, x in ticks.features.items()}
    present = torch.from_numpy(ticks.present)[None].clone()
    present[..., 0] *= sees
    with torch.no_grad():
        raw, _ = p(features, present, torch.from_numpy(ticks.age_s)[None])
    return raw["activity"][0] / p.heads.temperature("activity")


def test_the_recipe_is_written_and_read_again(tmp_path: Path) -> None:
    recipe = recipes.parse(table())
    recipes.save(recipe, tmp_path / "recipe.toml")
    assert recipes.load(tmp_path / "recipe.toml") == recipe


def test_until_it_is_fitted_it_says_nothing() -> None:
    p = network()
    assert torch.equal(outputs(p, clips(1, 0)[0]), outputs(p, clips(1, 0)[0], sees=False))


def test_it_is_fitted_where_it_counts_and_nothing_else_changes() -> None:
    p = network()
    p.heads.temperature("activity").fill_(2.0)
    before = {k: v.clone() for k, v in p.state_dict().items()}
    without = outputs(p, clips(1, 9)[0], sees=False)
    assert late_fusion.fit(p, clips(12, 1), clips(6, 2), seed=0) < 0.85
    changed = {k for k, v in p.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"tokens.mean_sight", "tokens.std_sight", "late_fusion.enter.weight", "late_fusion.enter.bias",
                       "late_fusion.leave.weight"}  # fmt: skip
    ticks = clips(1, 9)[0]
    assert torch.equal(outputs(p, ticks, sees=False), without)
    added = outputs(p, ticks) - without
    counts = torch.from_numpy((ticks.features["sight"][:, 2] > 0) & (ticks.features["voice"][:, 0] == 0))
    assert not added[:, 1].any()
    assert not added[~counts].any()
    assert added[counts, 0].abs().max() <= 3.0 + 1e-5
    seen = torch.from_numpy(ticks.features["sight"][:, 0])[counts]
    assert torch.corrcoef(torch.stack([seen, added[counts, 0]]))[0, 1] > 0.9


def test_what_tells_nothing_adds_nothing() -> None:
    p = network()
    assert late_fusion.fit(p, clips(12, 1, informative=False), clips(12, 2, informative=False), seed=0) > 0.97
    ticks = clips(1, 9)[0]
    assert (outputs(p, ticks) - outputs(p, ticks, sees=False)).abs().max() < 0.5


def test_how_often_the_target_comes_in_these_data_is_not_learnt() -> None:
    """The targets come in 40 % of the ticks whatever the rest of the network says: that is not what sight says."""
    p = network()
    with torch.no_grad():
        p.heads.layers["activity"].bias.fill_(math.log(0.02 / 0.98))
    late_fusion.fit(p, clips(30, 1, informative=False), clips(12, 2, informative=False), seed=0)
    ticks = clips(1, 9)[0]
    assert (outputs(p, ticks) - outputs(p, ticks, sees=False)).abs().mean() < 0.3


def test_the_exported_step_equals_the_sequence(tmp_path: Path) -> None:
    """The gate of the export compares them; a checkpoint keeps what was fitted."""
    p = network()
    late_fusion.fit(p, clips(6, 1), clips(3, 2), seed=0)
    save(p, tmp_path / "best.safetensors", {})
    again, _ = load(tmp_path / "best.safetensors")
    assert torch.equal(outputs(again.eval(), clips(1, 9)[0]), outputs(p, clips(1, 9)[0]))
    assert max(export(again, tmp_path / "step.onnx", {}).values()) < 1e-5


def test_data_without_a_silent_face_are_refused() -> None:
    made = clips(2, 0)
    for ticks in made:
        ticks.features["sight"][:, 2] = 0
    with pytest.raises(FileError, match="no tick of the data for late_fusion has 'sight'"):
        late_fusion.fit(network(), made, made, seed=0)


@pytest.mark.parametrize(
    ("late", "says"),
    [
        ({"head": "none"}, "late_fusion.head is 'none'"),
        ({"labels": ["never"]}, "has to name some of soon, later"),
        ({"labels": []}, "has to name some of soon, later"),
        ({"present": [3]}, "late_fusion.present names number 3"),
        ({"modality": "smell"}, "late_fusion.modality names 'smell'"),
        ({"silent": [["voice", 1]]}, "late_fusion.silent names number 1 of 'voice'"),
        ({"silent": [["noise", 0]]}, "late_fusion.silent names 'noise'"),
    ],
)
def test_what_does_not_fit_the_recipe_is_refused(late: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        recipes.parse(table(**late))
