"""Whether a media file was cut off: how many of the bytes that its own header promises are not there.

Reads the sizes that RIFF (AVI, WAV), AIFF, MP4 and Matroska files state at their outermost level. Knows nothing about
streams and codecs; a file without such a size has nothing that could be missing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

_SLACK_BYTES = 64
"""Some writers state a size that is too large by their own headers."""
_UNKNOWN_RIFF_BYTES = 0x7FFF0000
"""Programs that write to a pipe state the largest size that they know."""
_MP4_FIRST = (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip")
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


def missing_bytes(path: Path) -> int:
    """How many bytes the file lacks at its end; 0 if it is whole, or does not say."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            missing = _stated_end(file, size) - size
    except (OSError, ValueError):  # a pipe, or no file
        return 0
    return missing if missing > _SLACK_BYTES else 0


def _at(file: BinaryIO, at: int, count: int) -> bytes:
    file.seek(at)
    return file.read(count)


def _stated_end(file: BinaryIO, size: int) -> int:
    head = _at(file, 0, 12)
    if head[:4] in (b"RIFF", b"RF64"):
        return _riff_end(file, size)
    if head[:4] == b"FORM":
        return 8 + int.from_bytes(head[4:8], "big")
    if head[4:8] in _MP4_FIRST:
        return _mp4_end(file, size)
    if head[:4] == _EBML:
        return _matroska_end(file)
    return 0


def _riff_end(file: BinaryIO, size: int) -> int:
    """A large AVI has several outermost chunks, one after the other."""
    at = 0
    while (head := _at(file, at, 28))[:4] in (b"RIFF", b"RF64") and len(head) >= 8:
        length = int.from_bytes(head[4:8], "little")
        if head[:4] == b"RF64" and head[12:16] == b"ds64":
            length = int.from_bytes(head[20:28], "little")
        elif not 4 < length < _UNKNOWN_RIFF_BYTES:
            return 0
        at += 8 + length + length % 2
        if at >= size:
            return at
    return 0


def _mp4_end(file: BinaryIO, size: int) -> int:
    at = 0
    while at < size:
        head = _at(file, at, 16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8 or not head[4:8].isascii():  # 0: up to the end of the file, whatever that is
            return 0
        at += length
    return at


def _matroska_end(file: BinaryIO) -> int:
    at = 4
    length, at = _vint(file, at)
    at += length
    if _at(file, at, 4) != _SEGMENT:
        return 0
    length, at = _vint(file, at + 4)
    return at + length if length else 0


def _vint(file: BinaryIO, at: int) -> tuple[int, int]:
    """An integer of 1 to 8 bytes, and where it ends; 0 for the one that means "unknown"."""
    first = (_at(file, at, 1) or b"\0")[0]
    count = 9 - first.bit_length()
    bits = 7 * count
    value = int.from_bytes(_at(file, at, min(count, 8)), "big") & ((1 << bits) - 1)
    return (0 if value == (1 << bits) - 1 else value), at + count
