"""The values that travel through the system, without behaviour.

All times are nanoseconds of the host's monotonic clock (`clock.now_ns`); a field's unit is in its name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

FloatArray: TypeAlias = npt.NDArray[np.float32]
Payload: TypeAlias = npt.NDArray[Any] | bytes
Vectors: TypeAlias = dict[str, FloatArray]
Nanoseconds: TypeAlias = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
"""A time or duration from outside, limited to 64 bits."""


MAX_TICK = 2**53 - 1
"""Largest index of a served tick: the next one still is an integer in JSON and in JavaScript."""

FEATURE_BOUND = 1e12
"""Only smaller feature values enter a model: a finite value near the limit of float32 turns a recurrent state into NaN
for good."""


class Sample(msgspec.Struct, frozen=True, gc=False):
    """One reading of a device: a video frame, an audio block, a text event."""

    event_ns: int
    """Event time: the end of the interval that the sample covers."""
    capture_ns: int
    """When we received the sample from the device."""
    data: Payload
    """Vision: JPEG bytes. Audio: int16 [frames] at 16 kHz. Text: UTF-8 bytes."""
    device_ns: int = 0
    """The device's own time stamp, by its own clock, from which `event_ns` was computed; 0 if it has none. Never
    changed afterwards."""


class Envelope(msgspec.Struct, frozen=True, gc=False):
    """One message on the bus, live or recorded."""

    topic: str
    session: str
    seq: int
    """Counts the messages of one publisher on one topic and session, from 0."""
    event_ns: int
    capture_ns: int
    publish_ns: int
    payload: Payload
    origin: str = ""
    """Producer of the payload: the source's description, or the encoder as `name@sha256`."""
    received_ns: int = 0
    """When the reader received it; never on the wire, 0 if not stamped."""
    device_ns: int = 0
    """The sample's `device_ns`."""


class Mark(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Identity of a message: the publish time is part of it, because numbers restart with their publisher."""

    topic: str
    session: str
    seq: int
    publish_ns: int


class Stamps(msgspec.Struct, frozen=True, gc=False):
    """The times of the message that closed a tick."""

    event_ns: Nanoseconds
    capture_ns: Nanoseconds
    publish_ns: Nanoseconds
    received_ns: Nanoseconds
    by: str
    """Its topic: a feature topic, or `clock` after a lateness timeout."""


class Tick(msgspec.Struct, frozen=True, gc=False):
    """All modalities of one session aligned to one time step, ((index-1)T, index*T] of event time."""

    session: str
    index: int
    event_ns: int
    """The tick's end, index*T."""
    features: Vectors
    """By modality; zeros where absent."""
    present: dict[str, bool]
    age_ns: dict[str, int]
    """Tick's end minus the newest sample's event time; -1 without any sample yet."""
    closed: Stamps


class Prediction(msgspec.Struct, frozen=True, gc=False):
    """The heads' outputs for one tick of one session."""

    tick: Tick
    heads: Vectors
    model: str
    """sha256 of the model file."""
    step_start_ns: int
    step_end_ns: int


class ModalitySpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input of the model: its name, width and the encoder it was trained with."""

    name: str
    size: int
    encoder: str = ""
    """`name@sha256`, or "" if any is accepted."""
    reduction: str = ""
    """How the samples of one tick become one vector: `last`, `mean`, `sum` or `stack`; "" is the table's."""
    stack: int = 1
    """With `stack`: how many samples; `size` counts them all."""


class HeadSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An output of the model, and the meaning of its numbers."""

    name: str
    kind: str
    """`activity_projection`, `classification` or `regression`."""
    size: int
    labels: tuple[str, ...] = ()
    """One label per number."""
    horizons_s: tuple[tuple[float, float], ...] = ()
    """The interval that each number predicts: (start, end) in seconds after the tick's end."""
    unit: str = "probability"
    threshold: float = 0.5
    """Decision threshold of a binary head; chosen on validation data."""
    readable: Literal["always", "silence"] = "always"
    """When its numbers mean something: `silence`: only while nobody is heard."""


class StateSpec(msgspec.Struct, frozen=True):
    """A recurrent tensor: `state.NAME` in, `next.NAME` out."""

    name: str
    shape: tuple[int, ...]
    """Without the batch axis."""


class ModelSpec(msgspec.Struct, frozen=True):
    """The contract between a model file and the engine."""

    name: str
    sha256: str
    tick_ns: int
    modalities: tuple[ModalitySpec, ...]
    heads: tuple[HeadSpec, ...]
    states: tuple[StateSpec, ...]
