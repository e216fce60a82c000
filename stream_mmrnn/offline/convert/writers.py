"""Writers for WAV, MP4, Parquet and CSV files, message by message. Times in the files start at `zero_ns`."""

from __future__ import annotations

import csv
import io
import wave
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import FileError
from stream_mmrnn.core.types import Envelope

Codec = Literal["h264", "mjpeg"]
_RATE_HZ = topics.AUDIO_RATE_HZ
_ROWS_AT_ONCE = 4096
_SILENCE = bytes(2 * _RATE_HZ)
_TIME_BASE = Fraction(1, 90_000)
"""Time base of presentation times, the usual one of MP4."""
_LAST = _TIME_BASE.denominator // 25
_MIN_GAP_S = 0.005
_MAX_GAP_S = 24 * 3600

Row = Sequence[Any]


class Writer(Protocol):
    """The interface of a writer of one file."""

    def add(self, envelope: Envelope) -> None: ...

    def close(self) -> dict[str, Any]:
        """Finish the file; returns a description for the manifest."""


class Wav:
    """The sound of one stream; gaps are filled with silence, so that a sample's position gives its time."""

    def __init__(self, path: Path, zero_ns: int) -> None:
        self._zero_ns = zero_ns
        self._file = wave.open(str(path), "wb")  # noqa: SIM115
        self._file.setnchannels(1)
        self._file.setsampwidth(2)
        self._file.setframerate(_RATE_HZ)
        self._written = 0
        self._samples = self._cut = 0
        self._gaps: list[dict[str, float]] = []

    def add(self, envelope: Envelope) -> None:
        sound = np.asarray(envelope.payload, "<i2")
        begin = round((envelope.event_ns - self._zero_ns) * _RATE_HZ / 1e9) - len(sound)
        ahead = begin - self._written
        if abs(ahead) < max(len(sound) // 2, round(_MIN_GAP_S * _RATE_HZ)):
            ahead = 0  # stamps jitter, and a device's rate is not exact
        if ahead > _MAX_GAP_S * _RATE_HZ:
            raise FileError(f"{envelope.topic} has a gap of more than a day; its stamps are wrong")
        if ahead > 0:
            self._gaps.append({"at_s": self._written / _RATE_HZ, "seconds": ahead / _RATE_HZ})
            self._silence(ahead)
        elif ahead < 0:
            self._cut += min(-ahead, len(sound))
            sound = sound[-ahead:]
        self._file.writeframesraw(sound.tobytes())
        self._written += len(sound)
        self._samples += len(sound)

    def _silence(self, samples: int) -> None:
        self._written += samples
        while samples > 0:
            piece = _SILENCE[: 2 * samples]
            self._file.writeframesraw(piece)
            samples -= len(piece) // 2

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {"samples": self._samples, "cut": self._cut, "gaps": self._gaps}


class Mp4:
    """The pictures of one stream, each at its own time, as H.264 or as the recorded JPEGs."""

    def __init__(self, path: Path, zero_ns: int, codec: Codec) -> None:
        import av

        self._zero_ns, self._codec = zero_ns, codec
        # else the first picture's time would be rounded to milliseconds, and all others shifted by the rounding
        options = {"movie_timescale": str(_TIME_BASE.denominator)}
        self._file = av.open(str(path), "w", format="mp4", options=options)
        self._stream: Any = None
        self._last = -1
        self._frames = self._undecodable = self._same_time = 0

    def add(self, envelope: Envelope) -> None:
        import av

        at = round((envelope.event_ns - self._zero_ns) / 1e9 / _TIME_BASE)
        if at <= self._last:
            self._same_time += 1  # a video has one picture at a time
            return
        jpeg = bytes(envelope.payload)
        try:
            with av.open(io.BytesIO(jpeg), format="mjpeg") as picture:
                frame = next(picture.decode(video=0))
                if self._stream is None:
                    self._begin(picture.streams.video[0], frame)
        except (av.FFmpegError, StopIteration, ValueError, IndexError):
            self._undecodable += 1
            return
        self._last = at
        self._frames += 1
        if self._codec == "mjpeg":
            packet = av.Packet(jpeg)
            packet.pts = packet.dts = at
            packet.time_base = _TIME_BASE
            packet.duration = _LAST  # used for the last picture only: the others last until the next
            packet.stream = self._stream
            packet.is_keyframe = True
            self._file.mux(packet)
            return
        frame = frame.reformat(self._stream.width, self._stream.height, "yuv420p")
        frame.pts, frame.time_base = at, _TIME_BASE
        self._file.mux(self._stream.encode(frame))

    def _begin(self, like: Any, frame: Any) -> None:
        """Create the video with the first picture's size; later pictures are scaled to it."""
        if self._codec == "mjpeg":
            self._stream = self._file.add_stream_from_template(like)
            self._stream.time_base = _TIME_BASE
            return
        self._stream = self._file.add_stream("libx264", rate=30, options={"crf": "18", "preset": "veryfast"})
        self._stream.time_base = self._stream.codec_context.time_base = _TIME_BASE
        # H.264 needs even width and height
        self._stream.width, self._stream.height = frame.width // 2 * 2, frame.height // 2 * 2
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.max_b_frames = 0

    def close(self) -> dict[str, Any]:
        if self._stream is not None and self._codec == "h264":
            self._file.mux(self._stream.encode(None))
        self._file.close()
        return {"frames": self._frames, "undecodable": self._undecodable, "same_time": self._same_time}


class Parquet:
    """One table, written in batches of rows."""

    def __init__(self, path: Path, schema: Any, row: Callable[[Any], Row | None]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._pa, self._schema, self._row = pa, schema, row
        self._sink = path.open("xb")  # opened here, because pyarrow takes only paths in UTF-8
        self._file = pq.ParquetWriter(self._sink, schema, compression="zstd")
        self._rows: list[Row] = []
        self._count = 0

    def add(self, envelope: Envelope) -> None:
        row = self._row(envelope)
        if row is not None:
            self._rows.append(row)
            self._count += 1
            if len(self._rows) >= _ROWS_AT_ONCE:
                self._flush()

    def _flush(self) -> None:
        columns = zip(*self._rows, strict=True)
        arrays = [self._pa.array(c, field.type) for c, field in zip(columns, self._schema, strict=True)]
        self._file.write_batch(self._pa.record_batch(arrays, schema=self._schema))
        self._rows = []

    def close(self) -> dict[str, Any]:
        try:
            if self._rows:
                self._flush()
            self._file.close()
        finally:
            self._sink.close()
        return {"rows": self._count}


class Csv:
    """One table as text."""

    def __init__(self, path: Path, names: Sequence[str], row: Callable[[Any], Row | None]) -> None:
        self._file = path.open("x", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerow(names)
        self._row = row
        self._count = 0

    def add(self, envelope: Envelope) -> None:
        row = self._row(envelope)
        if row is not None:
            self._writer.writerow(row)
            self._count += 1

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {"rows": self._count}
