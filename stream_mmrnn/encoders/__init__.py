"""Encoders: Sample -> feature vectors. The same class runs live, in replay from raw and when training.

An encoder keeps what state it needs between samples of one stream (`reset` forgets it). It knows nothing about the
bus, sessions or where samples come from.
"""

from __future__ import annotations

from typing import Protocol

from stream_mmrnn.types import Sample


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

    def reset(self) -> None:
        """Forget the stream so far."""


def create(modality: str) -> Encoder:
    """The encoder of a modality; imports only what it needs."""
    if modality == "vision":
        from stream_mmrnn.encoders.image import ImageEncoder

        return ImageEncoder()
    if modality == "audio":
        from stream_mmrnn.encoders.audio import AudioEncoder

        return AudioEncoder()
    from stream_mmrnn.encoders.text import TextEncoder

    return TextEncoder()
