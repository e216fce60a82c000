"""The included models: each loads, describes itself, keeps sessions independent, and scores as its card says."""

from __future__ import annotations

import re

import numpy as np
import pytest
from harness import run
from places import ROOT, SHARED

from stream_mmrnn.core.types import Stamps, Tick
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.training import recipe as recipes

pytestmark = pytest.mark.process

MODELS = ROOT / "models"
PART = {"turn_taking": 30}
"""Test sequences where all of them take minutes: a sample, with the tolerance of one."""
NAMES = sorted(p.parent.name for p in MODELS.glob("*/step.onnx"))


def test_there_are_models() -> None:
    assert {"turn_taking", "digits", "activity"} <= set(NAMES)
    assert sum(p.stat().st_size for p in MODELS.glob("encoders/*.onnx")) < 40_000_000  # of others
    assert sum(p.stat().st_size for p in MODELS.glob("*/*.onnx")) < 45_000_000


@pytest.mark.parametrize("name", NAMES)
def test_a_model_matches_its_folder(name: str) -> None:
    engine = StepEngine(MODELS / name / "step.onnx", 2)
    assert engine.spec.name == name
    card = (MODELS / name / "card.md").read_text(encoding="utf-8")
    assert card.startswith(f"# {name}")
    assert "To make it again" in card
    path = MODELS / name / "recipe.toml"
    if path.exists():
        recipe = recipes.load(path)
        assert [(m.name, m.size) for m in engine.spec.modalities] == [(n, m.size) for n, m in recipe.modalities.items()]
        assert [h.name for h in engine.spec.heads] == [h.name for h in recipe.heads]
        assert engine.spec.tick_ns == recipe.tick_ns
    # a step beside another session equals the step alone
    rng = np.random.default_rng(0)
    features = {m.name: rng.standard_normal(m.size).astype(np.float32) for m in engine.spec.modalities}
    present, age = dict.fromkeys(features, True), dict.fromkeys(features, 0)

    def tick(session: str) -> Tick:
        return Tick(session, 1, engine.spec.tick_ns, features, present, age, Stamps(0, 0, 0, 0, ""))

    engine.open("a")
    engine.open("b")
    one, other = engine.step([tick("a"), tick("b")])
    for head in one.heads:
        assert one.heads[head].tobytes() == other.heads[head].tobytes()
        assert np.isfinite(one.heads[head]).all()


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("activity", "hapt.npz"),
        ("digits", ""),
        ("turn_taking", "switchboard_words.tar.xz"),
        ("polarity", "sentence_polarity.zip"),
        ("mnist_rows", "mnist.tgz"),
    ],
)
def test_a_model_scores_as_its_card_says(name: str, data: str) -> None:
    if not (SHARED / "data").is_dir():
        pytest.skip("the shared data folder is not beside this checkout")
    options, tolerance = ((), 2e-3) if name not in PART else (("--set", f"test={PART[name]}"), 0.03)
    code, result, err = run("evaluate", MODELS / name, "--data", SHARED / "data" / data, *options, timeout=200)
    assert code == 0, err
    card = (MODELS / name / "card.md").read_text(encoding="utf-8")
    stated = dict(re.findall(r"^\| (\w+) \| accuracy \| ([.\d]+) \|$", card, re.M))
    assert stated
    for head, accuracy in stated.items():
        assert result["test"][head]["accuracy"] == pytest.approx(float(accuracy), abs=tolerance)
