"""Encoders: Sample -> feature vectors. The same class runs live, in replay from raw samples and in training.

An encoder may keep state between the samples of one stream; `reset` clears it. Encoders know nothing about the bus,
sessions or sources.
"""

from __future__ import annotations

from typing import Protocol

from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.topics import MODALITIES
from stream_mmrnn.core.types import Sample


class Encoder(Protocol):
    """The interface of every encoder."""

    origin: str
    """`name@sha256` over all its weights and constants; a model names the one that it was trained with."""
    size: int
    """Length of a feature vector."""

    def encode(self, sample: Sample) -> list[Sample]:
        """The feature vectors (float32 [size]) that this sample completes, each with its own event time.

        Raises WireError where the sample's data cannot be decoded.
        """

    def prewarm(self) -> None:
        """Run on dummy data just before a sample is expected, if warm caches save more than the run costs."""

    def reset(self) -> None:
        """Clear the state."""


def create_encoder(modality: str) -> Encoder:
    """The encoder for a modality, chosen by its kind; imports only what it needs.

    Raises:
        UsageError: there is no encoder for this modality.

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
