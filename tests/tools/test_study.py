"""The study: its plan holds only true recipes, results are kept whole, and its words follow from its figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_mmrnn.training import recipe as recipes
from stream_mmrnn.training.served import subsets
from tools.study import plots, text
from tools.study.__main__ import main
from tools.study.plan import CELLS, CONTENDERS, DISTANCES, FUSIONS, PARTS, Run, changed, recall, whole
from tools.study.runs import Result, keep, kept, make

ABOUT = {"command": "c", "runs": 1, "minutes": 1.0, "date": "d", "versions": "v", "missing": []}


def made_up(run: Run, value: float = 0.5) -> Result:
    """A result of that run as a good one would be."""
    result = Result(key=run.key, part=run.part, group=run.group, name=run.name, seed=run.seed, cpu_s=1.0)
    if run.kind == "bench":
        result.figures = {c: {"tokens_per_s": 1000, "times_nn_gru": 1.5} for c in ("nn.GRU", *CELLS)}
    elif run.kind == "gradient":
        result.figures = {"ratio": [0.5] * 201}
    elif run.kind == "step":
        result.figures = {"us": 50.0, "bytes": 10240, "cell_weights": 1000}
    else:
        heads = [h["name"] for h in run.table["heads"]]
        result.figures = {h: {"primary": value, "auc": value} for h in heads}
        if run.alone:
            sets = subsets(run.table["modalities"])
            result.alone = {"+".join(s): dict.fromkeys(heads, 0.25) for s in sets}
    return result


def test_every_run_is_a_recipe() -> None:
    for run in {r.key: r for r in whole().runs if r.kind == "train"}.values():
        recipe = recipes.parse(run.table)
        assert recipe.cell.kind in CELLS
        assert text.head_of(run.part) in {h.name for h in recipe.heads}


def test_the_plan_is_cells_by_fusions_on_every_part() -> None:
    plan = whole()
    assert {r.part for r in plan.runs} == set(PARTS)
    grid = {r.name for r in plan.runs if (r.part, r.group) == ("digits", "grid")}
    assert grid == {f"{c} {f}" for c in CELLS for f in FUSIONS}
    assert {r.name for r in plan.runs if r.group == "larger"} == set(CONTENDERS)
    assert all(r.cost_s > 0 for r in plan.runs)
    two = whole(seeds=2)
    assert {r.seed for r in two.runs if r.kind == "train"} == {0, 1}


def test_a_result_depends_on_what_its_key_says() -> None:
    run = Run("recall", "distance", "gru 20", recall(20))
    others = [
        replace(run, table=changed(run.table, {"cell.kind": "lstm"})),
        replace(run, seed=1),
        replace(run, first=7),
        replace(run, alone=True),
        replace(run, kind="step"),
    ]
    assert len({r.key for r in (run, *others)}) == 6
    assert replace(run, group="else", name="else", cost_s=1).key == run.key


@pytest.mark.slow
@settings(max_examples=60)
@given(st.data())
def test_a_damaged_result_is_none(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("kept")
    run = whole().runs[-1]
    result = made_up(run)
    keep(result, folder)
    assert kept(run.key, folder) == result
    path = folder / f"{run.key}.json"
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    bad = data.draw(st.sampled_from([good[:at], good[:at] + b"\xff" + good[at + 1 :], good[:at] + b"9" + good[at:]]))
    path.write_bytes(bad)
    found = kept(run.key, folder)
    assert found is None or found == result  # a space more or less is no damage
    assert kept("0" * 20, folder) is None


@pytest.mark.slow
def test_every_figure_is_in_the_text(tmp_path: Path) -> None:
    plan = whole()
    results = {r.key: made_up(r, 0.4 + 0.01 * r.seed) for r in plan.runs}
    found = text.Found(plan, results)
    said = text.write(found, ABOUT)
    for heading in (
        "Cells",
        "Fusions",
        "Cells × fusions",
        "Long dependencies",
        "Training speed",
        "Size",
        "What the seeds",
    ):
        assert f"\n## {heading}" in said
    assert ".410 (.400 to .420)" in said
    assert "nan" not in said
    assert "attention` against `concat`: digit no difference beyond the seeds'" in said
    drawn = {p.name for p in plots.draw(found, tmp_path)}
    assert drawn == {"long_dependencies.png", "training_speed.png", "digits_grid.png"}
    for name in drawn:
        assert f"(study/{name})" in said

    better = {r.key: made_up(r, 0.9 if r.name == "attention" else 0.4) for r in plan.runs}
    assert "attention` against `concat`: digit better, next digit better" in text.write(text.Found(plan, better), ABOUT)


def test_what_is_missing_or_diverged_is_said() -> None:
    plan = whole()
    nothing = text.write(text.Found(plan, {}), {**ABOUT, "missing": ["digits (it is not there)"]})
    assert "Not in it: digits (it is not there)." in nothing
    assert "## Cells" not in nothing
    assert "## Published figures" in nothing
    run = next(r for r in plan.runs if (r.part, r.name) == ("activity", "rnn_relu"))
    lost = Result(
        key=run.key, part="activity", group="cells", name=run.name, seed=0, cpu_s=1.0, diverged="the loss is nan"
    )
    assert "| `rnn_relu` | diverged |" in text.write(text.Found(plan, {run.key: lost}), ABOUT)


@pytest.mark.slow
def test_a_run_is_made_and_again_the_same() -> None:
    table = changed(
        recall(DISTANCES[0]),
        {"data.options.train": 64, "data.options.held_out": 32, "data.options.length": 3, "train.length": 3},
    )
    run = Run("recall", "distance", "gru 3", changed(table, {"train.epochs": 30, "train.learning_rate": 0.01}))
    first, second = make(run, []), make(run, [])
    assert first.figures == second.figures
    assert first.figures["symbol"]["primary"] > 0.5, "eight symbols over three ticks are learned"
    assert first.ticks_per_s > 0
    assert first.weights > 0

    far = Run("recall", "gradient", "rnn_tanh", {"cell": "rnn_tanh", "hidden": 16, "distance": 40}, "gradient")
    ratio = make(far, []).figures["ratio"]
    assert ratio[0] == 1
    assert ratio[40] < 1e-4


@pytest.mark.process
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--data", str(tmp_path), "--work", str(tmp_path / "work"), "--docs", str(tmp_path / "docs")]
    assert main([*places, "--list"]) == 0
    assert "minutes of one core" in capsys.readouterr().out
    assert not (tmp_path / "docs").exists()
    with pytest.raises(SystemExit, match="2"):
        main([*places, "--parts", "digit"])
    assert "there is no part 'digit'; known are speed, recall" in capsys.readouterr().err

    assert main([*places, "--parts", "polarity", "--json"]) == 3
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "holds no rt-polarity.neg; give sentence_polarity.zip" in document["missing"]["polarity"]
    assert "Not in it: polarity (" in (tmp_path / "docs" / "study.md").read_text(encoding="utf-8")
