"""Evaluate a model on recorded conversations as a session would serve it: what a user gets, not what a corpus gives.

Two-channel sound goes through the same encoders, recogniser, aligner and engine as live, once from the view of each
person. The head `turn_over` is read in the mutual silences, and compared with rules that an agent would otherwise use.
Knows nothing about training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.encoders.audio import SPEECH
from stream_mmrnn.capture.encoders.speech_detector import CHUNK, MIN_CHUNKS, SILENCE, VOICE, SpeechDetector
from stream_mmrnn.capture.resampler import SoundInput
from stream_mmrnn.core import config
from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.topics import AUDIO_RATE_HZ
from stream_mmrnn.core.types import ModelSpec, Prediction
from stream_mmrnn.offline.predictor import Predictor
from stream_mmrnn.training import metrics
from stream_mmrnn.training.datasets.audio import pcm
from stream_mmrnn.training.tasks.turn_taking import SILENCE_S, decisions, moments

Array = npt.NDArray[Any]
Seconds = npt.NDArray[np.float64]

HEAD = "turn_over"
RULES_S = (0.4, 0.7, 1.0)
"""Silences after which a simple agent takes the turn."""
LONGEST_S = 3.0
"""After this silence every agent takes the turn."""
_BLOCK = 320
_JOIN_CHUNKS = 1
"""A gap as short is none."""


class Conversation(NamedTuple):
    name: str
    sound: tuple[Array, Array]
    """16 kHz of each person, int16."""
    voice: tuple[Seconds, Seconds]
    """When each of them speaks, [K, 2] in seconds."""


class Trace(NamedTuple):
    """One session: what was served for each of its N ticks."""

    at_s: Seconds
    """[N] when the tick ends."""
    turn_over: Array
    quiet: npt.NDArray[np.bool_]
    """The detector hears nobody."""
    turn_end: Array
    """The log-odds of the newest derived end of a turn in this pause; NaN where there is none."""


def read(path: Path) -> Conversation:
    """A WAV file with one person a channel; `NAME.rttm` beside it says who speaks when, else the speech detector does.

    Raises:
        FileError: the file has not two channels, or cannot be read.

    """
    try:
        rate_hz, samples = pcm(str(path), path.read_bytes())
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror}; give a WAV file with one person a channel") from e
    if samples.ndim != 2 or samples.shape[1] != 2:
        raise FileError(f"{path} has one channel, expected two: one person a channel")
    sound = tuple(_at_16_khz(np.ascontiguousarray(samples[:, i]), rate_hz) for i in range(2))
    rttm = path.with_suffix(".rttm")
    voice = _rttm(rttm) if rttm.is_file() else (heard(sound[0]), heard(sound[1]))
    return Conversation(path.stem, (sound[0], sound[1]), voice)


def _at_16_khz(samples: Array, rate_hz: int) -> Array:
    made = SoundInput(0)
    silence = np.zeros(rate_hz // 10, np.int16)  # what the resampler still holds comes out with it
    return np.concatenate([made.feed(samples, rate_hz, None), made.feed(silence, rate_hz, None)])


def heard(sound: Array) -> Seconds:
    """When somebody speaks, by the package's speech detector: [K, 2] seconds. It sees the whole file, so a gap of
    one chunk (32 ms) is closed, and what has less voice than a word is left out.
    """
    speaks, spans = False, list[list[int]]()
    for i, probability in enumerate(SpeechDetector().feed(sound.astype(np.float32) / np.float32(32768))):
        now = bool(probability > (SILENCE if speaks else VOICE))
        if now and spans and i - spans[-1][1] <= _JOIN_CHUNKS:
            spans[-1][1] = i + 1
        elif now:
            spans.append([i, i + 1])
        speaks = now
    long = [span for span in spans if span[1] - span[0] >= MIN_CHUNKS]
    return np.array(long, np.float64).reshape(-1, 2) * CHUNK / AUDIO_RATE_HZ


def _rttm(path: Path) -> tuple[Seconds, Seconds]:
    """`SPEAKER file channel start duration ...` (NIST Rich Transcription); channel 1 or 2."""
    found: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split()
        if not fields or fields[0] != "SPEAKER":
            continue
        try:
            channel, start_s, length_s = int(fields[2]), float(fields[3]), float(fields[4])
            found[{1: 0, 2: 1}[channel]].append((start_s, start_s + length_s))
        except (ValueError, IndexError, KeyError) as e:
            raise FileError(
                f"{path}, line {number}: expected `SPEAKER file channel start duration`, with channel 1 or 2"
            ) from e
    one, other = (np.array(sorted(spans)).reshape(-1, 2) for spans in found)
    return one, other


def serve(model: Path, sound: tuple[Array, Array | None], words: bool) -> Trace:
    """Run a session over the sound of `self` and of the other person (None: one microphone), in blocks of 20 ms."""
    settings = config.Settings()
    if words:
        made_of = {"audio": "push", "text": "speech"}
        if sound[1] is not None:
            made_of |= {f"other_{name}": source for name, source in made_of.items()}
        sources = msgspec.structs.replace(settings.sources, **made_of)
        settings = msgspec.structs.replace(settings, sources=sources)
    names = ("audio", "other_audio")[: 2 if sound[1] is not None else 1]
    predictor = Predictor(str(model), inputs=names, settings=settings)
    made: list[Prediction] = []
    for begin in range(0, len(sound[0]), _BLOCK):
        for name, samples in zip(names, sound, strict=False):
            if samples is not None and len(block := samples[begin : begin + _BLOCK]):
                made += predictor.push_audio(block, (begin + len(block)) / AUDIO_RATE_HZ, stream=name)
    return _trace(predictor.spec, made, [predictor.at_s(p) for p in made])


def _trace(spec: ModelSpec, made: Sequence[Prediction], at_s: Sequence[float]) -> Trace:
    takes = {m.name for m in spec.modalities}
    voices = [name for name in ("audio", "other_audio") if name in takes]
    ends = [name for name in ("turn_end", "other_turn_end") if name in takes]
    quiet = np.ones(len(made), bool)
    turn_end = np.full(len(made), np.nan)
    held = np.nan
    for i, p in enumerate(made):
        tick = p.tick
        quiet[i] = not any(tick.present[v] and tick.features[v][SPEECH] > VOICE for v in voices)
        said = [float(tick.features[e][0]) for e in ends if tick.present[e]]
        held = said[-1] if said else held if quiet[i] else np.nan
        turn_end[i] = held
    return Trace(np.array(at_s), np.array([p.heads[HEAD][0] for p in made]), quiet, turn_end)


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


def at(trace: Trace, values: Array, when_s: float) -> float:
    """What the newest tick says that has ended at this time."""
    place = int(np.searchsorted(trace.at_s, when_s + 1e-9, "right")) - 1
    return float(values[place]) if place >= 0 else float("nan")


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


def _scores(shift: Array, values: Array, threshold: float) -> dict[str, Any]:
    known = np.isfinite(values)
    values = np.where(known, values, 0.0)  # nothing said is no evidence
    found: dict[str, Any] = {"known": int(known.sum()), "auc": metrics.auc(values, shift)}
    if len(values):
        best = metrics.best_threshold(values, shift)
        found["best_balanced_accuracy"] = metrics.balanced_accuracy(values > best, shift)
        found["balanced_accuracy"] = metrics.balanced_accuracy(values > threshold, shift)
    return found


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
    spec = Predictor(str(model)).spec
    head = next((h for h in spec.heads if h.name == HEAD), None)
    if head is None:
        raise UsageError(
            f"the model {spec.name} has no head `{HEAD}`; its heads are {', '.join(h.name for h in spec.heads)}"
        )
    found: list[Silence] = []
    sound_s = 0.0
    for file in files:
        progress(file.name)
        conversation = read(file)
        one, other = conversation.sound
        two = microphones > 1
        traces = tuple(serve(model, (a, b if two else None), words) for a, b in ((one, other), (other, one)))
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
            "name": spec.name,
            "model": str(model),
            "files": [f.name for f in files],
            "sound_s": sound_s,
            "words": words,
            "microphones": microphones,
            "silences": len(found),
            "shifts": int(shift.sum()),
            HEAD: _scores(shift, values(turn_over), head.threshold),
            "turn_end": _scores(shift, values(turn_end), 0.0),
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
