"""The table of a session's streams, from its settings: live, in replay and in training the same.

The one place that knows how `[sources]`, `[streams]`, `[align]`, `[queues]` and the model's contract make a stream.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from stream_mmrnn.core import plugins
from stream_mmrnn.core.errors import ConfigError
from stream_mmrnn.core.settings import Settings, StreamSettings
from stream_mmrnn.core.streams import (
    DERIVATIONS,
    DERIVED_INPUTS,
    KINDS,
    PAGE_LATENESS_NS,
    SHORT_FORMS,
    SOURCE_KINDS,
    Kind,
    Stream,
    derivation_of,
    is_sensor,
    made_by,
    named_for,
    parent_of,
    with_one_value,
)
from stream_mmrnn.core.topics import STREAM_NAME
from stream_mmrnn.core.types import ModalitySpec


def stream_table(settings: Settings) -> dict[str, Stream]:
    """The streams of a session by name; also those without a source (`none`) that have settings of their own.

    Raises:
        ConfigError: a stream's kind cannot be told from its source, two streams feed one modality, a stream has a name
            that no stream may have, or a derived stream is made of none, of itself, or of one without samples.

    """
    given = {
        name: StreamSettings(getattr(settings.sources, name), kind, person=person)
        for name, (kind, person) in SHORT_FORMS.items()
        if name not in settings.streams
    } | settings.streams
    given = {name: _of_same_person(name, row, given) for name, row in given.items()}
    table: dict[str, Stream] = {}
    for name in _parents_first(given):
        if not re.match(STREAM_NAME, name):
            raise ConfigError(f"`streams.{name}`: a stream's name has 1 to 32 letters, digits, `_` or `-`")
        table[name] = _row(name, given[name], settings, table)
    table = {name: table[name] for name in given}
    _check_feeds(table)
    return table


def for_model(
    settings: Settings, modalities: Iterable[ModalitySpec], *, derived: bool = True, pushed: bool = False
) -> Settings:
    """The settings of a session with a model: with the derived inputs that it takes (`with_derived`; with `derived`),
    and streams whose settings name no encoders have those that it asks for.

    Whoever encodes calls this once, and makes the table of streams from what comes back.
    """
    asked = list(modalities)
    settings = _with_encoders(settings, {})
    if derived:
        settings = with_derived(settings, [m.name for m in asked], pushed)
    return _with_encoders(settings, wanted_encoders(stream_table(settings), asked, plugins.names("encoders")))


def _with_encoders(settings: Settings, encoders: dict[str, tuple[str, ...]]) -> Settings:
    replace = msgspec.structs.replace
    return replace(settings, engine=replace(settings.engine, encoders=encoders))


def wanted_encoders(
    table: Mapping[str, Stream], modalities: Iterable[ModalitySpec], plugged: Iterable[str] = ()
) -> dict[str, tuple[str, ...]]:
    """By stream, the encoders that a model asks for, where they are not its kind's own one alone.

    A modality `S` made by a further encoder, or by one of `plugged` (names of plug-ins), makes that the first encoder
    of the stream that feeds `S`. A modality `S.E` adds the encoder `E` after its first. Streams whose settings name
    encoders are left out: those stay.
    """
    asked, wanted = list(modalities), {}
    for row in table.values():
        if row.encoders:
            continue
        known = [*row.own_encoders, *plugged]
        own, *others = known
        first, further = own, []
        for modality in asked:
            of, _, name = modality.name.partition(".")
            if of == row.modality and name in known:
                further.append(name)
            elif of == row.modality and not name:
                first = next((e for e in others if made_by(modality.encoder, e)), first)
        if first != own or further:
            wanted[row.name] = (first, *further)
    return wanted


class ChosenEncoders(msgspec.Struct, frozen=True):
    """The encoders of a stream, and why it has these."""

    encoders: tuple[str, ...]
    why: str


def chosen_encoders(settings: Settings) -> dict[str, ChosenEncoders]:
    """By stream that has a source, its encoders; `settings` are those of a session (`for_model`) or a recording."""
    chosen = {}
    for name, row in stream_table(settings).items():
        if row.source != "none":
            by_model = name in settings.engine.encoders
            why = "the model's choice" if by_model else "named in the settings" if row.encoders else "its kind's own"
            chosen[name] = ChosenEncoders(row.encoders or row.own_encoders[:1], why)
    return chosen


def with_derived(settings: Settings, modalities: Collection[str], pushed: bool = False) -> Settings:
    """The settings, and a stream for each derived input that a model takes and that they do not name.

    It is made of the first sound of the same person; where there is none, or its samples are not published, the input
    stays masked. `pushed`: samples come from the caller, so the usual sound is there without a source.

    Raises:
        ConfigError: those of `stream_table`.

    """
    for name, (derivation, person) in DERIVED_INPUTS.items():
        if name not in modalities or name in settings.streams:
            continue
        sources = settings.sources
        if pushed:
            kind = DERIVATIONS[derivation].made_of
            sounds = [row for row in stream_table(settings).values() if (row.kind, row.person) == (kind, person)]
            if all(row.source == "none" for row in sounds):
                usual = (row.name for row in sounds if row.name not in settings.streams)
                sources = msgspec.structs.replace(sources, **dict.fromkeys(usual, "push"))
        row = StreamSettings(source=derivation, person=person)
        wanted = msgspec.structs.replace(settings, sources=sources, streams={**settings.streams, name: row})
        try:
            stream_table(wanted)
        except ConfigError:
            continue
        settings = wanted
    return settings


def _of_same_person(name: str, row: StreamSettings, given: dict[str, StreamSettings]) -> StreamSettings:
    """With `from:STREAM/speech` for the source `speech`. Raises ConfigError where the person has no sound."""
    if row.source not in DERIVATIONS:
        return row
    kind = DERIVATIONS[row.source].made_of
    for parent, other in given.items():
        is_sample = other.source != "none" and (not parent_of(other.source) or derivation_of(other.source))
        if is_sample and other.person == row.person and _kind_said(parent, other) == kind:
            return msgspec.structs.replace(row, source=f"from:{parent}/{row.source}")
    raise ConfigError(
        f"`streams.{name}` is made of the {kind} of `{row.person}`, and this session has none; give that person's "
        f"{kind} a source, or name a stream: from:STREAM/{row.source}"
    )


def _kind_said(name: str, given: StreamSettings) -> str:
    """The kind of a stream as far as its own settings tell."""
    usual = named_for(name)
    possible = usual[:1] if usual else SOURCE_KINDS.get(given.source.partition(":")[0], ())
    return given.kind or (possible[0] if len(possible) == 1 else "")


def _parents_first(given: dict[str, StreamSettings]) -> Iterator[str]:
    """The names of the streams, each after the one that it is made of. Raises ConfigError where there is a circle."""
    left = dict(given)
    while left:
        ready = [name for name, row in left.items() if parent_of(row.source) not in left]
        if not ready:
            circle = ", ".join(f"`{name}`" for name in left)
            raise ConfigError(f"the derived streams {circle} are made of each other; give one of them a device")
        for name in ready:
            del left[name]
            yield name


def _row(name: str, given: StreamSettings, settings: Settings, table: dict[str, Stream]) -> Stream:
    parent = _parent(name, given, table)
    kind = _kind(name, given, parent)
    encoders = given.encoders or settings.engine.encoders.get(name, ())
    about: dict[str, Any] = {name: getattr(given, name) for name in ("source", "feeds", "channel")}
    about["encoders"] = encoders
    if own := DERIVATIONS.get(derivation_of(given.source)):
        about |= {"dense": own.dense, "reduction": own.reduction}
        if not own.dense:
            about["lateness_ns"] = 0  # no tick waits for what comes when there is something to say
    if given.dense is not None:
        about["dense"] = given.dense
    if given.reduction:
        about["reduction"] = given.reduction
    if given.policy:
        about["policy"] = given.policy
    if given.lateness_ms is not None:
        about["lateness_ns"] = round(given.lateness_ms * 1e6)
    if parent is not None and not derivation_of(given.source):
        about["raw"] = False  # its samples are its parent's
    elif kind != "signal" or encoders:
        about["raw"] = given.raw
    lateness_ns = settings.align.lateness_ns(kind)
    if is_sensor(given.source, kind):
        lateness_ns = max(lateness_ns, PAGE_LATENESS_NS)
    defaults = {"lateness_ns": lateness_ns, "policy": settings.queues.policy(kind)}
    return msgspec.structs.replace(Stream.of(name, kind, given.person), **{**defaults, **about})


def _parent(name: str, given: StreamSettings, table: dict[str, Stream]) -> Stream | None:
    """The stream that this one is made of. Raises ConfigError where it has no samples."""
    if not given.source.startswith("from:"):
        return None
    parent = table.get(parent_of(given.source))
    if parent is None or parent.source == "none":
        raise ConfigError(
            f"`streams.{name}` is made of {parent_of(given.source)!r}, which this session has not; give that stream a "
            "source, or name another one"
        )
    if not parent.raw and (parent.kind != "signal" or parent.encoders):
        why = f"is a copy of `{parent.parent}`; name that one" if parent.parent else "has raw = false; set it to true"
        raise ConfigError(f"`streams.{name}` is made of the samples of `{parent.name}`, which {why}")
    return parent


def _kind(name: str, given: StreamSettings, parent: Stream | None) -> Kind:
    """The kind of a stream: the given one, or what its name and its source stand for. Raises ConfigError."""
    if parent is not None and not derivation_of(given.source):
        if given.kind not in ("", parent.kind):
            raise ConfigError(
                f"`streams.{name}` is {given.kind}, and its samples are those of `{parent.name}`: {parent.kind}; leave "
                "its kind out"
            )
        return parent.kind
    own = DERIVATIONS.get(derivation_of(given.source)) if parent is not None else None
    if parent is not None and own is not None and parent.kind != own.made_of:
        raise ConfigError(
            f"`streams.{name}` is {given.source!r}, which is made of {own.made_of}, and `{parent.name}` is "
            f"{parent.kind}; name a stream of {own.made_of}"
        )
    # a plug-in usually gives a signal
    possible = (own.gives,) if own is not None else SOURCE_KINDS.get(given.source.partition(":")[0], ("signal",))
    usual = named_for(name)
    named = usual[0] if usual else None
    clear = possible[0] if len(possible) == 1 or possible[0] in ("signal", "text") else None
    kind = given.kind or (named if named in possible else clear)
    if kind is None:
        raise ConfigError(
            f"`streams.{name}.kind` is missing: {given.source!r} may give {', '.join(KINDS)}; set one of them"
        )
    return kind


def _check_feeds(table: dict[str, Stream]) -> None:
    both = with_one_value((row for row in table.values() if row.source != "none"), lambda row: row.modality)
    if both is not None:
        raise ConfigError(
            f"the streams `{both[0].name}` and `{both[1].name}` both feed the modality {both[0].modality!r}; change "
            "the `feeds` of one of them"
        )
