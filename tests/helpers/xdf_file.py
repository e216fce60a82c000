"""A writer of XDF files by their published layout (https://github.com/sccn/xdf/wiki/Specifications), for tests.

Chunks of [bytes of the length, length, tag, content]: 1 FileHeader, 2 StreamHeader, 3 Samples, 4 ClockOffset,
5 Boundary, 6 StreamFooter.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

_FORMATS = {"int8": "b", "int16": "<h", "int32": "<i", "int64": "<q", "float32": "<f", "double64": "<d"}


def _length(n: int) -> bytes:
    """A number of bytes, in as few as it takes."""
    if n < 2**8:
        return struct.pack("<BB", 1, n)
    return struct.pack("<BI", 4, n) if n < 2**32 else struct.pack("<BQ", 8, n)


def chunk(tag: int, content: bytes) -> bytes:
    return _length(len(content) + 2) + struct.pack("<H", tag) + content


class XdfFile:
    """Chunks, one after the other."""

    def __init__(self, date: str = "2026-03-01T12:00:00+0000") -> None:
        header = f'<?xml version="1.0"?><info><version>1.0</version><datetime>{date}</datetime></info>'
        self._data = bytearray(b"XDF:") + chunk(1, header.encode())
        self._formats: dict[int, str] = {}

    def stream(self, number: int, name: str, kind: str, form: str, channels: int, rate_hz: float) -> None:
        xml = (
            f'<?xml version="1.0"?><info><name>{escape(name)}</name><type>{escape(kind)}</type>'
            f"<channel_count>{channels}</channel_count><nominal_srate>{rate_hz}</nominal_srate>"
            f"<channel_format>{form}</channel_format><created_at>0</created_at></info>"
        )
        self._formats[number] = form
        self._data += chunk(2, struct.pack("<I", number) + xml.encode())

    def samples(self, number: int, stamps_s: Sequence[float | None], values: Sequence[Sequence[object]]) -> None:
        """None: no stamp of its own, as most samples of regular streams."""
        form = self._formats[number]
        body = bytearray()
        for at_s, row in zip(stamps_s, values, strict=True):
            body += b"\0" if at_s is None else struct.pack("<Bd", 8, at_s)
            for value in row:
                if form == "string":
                    text = str(value).encode()
                    body += _length(len(text)) + text
                else:
                    body += struct.pack(_FORMATS[form], value)
        self._data += chunk(3, struct.pack("<I", number) + _length(len(stamps_s)) + bytes(body))

    def clock_offset(self, number: int, at_s: float, offset_s: float) -> None:
        self._data += chunk(4, struct.pack("<Idd", number, at_s, offset_s))

    def footer(self, number: int, count: str = "") -> None:
        xml = f'<?xml version="1.0"?><info>{f"<sample_count>{count}</sample_count>" if count else ""}</info>'
        self._data += chunk(6, struct.pack("<I", number) + xml.encode())

    @property
    def data(self) -> bytes:
        return bytes(self._data)

    def write(self, path: Path) -> Path:
        path.write_bytes(self.data)
        return path
