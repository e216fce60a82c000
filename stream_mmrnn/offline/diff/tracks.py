"""Tracks: all predictions of one model over one recording, as arrays. Made again by replay, or read as recorded.

Knows nothing about how two of them compare.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core.dedup import TickDeduplicator
from stream_mmrnn.core.errors import FileError, StreamError, WireError
from stream_mmrnn.core.types import FloatArray, HeadSpec, Prediction, Vectors
from stream_mmrnn.graph.runtime import Provider
from stream_mmrnn.offline.replay import replay
from stream_mmrnn.predict.engine import check_model
from stream_mmrnn.recording.mcap_file import Recording

Times = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PredictionTrack:
    """T predictions, one a tick, in the order of event time."""

    name: str
    """What a person calls it: the model as it was named, or "recorded"."""
    sha256: str
    """Of the model."""
    ticks: Times
    """[T]"""
    event_ns: Times
    """[T] the ticks' ends."""
    heads: dict[str, FloatArray]
    """By name, [T, size]."""
    specs: dict[str, HeadSpec]
    """By head; empty where nobody says what the numbers mean."""
    damage: str = ""
    """Why the recording was not read to its end."""
    notes: tuple[str, ...] = ()
    """What one should know before believing the numbers, a sentence each."""


class _Gathered:
    """Predictions one by one, as a track in the end."""

    def __init__(self) -> None:
        self._ticks: list[int] = []
        self._event_ns: list[int] = []
        self._heads: list[Vectors] = []
        self._deduplicator = TickDeduplicator()

    def add(self, tick: int, event_ns: int, heads: Vectors) -> None:
        if self._deduplicator.first("", tick):
            self._ticks.append(tick)
            self._event_ns.append(event_ns)
            self._heads.append(heads)

    def track(
        self, name: str, sha256: str, specs: dict[str, HeadSpec], damage: str, notes: tuple[str, ...]
    ) -> PredictionTrack:
        event_ns = np.array(self._event_ns, np.int64)
        _, order = np.unique(event_ns, return_index=True)
        names = self._heads[0] if self._heads else {}
        for heads in self._heads:
            if heads.keys() != names.keys() or any(len(heads[n]) != len(names[n]) for n in names):
                raise FileError(f"{name}: the predictions do not all have the same heads, so nothing can be compared")
        stacked = {n: np.stack([self._heads[i][n] for i in order]).astype(np.float32) for n in names}
        return PredictionTrack(
            name, sha256, np.array(self._ticks, np.int64)[order], event_ns[order], stacked, specs, damage, notes
        )


def predicted(
    path: Path,
    model: str,
    provider: Provider,
    see: Callable[[], None] = lambda: None,
    alive: Callable[[], bool] = lambda: True,
) -> PredictionTrack:
    """What a model says over the recorded features; `see` is called once a prediction.

    Raises:
        UsageError: the file or the model is not there, or not what it should be.
        FileError: there are no ticks in the recording.

    """
    spec = check_model(config.find_model(model), provider)
    gathered = _Gathered()

    def keep(prediction: Prediction) -> None:
        gathered.add(prediction.tick.index, prediction.tick.event_ns, prediction.heads)
        see()

    result = replay(path, model=model, provider=provider, see=keep, alive=alive)
    if not result["ticks"]:
        raise FileError(f"{path} holds no ticks; was anything recorded?")
    unfed = [name for name, s in result["streams"].items() if not s["delivered"] and s["dropped"].get("quarantined")]
    notes = [
        f"{model} was not fed {name}: the recorded features are another encoder's or of another size" for name in unfed
    ]
    return gathered.track(model, spec.sha256, {h.name: h for h in spec.heads}, result["damage"], tuple(notes))


def recorded(path: Path) -> PredictionTrack:
    """What was predicted when it was recorded.

    Raises:
        FileError: no recording, or one without predictions.

    """
    recording = Recording(path)
    gathered, sha256, unreadable = _Gathered(), "", 0
    for envelope in recording.envelopes({topics.PREDICTION}):
        try:
            p = wire.unpack(envelope.payload, wire.PredictionMessage)
        except WireError:
            unreadable += 1
            continue
        sha256 = p.model
        heads = {n: np.array([np.nan if v is None else v for v in values], np.float32) for n, values in p.heads.items()}
        gathered.add(p.tick, p.event_ns, heads)
    if not sha256:
        raise FileError(f"{path} holds no predictions; it was made by `record`, or cut off early: give --model twice")
    notes = (f"{unreadable} recorded predictions cannot be read",) if unreadable else ()
    return gathered.track("recorded", sha256, _specs(recording, sha256), recording.damage, notes)


class _Spec(msgspec.Struct, frozen=True):
    sha256: str = ""
    heads: tuple[HeadSpec, ...] = ()


class _Detail(msgspec.Struct, frozen=True):
    spec: _Spec = _Spec()


class _Status(msgspec.Struct, frozen=True):
    detail: _Detail = _Detail()


def _specs(recording: Recording, sha256: str) -> dict[str, HeadSpec]:
    """What the recorded heads mean: as the engine said to the recorder, or as the same model file says."""
    try:
        statuses = msgspec.json.decode(recording.end.get("statuses", "{}"), type=dict[str, msgspec.Raw])
        said = msgspec.json.decode(statuses["status/engine"], type=_Status).detail.spec
        if said.sha256 == sha256:
            return {h.name: h for h in said.heads}
    except (msgspec.MsgspecError, KeyError, ValueError, RecursionError):
        pass
    try:
        spec = check_model(config.find_model(recording.metadata.get("model", "")), "cpu")
    except StreamError:  # a file that is gone is no fault of the recording
        return {}
    return {h.name: h for h in spec.heads} if spec.sha256 == sha256 else {}
