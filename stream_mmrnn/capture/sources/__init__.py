"""SourcesSettings: each is a small class around a generator of samples, opened only in its worker's process.

A source knows its device and the clock. It knows nothing about encoders, the bus or sessions, and has no queue: the
worker has one (`pipeline.Pump`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from stream_mmrnn.core.config import Settings, SourcesSettings
from stream_mmrnn.core.errors import SourceSpecError
from stream_mmrnn.core.topics import AUDIO_RATE_HZ, Kind
from stream_mmrnn.core.topics import MODALITIES as _TABLE
from stream_mmrnn.core.types import Sample

RATE_HZ = AUDIO_RATE_HZ
"""Every source of sound gives mono int16 at this rate."""


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


_KINDS: dict[Kind, tuple[str, ...]] = {
    "vision": ("camera", "file", "synthetic", "none"),
    "audio": ("microphone", "file", "lsl", "synthetic", "none"),
    "text": ("stdin", "pipe", "tcp", "zmq", "lsl", "page", "synthetic", "none"),
    "signal": ("lsl", "none"),
}


NAMED = tuple(m.name for m in _TABLE.values() if m.kind in _KINDS)
"""The modalities that have sources; other programs publish the features of the rest."""
EVERY = tuple(name for name in NAMED if "synthetic" in _KINDS[_TABLE[name].kind])
"""Those of them that the synthetic source has."""
MODALITIES = tuple(name for name in EVERY if not _TABLE[name].other)
"""Those of the first person."""
OTHER = tuple(name for name in EVERY if _TABLE[name].other)
"""Those of the second person."""


def check(spec: str, modality: str) -> None:
    """Check a source's name, before any process starts.

    Raises:
        SourceSpecError: this modality has no such kind of source, or its argument is missing or wrong.
        FileError: `file:PATH` names no readable media file.

    """
    kind, rest = split(spec)
    known = _KINDS[_TABLE[modality].kind]
    if kind not in known:
        raise SourceSpecError(f"{spec!r} is no source of {modality}; use one of {', '.join(known)}")
    if kind == "page" and _TABLE[modality].other:
        raise SourceSpecError(f"text typed on the page is the first person's, not {modality}; use text = 'page'")
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


def check_all(chosen: SourcesSettings) -> None:
    """`check` each of a session's sources, and that no two of them read the same lines.

    Raises:
        SourceSpecError: see `check`; or `text` and `other_text` are the same stream, which can be read only once.
        FileError: see `check`.

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
    """The source of each modality for a spec of all modalities: `synthetic`, `devices` or `file:CLIP`.

    The synthetic source has two persons, devices and clips have one.
    """
    kind, rest = split(spec)
    if kind == "synthetic":
        return dict.fromkeys(EVERY, "synthetic")
    no_other = dict.fromkeys(OTHER, "none")
    if kind == "devices":
        return {"vision": "camera:0", "audio": "microphone", "text": "stdin", **no_other}
    if kind == "file":
        check(spec, "audio")
        from stream_mmrnn.capture.sources.file import streams_of

        has = streams_of(Path(rest))
        return {m: spec if m in has else "none" for m in MODALITIES} | no_other
    raise SourceSpecError(f"{spec!r} is no source; use synthetic, devices or file:PATH")


def create_source(spec: str, modality: str, settings: Settings, stdin_fd: int = -1) -> Source:
    """The source that `spec` names, not yet open; imports only what that source needs."""
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
