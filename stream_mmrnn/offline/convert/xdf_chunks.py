"""A view of an XDF file that pyxdf reads to its end.

pyxdf loses the whole last chunk of a file that was cut off, and refuses a file for one odd number in a footer or in a
clock offset. The view has a cut chunk up to its last whole sample, and no such numbers. Knows nothing about recordings.
"""

from __future__ import annotations

import bisect
import html
import io
import math
import os
import re
import struct
from typing import Any, BinaryIO, NamedTuple

_MAGIC_BYTES = 4
_HEADER, _SAMPLES, _OFFSET, _BOUNDARY, _FOOTER = 2, 3, 4, 5, 6
_TAGS = range(1, 7)
_OFFSET_BYTES = 16
_HEAD = struct.Struct("<HI")
"""Tag and number of the stream, which most chunks begin with."""
_ITEM_BYTES = {"int8": 1, "int16": 2, "int32": 4, "int64": 8, "float32": 4, "double64": 8, "string": 0}
_MAX_XML_BYTES = 16 * 2**20


class _Form(NamedTuple):
    """How the samples of a stream are written."""

    name: str
    channels: int
    item_bytes: int
    """0: strings, each with its length."""


class _Samples(NamedTuple):
    stamped: list[bool]
    """Of each whole sample, whether it has a stamp of its own."""
    stated: int
    """How many samples the chunk says that it has."""
    first: int
    """Where the first one begins."""
    end: int
    """Where the last whole one ends."""


class View:
    """The view (`file`) of an XDF file, and what is damaged (`notes`, in words)."""

    def __init__(self, file: BinaryIO) -> None:
        """Raises OSError if the file cannot be read."""
        self.notes: list[str] = []
        self._source, self._size = file, file.seek(0, os.SEEK_END)
        self._forms: dict[int, _Form] = {}
        self._samples: dict[int, tuple[int, int, int]] = {}
        """Of a chunk of samples, by where it ends in the view: begin and end of its content here, and its stream."""
        self._parts = _Parts(file)
        self._kept = 0
        """Where the next piece of the file begins that goes into the view as it is."""
        self._scan()
        self.file: BinaryIO = io.BufferedReader(self._parts, 1 << 20)

    def stamped(self) -> list[bool]:
        """Of each sample of the chunk that was just read from `file`, whether it has a stamp of its own."""
        begin, end, stream = self._samples.get(self.file.tell(), (0, 0, 0))
        try:
            return self._walk(begin, end, self._forms[stream]).stamped
        except (ValueError, IndexError, KeyError, struct.error):
            return []

    def _bytes(self, begin: int, end: int) -> bytes:
        self._source.seek(begin)
        return self._source.read(max(end - begin, 0))

    def _scan(self) -> None:
        at = _MAGIC_BYTES
        while at < self._size:
            begin = at
            try:
                length, used = _length(self._bytes(at, at + 9), 0)
                at += used
                tag, stream = _HEAD.unpack(self._bytes(at, at + _HEAD.size))
                content = at + _HEAD.size
                end = content + _OFFSET_BYTES if tag == _OFFSET else at + length
                if tag == _SAMPLES and stream in self._forms and end > self._size:
                    samples = self._walk(content, self._size, self._forms[stream])
                    if len(samples.stamped) < samples.stated:
                        self._cut(begin, content, stream, samples)
                        return
                    end = samples.end  # only its length is wrong, which pyxdf does not use
            except ValueError:
                break  # no chunk begins there: pyxdf searches for the next one
            except (IndexError, struct.error):
                end, tag = self._size + 1, _BOUNDARY  # not even its head is there
            if end > self._size and tag in _TAGS:
                self.notes.append(f"it was cut off at byte {self._size}")
                self._size = begin
                break
            if tag == _SAMPLES:
                self._samples[self._parts.size + end - self._kept] = (content, end, stream)
            elif tag == _HEADER:
                self._define(stream, self._bytes(content, min(end, content + _MAX_XML_BYTES)))
            elif (tag == _FOOTER and not _is_sound_footer(self._bytes(content, end))) or (
                tag == _OFFSET and not self._is_sound_offset(stream, self._bytes(content, end))
            ):
                self._parts.add(self._kept, begin)
                self._kept = end
            at = end
        self._parts.add(self._kept, self._size)

    def _cut(self, begin: int, content: int, stream: int, samples: _Samples) -> None:
        """End the view with the whole samples of a chunk that was cut off."""
        count = len(samples.stamped)
        self.notes.append(
            f"it was cut off at byte {self._size}, in samples of {self._forms[stream].name}, of which {count} of "
            f"{samples.stated} are there"
        )
        self._parts.add(self._kept, begin)
        if count:
            body = _HEAD.pack(_SAMPLES, stream) + struct.pack("<BI", 4, count)
            length = len(body) + samples.end - samples.first
            self._parts.data(struct.pack("<BQ", 8, length) + body)
            self._parts.add(samples.first, samples.end)
            self._samples[self._parts.size] = (content, samples.end, stream)

    def _define(self, stream: int, xml: bytes) -> None:
        name, count, form = (_text(xml, name) for name in ("name", "channel_count", "channel_format"))
        if count.isdecimal() and len(count) < 10 and form in _ITEM_BYTES:
            self._forms[stream] = _Form(name or str(stream), int(count), _ITEM_BYTES[form])
        else:
            self._forms.pop(stream, None)  # pyxdf says what is wrong with it

    def _is_sound_offset(self, stream: int, content: bytes) -> bool:
        if all(map(math.isfinite, struct.unpack("<dd", content))):
            return True
        name = self._forms[stream].name if stream in self._forms else str(stream)
        self.notes.append(f"a clock offset of {name} is no number")
        return False

    def _walk(self, begin: int, end: int, form: _Form) -> _Samples:
        """The whole samples of a chunk's content; raises ValueError if it holds something else."""
        content = self._bytes(begin, end)
        stamped: list[bool] = []
        stated, at = _length(content, 0)
        first = at
        for _ in range(stated):
            try:
                has_stamp = content[at] != 0
                after = at + (9 if has_stamp else 1) + form.channels * form.item_bytes
                for _ in range(0 if form.item_bytes else form.channels):
                    size, after = _length(content, after)
                    after += size
            except (IndexError, struct.error):
                break
            if after > len(content):
                break
            stamped.append(has_stamp)
            at = after
        return _Samples(stamped, stated, begin + first, begin + at)


def _length(data: bytes, at: int) -> tuple[int, int]:
    """A length, which is written in as few bytes as it takes, and where it ends."""
    layout = {1: "<B", 4: "<I", 8: "<Q"}.get(data[at])
    if layout is None:
        raise ValueError("no length is there")
    (value,) = struct.unpack_from(layout, data, at + 1)
    return value, at + 1 + data[at]


def _is_sound_footer(content: bytes) -> bool:
    """False for one whose count of samples is no whole number: counts are a hint, and nothing else is used of it."""
    count = _text(content, "sample_count")
    return not count or (count.isdecimal() and len(count) < 20)


def _text(xml: bytes, name: str) -> str:
    """The first element of this name, which holds only text; "" without one."""
    found = re.search(f"<{name}>([^<]*)</{name}>".encode(), xml)
    return html.unescape(found[1].decode("utf-8", "replace")).strip() if found else ""


class _Parts(io.RawIOBase):
    """Pieces of a file, and bytes, one after the other, as one file."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._pieces: list[tuple[int, int, bytes | None]] = []
        """Of each, where it begins in the source, its size, and its bytes if they are not in the source."""
        self._starts: list[int] = []
        """Where each begins here."""
        self._at = self.size = 0

    def add(self, begin: int, end: int) -> None:
        """A piece of the source."""
        if end > begin:
            self._append(begin, end - begin, None)

    def data(self, data: bytes) -> None:
        self._append(0, len(data), data)

    def _append(self, begin: int, size: int, data: bytes | None) -> None:
        self._pieces.append((begin, size, data))
        self._starts.append(self.size)
        self.size += size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = max(offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence], 0)
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        if self._at >= self.size:
            return 0
        number = bisect.bisect_right(self._starts, self._at) - 1
        begin, size, data = self._pieces[number]
        skip = self._at - self._starts[number]
        count = min(size - skip, len(buffer))
        if data is None:
            self._source.seek(begin + skip)
            piece = self._source.read(count)
        else:
            piece = data[skip : skip + count]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)
