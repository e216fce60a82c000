"""Names of topics, and the table of those that every session has.

The topics of streams follow from the streams' names (`raw/NAME`, `feature/NAME`, `feature/NAME.ENCODER`, `push/NAME`);
which streams there are is `streams`' and the settings' business.
"""

from __future__ import annotations

import re

import msgspec

CLOCK = "clock"
"""Time messages of the clock process: the aligner's only clock."""
SESSION = "session"
"""`open` and `close` of a session; recorded, so that a replay opens and closes it at the same points."""
TICK = "tick"
"""Only in recordings up to 0.1.0; a prediction carries its tick."""
PREDICTION = "prediction"
LABEL = "label"
"""Labels for training, typed by a person as `/label NAME` or given afterwards; not an input of models. Also the name of
the tier of those whose origin names none."""
TIER = "tier:"
"""How the origin of a label begins that belongs to a tier of its own: `tier:gaze`."""
TYPED = "typed"
"""Lines typed on the page; the text worker converts them to text events or labels."""
STATUS = "status/"
"""Counters and state of each process, about twice a second; not part of a session."""
CONTROL = "control"
"""Commands of the supervisor to the processes: that the session is over, or only its recording."""
STOP, END_RECORDING = b"stop", b"end_recording"
"""Payloads of `control`."""
REQUEST = "request"
"""What a person asks of the supervisor on a page: to record, or to end the session."""
CHECKPOINT = "checkpoint"
"""Only in recordings that began in the middle of a session: the state of aligner and model there."""

EVERYONE = "host"
"""The session name of messages without a session: clock, status."""

SESSION_NAME = r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z"
"""Pattern of session names: safe as a part of file names, without path separators."""

AUDIO_RATE_HZ = 16_000
"""Sample rate of all audio on the bus: mono, int16."""

RAW = "raw/"
FEATURE = "feature/"
PUSH = "push/"
"""Samples from other programs, on their way to the worker of their stream; never recorded."""
STREAM_NAME = r"\A[A-Za-z0-9][A-Za-z0-9_-]{0,31}\Z"
"""Pattern of the names of streams, persons and encoders."""
_PUSHED = re.compile(r"push/[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_OF_STREAM = re.compile(r"(?:raw/|feature/)([A-Za-z0-9][A-Za-z0-9_-]{0,31})(?:\.[A-Za-z0-9][A-Za-z0-9_-]{0,31})?")


class Topic(msgspec.Struct, frozen=True):
    """One row of the table."""

    name: str
    recorded: bool = True
    schema: str = ""
    """Schema name in a recording."""


TOPICS: dict[str, Topic] = {
    t.name: t
    for t in (
        Topic(LABEL, schema="foxglove.Log"),
        Topic(CLOCK, schema="stream_mmrnn.Clock"),
        Topic(SESSION, schema="stream_mmrnn.Session"),
        Topic(TICK, schema="stream_mmrnn.Tick"),
        Topic(PREDICTION, schema="stream_mmrnn.Prediction"),
        Topic(CHECKPOINT, schema="stream_mmrnn.Checkpoint"),
        Topic(CONTROL, recorded=False),
        Topic(REQUEST, recorded=False),
        Topic(TYPED, recorded=False),
    )
}
"""All topics but those of streams and statuses."""


def raw(stream: str) -> str:
    return RAW + stream


def feature(stream: str, encoder: str = "") -> str:
    """The topic of a stream's feature vectors; `encoder` names one that is not the stream's first."""
    return f"{FEATURE}{stream}.{encoder}" if encoder else FEATURE + stream


def push(stream: str) -> str:
    return PUSH + stream


def stream_of(topic: str) -> str:
    """The name of the stream whose raw messages or features have this topic; "" if it is no stream's."""
    found = _OF_STREAM.fullmatch(topic)
    return found[1] if found else ""


def tier_of(origin: str) -> str:
    """The tier of a label, from its origin."""
    return origin.removeprefix(TIER) if origin.startswith(TIER) else LABEL


def is_known(topic: str) -> bool:
    """Whether messages may have this topic."""
    of_stream = _OF_STREAM.fullmatch(topic) or _PUSHED.fullmatch(topic)
    return topic in TOPICS or topic.startswith(STATUS) or of_stream is not None


def is_recorded(topic: str) -> bool:
    return TOPICS[topic].recorded if topic in TOPICS else bool(stream_of(topic))


def counted_as(topic: str) -> str:
    """The topic under which a message is counted. All status topics count as one: senders choose their suffix."""
    return STATUS if topic.startswith(STATUS) else topic
