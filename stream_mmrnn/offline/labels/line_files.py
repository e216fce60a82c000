"""Labels in the line formats of speech evaluation, RTTM and CTM. Both have one label a line and fields between spaces.

RTTM: NIST, "The 2009 (RT-09) Rich Transcription Meeting Recognition Evaluation Plan", appendix A, "RTTM File Format
Specification": `SPEAKER FILE CHANNEL BEGIN DURATION ORTHO SUBTYPE NAME CONFIDENCE [LOOKAHEAD]`; `;;` begins a comment.
CTM: NIST SCTK, sclite's "CTM Format Definition": `FILE CHANNEL BEGIN DURATION WORD [CONFIDENCE [TYPE]]`.
Both have seconds from the beginning of the file, and no tiers: labels of several channels become tiers by channel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import FileError
from stream_mmrnn.offline.labels.entries import Entry, lines_of, name_of, seconds_ns, text_of, written_s

_DIGITS = 6
_OTHER_TYPES = (
    "SEGMENT",
    "NOSCORE",
    "NO_RT_METADATA",
    "LEXEME",
    "NON-LEX",
    "NON-SPEECH",
    "FILLER",
    "EDIT",
    "IP",
    "SU",
    "CB",
    "A/P",
    "SPKR-INFO",
)
_RTTM = "SPEAKER FILE CHANNEL BEGIN DURATION <NA> <NA> NAME <NA> <NA>"
_CTM = "FILE CHANNEL BEGIN DURATION WORD"


class _Line(NamedTuple):
    where: str
    file: str
    channel: str
    begin: str
    duration: str
    name: str


def read_rttm(path: Path, names: Sequence[str], note: Callable[[str], None]) -> list[Entry]:
    """The speakers of an RTTM file; `names`: how the file may call the recording. Raises FileError."""
    found, others = [], Counter[str]()
    for number, line in lines_of(text_of(path)):
        fields = line.split()
        if fields[0].startswith(";;"):
            continue
        if fields[0] in _OTHER_TYPES:
            others[fields[0]] += 1
            continue
        if fields[0] != "SPEAKER":
            raise FileError(f"{path}: line {number} begins with {fields[0][:40]!r}; expected a line {_RTTM}")
        if not 9 <= len(fields) <= 10:
            raise FileError(f"{path}: line {number} has {len(fields)} fields; expected 9 or 10: {_RTTM}")
        found.append(_Line._make([f"line {number}", *fields[1:5], fields[7]]))
    for kind, count in others.items():
        note(f"{path.name}: {count} lines of the type {kind} were left out; speakers are read")
    return _entries(path, found, names, "SPEAKER line")


def read_ctm(path: Path, names: Sequence[str]) -> list[Entry]:
    """The words of a CTM file; `names`: how the file may call the recording. Raises FileError."""
    found = []
    for number, line in lines_of(text_of(path)):
        fields = line.split()
        if fields[0].startswith(";;"):
            continue
        if not 5 <= len(fields) <= 8:
            raise FileError(f"{path}: line {number} has {len(fields)} fields; expected 5 to 8: {_CTM}")
        found.append(_Line._make([f"line {number}", *fields[:5]]))
    return _entries(path, found, names, "word")


def _entries(path: Path, lines: Sequence[_Line], names: Sequence[str], what: str) -> list[Entry]:
    if not lines:
        raise FileError(f"{path} has no {what}; expected one for each label")
    files = list(dict.fromkeys(line.file for line in lines))
    mine = files[0] if len(files) == 1 else next((name for name in names if name in files), None)
    if mine is None:
        raise FileError(
            f"{path} is of {len(files)} files ({', '.join(files[:8])}), and none is called {' or '.join(names)}; keep "
            "the lines of this recording, or rename the file in them"
        )
    lines = [line for line in lines if line.file == mine]
    several = len({line.channel for line in lines}) > 1
    entries = []
    for line in lines:
        begin_ns = seconds_ns(path, line.where, "begin", line.begin)
        end_ns = begin_ns + seconds_ns(path, line.where, "duration", line.duration)
        tier = line.channel if several else topics.LABEL
        entries.append(Entry(line.where, tier, begin_ns, end_ns, name_of(path, line.where, line.name)))
    return entries


def write(path: Path, entries: Sequence[Entry], name: str) -> None:
    """Write labels of one tier; `name`: of the recording. Raises FileError for what the format cannot hold."""
    is_rttm = path.suffix.lower() == ".rttm"
    tiers = list(dict.fromkeys(e.tier for e in entries))
    if len(tiers) > 1:
        raise FileError(f"{path.name} can hold no tiers, and there are {', '.join(tiers)}; choose one with --tier")
    file = "".join("_" if c.isspace() else c for c in name) or "recording"
    rows = []
    for e in entries:
        assert e.end_ns is not None
        if e.name.split() != [e.name]:
            raise FileError(
                f"{path.name} separates its fields by spaces, and the label {e.name[:80]!r} has one; use .csv, .eaf or "
                ".TextGrid"
            )
        begin = written_s(e.begin_ns, _DIGITS)
        unit = 10 ** (9 - _DIGITS)
        duration = written_s(((e.end_ns + unit // 2) // unit - (e.begin_ns + unit // 2) // unit) * unit, _DIGITS)
        if is_rttm:
            rows.append(f"SPEAKER {file} 1 {begin} {duration} <NA> <NA> {e.name} <NA> <NA>\n")
        else:
            rows.append(f"{file} 1 {begin} {duration} {e.name}\n")
    path.write_text("".join(rows), encoding="utf-8")
