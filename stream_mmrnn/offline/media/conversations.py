"""Conversations of two people as served: what a user gets, not what a corpus gives.

The head `turn_over` is read in the mutual silences, once from the view of each person, and compared with rules that an
agent would otherwise use. Knows nothing about training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.topics import AUDIO_RATE_HZ
from stream_mmrnn.offline.media.served import HEAD, Array, Served, Trace, at, scores
from stream_mmrnn.offline.media.sound import Conversation, read
from stream_mmrnn.training import metrics
from stream_mmrnn.training.tasks.turn_taking import SILENCE_S, decisions, moments

RULES_S = (0.4, 0.7, 1.0)
"""Silences after which a simple agent takes the turn."""
LONGEST_S = 3.0
"""After this silence every agent takes the turn."""


class Silence(NamedTuple):
    """A mutual silence of at least `SILENCE_S`, as the session of its holder saw it."""

    begin_s: float
    end_s: float
    shift: bool
    """The other one speaks next."""
    trace: Trace
    """Of the person who spoke last."""
    facing: Trace | None
    """Of the other person; None with one microphone."""


def silences(conversation: Conversation, traces: tuple[Trace, Trace], two: bool) -> list[Silence]:
    voice = conversation.voice
    at = decisions(*voice)
    now = moments(*voice, at)
    starts = np.sort(np.concatenate([voice[0][:, 0], voice[1][:, 0]]))
    found = []
    for when, shift in zip(at[now.known & now.silent], now.shift[now.known & now.silent], strict=True):
        last = [v[v[:, 1] <= when, 1].max(initial=-1.0) for v in voice]
        holder = int(last[1] > last[0])
        until = float(starts[np.searchsorted(starts, when, "right")])
        facing = traces[1 - holder] if two else None
        found.append(Silence(float(when) - SILENCE_S, until, bool(shift), traces[holder], facing))
    return found


def fired(silence: Silence, values: Array, threshold: float) -> float:
    """Seconds into the silence at which an agent takes the turn that waits for a value above the threshold while
    nobody is heard; `LONGEST_S` if it does not in this silence.
    """
    trace = silence.trace
    here = (trace.at_s > silence.begin_s) & (trace.at_s <= silence.end_s) & trace.quiet
    with np.errstate(invalid="ignore"):
        places = np.flatnonzero(here & (values > threshold))
    return float(trace.at_s[places[0]] - silence.begin_s) if len(places) else LONGEST_S


def outcome(found: Sequence[Silence], delays_s: Sequence[float]) -> dict[str, float]:
    """The share of holds that were cut into, and the median delay in the shifts."""
    holds = [d < s.end_s - s.begin_s for s, d in zip(found, delays_s, strict=True) if not s.shift]
    shifts = [d for s, d in zip(found, delays_s, strict=True) if s.shift]
    return {
        "cut_in": float(np.mean(holds)) if holds else float("nan"),
        "delay_p50_s": float(np.median(shifts)) if shifts else float("nan"),
    }


def curve(found: Sequence[Silence], which: Callable[[Trace], Array]) -> list[dict[str, float]]:
    """The outcome for each threshold that differs."""
    values = np.concatenate([which(s.trace)[s.trace.quiet] for s in found]) if found else np.zeros(0)
    values = values[np.isfinite(values)]
    marks = np.unique(np.quantile(values, np.linspace(0, 1, 41))) if len(values) else np.zeros(0)
    return [
        {"threshold": float(m), **outcome(found, [fired(s, which(s.trace), m) for s in found])}
        for m in [-np.inf, *marks]
    ]


def _least(points: Sequence[dict[str, float]], delay_s: float) -> float:
    """The smallest share of cut-ins with at most this median delay."""
    return min((p["cut_in"] for p in points if p["delay_p50_s"] <= delay_s + 1e-9), default=float("nan"))


def evaluate(
    model: Path,
    media: Sequence[Path],
    *,
    words: bool = True,
    microphones: int = 2,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The figures of a model on conversations.

    `words`: the recogniser hears both (extra `speech`). `microphones`: with 1, each session hears its own person only.

    Raises:
        UsageError: there is no WAV file, or the model has no head `turn_over`.
        FileError: a file cannot be read, or has not two channels.

    """
    files = sorted(f for path in media for f in (path.glob("*.wav") if path.is_dir() else [path]))
    if not files:
        raise UsageError(
            f"{', '.join(map(str, media))} holds no WAV file; give two-channel recordings of conversations"
        )
    two = microphones > 1
    served = Served(model, microphones=microphones, words=words)
    found: list[Silence] = []
    sound_s = 0.0
    for file in files:
        progress(file.name)
        conversation = read(file)
        one, other = conversation.sound
        traces = tuple(served.trace(*((a, b) if two else (a,))) for a, b in ((one, other), (other, one)))
        found += silences(conversation, (traces[0], traces[1]), two)
        sound_s += len(one) / AUDIO_RATE_HZ
    shift = np.array([s.shift for s in found], bool)

    def values(which: Callable[[Trace], Array]) -> Array:
        """At the time of the decision, the mean over the sessions that there are."""
        rows = [
            np.mean([at(t, which(t), s.begin_s + SILENCE_S) for t in (s.trace, s.facing) if t is not None])
            for s in found
        ]
        return np.array(rows, np.float64)

    def turn_over(t: Trace) -> Array:
        return t.turn_over

    def turn_end(t: Trace) -> Array:
        return t.turn_end

    curves = {HEAD: curve(found, turn_over), "turn_end": curve(found, turn_end)}
    rules = {f"silence_{round(s * 1000)}_ms": outcome(found, [s] * len(found)) for s in RULES_S}
    document: dict[str, Any] = metrics.clean(
        {
            "name": served.name,
            "model": str(model),
            "files": [f.name for f in files],
            "sound_s": sound_s,
            "words": words,
            "microphones": microphones,
            "silences": len(found),
            "shifts": int(shift.sum()),
            HEAD: scores(shift, values(turn_over), served.head.threshold),
            "turn_end": scores(shift, values(turn_end), 0.0),
            "rules": rules,
            "cut_in_at_700_ms": {
                "silence": rules["silence_700_ms"]["cut_in"],
                **{name: _least(points, 0.7) for name, points in curves.items()},
            },
            "curves": curves,
        }
    )
    return document


def plot(document: dict[str, Any], path: Path) -> None:
    """Draw the curves: cut-ins against the delay."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 4))
    for name, label in ((HEAD, document["name"]), ("turn_end", "smart-turn alone")):
        points = sorted(
            (p["delay_p50_s"], p["cut_in"])
            for p in document["curves"][name]
            if None not in (p["delay_p50_s"], p["cut_in"])
        )
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker=".")
    for name, rule in document["rules"].items():
        if rule["cut_in"] is not None:
            axes.plot(rule["delay_p50_s"], rule["cut_in"], "kx")
            axes.annotate(name.replace("_", " "), (rule["delay_p50_s"], rule["cut_in"]), fontsize=8)
    axes.set(
        xlabel="median delay in shifts, s",
        ylabel="share of holds cut into",
        title=f"{document['silences']} silences of {len(document['files'])} conversations",
        xlim=(0, 1.5),
        ylim=(-0.02, 1.02),
    )
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
