"""Convert an XDF file, as Lab Streaming Layer's recorders write it, to a recording.

Its samples are processed like live ones: sorted by time, encoded by the same encoders, with clock messages between.
Knows nothing about the layout of XDF files (`xdf_file`) or of recordings.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from stream_mmrnn.capture.pipeline import Outgoing
from stream_mmrnn.capture.sources.lsl import int16_of
from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.settings import StreamSettings
from stream_mmrnn.core.types import Sample
from stream_mmrnn.core.wire import encodable
from stream_mmrnn.offline.convert.imported import (
    FIRST_NS,
    Imported,
    SampledMessages,
    described,
    without_devices,
    write,
)
from stream_mmrnn.offline.convert.roles import is_role, kind_of, own_name, stream_of
from stream_mmrnn.offline.convert.xdf_file import XdfStream, read

ROLES = ("audio", "other_audio", "text", "other_text", "signal", topics.LABEL, "none")
_MARKERS, _AUDIO = ("markers", "marker", "events"), "audio"
_NAMED = ("audio", "text", "signal")
"""Kinds of a role STREAM:KIND: a stream with a name of its own."""
_MERGED = ("text", topics.LABEL, "none")
"""Kinds of which several streams may have one role: they are merged."""
_BLOCK_S = 0.02
_MAX_CHANNELS = 4096
_LEAST_HZ, _MOST_HZ = 1000, 384_000
"""Rates of sound, as for what programs push."""


def roles(streams: Sequence[XdfStream], chosen: dict[str, str]) -> dict[int, str]:
    """The role of each stream, by its number. `chosen`: roles that the user assigned, by name or number.

    Raises:
        UsageError: there is no such stream or role, it does not fit, or two streams have a role that allows one.

    """
    found: dict[int, str] = {}
    names = {s.number: s.name for s in streams}
    for key, role in chosen.items():
        numbers = [s.number for s in streams if key in (s.name, str(s.number))]
        if not numbers:
            raise UsageError(f"there is no stream {key!r}; there are {', '.join(map(repr, names.values())) or 'none'}")
        if not is_role(role, ROLES, _NAMED):
            raise UsageError(f"{role!r} is not a role of a stream; use one of {', '.join(ROLES)}, or STREAM:KIND")
        found |= dict.fromkeys(numbers, role)
    for stream in streams:
        if stream.number not in found:
            found[stream.number] = _usual(stream, set(found.values()))
    signals = [
        s for s in streams if found[s.number] == "signal" and str(s.number) not in chosen and s.name not in chosen
    ]
    if len(signals) > 1:
        for stream in signals:
            taken = {role.partition(":")[0] for role in found.values()}
            found[stream.number] = own_name(stream.name, stream.number, taken, "signal")
    for stream in streams:
        _check(stream, found[stream.number])
    for role in dict.fromkeys(found.values()):
        those = [names[n] for n, r in found.items() if r == role]
        if len(those) > 1 and kind_of(role) not in _MERGED:
            numbers = [n for n, r in found.items() if r == role]
            same = len(set(those)) < len(those)
            named = ", ".join(f"{names[n]!r} (number {n})" if same else repr(names[n]) for n in numbers)
            raise UsageError(
                f"several streams could be the {role}: {named}; choose one with "
                f"--as {numbers[0] if same else those[0]}={role}, and --as {'NUMBER' if same else 'NAME'}=none for the "
                "others"
            )
    if all(role == "none" for role in found.values()):
        raise UsageError("the file has no stream that can be used; assign a role with --as NAME=signal")
    return found


def _usual(stream: XdfStream, taken: set[str]) -> str:
    kind = stream.kind.lower()
    if not len(stream.times_s):
        return "none"
    if kind in _MARKERS:
        return topics.LABEL
    if stream.is_text:
        return "text"
    if kind == _AUDIO:
        # of another rate it is no sound, and as a signal it would take the name of the one that is meant
        free = [role for role in ("audio", "other_audio") if role not in taken] if _is_rate(stream.rate_hz) else []
        return free[0] if free else "none"
    return "none" if "signal" in taken and stream.rate_hz == 0 else "signal"


def _check(stream: XdfStream, role: str) -> None:
    kind = kind_of(role)
    if kind == "text" and not stream.is_text:
        raise UsageError(f"the stream {stream.name!r} holds numbers, but {role} needs strings")
    if kind in ("audio", "signal") and stream.is_text:
        raise UsageError(f"the stream {stream.name!r} holds strings, but {role} needs numbers")
    if kind == "audio" and not stream.rate_hz:
        raise UsageError(f"the stream {stream.name!r} has no fixed rate, but {role} needs one")
    if kind == "audio" and not _is_rate(stream.rate_hz):
        raise UsageError(
            f"the stream {stream.name!r} has {stream.rate_hz:g} samples a second, but {role} needs {_LEAST_HZ} to "
            f"{_MOST_HZ}"
        )
    if stream.channels > _MAX_CHANNELS:
        raise UsageError(f"the stream {stream.name!r} has {stream.channels} channels; the limit is {_MAX_CHANNELS}")


def _is_rate(rate_hz: float) -> bool:
    """Whether sound can have this rate."""
    return _LEAST_HZ <= rate_hz <= _MOST_HZ


def _samples(stream: XdfStream, kind: str, shift_ns: int) -> Iterator[Sample]:
    if kind == "audio":
        yield from _sound(stream, shift_ns)
        return
    for value, at_s in zip(stream.values, stream.times_s, strict=True):
        at_ns = round(at_s * 1e9) + shift_ns
        if stream.is_text:
            text = str(value[0]).strip().encode()
            if text:
                yield Sample(at_ns, at_ns, text)
        else:
            yield Sample(at_ns, at_ns, np.asarray(value, np.float32))


def _sound(stream: XdfStream, shift_ns: int) -> Iterator[Sample]:
    from stream_mmrnn.capture.resampler import BlockResampler

    rate_hz = round(stream.rate_hz)
    step = max(round(rate_hz * _BLOCK_S), 1)
    for first, last in stream.segments:
        resampler = BlockResampler(rate_hz, 1, round(topics.AUDIO_RATE_HZ * _BLOCK_S))
        for begin in range(first, last + 1, step):
            end = min(begin + step, last + 1)
            mono = int16_of(stream.values[begin:end]).astype(np.int32).mean(axis=1).astype(np.int16)
            # XDF stamps the start of a sample, event time is its end
            end_ns = round((stream.times_s[end - 1] + 1 / stream.rate_hz) * 1e9) + shift_ns
            for sound, at_ns in resampler.feed(mono, end_ns):
                yield Sample(at_ns, end_ns, sound)


def _imported(used: Sequence[XdfStream], role_of: dict[int, str], shift_ns: int) -> list[Imported]:
    found = []
    for role in {role_of[s.number]: None for s in used if role_of[s.number] != topics.LABEL}:
        streams, row = [s for s in used if role_of[s.number] == role], stream_of(role)
        samples = heapq.merge(*(_samples(s, row.kind, shift_ns) for s in streams), key=lambda s: s.capture_ns)
        found.append(Imported(row, "+".join(f"xdf:{s.name}" for s in streams), samples))
    return found


def _labels(used: Sequence[XdfStream], role_of: dict[int, str], shift_ns: int) -> Iterable[Outgoing]:
    labels = [_labels_of(s, shift_ns) for s in used if role_of[s.number] == topics.LABEL]
    return heapq.merge(*labels, key=lambda out: out.sample.capture_ns)


def _labels_of(stream: XdfStream, shift_ns: int) -> Iterator[Outgoing]:
    for value, at_s in zip(stream.values, stream.times_s, strict=True):
        at_ns = round(at_s * 1e9) + shift_ns
        name = str(value[0]).strip() if stream.is_text else f"{float(np.ravel(value)[0]):g}"
        if name:
            yield Outgoing(topics.LABEL, Sample(at_ns, at_ns, name.encode()), f"xdf:{stream.name}")


def convert(
    path: Path,
    out: Path,
    session: str = "imported",
    chosen: dict[str, str] | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> dict[str, Any]:
    """Convert an XDF file to a recording; `progress` is called with the share that is done.

    Raises:
        FileError: `path` is no XDF file, or `out` exists already or cannot be written.
        UsageError: the role of a stream is ambiguous or impossible.

    """
    streams, date, damage = read(path)
    role_of = roles(streams, chosen or {})
    used = [s for s in streams if role_of[s.number] != "none" and len(s.times_s)]
    if not used:
        raise FileError(f"{path} holds no samples of the chosen streams")
    begin_ns = round(min(s.times_s[0] for s in used) * 1e9)
    shift_ns = max(FIRST_NS - begin_ns, 0)  # event times must not be negative
    begin_ns += shift_ns
    end_ns = round(max(s.times_s[-1] for s in used) * 1e9) + shift_ns
    try:
        wall_offset_ns = round(datetime.fromisoformat(date).timestamp() * 1e9) - begin_ns
    except (ValueError, OverflowError, OSError):
        wall_offset_ns = 0
    span_ns = (begin_ns, end_ns)
    named = {stream_of(role_of[s.number]): s for s in reversed(used) if ":" in role_of[s.number]}
    settings = without_devices(
        session, {row.name: StreamSettings(f"lsl:{s.name}", row.kind) for row, s in named.items()}
    )
    source = SampledMessages(session, span_ns, _imported(used, role_of, shift_ns), _labels(used, role_of, shift_ns))
    counts = write(
        out,
        settings,
        source,
        span_ns,
        {
            "imported_from": encodable(path.name),
            "imported_shift_ns": str(shift_ns),
            "clock_offsets_s": msgspec.json.encode({f"{s.number}:{s.name}": s.offsets for s in streams}).decode(),
        },
        wall_offset_ns,
        progress,
    )
    return {
        **described(out, path, settings, span_ns),
        "messages": counts,
        "undecodable": source.undecodable,
        "gaps": [{"after_s": after_ns / 1e9, "seconds": gap_ns / 1e9} for after_ns, gap_ns in source.gaps],
        "streams": [
            {
                "number": s.number,
                "name": s.name,
                "type": s.kind,
                "role": role_of[s.number],
                "samples": len(s.times_s),
                "clock_offsets": len(s.offsets),
            }
            for s in streams
        ],
        "damage": f"{path.name} is damaged: {damage}" if damage else "",
    }
