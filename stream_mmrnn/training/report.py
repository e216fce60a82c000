"""Reports: the results of training and evaluation as one JSON document, plots and a model card."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stream_mmrnn.core.durations import spoken
from stream_mmrnn.training import metrics
from stream_mmrnn.training.data import Task
from stream_mmrnn.training.evaluate import Output, by_modalities, collect, figures, served
from stream_mmrnn.training.predictor import PredictorNetwork
from stream_mmrnn.training.recipe import HeadRecipe

_LABEL = 18
"""Letters of a class's name in a plot."""
_ROLLING = 400
"""Ticks of a forecast that a report shows."""
_UNITS = (("days", 86_400), ("hours", 3600), ("minutes", 60))
_INK, _SECOND, _GRID = "#4c3fb5", "#1f77b4", "#d9dbe0"


def report(
    predictor: PredictorNetwork, task: Task, history: list[dict[str, Any]], ignored: Sequence[str] = ()
) -> dict[str, Any]:
    """All results of a trained network, for the card, the study and scripts.

    `ignored`: modalities that the network does not use; sets of modalities are compared with them.
    """
    test = task.test
    outputs = collect(predictor, test)
    several = len(predictor.recipe.modalities) > 1
    with predictor.using(ignored):
        compared = by_modalities(predictor, test, task.sets) if several else {}
    return {
        "name": predictor.recipe.name,
        "parameters": sum(p.numel() for p in predictor.parameters()),
        "cell": predictor.recipe.cell.kind,
        "fusion": predictor.recipe.fusion.kind if predictor.fusion.count else "no",
        "epochs": len(history),
        "history": history,
        "labels": {h.name: list(h.labels) for h in predictor.recipe.heads if h.labels},
        "test": figures(predictor, outputs),
        "by_modalities": compared,
        "ignored": list(ignored),
        "warnings": list(task.warnings),
        "by_time": {
            h.name: by_time(predictor, outputs[h.name], h) for h in predictor.recipe.heads if h.kind == "classification"
        },
        "rolling": rolling(predictor, task),
        "test_ticks": sum(len(t) - t.warm_up for t in test),
        "about": task.about,
    }


def rolling(predictor: PredictorNetwork, task: Task) -> dict[str, Any]:
    """Of each head that is compared with simple forecasts: its numbers at the last ticks of the first test sequence."""
    outputs = collect(predictor, task.test[:1])
    found = {}
    for head in predictor.recipe.heads:
        output = outputs[head.name]
        if output.baselines and head.labels and head.horizons_s:
            scores, _ = served(predictor, head, output.raw[-_ROLLING:])
            found[head.name] = {
                "labels": list(head.labels),
                "ahead": [round(end_s * 1e9 / predictor.recipe.tick_ns) for _, end_s in head.horizons_s],
                "tick_s": predictor.recipe.tick_ns / 1e9,
                "tick": output.place[-_ROLLING:].tolist(),
                "forecast": scores.tolist(),
                "true": output.target[-_ROLLING:].tolist(),
            }
    return found


def by_time(predictor: PredictorNetwork, output: Output, head: HeadRecipe) -> dict[str, list[float]]:
    """Accuracy by time since the start of the sequence, in twelve intervals of growing length."""
    tick_s = predictor.recipe.tick_ns / 1e9
    at = output.place
    if not len(at):
        return {"seconds": [], "accuracy": []}
    scores, threshold = served(predictor, head, output.raw)
    best = scores.argmax(1) if head.size > 1 else scores[:, 0] > threshold
    correct = best == output.target.reshape(len(at), -1)[:, 0]
    edges = np.unique(np.geomspace(1, at.max() + 2, 13).astype(int))
    seconds, accuracy = [], []
    for a, b in itertools.pairwise(edges):
        here = (at + 1 >= a) & (at + 1 < b)
        if here.any():
            seconds.append(float(b * tick_s))
            accuracy.append(float(correct[here].mean()))
    return {"seconds": seconds, "accuracy": accuracy}


def write(document: dict[str, Any], folder: Path) -> list[Path]:
    """Write `report.json` and the plots; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.json"
    path.write_text(json.dumps(metrics.clean(document), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return [path, *_plots(document, folder)]


def _plots(document: dict[str, Any], folder: Path) -> list[Path]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": _GRID})
    made = []

    def keep(figure: Any, name: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / f"{name}.png", dpi=120)
        plt.close(figure)
        made.append(folder / f"{name}.png")

    history = document["history"]
    if history:
        figure, axes = plt.subplots(figsize=(5, 3.2))
        epochs = [h["epoch"] for h in history]
        axes.plot(epochs, [h["train_loss"] for h in history], color=_SECOND, label="training data")
        axes.plot(epochs, [h["validation_loss"] for h in history], color=_INK, label="validation data")
        axes.set(xlabel="epoch", ylabel="loss (lower is better)", title=f"How {document['name']} learned")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
        keep(figure, "learning")
    for name, head in document["test"].items():
        if head.get("reliability"):
            figure, axes = plt.subplots(figsize=(4.2, 3.8))
            predicted, true, _ = (np.array(x) for x in zip(*head["reliability"], strict=True))
            axes.plot([0, 1], [0, 1], color=_GRID, zorder=1)
            axes.plot(predicted, true, marker="o", color=_INK)
            axes.set(xlabel="predicted probability", ylabel="share that came true", xlim=(0, 1), ylim=(0, 1))
            axes.set_title(f"How far to trust {name}: off by {head['calibration_error']:.3f}", fontsize=11)
            keep(figure, f"reliability_{name}")
        if head.get("confusion"):
            keep(_confusion(name, head, document["labels"].get(name, ()), plt), f"confusion_{name}")
    for name, curve in document["by_time"].items():
        if curve["seconds"]:
            figure, axes = plt.subplots(figsize=(5, 3.2))
            axes.semilogx(curve["seconds"], curve["accuracy"], marker="o", color=_INK)
            axes.set(xlabel="seconds since the sequence began", ylabel="accuracy", ylim=(0, 1.02))
            axes.set_title(f"How soon {name} is right")
            keep(figure, f"by_time_{name}")
    for name, rows in document["rolling"].items():
        keep(_forecasts(rows, plt), f"forecast_{name}")
    if document["by_modalities"]:
        heads = list(document["test"])
        figure, axes = plt.subplots(figsize=(5.5, 1.0 + 0.34 * len(document["by_modalities"]) * len(heads)))
        rows = [(f"{s} · {h}", v[h]) for s, v in document["by_modalities"].items() for h in heads]
        bars = axes.barh([r[0] for r in rows][::-1], [r[1] for r in rows][::-1], color=_INK)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axes.set(xlabel="figure of the head: accuracy, AUC or R²", ylabel="streams · head")
        axes.set_title("With these streams alone", fontsize=11)
        keep(figure, "by_modalities")
    return made


def _confusion(name: str, head: dict[str, Any], labels: Sequence[str], plt: Any) -> Any:
    """Which class was taken for which, in ticks; the colour is the share of the true class."""
    table = np.array(head["confusion"])
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    count = len(table)
    names = [_short(label) for label in labels] or [str(i) for i in range(count)]
    size = min(3.4 + 0.45 * count, 14)
    figure, axes = plt.subplots(figsize=(size + 0.4, size))
    axes.grid(False)
    axes.imshow(share, cmap="Purples", vmin=0, vmax=1)
    axes.set_xticks(range(count), names, rotation=45 if max(map(len, names)) > 3 else 0, ha="right", fontsize=9)
    axes.set_yticks(range(count), names, fontsize=9)
    for i, j in np.ndindex(count, count):
        axes.text(j, i, f"{table[i, j]}", ha="center", va="center", fontsize=8, color="w" if share[i, j] > 0.6 else "k")
    axes.set(xlabel="predicted (ticks)", ylabel="true")
    axes.set_title(f"What {name} takes for what: {head['accuracy']:.1%} right", fontsize=11)
    return figure


def _short(label: str) -> str:
    return label if len(label) <= _LABEL else f"{label[: _LABEL - 1]}…"


def _forecasts(rows: dict[str, Any], plt: Any) -> Any:
    """The rolling forecast of each column (at most four): the truth, and what was forecast for the same time, one tick
    and the most ticks before.
    """
    columns = list(dict.fromkeys(label.rpartition("+")[0] for label in rows["labels"]))[:4]
    figure, axes = plt.subplots(len(columns), figsize=(9, 0.8 + 2.2 * len(columns)), sharex=True, squeeze=False)
    unit, size_s = next(((u, s) for u, s in _UNITS if rows["tick_s"] >= s), ("seconds", 1))
    ticks, forecast, true = np.array(rows["tick"]), np.array(rows["forecast"]), np.array(rows["true"])
    for axis, column in zip(axes[:, 0], columns, strict=True):
        numbers = [j for j, label in enumerate(rows["labels"]) if label.rpartition("+")[0] == column]
        for j, color in ((numbers[0], _SECOND), (numbers[-1], _INK)):
            ahead = rows["ahead"][j]
            at = (ticks + ahead - ticks[0]) * rows["tick_s"] / size_s
            if j == numbers[0]:
                axis.plot(at, true[:, j], ".", color="#8b8f98", markersize=3, label=column)
            if j == numbers[0] or len(numbers) > 1:
                label = f"forecast {spoken(ahead * rows['tick_s'])} before"
                axis.plot(at, forecast[:, j], color=color, linewidth=1.2, label=label)
        axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 0.98), ncols=3, fontsize=8)
        axis.set_ylabel(_short(column))
    figure.suptitle("What was forecast, and what came", fontsize=11)
    axes[-1, 0].set(xlabel=f"{unit} of the held-out part")
    return figure


def card(document: dict[str, Any], differences: dict[str, float], made_by: str, versions: str) -> str:
    """The model card: the network, its data, its scores, how to make it again."""
    lines = [f"# {document['name']}", "", document["about"], ""]
    what = (
        f"{document['cell']} cell, {document['fusion']} fusion, {document['parameters']:,} weights, "
        f"{document['epochs']} epochs. The torch sequence, the torch step and the ONNX step differ by at most "
        f"{max(differences.values()):.1e}."
    )
    lines += [
        what,
        "",
        f"On {document['test_ticks']:,} held-out ticks:",
        "",
        "| head | figure | value |",
        "| --- | --- | --- |",
    ]
    for name, head in document["test"].items():
        for key in ("accuracy", "balanced_accuracy", "auc", "r2", "mse", "log_loss", "calibration_error"):
            if key in head:
                lines.append(f"| {name} | {key.replace('_', ' ')} | {_figure(head[key])} |")
        for rule, figures_ in head.get("baselines", {}).items():
            lines += [f"| {rule.replace('_', ' ')} | {key} | {_figure(figures_[key])} |" for key in ("r2", "mse")]
    if document["by_modalities"]:
        heads = list(document["test"])
        lines += ["", f"By the modalities present ({', '.join(heads)}):", "", "| present | " + " | ".join(heads) + " |"]
        lines.append("| --- |" + " --- |" * len(heads))
        for present, scores in document["by_modalities"].items():
            lines.append(f"| {present} | " + " | ".join(_figure(scores[h]) for h in heads) + " |")
    if document["ignored"]:
        lines += [
            "",
            f"Not used, because it was better without on the validation data: {', '.join(document['ignored'])}.",
        ]
    lines += [f"\nWarning: {text}." for text in document["warnings"]]
    lines += ["", "## To make it again", "", f"    {made_by}", "", versions, ""]
    return "\n".join(lines)


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_figure(v)}" for k, v in value.items())
    return "none" if value is None or not math.isfinite(value) else f"{value:.3f}"


def best_single(document: dict[str, Any], head: str) -> tuple[str, float]:
    """The best single modality and its primary figure."""
    alone = {s: v[head] for s, v in document["by_modalities"].items() if "+" not in s}
    if not alone:
        return "", float("nan")
    name = max(alone, key=lambda s: alone[s])
    return name, alone[name]
