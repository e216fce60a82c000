"""The table of topics and modalities: bus, recorder, aligner and views read it, nobody repeats it.

Knows nothing about sockets, files or models.
"""

from __future__ import annotations

from typing import Literal

import msgspec

CLOCK = "clock"
"""Ticks of time, from the clock process: the only clock the aligner has."""
SESSION = "session"
"""`open` and `close` of a session: part of the sequence, so that a replay begins and ends alike."""
TICK = "tick"
PREDICTION = "prediction"
LABEL = "label"
"""What a person says is true from now on, typed as `/label NAME`: for training, never seen by a model."""
STATUS = "status/"
"""Counters and state of each process, about twice a second; not part of a session."""
CONTROL = "control"
"""The supervisor's word to the processes."""

EVERYONE = "host"
"""The session of messages that belong to none: the clock's, status."""

AUDIO_RATE_HZ = 16_000
"""Of all sound on the bus: mono, int16."""

RAW = "raw/"
FEATURE = "feature/"


class Modality(msgspec.Struct, frozen=True):
    """How a kind of input behaves in time."""

    name: str
    dense: bool
    """A dense stream holds the watermark back; a sparse one (text) comes when it comes."""
    reduction: Literal["last", "mean", "sum"]
    """How the samples of one tick become one vector."""


MODALITIES: dict[str, Modality] = {
    m.name: m
    for m in (
        Modality("vision", dense=True, reduction="last"),
        Modality("audio", dense=True, reduction="mean"),
        Modality("text", dense=False, reduction="sum"),
        Modality("signal", dense=True, reduction="mean"),
    )
}


class Topic(msgspec.Struct, frozen=True):
    """One row of the table."""

    name: str
    modality: str = ""
    recorded: bool = True
    schema: str = ""
    """What it is called in a recording."""


TOPICS: dict[str, Topic] = {
    t.name: t
    for t in (
        Topic(RAW + "vision", "vision", schema="foxglove.CompressedImage"),
        Topic(RAW + "audio", "audio", schema="foxglove.RawAudio"),
        Topic(RAW + "text", "text", schema="foxglove.Log"),
        Topic(FEATURE + "vision", "vision", schema="stream_mmrnn.Features"),
        Topic(FEATURE + "audio", "audio", schema="stream_mmrnn.Features"),
        Topic(FEATURE + "text", "text", schema="stream_mmrnn.Features"),
        Topic(FEATURE + "signal", "signal", schema="stream_mmrnn.Features"),
        Topic(LABEL, schema="foxglove.Log"),
        Topic(CLOCK, schema="stream_mmrnn.Clock"),
        Topic(SESSION, schema="stream_mmrnn.Session"),
        Topic(TICK, schema="stream_mmrnn.Tick"),
        Topic(PREDICTION, schema="stream_mmrnn.Prediction"),
        Topic(CONTROL, recorded=False),
    )
}


def raw(modality: str) -> str:
    return RAW + modality


def feature(modality: str) -> str:
    return FEATURE + modality
