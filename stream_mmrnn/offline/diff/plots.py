"""Plot two tracks: the outputs of each head in both, their distance, where decisions differ, and all that once more for
the seconds that differ most. Needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stream_mmrnn.core.durations import spoken
from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.extras import need
from stream_mmrnn.core.types import FloatArray, HeadSpec
from stream_mmrnn.offline.diff.compare import Bools, Numbers, common, decisions, distance, stretches
from stream_mmrnn.offline.diff.tracks import PredictionTrack

_MAX_LINES = 8
_MAX_HEADS = 8
ZOOM_TICKS = 100
"""Length of the part that is drawn once more: 4 s in ticks of 40 ms."""


def check(path: Path) -> None:
    """Check that a plot can be made, before anything is computed; raises UsageError."""
    need("a plot", "plots", "matplotlib")
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"{path} cannot be a plot; use a name that ends in .png, .svg or .pdf")


class _HeadTracks(NamedTuple):
    """One head of both tracks on their T common ticks."""

    spec: HeadSpec
    seconds: Numbers
    """[T] from the first common tick."""
    a: FloatArray
    b: FloatArray
    """[T, size]"""
    gap: Numbers
    """[T] the largest distance of its numbers; NaN where one of them is not finite."""
    changed: Bools
    """[T] where decisions differ; all False for a head without decisions."""

    @property
    def worst(self) -> slice:
        """The ticks that differ most on the whole; empty if none differ or the track is not longer anyway."""
        found = np.where(np.isnan(self.gap), np.inf, self.gap)
        most = found[np.isfinite(found)].max(initial=0)
        found = np.where(np.isinf(found), most or 1, found)
        if len(found) <= ZOOM_TICKS or not found.any():
            return slice(0, 0)
        total = np.concatenate([[0], np.cumsum(found)])
        first = int(np.argmax(total[ZOOM_TICKS:] - total[:-ZOOM_TICKS]))
        return slice(first, first + ZOOM_TICKS)

    @property
    def verdict(self) -> str:
        """How different the tracks are, in words."""
        differs = np.isnan(self.gap) | (self.gap > 0)
        if not differs.any():
            return "the same in both"
        most = self.gap[np.isfinite(self.gap)].max(initial=0)
        words = f"{differs.sum()} of {len(differs)} ticks differ, by up to {most:.3g}"
        return f"{words}; decisions differ on {self.changed.sum()} (red)" if self.changed.any() else words


def draw(path: Path, a: PredictionTrack, b: PredictionTrack) -> None:
    """Two panels per head: both tracks (a solid, b dashed), and the largest distance of each tick. On the right are the
    ticks that differ most.

    Raises:
        FileError: it cannot be written.

    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    heads = _heads(a, b)
    zooms = any(head.worst.stop for head in heads)
    figure, axes = plt.subplots(
        2 * len(heads) or 1,
        2 if zooms else 1,
        figsize=(14 if zooms else 9, 3.8 * len(heads) or 2),
        squeeze=False,
        gridspec_kw={"height_ratios": [3, 1] * len(heads) or [1]},
        layout="constrained",
    )
    for k, head in enumerate(heads):
        rows = axes[2 * k : 2 * k + 2]
        _panels(rows[:, 0], head, slice(0, len(head.seconds)))
        rows[0, 0].set_title(f"{head.spec.name}: {head.verdict}", fontsize=9, loc="left")
        if head.worst.stop:
            _panels(rows[:, 1], head, head.worst)
            begin_s, end_s = head.seconds[head.worst][[0, -1]]
            title = f"the {spoken(end_s - begin_s)} that differ most, from {begin_s:.1f} s on"
            rows[0, 1].set_title(title, fontsize=9, loc="left")
            for each in rows[:, 0]:
                each.axvspan(begin_s, end_s, color="0.5", alpha=0.12, lw=0)
        elif zooms:
            for each in rows[:, 1]:
                each.set_visible(False)
        rows[0, 1 if head.worst.stop else 0].legend(
            frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1.0)
        )
    if not heads:
        axes[0][0].text(0.5, 0.5, "no head in common", ha="center", va="center")
    figure.suptitle(
        f"What {a.name} (solid) and {b.name} (dashed) predict on the same recording", fontsize=11, wrap=True
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as e:
        raise FileError(f"the plot {path} cannot be written: {e.strerror}; name another place") from e
    finally:
        plt.close(figure)


def _heads(a: PredictionTrack, b: PredictionTrack) -> list[_HeadTracks]:
    """The heads that both have."""
    i, j = common(a, b)
    seconds = (a.event_ns[i] - a.event_ns[i][:1]) / 1e9
    found = []
    for name in [n for n in a.heads if n in b.heads and a.heads[n].shape[1] == b.heads[n].shape[1]][:_MAX_HEADS]:
        x, y = a.heads[name][i], b.heads[name][j]
        spec = a.specs.get(name) or b.specs.get(name)
        gap, unmeasured = distance(x, y)
        largest = np.where(unmeasured.any(1), np.nan, gap.max(1, initial=0))
        in_a, in_b = decisions(a.specs.get(name) or spec, x), decisions(b.specs.get(name) or spec, y)
        changed = np.zeros(len(x), np.bool_)
        if in_a is not None and in_b is not None:
            changed = (in_a != in_b).reshape(len(x), -1).any(1)
        found.append(_HeadTracks(spec or HeadSpec(name, "", x.shape[1], unit=""), seconds, x, y, largest, changed))
    return found


def _panels(panels: Any, head: _HeadTracks, part: slice) -> None:
    """Draw some ticks of a head: its numbers above, the distance below."""
    upper, lower = panels
    spec, seconds = head.spec, head.seconds[part]
    for output in range(min(head.a.shape[1], _MAX_LINES)):
        label = spec.name if spec.size == 1 else f"{spec.name}[{output}]"
        label = spec.labels[output] if output < len(spec.labels) else label
        (line,) = upper.plot(seconds, head.a[part, output], linewidth=1, label=label)
        upper.plot(seconds, head.b[part, output], linewidth=1, linestyle="--", color=line.get_color())
    lower.plot(seconds, head.gap[part], color="0.3", linewidth=1)
    lower.set_ylim(bottom=0)
    half = float(np.median(np.diff(seconds))) / 2 if len(seconds) > 1 else 0.02
    spans = [(seconds[i] - half, seconds[j] - seconds[i] + 2 * half) for i, j in stretches(head.changed[part])]
    more = f" (the first {_MAX_LINES} of {spec.size})" if spec.size > _MAX_LINES else ""
    upper.set_ylabel(f"{spec.unit or 'output'}{more}", fontsize=8)
    lower.set_ylabel("largest\ndifference", fontsize=8)
    lower.set_xlabel("seconds from the first common tick", fontsize=8)
    upper.tick_params(labelbottom=False)
    for axes in (upper, lower):
        axes.broken_barh(spans, (0, 1), transform=axes.get_xaxis_transform(), color="tab:red", alpha=0.15, lw=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        if len(seconds) > 1:
            axes.set_xlim(seconds[0], seconds[-1])
