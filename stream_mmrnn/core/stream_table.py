"""The table of a session's streams, from its settings: live, in replay and in training the same.

The one place that knows how `[sources]`, `[streams]`, `[align]` and `[queues]` make a stream.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from stream_mmrnn.core.config import Settings
from stream_mmrnn.core.errors import ConfigError
from stream_mmrnn.core.streams import KINDS, SHORT_FORMS, SOURCE_KINDS, Stream, usual, with_one_value
from stream_mmrnn.core.topics import STREAM_NAME


def stream_table(settings: Settings) -> dict[str, Stream]:
    """The streams of a session by name; also those without a source (`none`) that have settings of their own.

    Raises:
        ConfigError: a stream's kind cannot be told from its source, two streams feed one modality, or a stream has a
            name that no stream may have.

    """
    table: dict[str, Stream] = {}
    for name, row in usual().items():
        if name not in settings.streams:
            table[name] = _with_defaults(row, settings, source=getattr(settings.sources, name))
    for name, given in settings.streams.items():
        if not re.match(STREAM_NAME, name):
            raise ConfigError(f"`streams.{name}`: a stream's name has 1 to 32 letters, digits, `_` or `-`")
        possible = SOURCE_KINDS.get(given.source.partition(":")[0], ("signal",))  # what most plug-ins give
        named = SHORT_FORMS[name][0] if name in SHORT_FORMS else None
        clear = possible[0] if len(possible) == 1 or possible[0] == "signal" else None
        kind = given.kind or (named if named in possible else clear)
        if kind is None:
            raise ConfigError(
                f"`streams.{name}.kind` is missing: {given.source!r} may give {', '.join(KINDS)}; set one of them"
            )
        made = Stream.of(name, kind, given.person)
        about: dict[str, Any] = {"source": given.source, "encoders": given.encoders, "feeds": given.feeds}
        if given.dense is not None:
            about["dense"] = given.dense
        if given.reduction:
            about["reduction"] = given.reduction
        if given.policy:
            about["policy"] = given.policy
        if given.lateness_ms is not None:
            about["lateness_ns"] = round(given.lateness_ms * 1e6)
        if kind != "signal" or given.encoders:
            about["raw"] = given.raw
        table[name] = _with_defaults(made, settings, **about)
    _check_feeds(table)
    return table


def _with_defaults(made: Stream, settings: Settings, **given: Any) -> Stream:
    defaults = {"lateness_ns": settings.align.lateness_ns(made.kind), "policy": settings.queues.policy(made.kind)}
    return msgspec.structs.replace(made, **{**defaults, **given})


def _check_feeds(table: dict[str, Stream]) -> None:
    both = with_one_value((row for row in table.values() if row.source != "none"), lambda row: row.modality)
    if both is not None:
        raise ConfigError(
            f"the streams `{both[0].name}` and `{both[1].name}` both feed the modality {both[0].modality!r}; change "
            "the `feeds` of one of them"
        )
