"""Plot two tracks: the outputs of each head in both, their distance, and where decisions differ. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.extras import need
from stream_mmrnn.offline.diff.compare import common, decisions, distance, stretches
from stream_mmrnn.offline.diff.tracks import PredictionTrack

_MAX_LINES = 8
_MAX_HEADS = 8


def check(path: Path) -> None:
    """Check that a plot can be made, before anything is computed; raises UsageError."""
    need("a plot", "plots", "matplotlib")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"{path} cannot be a plot; use a name that ends in .png, .svg or .pdf")


def draw(path: Path, a: PredictionTrack, b: PredictionTrack) -> None:
    """One column with two panels per head: both tracks (a solid, b dashed), and the largest distance of each tick.

    Raises:
        FileError: it cannot be written.

    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    i, j = common(a, b)
    names = [n for n in a.heads if n in b.heads and a.heads[n].shape[1] == b.heads[n].shape[1]][:_MAX_HEADS]
    seconds = (a.event_ns[i] - a.event_ns[i][:1]) / 1e9
    figure, axes = plt.subplots(
        2 * len(names) or 1,
        1,
        figsize=(9, 3.6 * len(names) or 2),
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": [3, 1] * len(names) or [1]},
    )
    for k, name in enumerate(names):
        _head((axes[2 * k][0], axes[2 * k + 1][0]), seconds, name, (a, b), (i, j))
    if not names:
        axes[0][0].text(0.5, 0.5, "no head in common", ha="center", va="center")
    axes[-1][0].set_xlabel("seconds from the first common tick")
    figure.suptitle(f"{a.name} (solid) and {b.name} (dashed)", fontsize=10)
    figure.tight_layout()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as e:
        raise FileError(f"the plot {path} cannot be written: {e.strerror}; name another place") from e
    finally:
        plt.close(figure)


def _head(
    panels: tuple[Any, Any],
    seconds: Any,
    name: str,
    tracks: tuple[PredictionTrack, PredictionTrack],
    indices: tuple[Any, Any],
) -> None:
    (upper, lower), (a, b) = panels, tracks
    x, y = a.heads[name][indices[0]], b.heads[name][indices[1]]
    spec = a.specs.get(name) or b.specs.get(name)
    for output in range(min(x.shape[1], _MAX_LINES)):
        label = spec.labels[output] if spec is not None and output < len(spec.labels) else f"{name}[{output}]"
        (line,) = upper.plot(seconds, x[:, output], linewidth=1, label=label)
        upper.plot(seconds, y[:, output], linewidth=1, linestyle="--", color=line.get_color())
    gap, unmeasured = distance(x, y)
    lower.plot(seconds, np.where(unmeasured, np.nan, gap).max(1, initial=0), color="0.3", linewidth=1)
    in_a, in_b = decisions(a.specs.get(name) or spec, x), decisions(b.specs.get(name) or spec, y)
    if in_a is not None and in_b is not None:
        changed = in_a != in_b
        ticks = changed if changed.ndim == 1 else changed.any(1)
        half = float(np.median(np.diff(seconds))) / 2 if len(seconds) > 1 else 0.02
        spans = [(seconds[i] - half, seconds[j] - seconds[i] + 2 * half) for i, j in stretches(ticks)]
        for axes in (upper, lower):
            axes.broken_barh(spans, (0, 1), transform=axes.get_xaxis_transform(), color="tab:red", alpha=0.15, lw=0)
    more = f" (the first {_MAX_LINES} of {x.shape[1]})" if x.shape[1] > _MAX_LINES else ""
    upper.set_title(f"{name}{more}; red: decisions differ", fontsize=9, loc="left")
    upper.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    lower.set_ylabel("|a - b|", fontsize=8)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
