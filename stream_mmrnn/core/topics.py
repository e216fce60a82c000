"""The table of topics and modalities, which bus, recorder, aligner and viewers read."""

from __future__ import annotations

from typing import Literal

import msgspec

CLOCK = "clock"
"""Time messages of the clock process: the aligner's only clock."""
SESSION = "session"
"""`open` and `close` of a session; recorded, so that a replay opens and closes it at the same points."""
TICK = "tick"
"""Only in recordings up to 0.1.0; a prediction carries its tick."""
PREDICTION = "prediction"
LABEL = "label"
"""Labels for training, typed by a person as `/label NAME`; not an input of models."""
TYPED = "typed"
"""Lines typed on the page; the text worker converts them to text events or labels."""
STATUS = "status/"
"""Counters and state of each process, about twice a second; not part of a session."""
CONTROL = "control"
"""Commands of the supervisor to the processes."""

EVERYONE = "host"
"""The session name of messages without a session: clock, status."""

SESSION_NAME = r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"
"""Pattern of session names: safe as a part of file names, without path separators."""

AUDIO_RATE_HZ = 16_000
"""Sample rate of all audio on the bus: mono, int16."""

RAW = "raw/"
FEATURE = "feature/"


Kind = Literal["vision", "audio", "text", "signal"]


class Modality(msgspec.Struct, frozen=True):
    """One input, and how it behaves in time."""

    name: str
    kind: Kind
    """Sources, encoder, queue and lateness depend on the kind, not on the person."""
    dense: bool
    """A dense stream holds the watermark back; a sparse one (text) does not."""
    reduction: Literal["last", "mean", "sum"]
    """How the samples of one tick become one vector."""
    schema: str = ""
    """Schema of its raw messages in a recording; "" if only features are recorded."""
    other: bool = False
    """Belongs to the second person (a voice agent, the other party of a call), not to the session's own."""


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
    """Schema name in a recording."""


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
    """The kind of a topic's modality; None if it has none."""
    row = TOPICS.get(topic)
    return MODALITIES[row.modality].kind if row and row.modality else None


def raw(modality: str) -> str:
    return RAW + modality


def raws(kind: Kind) -> list[str]:
    """The raw topics of a kind, for all persons."""
    return [raw(m.name) for m in MODALITIES.values() if m.kind == kind and m.schema]


def feature(modality: str) -> str:
    return FEATURE + modality


def counted_as(topic: str) -> str:
    """The topic under which a message is counted. All status topics count as one: senders choose their suffix."""
    return topic if topic in TOPICS else STATUS
