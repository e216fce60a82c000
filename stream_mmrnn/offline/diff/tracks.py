"""Tracks: all predictions of one model over one recording, as arrays; computed by a replay, or read as recorded."""

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
    """T predictions, one per tick, in the order of event time."""

    name: str
    """The model's name as the user gave it, or "recorded"."""
    sha256: str
    """Of the model."""
    ticks: Times
    """[T]"""
    event_ns: Times
    """[T] end of each tick."""
    heads: dict[str, FloatArray]
    """By name, [T, size]."""
    specs: dict[str, HeadSpec]
    """By head; empty if they are not known."""
    damage: str = ""
    """Why the recording was not read to its end."""
    notes: tuple[str, ...] = ()
    """Warnings about the numbers, one sentence each."""


class _TrackBuilder:
    """Collects predictions and makes a track of them."""

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

    def build(
        self, name: str, sha256: str, specs: dict[str, HeadSpec], damage: str, notes: tuple[str, ...]
    ) -> PredictionTrack:
        event_ns = np.array(self._event_ns, np.int64)
        _, order = np.unique(event_ns, return_index=True)
        names = self._heads[0] if self._heads else {}
        for heads in self._heads:
            if heads.keys() != names.keys() or any(len(heads[n]) != len(names[n]) for n in names):
                raise FileError(f"{name}: the predictions do not all have the same heads and cannot be compared")
        stacked = {n: np.stack([self._heads[i][n] for i in order]).astype(np.float32) for n in names}
        return PredictionTrack(
            name, sha256, np.array(self._ticks, np.int64)[order], event_ns[order], stacked, specs, damage, notes
        )


def predicted(
    path: Path,
    model: str,
    provider: Provider,
    on_prediction: Callable[[], None] = lambda: None,
    alive: Callable[[], bool] = lambda: True,
) -> PredictionTrack:
    """A model's predictions over the recorded features; `on_prediction` is called after each.

    Raises:
        UsageError: the file or the model is missing or invalid.
        FileError: the recording has no ticks.

    """
    spec = check_model(config.find_model(model), provider)
    builder = _TrackBuilder()

    def add(prediction: Prediction) -> None:
        builder.add(prediction.tick.index, prediction.tick.event_ns, prediction.heads)
        on_prediction()

    result = replay(path, model=model, provider=provider, on_prediction=add, alive=alive)
    if not result["ticks"]:
        raise FileError(f"{path} holds no ticks; was anything recorded?")
    unfed = [name for name, s in result["streams"].items() if not s["delivered"] and s["dropped"].get("quarantined")]
    notes = [
        f"{model} got no {name}: the recorded features are from another encoder or of another size" for name in unfed
    ]
    return builder.build(model, spec.sha256, {h.name: h for h in spec.heads}, result["damage"], tuple(notes))


def recorded(path: Path) -> PredictionTrack:
    """The recorded predictions.

    Raises:
        FileError: it is no recording, or one without predictions.

    """
    recording = Recording(path)
    builder, sha256, unreadable = _TrackBuilder(), "", 0
    for envelope in recording.envelopes({topics.PREDICTION}):
        try:
            p = wire.unpack(envelope.payload, wire.PredictionMessage)
        except WireError:
            unreadable += 1
            continue
        sha256 = p.model
        heads = {n: np.array([np.nan if v is None else v for v in values], np.float32) for n, values in p.heads.items()}
        builder.add(p.tick, p.event_ns, heads)
    if not sha256:
        raise FileError(f"{path} holds no predictions; it was made by `record`, or cut off early: give --model twice")
    notes = (f"{unreadable} recorded predictions cannot be read",) if unreadable else ()
    return builder.build("recorded", sha256, _specs(recording, sha256), recording.damage, notes)


class _Spec(msgspec.Struct, frozen=True):
    sha256: str = ""
    heads: tuple[HeadSpec, ...] = ()


class _Detail(msgspec.Struct, frozen=True):
    spec: _Spec = _Spec()


class _Status(msgspec.Struct, frozen=True):
    detail: _Detail = _Detail()


def _specs(recording: Recording, sha256: str) -> dict[str, HeadSpec]:
    """The specs of the recorded heads: from the engine's recorded status, or from the same model file."""
    try:
        statuses = msgspec.json.decode(recording.end.get("statuses", "{}"), type=dict[str, msgspec.Raw])
        recorded_spec = msgspec.json.decode(statuses["status/engine"], type=_Status).detail.spec
        if recorded_spec.sha256 == sha256:
            return {h.name: h for h in recorded_spec.heads}
    except (msgspec.MsgspecError, KeyError, ValueError, RecursionError):
        pass
    try:
        spec = check_model(config.find_model(recording.metadata.get("model", "")), "cpu")
    except StreamError:  # the model file may have been removed since
        return {}
    return {h.name: h for h in spec.heads} if spec.sha256 == sha256 else {}
