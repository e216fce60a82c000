"""Encoders: Sample -> feature vectors. The same class runs live, in replay from raw and when training.

An encoder keeps what state it needs between samples of one stream (`reset` forgets it). It knows nothing about the
bus, sessions or where samples come from.
"""

from __future__ import annotations

from typing import Protocol

from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.topics import MODALITIES
from stream_mmrnn.core.types import Sample


class Encoder(Protocol):
    """What every encoder can do."""

    origin: str
    """`name@sha256` of all its weights and constants: models say which they were trained with."""
    size: int
    """Length of a feature vector."""

    def encode(self, sample: Sample) -> list[Sample]:
        """The feature vectors (float32 [size]) that this sample completes, each with its own event time.

        Raises WireError where the sample's data cannot be decoded.
        """

    def prewarm(self) -> None:
        """Do nobody's work just before a sample is expected, where that costs less than it saves."""

    def reset(self) -> None:
        """Forget the stream so far."""


def create_encoder(modality: str) -> Encoder:
    """The encoder of a modality, which is its kind's; imports only what it needs.

    Raises:
        UsageError: no encoder of ours makes these features.

    """
    kind = MODALITIES[modality].kind
    if kind == "vision":
        from stream_mmrnn.capture.encoders.image import ImageEncoder

        return ImageEncoder()
    if kind == "audio":
        from stream_mmrnn.capture.encoders.audio import AudioEncoder

        return AudioEncoder()
    if kind == "text":
        from stream_mmrnn.capture.encoders.text import TextEncoder

        return TextEncoder()
    if kind == "signal":
        from stream_mmrnn.capture.encoders.signal import SignalEncoder

        return SignalEncoder()
    raise UsageError(f"there is no encoder of {modality}: its features come from outside; replay them as recorded")
