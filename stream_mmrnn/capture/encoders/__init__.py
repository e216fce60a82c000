"""Encoders: Sample -> feature vectors. The same class runs live, in replay from raw samples and in training.

An encoder may keep state between the samples of one stream; `reset` clears it. Encoders know nothing about the bus,
sessions or sources.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, TypeAlias

import numpy.typing as npt

from stream_mmrnn.core import plugins
from stream_mmrnn.core.errors import PluginError, UsageError
from stream_mmrnn.core.streams import FURTHER_ENCODERS, SHORT_FORMS, Stream
from stream_mmrnn.core.types import Sample

Array: TypeAlias = npt.NDArray[Any]


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

    def snapshot(self) -> dict[str, Array]:
        """The state, by name; {} if there is none."""

    def restore(self, state: dict[str, Array]) -> None:
        """Continue from a snapshot. Raises SnapshotError if it does not fit."""


class Stateless:
    """What an encoder without a state has of the protocol; nothing is warmed up, either."""

    def prewarm(self) -> None:
        """Does nothing."""

    def reset(self) -> None:
        """Does nothing: there is no state."""

    def snapshot(self) -> dict[str, Array]:
        """Empty: there is no state."""
        return {}

    def restore(self, state: dict[str, Array]) -> None:
        """Does nothing: there is no state."""


def create_encoder(name: str) -> Encoder:
    """The package's own encoder: for a kind, for a usual stream such as `other_text`, one of `FURTHER_ENCODERS`, or
    what derived features (`turn_end`) pass through.

    Imports only what it needs.

    Raises:
        UsageError: there is no such kind, stream or encoder.

    """
    if name == "face":
        from stream_mmrnn.capture.encoders.face import FaceEncoder

        return FaceEncoder()
    if name == "prosody":
        from stream_mmrnn.capture.encoders.prosody import ProsodyEncoder

        return ProsodyEncoder()
    if name == "tokens":
        from stream_mmrnn.capture.encoders.tokens import TokenEncoder

        return TokenEncoder()
    if name == "turn_end":
        from stream_mmrnn.capture.speech.turn_end import TurnEndEncoder

        return TurnEndEncoder()
    if name not in SHORT_FORMS:
        raise UsageError(f"there is no encoder of {name!r}; use one of {', '.join([*SHORT_FORMS, *FURTHER_ENCODERS])}")
    kind = SHORT_FORMS[name][0]
    if kind == "vision":
        from stream_mmrnn.capture.encoders.image import ImageEncoder

        return ImageEncoder()
    if kind == "audio":
        from stream_mmrnn.capture.encoders.audio import AudioEncoder

        return AudioEncoder()
    if kind == "text":
        from stream_mmrnn.capture.encoders.text import TextEncoder

        return TextEncoder()
    from stream_mmrnn.capture.encoders.signal import SignalEncoder

    return SignalEncoder()


def encoders_of(stream: Stream) -> dict[str, Encoder]:
    """The encoders of a stream, by the name of their feature vectors.

    Raises:
        UsageError: one of them is not known.

    """
    names = stream.encoders or stream.own_encoders[:1]
    return {features: _named(name, stream) for name, features in zip(names, stream.features(), strict=True)}


def check_all(streams: Iterable[Stream]) -> None:
    """Raise UsageError unless every encoder that a stream names is known; loads none of them."""
    for stream in streams:
        for name in stream.encoders:
            if name not in stream.own_encoders and plugins.find("encoders", name) is None:
                raise _unknown(name, stream)


def _unknown(name: str, stream: Stream) -> UsageError:
    known = ", ".join([*stream.own_encoders, *plugins.names("encoders")])
    return UsageError(f"the stream {stream.name!r} has an encoder {name!r}, which is not known; use one of {known}")


def _named(name: str, stream: Stream) -> Encoder:
    if name in stream.own_encoders:
        return create_encoder(name)
    plugin = plugins.find("encoders", name)
    if plugin is not None:
        encoder: Encoder = plugins.call(plugin)
        if "@" not in str(getattr(encoder, "origin", "")):
            raise PluginError(
                f"the encoder {name!r} of the package {plugin.package} has no `origin`; expected NAME@SHA256 over its "
                "weights and its code"
            )
        return encoder
    raise _unknown(name, stream)
