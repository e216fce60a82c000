"""A model as a session serves it, over sound of files: encoders, recogniser, what is derived, aligner and engine.

Knows nothing about files and about what is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.encoders.audio import SPEECH
from stream_mmrnn.capture.encoders.speech_detector import VOICE
from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.topics import AUDIO_RATE_HZ
from stream_mmrnn.core.types import HeadSpec, ModelSpec, Prediction
from stream_mmrnn.offline.predictor import Predictor
from stream_mmrnn.predict.engine import check_model
from stream_mmrnn.training import metrics

Array = npt.NDArray[Any]
Seconds = npt.NDArray[np.float64]

HEAD = "turn_over"
_BLOCK = 320


class Trace(NamedTuple):
    """One session: what was served for each of its N ticks."""

    at_s: Seconds
    """[N] when the tick ends."""
    turn_over: Array
    quiet: npt.NDArray[np.bool_]
    """The detector hears nobody."""
    turn_end: Array
    """The log-odds of the newest derived end of a turn in this pause; NaN where there is none."""


class Served:
    """One session after the other of a model with the head `turn_over`, each over the sound of a file."""

    def __init__(self, model: Path, *, microphones: int, words: bool) -> None:
        """`microphones`: with 2, the session hears the other person, too. `words`: by the recogniser.

        Raises:
            UsageError: the model has no head `turn_over`.

        """
        spec = check_model(model, "cpu")
        self.name = spec.name
        heads = {head.name: head for head in spec.heads}
        if HEAD not in heads:
            raise UsageError(f"the model {spec.name} has no head `{HEAD}`; its heads are {', '.join(heads)}")
        self.head: HeadSpec = heads[HEAD]
        settings = Settings()
        self._names = ("audio", "other_audio")[:microphones]
        if words:
            made_of = {"audio": "push", "text": "speech"}
            if microphones > 1:
                made_of |= {f"other_{name}": source for name, source in made_of.items()}
            sources = msgspec.structs.replace(settings.sources, **made_of)
            settings = msgspec.structs.replace(settings, sources=sources)
        self._predictor = Predictor(str(model), inputs=self._names, settings=settings)

    def trace(self, *sound: Array) -> Trace:
        """A session from 0 s over the sound (16 kHz, int16) of each microphone, in blocks of 20 ms."""
        predictor = self._predictor
        predictor.reset()
        made: list[Prediction] = []
        for begin in range(0, len(sound[0]), _BLOCK):
            for name, samples in zip(self._names, sound, strict=True):
                if len(block := samples[begin : begin + _BLOCK]):
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


def at(trace: Trace, values: Array, when_s: float) -> float:
    """What the newest tick says that has ended at this time."""
    place = int(np.searchsorted(trace.at_s, when_s + 1e-9, "right")) - 1
    return float(values[place]) if place >= 0 else float("nan")


def scores(true: Array, values: Array, threshold: float) -> dict[str, Any]:
    """Of values at which something is `true` or not; NaN: nothing was said, which is no evidence."""
    known = np.isfinite(values)
    values = np.where(known, values, 0.0)
    found: dict[str, Any] = {"known": int(known.sum()), "auc": metrics.auc(values, true)}
    if len(values):
        best = metrics.best_threshold(values, true)
        found["best_balanced_accuracy"] = metrics.balanced_accuracy(values > best, true)
        found["balanced_accuracy"] = metrics.balanced_accuracy(values > threshold, true)
    return found
