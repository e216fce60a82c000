"""TIMIT: read sentences with phones and words, in (TRAIN|TEST)/DRn/SPEAKER/SENTENCE.WAV, .PHN, .WRD and .TXT.

Garofolo et al., "TIMIT Acoustic-Phonetic Continuous Speech Corpus", LDC93S1, 1993; not free: get it from the LDC. Names
in upper or lower case; the sound is NIST SPHERE as published, or RIFF as many copies have it (also beside the first,
as .WAV.wav). One utterance is in memory at a time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from stream_mmrnn.core.errors import FileError
from stream_mmrnn.training.datasets.audio import Int16Array, pcm
from stream_mmrnn.training.datasets.files import choose, names, read, text

RATE_HZ = 16_000
COUNTS = {"train": 4620, "test": 1680}
"""As published: ten sentences of 462 and of 168 speakers."""
_PHONES = """
b d g p t k dx q bcl dcl gcl pcl tcl kcl jh ch s sh z zh f th v dh m n ng em en eng nx l r w y hh hv el
iy ih eh ey ae aa aw ay ah ao oy ow uh uw ux er ax ix axr ax-h pau epi h#
"""
PHONES = frozenset(_PHONES.split())
"""The 61 phones of PHONCODE.DOC in the corpus."""
_CORE_TEST = """
mdab0 mwbt0 felc0 mtas1 mwew0 fpas0 mjmp0 mlnt0 fpkt0 mlll0 mtls0 fjlm0
mbpm0 mklt0 fnlp0 mcmj0 mjdh0 fmgd0 mgrt0 mnjm0 fdhc0 mjln0 mpam0 fmld0
"""
CORE_TEST = frozenset(_CORE_TEST.split())
"""Speakers of the core test set, from TESTSET.DOC; papers leave out their two SA sentences."""

_SOUND = re.compile(r"(?:^|/)(train|test)/dr([1-8])/([a-z]{4}\d)/(s[aix]\d+)\.wav(?:\.wav)?$", re.IGNORECASE)


class Segment(NamedTuple):
    start: int
    """In samples."""
    end: int
    label: str


class Utterance(msgspec.Struct, frozen=True, gc=False, eq=False):
    samples: Int16Array
    dialect: int
    speaker: str
    """In lower case; begins with f or m."""
    sentence: str
    """sa1, si648, sx37; the two sa sentences are the same for all speakers."""
    text: str
    phones: tuple[Segment, ...]
    words: tuple[Segment, ...]


def utterances(path: Path, split: str) -> Iterator[Utterance]:
    """All utterances of `train` or `test`, sorted by name.

    Raises:
        FileError: there are none, or one is incomplete, damaged, or has labels that do not fit its sound.

    """
    choose("the TIMIT split", split, COUNTS)
    by_key = {name.lower(): name for name in names(path)}
    found = False
    for key, name in by_key.items():
        match = _SOUND.search(key)
        if match is None or match[1] != split:
            continue
        stem = key[: match.end(4)]
        if key.endswith(".wav.wav") and f"{stem}.wav" in by_key:
            continue  # a RIFF copy beside the original
        found = True
        yield _utterance(path, name, stem, by_key, match)
    if not found:
        raise FileError(f"{path} holds no {split.upper()}/DRn/SPEAKER/SENTENCE.WAV; give the unpacked TIMIT folder")


def _utterance(path: Path, name: str, stem: str, by_key: dict[str, str], match: re.Match[str]) -> Utterance:
    rate, samples = pcm(f"{path / name}", read(path / name))
    if rate != RATE_HZ or samples.ndim != 1:
        raise FileError(
            f"the file {path / name} has {samples.shape} samples at {rate} Hz, expected 16000 Hz mono; fetch it again"
        )
    lines = {}
    for kind in ("phn", "wrd", "txt"):
        if f"{stem}.{kind}" not in by_key:
            raise FileError(f"the file {path / name} has no .{kind.upper()} beside it; fetch the corpus again")
        file = path / by_key[f"{stem}.{kind}"]
        lines[kind] = _segments(str(file), text(str(file), read(file)), len(samples))
    unknown = sorted({s.label for s in lines["phn"]} - PHONES)
    if unknown:
        raise FileError(
            f"the file {path / by_key[f'{stem}.phn']} has `{unknown[0]}`, which is not a TIMIT phone; fetch it again"
        )
    sentence = " ".join(s.label for s in lines["txt"])
    return Utterance(samples, int(match[2]), match[3], match[4], sentence, lines["phn"], lines["wrd"])


def _segments(where: str, content: str, samples: int) -> tuple[Segment, ...]:
    """Lines `start end label`. In the published data ends may be slightly after the sound, and words may overlap."""
    segments: list[Segment] = []
    for number, line in enumerate(content.splitlines(), start=1):
        start, _, rest = line.strip().partition(" ")
        end, _, label = rest.strip().partition(" ")
        if not (start.isdigit() and end.isdigit() and label):
            raise FileError(f"the file {where} is damaged in line {number}, expected `start end label`; fetch it again")
        segment = Segment(int(start), int(end), label.strip())
        if segment.end < segment.start or segment.start >= samples or (segments and segment.start < segments[-1].start):
            raise FileError(
                f"the file {where} does not fit the sound's {samples} samples in line {number}; fetch both again"
            )
        segments.append(segment)
    if not segments:
        raise FileError(f"the file {where} is empty, expected lines `start end label`; fetch it again")
    return tuple(segments)
