"""The study's plots, from its kept results. Knows nothing about how they were made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .plan import CELLS, DISTANCES, FUSIONS
from .text import Found, mean

COLOURS = {
    "rnn_tanh": "#8d8d8d",
    "rnn_relu": "#c4a35a",
    "lstm": "#5a7fc4",
    "gru": "#5b3fa0",
    "min_gru": "#2f9e77",
    "rg_lru": "#c4573a",
}


def draw(found: Found, folder: Path) -> list[Path]:
    """PNG files of whatever there are results for."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#eee"})
    folder.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []

    def keep(figure: Any, name: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / name, dpi=110)
        plt.close(figure)
        made.append(folder / name)

    gradient = found.of("recall", "gradient")
    recalled = found.of("recall", "distance")
    if gradient and recalled:
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6))
        for cell in CELLS:
            if cell in gradient:
                rows = [r.figures["ratio"] for r in gradient[cell]]
                curve = [sum(values) / len(values) for values in zip(*rows, strict=True)]
                left.semilogy([max(v, 1e-12) for v in curve], color=COLOURS[cell], label=cell)
            at = [(d, mean(recalled[f"{cell} {d}"], "symbol")) for d in DISTANCES if f"{cell} {d}" in recalled]
            right.plot([d for d, _ in at], [v for _, v in at], marker="o", color=COLOURS[cell], label=cell)
        left.set(
            xlabel="ticks back",
            ylabel="gradient against the last tick's",
            title="untrained: a gradient's reach",
        )
        right.axhline(1 / 8, color="#8d8d8d", linestyle=":", linewidth=1)
        right.set(
            xlabel="ticks to remember for",
            ylabel="accuracy",
            ylim=(0, 1.04),
            title="trained: one symbol of eight",
        )
        left.legend(frameon=False, fontsize=8, loc="center right")  # where no curve goes
        keep(figure, "long_dependencies.png")

    bench = found.of("speed", "bench")
    if bench:
        figure, axes = plt.subplots(figsize=(6.6, 3.6))
        lengths = sorted(bench, key=int)
        for cell in ("nn.GRU", *CELLS):
            speeds = [bench[n][0].figures[cell]["tokens_per_s"] for n in lengths]
            axes.loglog([int(n) for n in lengths], speeds, marker="o", color=COLOURS.get(cell, "#000000"), label=cell)
        axes.set(xlabel="ticks a sequence", ylabel="ticks a second", title="training: forward and backward, one thread")
        axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))
        keep(figure, "training_speed.png")

    grid = found.of("digits", "grid")
    if grid:
        figure, axes = plt.subplots(figsize=(6.8, 4.0))
        table = [[mean(grid.get(f"{c} {f}", []), "digit") for f in FUSIONS] for c in CELLS]
        axes.grid(False)
        axes.imshow(table, cmap="Purples", aspect="auto")
        middle = sum(map(sum, table)) / sum(map(len, table))
        for i, row in enumerate(table):
            for j, value in enumerate(row):
                said, colour = f"{value:.2f}".removeprefix("0"), "w" if value > middle else "k"
                axes.text(j, i, said, ha="center", va="center", color=colour)
        axes.set_xticks(range(len(FUSIONS)), FUSIONS, rotation=25, ha="right")
        axes.set_yticks(range(len(CELLS)), CELLS)
        axes.set_title("digits, small: accuracy by cell and fusion")
        keep(figure, "digits_grid.png")
    return made
