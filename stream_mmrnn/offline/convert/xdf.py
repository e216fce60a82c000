"""XDF, the files of Lab Streaming Layer's recorders, as recordings of ours.

pyxdf reads them, and puts the stamps of all streams on one clock. What was sampled then goes the way of live samples:
through the same encoders, in the order of time, with the ticks of a clock between. Knows nothing about how XDF is laid
out, nor how a recording is.
"""

from __future__ import annotations

import gzip
import heapq
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture import encoders
from stream_mmrnn.capture.pipeline import Outgoing, capture
from stream_mmrnn.capture.sources.lsl import int16_of
from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import FileError, UsageError, WireError
from stream_mmrnn.core.extras import need
from stream_mmrnn.core.types import Envelope, Sample
from stream_mmrnn.recording.mcap_file import Recorder

ROLES = ("audio", "other_audio", "text", "other_text", "signal", topics.LABEL, "none")
_MARKERS, _AUDIO = ("markers", "marker", "events"), "audio"
_ALONE = ("audio", "other_audio", "signal")
"""Roles that one stream can have; words and labels of several come together."""
_PACKED = (".xdfz", ".gz")
_BLOCK_S = 0.02
_CLOCK_NS = 10_000_000
_TAIL_NS = 500_000_000
"""How long the clock goes on after the last sample, so that its tick closes."""
_FIRST_NS = 1_000_000_000
_MAX_S = 2**62 / 1e9
_MAX_CHANNELS = 4096

Pieces = Iterator[tuple[int, int, Outgoing | None]]
"""When it arrives, a number that puts what comes at the same time in order, and what; None is the clock."""


class Stream(msgspec.Struct, frozen=True, eq=False):
    """One stream of an XDF file."""

    number: int
    name: str
    kind: str
    """What it says that it is: EEG, Markers, Audio."""
    rate_hz: float
    """0 of events."""
    channels: int
    values: Any
    """[samples, channels] of numbers, or lists of strings."""
    times_s: npt.NDArray[np.float64]
    """[samples], ascending, on the clock of all streams."""
    segments: list[tuple[int, int]]
    """First and last sample of each stretch without a break."""
    offsets: list[tuple[float, float]]
    """When the distance of its clock was measured, and how far it was, in seconds."""

    @property
    def is_text(self) -> bool:
        return isinstance(self.values, list)


def read(path: Path) -> tuple[list[Stream], str, str]:
    """The streams of a file, its date ("" where it has none), and what is wrong with it ("" where nothing is).

    Raises:
        UsageError: pyxdf is not installed.
        FileError: the file is missing, or no XDF.

    """
    need("XDF", "lsl", "pyxdf")
    import pyxdf

    complaints = _Complaints()
    logger = logging.getLogger("pyxdf")
    logger.addHandler(complaints)
    logger.propagate = False
    try:
        # opened here: pyxdf leaves a file open that is none of its own
        with gzip.open(path) if path.suffix in _PACKED else path.open("rb") as file:
            found, header = pyxdf.load_xdf(file)
        streams = [_stream(row) for row in found]
        date = str(header["info"]["datetime"][0]) if header and header["info"].get("datetime") else ""
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror or e}; expected an XDF file") from e
    except Exception as e:  # it parses bytes from outside, and its errors share no base
        raise FileError(f"{path} is no XDF file that pyxdf can read: {type(e).__name__}: {e}") from e
    finally:
        logger.removeHandler(complaints)
        logger.propagate = True
    return streams, date, "; ".join(complaints.said[:3])


class _Complaints(logging.Handler):
    """What pyxdf says of a file that is damaged: it goes on with what it can read."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage().strip())


def _stream(row: dict[str, Any]) -> Stream:
    info = row["info"]
    times_s = np.asarray(row["time_stamps"], np.float64)
    if not np.isfinite(times_s).all() or (np.abs(times_s) > _MAX_S).any():
        raise ValueError("a stamp is no time")
    values = row["time_series"]
    segments = [(int(a), int(b)) for a, b in info.get("segments") or []]
    if (np.diff(times_s) < 0).any():  # a clock was set back
        order = np.argsort(times_s, kind="stable")
        times_s = times_s[order]
        values = [values[i] for i in order] if isinstance(values, list) else values[order]
        segments = [(0, len(times_s) - 1)] if len(times_s) else []
    return Stream(
        int(info["stream_id"]),
        str(info["name"][0] or ""),
        str(info["type"][0] or ""),
        float(info["nominal_srate"][0]),
        int(info["channel_count"][0]),
        values,
        times_s,
        segments,
        list(zip(map(float, row["clock_times"]), map(float, row["clock_values"]), strict=True)),
    )


def roles(streams: Sequence[Stream], chosen: dict[str, str]) -> dict[int, str]:
    """What each stream becomes, by its number. `chosen`: what the user says of some, by name or number.

    Raises:
        UsageError: there is no such stream or role, it does not fit, or two streams have the role of one.

    """
    found: dict[int, str] = {}
    names = {s.number: s.name for s in streams}
    for key, role in chosen.items():
        numbers = [s.number for s in streams if key in (s.name, str(s.number))]
        if not numbers:
            raise UsageError(f"there is no stream {key!r}; there are {', '.join(map(repr, names.values())) or 'none'}")
        if role not in ROLES:
            raise UsageError(f"{role!r} is nothing that a stream can be; use one of {', '.join(ROLES)}")
        found |= dict.fromkeys(numbers, role)
    for stream in streams:
        if stream.number not in found:
            found[stream.number] = _usual(stream, set(found.values()))
        _check(stream, found[stream.number])
    for role in _ALONE:
        those = [names[n] for n, r in found.items() if r == role]
        if len(those) > 1:
            raise UsageError(
                f"several streams could be the {role}: {', '.join(map(repr, those))}; say which one by "
                f"--as {those[0]}={role}, and --as NAME=none for the others"
            )
    if all(role == "none" for role in found.values()):
        raise UsageError("no stream of the file is of use; say what one is by --as NAME=signal")
    return found


def _usual(stream: Stream, taken: set[str]) -> str:
    kind = stream.kind.lower()
    if not len(stream.times_s):
        return "none"
    if kind in _MARKERS:
        return topics.LABEL
    if stream.is_text:
        return "text"
    if kind == _AUDIO:
        return next((role for role in ("audio", "other_audio") if role not in taken), "none")
    return "none" if "signal" in taken and stream.rate_hz == 0 else "signal"


def _check(stream: Stream, role: str) -> None:
    kind = topics.MODALITIES[role].kind if role in topics.MODALITIES else role
    if kind == "text" and not stream.is_text:
        raise UsageError(f"the stream {stream.name!r} holds numbers, and {role} is strings")
    if kind in ("audio", "signal") and stream.is_text:
        raise UsageError(f"the stream {stream.name!r} holds strings, and {role} is numbers")
    if kind == "audio" and stream.rate_hz < 1:
        raise UsageError(f"the stream {stream.name!r} has no fixed rate, and {role} is sound")
    if stream.channels > _MAX_CHANNELS:
        raise UsageError(f"the stream {stream.name!r} has {stream.channels} channels; {_MAX_CHANNELS} are the most")


def _samples(stream: Stream, modality: str, shift_ns: int) -> Iterator[Sample]:
    if topics.MODALITIES[modality].kind == "audio":
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


def _sound(stream: Stream, shift_ns: int) -> Iterator[Sample]:
    from stream_mmrnn.capture.sources.microphone import Resampler

    rate_hz = round(stream.rate_hz)
    step = max(round(rate_hz * _BLOCK_S), 1)
    for first, last in stream.segments:
        resampler = Resampler(rate_hz, 1, round(topics.AUDIO_RATE_HZ * _BLOCK_S))
        for begin in range(first, last + 1, step):
            end = min(begin + step, last + 1)
            mono = int16_of(stream.values[begin:end]).astype(np.int32).mean(axis=1).astype(np.int16)
            # a stamp is of a sample's beginning, an event time of its end
            end_ns = round((stream.times_s[end - 1] + 1 / stream.rate_hz) * 1e9) + shift_ns
            for sound, at_ns in resampler.feed(mono, end_ns):
                yield Sample(at_ns, end_ns, sound)


def _labels(stream: Stream, shift_ns: int) -> Iterator[Outgoing]:
    for value, at_s in zip(stream.values, stream.times_s, strict=True):
        at_ns = round(at_s * 1e9) + shift_ns
        name = str(value[0]).strip() if stream.is_text else f"{float(np.ravel(value)[0]):g}"
        if name:
            yield Outgoing(topics.LABEL, Sample(at_ns, at_ns, name.encode()), f"xdf:{stream.name}")


class Summary(msgspec.Struct):
    """What became of a file."""

    messages: int = 0
    undecodable: int = 0
    """Samples that no encoder took: not finite, or no text."""
    first_ns: int = 0
    last_ns: int = 0


def convert(
    path: Path,
    out: Path,
    session: str = "imported",
    chosen: dict[str, str] | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> dict[str, Any]:
    """Make a recording of an XDF file; `progress` is told the share that is done.

    Raises:
        FileError: the file is no XDF, or `out` is there already or cannot be written.
        UsageError: what a stream shall be is not clear, or not possible.

    """
    streams, date, damage = read(path)
    role_of = roles(streams, chosen or {})
    used = [s for s in streams if role_of[s.number] != "none" and len(s.times_s)]
    if not used:
        raise FileError(f"{path} holds no sample of the streams that are wanted")
    begin_ns = round(min(s.times_s[0] for s in used) * 1e9)
    shift_ns = max(_FIRST_NS - begin_ns, 0)  # no time of ours is negative
    begin_ns += shift_ns
    end_ns = round(max(s.times_s[-1] for s in used) * 1e9) + shift_ns
    try:
        wall_offset_ns = round(datetime.fromisoformat(date).timestamp() * 1e9) - begin_ns
    except (ValueError, OverflowError, OSError):
        wall_offset_ns = 0
    settings = config.Settings(
        session=config.Session(session),
        sources=config.Sources(**dict.fromkeys(config.Sources.__struct_fields__, "none")),
    )
    recorder = Recorder(
        out,
        session,
        {
            "part": "1",
            "raw": "true",
            "slots": "1",
            "model": "",
            "model_sha256": "",
            "config": msgspec.json.encode(settings).decode(),
            "platform": sys.platform,
            "started_ns": str(begin_ns),
            "imported_from": path.name,
            "imported_shift_ns": str(shift_ns),
            "clock_offsets_s": msgspec.json.encode({f"{s.number}:{s.name}": s.offsets for s in streams}).decode(),
        },
        wall_offset_ns=wall_offset_ns if wall_offset_ns + begin_ns > 0 else 0,
    )
    summary = Summary(first_ns=begin_ns, last_ns=end_ns)
    try:
        for envelope in _envelopes(used, role_of, session, begin_ns, end_ns, shift_ns, summary):
            recorder.write(envelope)
            recorder.flush_due(now_ns())
            if recorder.trouble:
                raise FileError(f"{out} cannot be written: {recorder.trouble}; make room, or choose another place")
            if envelope.topic == topics.CLOCK:
                progress((envelope.event_ns - begin_ns) / (end_ns + _TAIL_NS - begin_ns))
        whole = recorder.close({"ended": "imported", "lost": "{}", "statuses": "{}"})
        if not whole:
            raise FileError(f"{out} cannot be written: {recorder.trouble}; make room, or choose another place")
    except BaseException:
        recorder.abandon()
        out.unlink(missing_ok=True)
        raise
    return {
        "recording": str(out),
        "of": str(path),
        "session": session,
        "seconds": round((end_ns - begin_ns) / 1e9, 3),
        "messages": recorder.counts,
        "undecodable": summary.undecodable,
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


def _envelopes(
    used: Sequence[Stream],
    role_of: dict[int, str],
    session: str,
    begin_ns: int,
    end_ns: int,
    shift_ns: int,
    summary: Summary,
) -> Iterator[Envelope]:
    """The sequence that would have been on the bus."""

    def bad(_: WireError) -> None:
        summary.undecodable += 1

    def pieces(order: int, outgoing: Iterator[Outgoing]) -> Pieces:
        # what a sample's features are ready for is there when the sample is
        yield from ((out.sample.capture_ns, order, out) for out in outgoing)

    def modality_of(modality: str) -> Iterator[Outgoing]:
        those = [s for s in used if role_of[s.number] == modality]
        samples = heapq.merge(*(_samples(s, modality, shift_ns) for s in those), key=lambda s: s.capture_ns)
        origin = "+".join(f"xdf:{s.name}" for s in those)
        return capture(samples, modality, origin, encoders.create_encoder(modality), bad)

    modalities = [m for m in topics.MODALITIES if m in role_of.values() and any(role_of[s.number] == m for s in used)]
    labels = heapq.merge(
        *(_labels(s, shift_ns) for s in used if role_of[s.number] == topics.LABEL), key=lambda o: o.sample.capture_ns
    )
    clock: Pieces = ((at_ns, len(ROLES), None) for at_ns in range(begin_ns, end_ns + _TAIL_NS, _CLOCK_NS))
    merged = heapq.merge(
        pieces(0, iter(labels)),
        *(pieces(1 + i, modality_of(m)) for i, m in enumerate(modalities)),
        clock,
        key=lambda piece: piece[:2],
    )
    seq: dict[str, int] = {}

    def envelope(topic: str, sample: Sample, arrival_ns: int, origin: str = "") -> Envelope:
        number = seq[topic] = seq.get(topic, -1) + 1
        summary.messages += 1
        owner = topics.EVERYONE if topic == topics.CLOCK else session
        return Envelope(topic, owner, number, sample.event_ns, arrival_ns, arrival_ns, sample.data, origin, arrival_ns)

    def about(op: str, at_ns: int) -> Sample:
        return Sample(at_ns, at_ns, wire.pack(wire.SessionMessage(op, at_ns, tuple(modalities))))  # type: ignore[arg-type]

    yield envelope(topics.SESSION, about("open", begin_ns - 1), begin_ns - 1)
    for arrival_ns, _, out in merged:
        if out is None:
            yield envelope(topics.CLOCK, Sample(arrival_ns, arrival_ns, b""), arrival_ns)
        else:
            yield envelope(out.topic, out.sample, arrival_ns, out.origin)
    yield envelope(topics.SESSION, about("close", end_ns + _TAIL_NS), end_ns + _TAIL_NS)
