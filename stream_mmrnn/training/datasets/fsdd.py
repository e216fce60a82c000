"""Free Spoken Digit Dataset: short recordings of English digits, 8 kHz, in `recordings/{digit}_{speaker}_{index}.wav`.

Jackson et al., "Free Spoken Digit Dataset", v1.0.10, doi:10.5281/zenodo.1342401; CC BY-SA 4.0. From a folder or an
archive.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path

import msgspec

from stream_mmrnn.core.errors import FileError
from stream_mmrnn.training.datasets.audio import Int16Array, pcm
from stream_mmrnn.training.datasets.files import choose, complete, files

RATE_HZ = 8000
CLASSES = tuple("0123456789")
TEST_INDICES = range(5)
"""The official test split from the README of the data set: the first five of each digit and speaker."""

_NAME = re.compile(r"(?:^|/)(\d)_([A-Za-z]+)_(\d+)\.wav$")


class FsddRecording(msgspec.Struct, frozen=True, gc=False, eq=False):
    samples: Int16Array
    digit: int
    speaker: str
    index: int


def load(path: Path) -> list[FsddRecording]:
    """All recordings, by speaker, digit and index.

    Raises:
        FileError: there are none, one is damaged or not 8 kHz mono, or one between two others is missing.

    """
    found = []
    for name, raw in files(path, lambda name: name.lower().endswith(".wav")):
        where, match = f"{path}/{name}", _NAME.search(name)
        if match is None:
            raise FileError(f"the file {where} is not called DIGIT_SPEAKER_INDEX.wav; take it out or rename it")
        rate, samples = pcm(where, raw)
        if rate != RATE_HZ or samples.ndim != 1 or not len(samples):
            raise FileError(
                f"the file {where} has {samples.shape} samples at {rate} Hz, expected 8000 Hz mono; fetch it again"
            )
        found.append(FsddRecording(samples, int(match[1]), match[2], int(match[3])))
    if not found:
        raise FileError(f"{path} holds no DIGIT_SPEAKER_INDEX.wav; give the folder or archive with `recordings/`")
    indices: dict[tuple[str, int], list[int]] = defaultdict(list)
    for recording in found:
        indices[recording.speaker, recording.digit].append(recording.index)
    for (speaker, digit), numbers in indices.items():
        complete(str(path), f"{digit}_{speaker} recording", numbers)
    return sorted(found, key=lambda r: (r.speaker, r.digit, r.index))


def official_split(recordings: Iterable[FsddRecording]) -> tuple[list[FsddRecording], list[FsddRecording]]:
    """The split of the authors: every speaker is in train and test."""
    both: tuple[list[FsddRecording], list[FsddRecording]] = [], []
    for recording in recordings:
        both[recording.index in TEST_INDICES].append(recording)
    return both


def speaker_split(
    recordings: Iterable[FsddRecording], test: Collection[str]
) -> tuple[list[FsddRecording], list[FsddRecording]]:
    """A split by speaker: the named speakers are in the test only, to measure unknown voices.

    Raises:
        UsageError: a speaker is unknown.

    """
    everyone = list(recordings)
    speakers = sorted({r.speaker for r in everyone})
    for speaker in test:
        choose("the speaker", speaker, speakers)
    return [r for r in everyone if r.speaker not in test], [r for r in everyone if r.speaker in test]
