"""A stream: one named input of a session, and how it behaves in time.

Which streams a session has is data: live from the settings, in replay and training from the recording (see
`stream_table`). Knows nothing about devices, encoders or the bus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import msgspec

from stream_mmrnn.core import topics

Kind = Literal["vision", "audio", "text", "signal"]
Reduction = Literal["last", "mean", "sum"]

SELF = "self"
"""The person whom the session is about; others are for example the other party of a call, or a voice agent."""
OTHER = "other"


class KindSpec(msgspec.Struct, frozen=True):
    """What streams of a kind have in common."""

    dense: bool
    """A dense stream holds the watermark back; a sparse one (text) does not."""
    reduction: Reduction
    """How the samples of one tick become one vector."""
    schema: str
    """Schema of its raw messages in a recording."""


KINDS: dict[Kind, KindSpec] = {
    "vision": KindSpec(True, "last", "foxglove.CompressedImage"),
    "audio": KindSpec(True, "mean", "foxglove.RawAudio"),
    "text": KindSpec(False, "sum", "foxglove.Log"),
    "signal": KindSpec(True, "mean", "stream_mmrnn.Features"),
}


class Stream(msgspec.Struct, frozen=True):
    """One row of a session's table of streams."""

    name: str
    kind: Kind
    """Schema of the raw messages; default of queue, lateness, reduction and encoder."""
    dense: bool
    reduction: Reduction
    source: str = "none"
    encoders: tuple[str, ...] = ()
    """Names of its encoders; () is the kind's own. The first gives `feature/NAME`, a further one
    `feature/NAME.ENCODER`."""
    person: str = SELF
    lateness_ns: int = 0
    policy: Literal["latest", "drop_oldest", "block"] = "block"
    """What its queue does when its encoder is late."""
    feeds: str = ""
    """The modality of a model that it feeds; "" is the one of its own name."""
    raw: bool = True
    """Whether its samples are published and recorded beside their features."""
    channel: int = 0
    """The only channel of a file's sound that is heard, from 1 on; 0: the mix of all."""

    @classmethod
    def of(cls, name: str, kind: Kind | None = None, person: str = "", source: str = "none") -> Stream:
        """A stream with the defaults of its kind; without one, of what the name stands for, or else a signal."""
        usual, usual_person = named_for(name) or ("signal", SELF)
        kind = kind or usual
        is_derived = name in DERIVED_INPUTS and kind == usual
        spec = DERIVATIONS[DERIVED_INPUTS[name][0]] if is_derived else KINDS[kind]
        person = person or usual_person
        # the features of a signal are its samples: one copy is enough
        return cls(name, kind, spec.dense, spec.reduction, source, person=person, raw=kind != "signal")

    @property
    def modality(self) -> str:
        return self.feeds or self.name

    @property
    def parent(self) -> str:
        """The stream that it is made of; "" if it is not derived."""
        return parent_of(self.source)

    @property
    def derivation(self) -> str:
        """What makes a derived stream of its parent; "": its samples are the parent's."""
        return derivation_of(self.source)

    @property
    def own_encoders(self) -> tuple[str, ...]:
        """The package's encoders for such a stream; the first is the one that it has unless others are named."""
        derived = DERIVATIONS[self.derivation].encoder if self.derivation in DERIVATIONS else ""
        further = (name for name, kind in FURTHER_ENCODERS.items() if kind == self.kind)
        return (*filter(None, [derived]), self.kind, *further)

    def features(self) -> tuple[str, ...]:
        """By encoder, the name of its feature vectors: the last part of their topic."""
        return (self.name, *(f"{self.name}.{encoder}" for encoder in self.encoders[1:]))

    def encoder_of(self, features: str) -> str:
        """The name of the encoder that makes these feature vectors."""
        return (self.encoders or self.own_encoders)[self.features().index(features)]

    def modality_of(self, features: str) -> str:
        """The modality that these feature vectors feed."""
        return self.modality + features.removeprefix(self.name)

    def topics(self) -> list[str]:
        """Of its samples, if they are published, and of its features."""
        return [*([topics.raw(self.name)] if self.raw else []), *(topics.FEATURE + name for name in self.features())]

    def counted_as(self, features: str) -> str:
        """The name of the count of these feature vectors in a worker's status."""
        return "published" + features.removeprefix(self.name)


SHORT_FORMS: dict[str, tuple[Kind, str]] = {
    "vision": ("vision", SELF),
    "audio": ("audio", SELF),
    "text": ("text", SELF),
    "other_audio": ("audio", OTHER),
    "other_text": ("text", OTHER),
    "signal": ("signal", SELF),
}
"""Kind and person of the streams that have settings and options of their own (`sources.vision`, `--vision`)."""


SOURCE_KINDS: dict[str, tuple[Kind, ...]] = {
    "camera": ("vision",),
    "microphone": ("audio",),
    "file": ("vision", "audio"),
    "stdin": ("text",),
    "pipe": ("text",),
    "tcp": ("text",),
    "zmq": ("text",),
    "page": ("text", "vision", "audio"),
    "speech": ("text",),
    "turn_end": ("signal",),
    "lsl": ("signal", "audio", "text"),
    "synthetic": ("vision", "audio", "text"),
    "push": ("vision", "audio", "text", "signal"),
    "from": ("vision", "audio", "text", "signal"),
    "none": ("vision", "audio", "text", "signal"),
}
"""The package's own sources, and the kinds of stream that each can give. Where the settings do not say the kind, `lsl`
is a signal, `page` is text, `from:STREAM` is of its parent's kind, and `file`, `push`, `synthetic` and `none` are an
error."""
PAGE_LATENESS_NS = 250_000_000
"""The least lateness of a browser's camera or microphone: a phone's samples come over a network."""


FURTHER_ENCODERS: dict[str, Kind] = {"face": "vision", "prosody": "audio", "tokens": "text"}
"""The package's own encoders beside the one of each kind, and the kind of stream that each is for."""
ORIGIN_NAMES = {"tokens": "tokens-l2-supercat"}
"""By encoder, its name in the `origin` of its features, where that is not its own."""


class DerivationSpec(msgspec.Struct, frozen=True):
    """What the streams of one of the package's own derivations have in common."""

    made_of: Kind
    gives: Kind
    reduction: Reduction
    encoder: str = ""
    """Whose features its samples are; "": the kind's own encoder makes them."""
    dense: bool = False
    """Samples come when there is something to say, so ticks do not wait for them."""


DERIVATIONS: dict[str, DerivationSpec] = {
    "speech": DerivationSpec("audio", "text", "sum"),
    "turn_end": DerivationSpec("audio", "signal", "last", encoder="turn_end"),
}
"""The package's own derivations."""


DERIVED_INPUTS: dict[str, tuple[str, str]] = {"turn_end": ("turn_end", SELF), "other_turn_end": ("turn_end", OTHER)}
"""Inputs of models that are derived without being asked for: by which derivation, and of whose stream."""


def named_for(name: str) -> tuple[Kind, str] | None:
    """Kind and person that the name of a stream stands for; None if it may be anything."""
    if name in DERIVED_INPUTS:
        derivation, person = DERIVED_INPUTS[name]
        return DERIVATIONS[derivation].gives, person
    return SHORT_FORMS.get(name)


def parent_of(source: str) -> str:
    """The stream that a source reads: `from:STREAM` or `from:STREAM/DERIVATION`; "" for any other source."""
    what, _, rest = source.partition(":")
    return rest.partition("/")[0] if what == "from" else ""


def derivation_of(source: str) -> str:
    """The derivation of a source `from:STREAM/DERIVATION`; "" if it has none."""
    return source.partition("/")[2] if parent_of(source) else ""


def is_sensor(source: str, kind: str) -> bool:
    """Whether a browser that shows the page is the camera or the microphone of such a stream."""
    return source == "page" and kind in ("vision", "audio")


def usual() -> dict[str, Stream]:
    """The streams that have settings of their own, without sources."""
    return {name: Stream.of(name) for name in SHORT_FORMS}


def text_topics(table: Iterable[Stream]) -> list[str]:
    """The raw topics of all texts."""
    return [topics.raw(row.name) for row in table if row.kind == "text"]


def first_text(table: Iterable[Stream]) -> str:
    """The stream that typed lines and labels join: the first person's first text; "" if there is none."""
    return next((s.name for s in table if s.kind == "text" and s.person == SELF and s.source != "none"), "")


def with_one_value(rows: Iterable[Stream], value: Callable[[Stream], str]) -> tuple[Stream, Stream] | None:
    """The first two streams that have the same value; None if all differ."""
    seen: dict[str, Stream] = {}
    for row in rows:
        if (before := seen.setdefault(value(row), row)) is not row:
            return before, row
    return None


def made_by(origin: str, encoder: str) -> bool:
    """Whether features of this origin, `name@sha256`, are those of the further or plugged-in encoder of a name."""
    return origin.partition("@")[0] == ORIGIN_NAMES.get(encoder, encoder)


def feeding(modality: str, encoder: str, table: Mapping[str, Stream]) -> tuple[str, Stream]:
    """What feeds a modality of a model: the name of the feature vectors, and their stream.

    `encoder` is the contract's `name@sha256`, or "": it chooses among the encoders of one stream. A modality that no
    stream feeds is masked; it gets the stream that its name stands for.
    """
    for row in table.values():
        for name in row.features():
            if row.modality_of(name) == modality and row.source != "none":
                by = next((f".{further}" for further in row.encoders[1:] if made_by(encoder, further)), "")
                return row.name + by if by else name, row
    base = modality.partition(".")[0]
    return modality, table.get(base) or Stream.of(base)
