"""PNG plots of a bench: a histogram of latencies, stages over time, a capacity curve. Needs matplotlib.

Knows nothing about what is measured: it is given values with their names.
"""

from __future__ import annotations

import importlib.util
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stream_mmrnn.core.latency import Histogram


class Curve(NamedTuple):
    """Points of one capacity curve."""

    x: str
    """What the points' first number is, such as `sessions`."""
    y: str
    points: Sequence[tuple[float, float]]
    limit: float | None = None
    """Where `y` must stay below, such as the tick."""


class Pictures:
    """What a bench has to draw, by name."""

    def __init__(self) -> None:
        self.histograms: dict[str, dict[str, Histogram]] = {}
        """Plot -> what is drawn in it."""
        self.stages: dict[str, list[tuple[float, Mapping[str, int]]]] = {}
        """Plot -> (seconds from the beginning, stage -> nanoseconds)."""
        self.curves: dict[str, Curve] = {}

    def write(self, folder: Path, bench: str) -> tuple[list[Path], str]:
        """The files made, and one sentence where none could be."""
        if importlib.util.find_spec("matplotlib") is None:
            return [], "no plots: matplotlib is not installed; pip install matplotlib"
        folder.mkdir(parents=True, exist_ok=True)
        return [
            *(_draw(_histograms, h, folder, f"{bench}_histogram_{name}") for name, h in self.histograms.items()),
            *(_draw(_stages, s, folder, f"{bench}_stages_{name}") for name, s in self.stages.items()),
            *(_draw(_curve, c, folder, f"{bench}_curve_{name}") for name, c in self.curves.items()),
        ], ""


def _draw(draw: Any, values: Any, folder: Path, name: str) -> Path:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes, values)
    axes.set_title(name.replace("_", " "), fontsize=9)
    figure.tight_layout()
    path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _beside(axes: Any) -> None:
    """The legend where no curve is."""
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.02, 1.0))


def _plain(axis: Any) -> None:
    """A logarithmic axis with 1, 2 and 5 of each decade, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _histograms(axes: Any, histograms: Mapping[str, Histogram]) -> None:
    for name, histogram in histograms.items():
        values, counts = zip(*histogram.buckets(), strict=True) if histogram.count else ((), ())
        bins = [10 ** (k / 40) for k in range(-120, 161)]  # 1 us to 10 s
        axes.hist([v / 1e6 for v in values], bins, weights=counts, histtype="step", label=name)
    axes.set(xlabel="milliseconds; one of a thousand is further right", ylabel="how many", xscale="log")
    _plain(axes.xaxis)
    counted = [h for h in histograms.values() if h.count]
    if counted:
        low = min(h.percentile(0.1) for h in counted)
        high = max(h.percentile(99.9) for h in counted)
        axes.set_xlim(max(low, 1000) / 1.3e6, max(high, 2000) * 1.3 / 1e6)
    _beside(axes)


def _stages(axes: Any, seen: Sequence[tuple[float, Mapping[str, int]]]) -> None:
    """Median of each stage in each second, one above the other."""
    seconds: dict[int, list[Mapping[str, int]]] = {}
    for at_s, took in seen:
        seconds.setdefault(int(at_s), []).append(took)
    names = list(seen[0][1]) if seen else []
    layers = [[statistics.median(t[n] for t in ts) / 1e6 for ts in seconds.values()] for n in names]
    if seconds:
        axes.stackplot(list(seconds), layers, labels=names)
    axes.set(xlabel="seconds", ylabel="milliseconds (median of each second)")
    _beside(axes)


def _curve(axes: Any, curve: Curve) -> None:
    axes.plot(*zip(*curve.points, strict=True), marker="o")
    if curve.limit is not None:
        axes.axhline(curve.limit, color="0.5", linestyle="--")
    axes.set(xlabel=curve.x, ylabel=curve.y, xscale="log", yscale="log")
    _plain(axes.xaxis)
    _plain(axes.yaxis)
