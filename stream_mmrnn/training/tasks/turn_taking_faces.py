"""Clips of faces for the late fusion of `turn_taking`: does what the camera sees tell that speech begins soon?

A clip has one sentence. Its ticks count until the speech detector hears it, and the target is what the detector hears
afterwards, as in a live session; so the time that the detector needs is in it. Knows nothing about the other data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stream_mmrnn.capture.encoders.audio import SPEECH, AudioEncoder
from stream_mmrnn.capture.encoders.face import FaceEncoder
from stream_mmrnn.capture.encoders.speech_detector import VOICE
from stream_mmrnn.core.types import FloatArray, HeadSpec, ModalitySpec, Tick
from stream_mmrnn.predict.columns import MAX_AGE_S
from stream_mmrnn.training.data import Array, Ticks
from stream_mmrnn.training.datasets import grid
from stream_mmrnn.training.recipe import HeadRecipe, Recipe

_HELD_OUT = 5
"""Every fifth clip is held out, to stop the fit in time."""
_FIRST = 4
"""Ticks of a clip before which a movement of the mouth cannot be seen."""


def modalities() -> tuple[ModalitySpec, ModalitySpec]:
    """What is taken of a clip."""
    return (
        ModalitySpec("vision", FaceEncoder.size, FaceEncoder().origin),
        ModalitySpec("audio", AudioEncoder.size, AudioEncoder().origin),
    )


def sequences(recipe: Recipe, place: Path) -> tuple[list[Ticks], list[Ticks]]:
    """The clips of a folder as sequences: to fit on, and held out.

    Raises:
        FileError: there is no clip, or one cannot be read.

    """
    taken = modalities()
    found = [
        _sequence(recipe, taken, clip.stem, grid.ticks_of(clip, taken, recipe.tick_ns)) for clip in grid.clips(place)
    ]
    return [s for i, s in enumerate(found) if i % _HELD_OUT], found[::_HELD_OUT]


def _sequence(recipe: Recipe, taken: Sequence[ModalitySpec], name: str, ticks: list[Tick]) -> Ticks:
    names = list(recipe.modalities)
    present = np.zeros((len(ticks), len(names)), np.float32)
    age_s = np.full((len(ticks), len(names)), MAX_AGE_S, np.float32)
    features: dict[str, FloatArray] = {}
    for m in taken:
        if m.name in names:
            i = names.index(m.name)
            features[m.name] = np.stack([t.features[m.name] for t in ticks])
            present[:, i] = [t.present[m.name] for t in ticks]
            ages = np.array([t.age_ns[m.name] for t in ticks]) / 1e9
            age_s[:, i] = np.where(ages < 0, MAX_AGE_S, np.minimum(ages, MAX_AGE_S))
    heard = np.array([t.present["audio"] and t.features["audio"][SPEECH] > VOICE for t in ticks])
    targets: dict[str, Array] = {}
    weights: dict[str, FloatArray] = {}
    for head in recipe.heads:
        targets[head.name] = np.zeros((len(ticks), head.size) if head.size > 1 else len(ticks), np.float32)
        weights[head.name] = np.zeros(len(ticks), np.float32)
        if head.kind == "activity_projection":
            targets[head.name] = own_voice(head, heard, recipe.tick_ns / 1e9)
            weights[head.name][before_speech(heard)] = 1
    return Ticks(features, present, age_s, targets, weights, name)


def before_speech(heard: Array) -> slice:
    """The ticks that count of a clip, by whether the detector hears speech in each."""
    return slice(_FIRST, int(np.argmax(heard)) if heard.any() else 0)


def own_voice(head: HeadRecipe | HeadSpec, heard: Array, tick_s: float) -> FloatArray:
    """The target of each number for `self`: is there speech in at least half of the interval? 0 for `other`."""
    said = np.concatenate([[0], np.cumsum(heard)])
    at = np.arange(1, len(said))
    target = np.zeros((len(at), head.size), np.float32)
    for j, (begin, end) in enumerate(head.horizons_s[: head.size // 2]):
        first, last = (np.minimum(at + round(s / tick_s), len(said) - 1) for s in (begin, end))
        target[:, j] = said[last] - said[first] >= 0.5 * (end - begin) / tick_s
    return target
