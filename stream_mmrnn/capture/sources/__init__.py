"""Sources: each is a small class around a generator of samples, opened only in its worker's process.

A source knows its device and the clock. It knows nothing about encoders, the bus or sessions, and has no queue: the
worker has one (`pipeline.Pump`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from stream_mmrnn.bus import Address
from stream_mmrnn.core import plugins
from stream_mmrnn.core.errors import SourceSpecError
from stream_mmrnn.core.numbers import whole_number
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.stream_table import stream_table
from stream_mmrnn.core.streams import SELF, SOURCE_KINDS, Kind, Stream, is_sensor, with_one_value
from stream_mmrnn.core.topics import AUDIO_RATE_HZ
from stream_mmrnn.core.types import Sample

RATE_HZ = AUDIO_RATE_HZ
"""Every source of sound gives mono int16 at this rate."""
WARNINGS, ENDS_EARLY = "warnings", "ends_early"
"""Keys of `Source.info` that a source may have: sentences that a person should know, in the order in which they came
up; and whether what it reads ended before its end."""


class Source(Protocol):
    """The interface of every source."""

    origin: str
    """Its description, such as `camera:0`; the `origin` of its raw messages."""
    info: dict[str, Any]
    """The format that was requested and the one that the device gave, and its loss counts; complete after `open`."""

    def open(self) -> None:
        """Open the device; raises SourceError if it is not there (the worker retries)."""

    def samples(self, alive: Callable[[], bool], epoch_ns: int) -> Iterator[Sample]:
        """Samples as they come, until the stream ends or `alive()` is false (checked at least ten times a second).

        `epoch_ns` is the start time of a file or synthetic stream; devices stamp with the clock.
        Raises SourceError when the device is lost.
        """

    def close(self) -> None:
        """Close the device; does nothing if it is not open."""


def split(spec: str) -> tuple[str, str]:
    """`camera:0` -> ("camera", "0")."""
    kind, _, rest = spec.partition(":")
    return kind, rest


def check(spec: str, name: str, kind: Kind, person: str = SELF, settings: Settings | None = None) -> None:
    """Check a stream's source, before any process starts. `settings`: of a derivation, by default the defaults.

    Raises:
        SourceSpecError: this kind of stream has no such source, or its argument is missing or wrong.
        FileError: `file:PATH` names no readable media file.
        UsageError: a derivation lacks its extra or its model.

    """
    what, rest = split(spec)
    if kind not in SOURCE_KINDS.get(what, ()):
        if what not in SOURCE_KINDS and plugins.find("sources", what) is not None:
            return
        known = [*(source for source, kinds in SOURCE_KINDS.items() if kind in kinds), *plugins.names("sources")]
        raise SourceSpecError(f"{spec!r} is no source of {name}; use one of {', '.join(known)}")
    if what == "page" and rest:
        raise SourceSpecError(f"{spec!r} of {name}: page takes no argument; the browser chooses the device")
    if is_sensor(spec, kind):
        if settings is not None and not settings.dashboard.enabled:
            raise SourceSpecError(f"{name} comes from the page, and this session has none; leave out --no-dashboard")
    elif what == "page" and person != SELF:
        raise SourceSpecError(f"text typed on the page is the first person's, not {name}; use text = 'page'")
    if what in ("tcp", "zmq") and whole_number(rest, 0, 65535) is None:
        raise SourceSpecError(f"{spec!r} needs a port on this machine, such as {what}:5555")
    if what in ("file", "pipe") and not rest:
        raise SourceSpecError(f"{spec!r} needs a path, such as {what}:PATH")
    if what == "from":
        from stream_mmrnn.capture.derive import derivation_of

        derivation_of(Stream.of(name, kind, person, spec), settings or Settings())
    if what == "push" and rest:
        raise SourceSpecError(f"{spec!r} of {name}: push takes no argument; programs name the stream when they push")
    if what == "lsl":
        from stream_mmrnn.capture.sources.lsl import query

        query(rest)
    if what == "file":
        from stream_mmrnn.capture.sources.file import require

        require(Path(rest), kind)


def check_all(streams: Iterable[Stream], settings: Settings | None = None) -> None:
    """`check` each of a session's sources, and that no two of them read the same lines.

    Raises:
        SourceSpecError: see `check`; or two streams read the same lines, which can be read only once.
        FileError: see `check`.

    """
    rows = list(streams)
    for row in rows:
        check(row.source, row.name, row.kind, row.person, settings)
        if row.channel and (split(row.source)[0], row.kind) != ("file", "audio"):
            raise SourceSpecError(f"`streams.{row.name}.channel` is of sound from `file:`; leave it out of this stream")
    lines = (
        row
        for row in rows
        if split(row.source)[0] in _LINES and split(row.source)[1] != "0" and not is_sensor(row.source, row.kind)
    )
    both = with_one_value(lines, lambda row: row.source)
    if both is not None:
        raise SourceSpecError(
            f"{both[0].name} and {both[1].name} cannot both be {both[0].source!r}, whose lines are read once; give one "
            "of them another source, such as tcp:5555"
        )


_LINES = ("stdin", "pipe", "tcp", "zmq", "page")
"""Sources whose lines go to one reader."""
SYNTHETIC = ("vision", "audio", "text", "other_audio", "other_text")
"""The streams of `--source synthetic`: two persons who talk with each other."""


def everything_from(spec: str) -> dict[str, str]:
    """The source of each usual stream for a spec of all of them: `synthetic`, `devices` or `file:CLIP`.

    The synthetic source has two persons, devices and clips have one.
    """
    what, rest = split(spec)
    if what == "synthetic":
        return dict.fromkeys(SYNTHETIC, "synthetic")
    nothing = dict.fromkeys(SYNTHETIC, "none")
    if what == "devices":
        return {**nothing, "vision": "camera:0", "audio": "microphone", "text": "stdin"}
    if what == "file":
        from stream_mmrnn.capture.sources.file import streams_of

        if not rest:
            raise SourceSpecError(f"{spec!r} needs a path, such as file:PATH")
        return {**nothing, **dict.fromkeys(streams_of(Path(rest)), spec)}
    raise SourceSpecError(f"{spec!r} is no source; use synthetic, devices or file:PATH")


def create_source(
    stream: Stream, settings: Settings, stdin_fd: int = -1, *, paced: bool = True, address: Address | None = None
) -> Source:
    """The source of a stream, not yet open; imports only what that source needs.

    `paced`: files and the synthetic source give each sample at its time; else as fast as they are read. `address`: of
    the session's bus, which `from:STREAM`, `push` and a browser's sensors read.
    """
    what, rest = split(stream.source)
    if what in ("from", "push") or is_sensor(stream.source, stream.kind):
        from stream_mmrnn.capture.sources import bus_source

        if address is None:
            raise SourceSpecError(f"{stream.source!r} reads the bus of a live session; use another source here")
        return bus_source.create(stream, stream_table(settings), settings, address)
    if what == "camera":
        from stream_mmrnn.capture.sources.camera import Camera

        return Camera(rest or "0", settings.camera)
    if what == "microphone":
        from stream_mmrnn.capture.sources.microphone import Microphone

        return Microphone(rest, settings.microphone)
    if what == "file":
        from stream_mmrnn.capture.sources import file

        if stream.kind == "vision":
            return file.FilePicture(Path(rest), settings.camera, paced=paced)
        return file.FileSound(Path(rest), settings.microphone, channel=stream.channel, paced=paced)
    if what == "synthetic":
        from stream_mmrnn.capture.sources.synthetic import Synthetic

        return Synthetic(stream, settings.synthetic, paced=paced)
    if what == "lsl":
        from stream_mmrnn.capture.sources.lsl import LslSource

        return LslSource(rest, stream.kind, settings.lsl, settings.microphone, settings.text)
    plugin = None if what in SOURCE_KINDS else plugins.find("sources", what)
    if plugin is not None:
        made: Source = plugins.call(plugin, rest, stream)
        return made
    from stream_mmrnn.capture.sources import text

    return text.create(what, rest, settings.text, stdin_fd)
