r"""16 bit PCM from the bytes of a RIFF WAV or a NIST SPHERE file: the two containers of published speech corpora.

SPHERE: "NIST_1A\n", the header's size in eight bytes, lines `name -i INTEGER`, `name -r REAL`, `name -sLENGTH STRING`,
`end_head`, padding up to that size, then the samples (NIST SPeech HEader REsources, version 2.6).
"""

from __future__ import annotations

import io
import re
import wave
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.errors import FileError
from stream_mmrnn.training.datasets.files import reason

Int16Array = npt.NDArray[np.int16]

_FIELD = re.compile(rb"(\S+) +-(?:[ir]|s(\d+)) ")
_ENDIAN = {"01": "<i2", "10": ">i2"}
"""`sample_byte_format`: the byte order; 0 is the lowest byte."""


class Pcm(NamedTuple):
    rate_hz: int
    samples: Int16Array
    """[N] for one channel, else [N, channels]."""


def pcm(where: str, raw: bytes) -> Pcm:
    """Decode by content, not by name: in TIMIT both kinds of file are called .WAV.

    Raises:
        FileError: another container, another coding than 16 bit PCM, or fewer samples than in the header.

    """
    if raw.startswith(b"NIST_1A"):
        return _sphere(where, raw)
    if raw.startswith(b"RIFF"):
        return _riff(where, raw)
    raise FileError(f"the file {where} is not a sound file: expected RIFF WAV or NIST SPHERE; fetch it again")


def sphere_header(where: str, raw: bytes) -> tuple[int, dict[str, str]]:
    """The header's size in bytes and its fields, as written.

    Raises:
        FileError: it is truncated, or a line is not a field.

    """
    size_field = raw[8:16].strip()
    if not raw.startswith(b"NIST_1A\n") or not size_field.isdigit() or not 16 <= int(size_field) <= len(raw):
        raise FileError(f"the file {where} is cut off in its SPHERE header; fetch it again")
    size = int(size_field)
    header, at = raw[:size], 16
    fields: dict[str, str] = {}
    while True:
        end = header.find(b"\n", at)
        line = header[at:end] if end >= 0 else b""
        if line.strip() == b"end_head":
            return size, fields
        if end < 0:
            raise FileError(f"the file {where} has a SPHERE header without `end_head`; fetch it again")
        if line.strip() and not line.startswith(b";"):  # a comment
            field = _FIELD.match(header, at, end)
            if field is None:
                raise FileError(f"the file {where} has a SPHERE header with a wrong line; fetch it again")
            # a string field has a length, and may contain spaces and newlines
            stop = field.end() + int(field[2]) if field[2] else end
            fields[field[1].decode("latin-1")] = header[field.end() : stop].decode("latin-1").strip()
            end = header.find(b"\n", stop)
            if end < 0:
                raise FileError(f"the file {where} has a SPHERE header without `end_head`; fetch it again")
        at = end + 1


def _sphere(where: str, raw: bytes) -> Pcm:
    size, fields = sphere_header(where, raw)
    coding = fields.get("sample_coding", "pcm")  # missing in TIMIT
    packed = next(
        (p for p in ("shorten", "shortpack", "wavpack") if p in coding + fields.get("sample_byte_format", "")), ""
    )
    if packed:
        raise FileError(f"the file {where} is compressed with {packed}; unpack it with `sph2pipe -f wav` first")
    if coding != "pcm":
        raise FileError(
            f"the file {where} is coded as {coding}, expected pcm; convert it with `sph2pipe -p -f wav` first"
        )
    rate, count, channels, width = (
        _integer(where, fields, name) for name in ("sample_rate", "sample_count", "channel_count", "sample_n_bytes")
    )
    order = fields.get("sample_byte_format", "")
    if width != 2 or order not in _ENDIAN:
        raise FileError(
            f"the file {where} has samples of {width} bytes in the order `{order}`, expected 2 bytes in 01 or 10; "
            "convert it with `sph2pipe -p -f wav` first"
        )
    return Pcm(rate, _samples(where, raw[size:], _ENDIAN[order], count, channels))


def _integer(where: str, fields: dict[str, str], name: str) -> int:
    value = fields.get(name, "")
    if not value.isdigit() or int(value) == 0:
        raise FileError(f"the file {where} has a SPHERE header without a usable {name} (`{value}`); fetch it again")
    return int(value)


def _riff(where: str, raw: bytes) -> Pcm:
    try:
        with wave.open(io.BytesIO(raw)) as file:
            rate, width, count = file.getframerate(), file.getsampwidth(), file.getnframes()
            channels, data = file.getnchannels(), file.readframes(count)
    except (wave.Error, EOFError) as e:
        raise FileError(f"the file {where} is not a WAV file of plain PCM ({reason(e)}); fetch it again") from e
    if width != 2:
        raise FileError(f"the file {where} has samples of {8 * width} bits, expected 16; convert it first")
    return Pcm(rate, _samples(where, data, "<i2", count, channels))


def _samples(where: str, data: bytes, kind: str, count: int, channels: int) -> Int16Array:
    there = len(data) // (2 * channels)
    if there < count:
        raise FileError(f"the file {where} is cut off: {there} samples of {count} are there; fetch it again")
    samples = np.frombuffer(data, kind, count * channels).astype(np.int16)  # a copy in native byte order
    return samples if channels == 1 else samples.reshape(count, channels)
