"""Derived streams: `from:STREAM` is made of the samples of another stream, `from:STREAM/NAME` by a derivation.

Live a worker derives from what it reads on the bus; in replay from raw and in `Predictor` the same objects derive from
the samples of the stream at the beginning of the chain. Knows nothing about the bus, files or processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import numpy.typing as npt

from stream_mmrnn.capture.encoders import Encoder, encoders_of
from stream_mmrnn.core import plugins, topics
from stream_mmrnn.core.errors import PluginError, SnapshotError, SourceSpecError
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.streams import DERIVATIONS, Stream
from stream_mmrnn.core.types import Sample

Array: TypeAlias = npt.NDArray[Any]


class Derivation(Protocol):
    """The interface of what makes the samples of one stream from those of another."""

    origin: str
    """Its description; the `origin` of the samples that it makes."""

    def derive(self, sample: Sample) -> list[Sample]:
        """The samples that this one completes, each with the event time of what it is about.

        What comes out depends only on what went in, so that a replay derives the same.
        """

    def finish(self) -> list[Sample]:
        """The samples that are still held back, at the end of the stream."""

    def reset(self) -> None:
        """Clear the state."""


class Unchanged:
    """The same samples once more, for encoders and settings of their own."""

    def __init__(self, parent: str) -> None:
        self.origin = f"from:{parent}"

    def derive(self, sample: Sample) -> list[Sample]:
        return [sample]

    def finish(self) -> list[Sample]:
        return []

    def reset(self) -> None:
        """There is no state."""


def derivation_of(stream: Stream, settings: Settings, clock_ns: Callable[[], int] | None = None) -> Derivation:
    """The derivation of a derived stream. `clock_ns`: the clock of a live session.

    Raises:
        SourceSpecError: there is no derivation of that name, or it does not give streams of this kind.
        PluginError: it is a plug-in's and does not load, or is no derivation.
        UsageError: the extra that it needs is not installed.
        ModelError: it has no model.

    """
    if not stream.derivation:
        return Unchanged(stream.parent)
    own = DERIVATIONS.get(stream.derivation)
    if own is not None and stream.kind != own.gives:
        gives = f"gives {own.gives}, and the stream {stream.name!r} is {stream.kind}"
        raise SourceSpecError(f"{stream.source!r} {gives}; leave its kind out")
    if stream.derivation == "speech":
        from stream_mmrnn.capture.speech.derivation import Speech

        return Speech(stream.parent, settings.speech, clock_ns)
    if stream.derivation == "turn_end":
        from stream_mmrnn.capture.speech.turn_end import TurnEnd

        return TurnEnd(stream.parent, clock_ns)
    plugin = plugins.find("sources", stream.derivation)
    if plugin is None:
        known = ", ".join(plugins.names("sources")) or "none is installed"
        mine = ", ".join(f"from:{stream.parent}/{name}" for name in DERIVATIONS)
        raise SourceSpecError(
            f"{stream.source!r} of the stream {stream.name!r} names no derivation; use from:{stream.parent}, {mine}, "
            f"or a plug-in's ({known})"
        )
    made: Derivation = plugins.call(plugin, stream.parent, stream)
    if not hasattr(made, "derive"):
        raise PluginError(
            f"{plugin.name!r} of the package {plugin.package} {plugin.version} is a source and derives nothing; use "
            f"{plugin.name} instead of {stream.source}"
        )
    return made


class DerivationChain:
    """Derivations one after another, for all encoders of a stream: each sample is derived once, for the first of them.

    Every encoder is given the same samples, one after the other.
    """

    def __init__(self, derivations: list[Derivation]) -> None:
        self._derivations = derivations
        self._sample: Sample | None = None
        self._derived: list[Sample] = []
        self._finished: list[Sample] | None = None

    def derive(self, sample: Sample) -> list[Sample]:
        if sample is not self._sample:
            self._sample, self._derived = sample, []  # nothing for the others where a derivation raises
            self._derived = self._pass_on([sample], self._derivations)
        return self._derived

    @staticmethod
    def _pass_on(samples: list[Sample], derivations: list[Derivation]) -> list[Sample]:
        for derivation in derivations:
            samples = [made for of in samples for made in derivation.derive(of)]
        return samples

    def finish(self) -> list[Sample]:
        """What the derivations still hold back, at the end of the stream."""
        if self._finished is None:
            after = enumerate(self._derivations, 1)
            self._finished = [s for i, of in after for s in self._pass_on(of.finish(), self._derivations[i:])]
        return self._finished

    def reset(self) -> None:
        for derivation in self._derivations:
            derivation.reset()
        self._sample = self._finished = None

    def snapshot(self) -> dict[str, Array]:
        """The state of the derivations. Raises SnapshotError where one cannot save its state."""
        return {
            f"{_DERIVATION}{i}.{name}": array
            for i, derivation in self._savable()
            for name, array in derivation.snapshot().items()
        }

    def restore(self, state: dict[str, Array]) -> None:
        """Continue from a snapshot; raises SnapshotError if it does not fit."""
        for i, derivation in self._savable():
            prefix = f"{_DERIVATION}{i}."
            derivation.restore({name.removeprefix(prefix): a for name, a in state.items() if name.startswith(prefix)})
        self._sample = self._finished = None

    def _savable(self) -> Iterator[tuple[int, Any]]:
        """The derivations that have a state, each with its place in the chain."""
        for i, derivation in enumerate(self._derivations):
            if isinstance(derivation, Unchanged):
                continue
            if not hasattr(derivation, "snapshot"):
                raise SnapshotError(
                    f"the state of {self._derivations[-1].origin} cannot be saved; leave that stream out"
                )
            yield i, derivation


_DERIVATION = "derivation"
"""How the names of a derivation's arrays begin in a snapshot."""


class DerivedEncoder:
    """An encoder behind a chain of derivations, as an `Encoder` of the samples at the beginning of the chain."""

    def __init__(self, chain: DerivationChain, encoder: Encoder) -> None:
        self._chain, self._encoder = chain, encoder
        self.origin, self.size = encoder.origin, encoder.size

    def encode(self, sample: Sample) -> list[Sample]:
        """As `Encoder.encode`."""
        return [vector for of in self._chain.derive(sample) for vector in self._encoder.encode(of)]

    def finish(self) -> list[Sample]:
        """The vectors of what the derivations still hold back, at the end of the stream."""
        return [vector for of in self._chain.finish() for vector in self._encoder.encode(of)]

    def prewarm(self) -> None:
        self._encoder.prewarm()

    def reset(self) -> None:
        self._chain.reset()
        self._encoder.reset()

    def snapshot(self) -> dict[str, Array]:
        """The state of encoder and derivations. Raises SnapshotError where a derivation cannot save its state."""
        return {**self._encoder.snapshot(), **self._chain.snapshot()}

    def restore(self, state: dict[str, Array]) -> None:
        """Continue from a snapshot; raises SnapshotError if it does not fit."""
        self._chain.restore(state)
        self._encoder.restore({name: array for name, array in state.items() if not name.startswith(_DERIVATION)})


def heard_topic(stream: Stream) -> str:
    """The topic of a stream's samples: those of a signal are its features, unless it has encoders of its own."""
    return topics.raw(stream.name) if stream.raw else topics.feature(stream.name)


def chain_of(stream: Stream, table: Mapping[str, Stream]) -> list[Stream]:
    """The derived streams from the one that is made of no derived stream to this one; [] if this is not derived."""
    return [*chain_of(table[stream.parent], table), stream] if stream.parent else []


def root_of(stream: Stream, table: Mapping[str, Stream]) -> Stream:
    """The stream at the beginning of a stream's chain: itself, if it is not derived."""
    chain = chain_of(stream, table)
    return table[chain[0].parent] if chain else stream


def encoders_from_root(stream: Stream, table: Mapping[str, Stream], settings: Settings) -> dict[str, Encoder]:
    """Encoders of the samples of `root_of(stream)`, by the name of the stream's feature vectors.

    Raises:
        SourceSpecError, PluginError, ModelError: those of `derivation_of`.
        UsageError: so, or an encoder is not known.

    """
    chain = chain_of(stream, table)
    encoders = encoders_of(stream)
    if not chain:
        return encoders
    derivations = DerivationChain([derivation_of(of, settings) for of in chain])
    return {name: DerivedEncoder(derivations, encoder) for name, encoder in encoders.items()}
