"""Sources: each a generator of samples behind a tiny class, opened only in its worker's process.

A source knows its device and the clock. It knows nothing about encoders, the bus or sessions, and keeps no
queue: the worker's pump does (`pipeline.Pump`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from stream_mmrnn.core.config import Settings, Sources
from stream_mmrnn.core.errors import SourceSpecError
from stream_mmrnn.core.topics import AUDIO_RATE_HZ, Kind
from stream_mmrnn.core.topics import MODALITIES as _TABLE
from stream_mmrnn.core.types import Sample

RATE_HZ = AUDIO_RATE_HZ
"""Sound is mono int16 at this rate, wherever it comes from."""


class Source(Protocol):
    """What every source can do."""

    origin: str
    """Its description, such as `camera:0`; travels as the origin of its raw messages."""
    info: dict[str, Any]
    """What was asked for and what was got, and what the device said it lost; complete after `open`."""

    def open(self) -> None:
        """Take the device; raises SourceError where it is not there (the worker asks again later)."""

    def samples(self, alive: Callable[[], bool], epoch_ns: int) -> Iterator[Sample]:
        """Samples as they come, until the stream ends or `alive()` is false (asked ten times a second or more).

        `epoch_ns` is the time of a file's or synthetic stream's beginning; devices stamp with the clock.
        Raises SourceError when the device is lost.
        """

    def close(self) -> None:
        """Give the device back; harmless when it is not open."""


def split(spec: str) -> tuple[str, str]:
    """`camera:0` -> ("camera", "0")."""
    kind, _, rest = spec.partition(":")
    return kind, rest


_KINDS: dict[Kind, tuple[str, ...]] = {
    "vision": ("camera", "file", "synthetic", "none"),
    "audio": ("microphone", "file", "lsl", "synthetic", "none"),
    "text": ("stdin", "pipe", "tcp", "zmq", "lsl", "page", "synthetic", "none"),
    "signal": ("lsl", "none"),
}


NAMED = tuple(m.name for m in _TABLE.values() if m.kind in _KINDS)
"""The modalities that a source can be named for; features of the others come from whoever publishes them."""
EVERY = tuple(name for name in NAMED if "synthetic" in _KINDS[_TABLE[name].kind])
"""Of them, those of people, who can be seen, heard and read: what one source may give together."""
MODALITIES = tuple(name for name in EVERY if not _TABLE[name].other)
"""Of them, those of the person that a session is about."""
OTHER = tuple(name for name in EVERY if _TABLE[name].other)
"""Those of the second person."""


def check(spec: str, modality: str) -> None:
    """Say in one sentence what is wrong with a source's name, before any process starts.

    Raises:
        SourceSpecError: no such kind of source for this modality, or its argument is missing or wrong.
        FileError: `file:PATH` names no readable media file.

    """
    kind, rest = split(spec)
    known = _KINDS[_TABLE[modality].kind]
    if kind not in known:
        raise SourceSpecError(f"{spec!r} is no source of {modality}; use one of {', '.join(known)}")
    if kind == "page" and _TABLE[modality].other:
        raise SourceSpecError(f"what is typed on the page is of the first person, not {modality}; use text = 'page'")
    if kind in ("tcp", "zmq") and not (rest.isdigit() and int(rest) < 65536):
        raise SourceSpecError(f"{spec!r} needs a port on this machine, such as {kind}:5555")
    if kind in ("file", "pipe") and not rest:
        raise SourceSpecError(f"{spec!r} needs a path, such as {kind}:PATH")
    if kind == "lsl":
        from stream_mmrnn.capture.sources.lsl import query

        query(rest)
    if kind == "file":
        from stream_mmrnn.capture.sources.file import streams_of

        streams_of(Path(rest))


def check_all(chosen: Sources) -> None:
    """`check` each of a session's sources, and that no two of them want the same lines.

    Raises:
        SourceSpecError: as `check`, or `text` and `other_text` are one stream that can be read once.
        FileError: as `check`.

    """
    for modality in NAMED:
        check(getattr(chosen, modality), modality)
    kind, rest = split(chosen.text)
    if chosen.text == chosen.other_text and kind not in ("synthetic", "lsl", "none") and rest != "0":
        raise SourceSpecError(
            f"text and other_text cannot both be {chosen.text!r}, whose lines are read once; give one of them another "
            "source, such as tcp:5555"
        )


def everything_from(spec: str) -> dict[str, str]:
    """The source of each modality where one spec is given for all: `synthetic`, `devices` or `file:CLIP`.

    Devices and clips have one person; the synthetic one has somebody to talk to.
    """
    kind, rest = split(spec)
    if kind == "synthetic":
        return dict.fromkeys(EVERY, "synthetic")
    nobody = dict.fromkeys(OTHER, "none")
    if kind == "devices":
        return {"vision": "camera:0", "audio": "microphone", "text": "stdin", **nobody}
    if kind == "file":
        check(spec, "audio")
        from stream_mmrnn.capture.sources.file import streams_of

        has = streams_of(Path(rest))
        return {m: spec if m in has else "none" for m in MODALITIES} | nobody
    raise SourceSpecError(f"{spec!r} is no source; use synthetic, devices or file:PATH")


def create_source(spec: str, modality: str, settings: Settings, stdin_fd: int = -1) -> Source:
    """The source that `spec` names; nothing is opened yet. Imports only what that source needs."""
    kind, rest = split(spec)
    if kind == "camera":
        from stream_mmrnn.capture.sources.camera import Camera

        return Camera(rest or "0", settings.camera)
    if kind == "microphone":
        from stream_mmrnn.capture.sources.microphone import Microphone

        return Microphone(rest, settings.microphone)
    if kind == "file":
        from stream_mmrnn.capture.sources import file

        if _TABLE[modality].kind == "vision":
            return file.FilePicture(Path(rest), settings.camera)
        return file.FileSound(Path(rest), settings.microphone)
    if kind == "synthetic":
        from stream_mmrnn.capture.sources.synthetic import Synthetic

        return Synthetic(modality, settings.synthetic)
    if kind == "lsl":
        from stream_mmrnn.capture.sources.lsl import LslSource

        return LslSource(rest, _TABLE[modality].kind, settings.lsl, settings.microphone, settings.text)
    from stream_mmrnn.capture.sources import text

    return text.create(kind, rest, settings.text, stdin_fd)
