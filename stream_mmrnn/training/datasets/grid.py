"""GRID: clips of 3 s in which one face speaks a command sentence, as a session with camera and microphone sees them.

Cooke, Barker, Cunningham and Shao, "An audio-visual corpus for speech perception and automatic speech recognition",
2006; CC BY 4.0. Pictures and sound go through the sources, encoders and the aligner of a live session. Knows nothing
about heads and targets.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path

from stream_mmrnn.capture.sources.file import FilePicture, FileSound
from stream_mmrnn.core.errors import FileError
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.stream_table import for_model
from stream_mmrnn.core.types import ModalitySpec, ModelSpec, Sample, Tick
from stream_mmrnn.serve.session_input import SessionInput

_ENDINGS = (".mpg", ".mp4")


def clips(place: Path) -> list[Path]:
    """The clips of a folder, by name; raises FileError where there is none."""
    found = sorted(p for p in place.iterdir() if p.suffix in _ENDINGS) if place.is_dir() else []
    if not found:
        raise FileError(f"{place} holds no clip (.mpg, .mp4); give a folder of GRID with its clips")
    return found


def ticks_of(clip: Path, modalities: Sequence[ModalitySpec], tick_ns: int) -> list[Tick]:
    """The ticks of a clip: `vision` and `audio` of those modalities, each with the encoder that it names.

    Raises:
        FileError: the clip cannot be read, or has no picture or no sound.

    """
    spec = ModelSpec(clip.stem, "", tick_ns, tuple(modalities), (), ())
    settings = for_model(Settings(), modalities, pushed=True)
    made = SessionInput(spec, settings, clip.stem, inputs=("vision", "audio"))
    ticks: list[Tick] = []
    at_ns = made.zero_ns
    for name, sample in _samples(clip, made.zero_ns):
        ticks += made.push(made.stream(name), sample.data, sample.event_ns)
        at_ns = sample.event_ns
    return [*ticks, *made.advance(at_ns)]


def _samples(clip: Path, zero_ns: int) -> Iterator[tuple[str, Sample]]:
    """Pictures and sound in order of time."""
    settings = Settings()
    picture = FilePicture(clip, settings.camera, paced=False)
    sound = FileSound(clip, settings.microphone, paced=False)
    try:
        picture.open()
        sound.open()
        yield from heapq.merge(
            zip(repeat("vision"), picture.samples(lambda: True, zero_ns), strict=False),
            zip(repeat("audio"), sound.samples(lambda: True, zero_ns), strict=False),
            key=lambda row: row[1].event_ns,
        )
    finally:
        picture.close()
        sound.close()
