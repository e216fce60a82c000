"""The table of topics and modalities, which bus, recorder, aligner and viewers read."""

from __future__ import annotations

from typing import Literal

import msgspec

CLOCK = "clock"
"""Ticks of time, from the clock process: the only clock the aligner has."""
SESSION = "session"
"""`open` and `close` of a session: part of the sequence, so that a replay begins and ends alike."""
TICK = "tick"
"""Only in recordings up to 0.1.0; a prediction carries its tick."""
PREDICTION = "prediction"
LABEL = "label"
"""What a person says is true from now on, typed as `/label NAME`: for training, never seen by a model."""
TYPED = "typed"
"""Lines typed on the page, on their way to the text worker, which makes text events or labels of them."""
STATUS = "status/"
"""Counters and state of each process, about twice a second; not part of a session."""
CONTROL = "control"
"""The supervisor's word to the processes."""

EVERYONE = "host"
"""The session of messages that belong to none: the clock's, status."""

SESSION_NAME = r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"
"""What a session may be called: so it can be part of a file's name, and leads out of no folder."""

AUDIO_RATE_HZ = 16_000
"""Of all sound on the bus: mono, int16."""

RAW = "raw/"
FEATURE = "feature/"


Kind = Literal["vision", "audio", "text", "signal"]


class Modality(msgspec.Struct, frozen=True):
    """One input, and how it behaves in time."""

    name: str
    kind: Kind
    """What it is made of: sources, encoder, queue and lateness are the kind's, for any person."""
    dense: bool
    """A dense stream holds the watermark back; a sparse one (text) comes when it comes."""
    reduction: Literal["last", "mean", "sum"]
    """How the samples of one tick become one vector."""
    schema: str = ""
    """What its raw messages are called in a recording; "" where it has none, only features."""
    other: bool = False
    """Of the second person, a voice agent or the other party of a call, not of the one that a session is about."""


_AUDIO = Modality("audio", "audio", dense=True, reduction="mean", schema="foxglove.RawAudio")
_TEXT = Modality("text", "text", dense=False, reduction="sum", schema="foxglove.Log")

MODALITIES: dict[str, Modality] = {
    m.name: m
    for m in (
        Modality("vision", "vision", dense=True, reduction="last", schema="foxglove.CompressedImage"),
        _AUDIO,
        _TEXT,
        msgspec.structs.replace(_AUDIO, name="other_audio", other=True),
        msgspec.structs.replace(_TEXT, name="other_text", other=True),
        Modality("signal", "signal", dense=True, reduction="mean"),
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
        *(Topic(RAW + m.name, m.name, schema=m.schema) for m in MODALITIES.values() if m.schema),
        *(Topic(FEATURE + m.name, m.name, schema="stream_mmrnn.Features") for m in MODALITIES.values()),
        Topic(LABEL, schema="foxglove.Log"),
        Topic(CLOCK, schema="stream_mmrnn.Clock"),
        Topic(SESSION, schema="stream_mmrnn.Session"),
        Topic(TICK, schema="stream_mmrnn.Tick"),
        Topic(PREDICTION, schema="stream_mmrnn.Prediction"),
        Topic(CONTROL, recorded=False),
        Topic(TYPED, recorded=False),
    )
}


def kind_of(topic: str) -> Kind | None:
    """The kind of the modality that a topic belongs to; None where it belongs to none."""
    row = TOPICS.get(topic)
    return MODALITIES[row.modality].kind if row and row.modality else None


def raw(modality: str) -> str:
    return RAW + modality


def raws(kind: Kind) -> list[str]:
    """The raw topics of a kind, of every person."""
    return [raw(m.name) for m in MODALITIES.values() if m.kind == kind and m.schema]


def feature(modality: str) -> str:
    return FEATURE + modality


def counted_as(topic: str) -> str:
    """Under which name a message is counted: all statuses are one, because what follows the prefix is the sender's."""
    return topic if topic in TOPICS else STATUS
