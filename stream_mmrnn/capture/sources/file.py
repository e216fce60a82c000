"""Picture and sound of a media file in real time, by the file's own time stamps.

Both streams count from the container's start, so that two processes that read one file agree. PyAV decodes both,
because OpenCV guesses the frame times of some containers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.sources import RATE_HZ
from stream_mmrnn.capture.sources.pacing import ScheduledSample, pace
from stream_mmrnn.core.config import CameraSettings
from stream_mmrnn.core.config import MicrophoneSettings as MicrophoneSettings
from stream_mmrnn.core.errors import FileError, SourceError
from stream_mmrnn.core.types import Sample

_GAP_S = Fraction(1, 20)
"""A gap between time stamps that is longer than this is filled with silence, to keep the rest in time."""

Int16Array = npt.NDArray[np.int16]


def _opened(path: Path) -> Any:
    try:
        return av.open(str(path))
    except av.error.FFmpegError as e:
        raise FileError(f"the file {path} cannot be read: {e.strerror}; give a file with picture or sound") from e
    except OSError as e:
        raise FileError(f"the file {path} cannot be read: {e.strerror}; give a media file that exists") from e


def streams_of(path: Path) -> set[str]:
    """Which of `vision` and `audio` the file holds.

    Raises:
        FileError: it is missing, cannot be read, or holds neither.

    """
    with _opened(path) as container:
        if container.format.name == "tty":  # FFmpeg renders any text file as a video
            raise FileError(f"the file {path} is text; give a file with picture or sound")
        has = set()
        # the cover picture of a music file is not a video
        if any(not s.disposition & av.stream.Disposition.attached_pic for s in container.streams.video):
            has.add("vision")
        if container.streams.audio:
            has.add("audio")
    if not has:
        raise FileError(f"the file {path} has no picture and no sound; give a file with at least one of them")
    return has


class _Media:
    """The base of both: an open container and its start time."""

    def __init__(self, path: Path, modality: str, *, paced: bool) -> None:
        self.origin = f"file:{path.name}"
        self.info: dict[str, Any] = {"damaged": 0}
        self._path, self._modality, self._paced = path, modality, paced
        self._container: Any = None

    def open(self) -> None:
        self.close()
        if self._modality not in streams_of(self._path):
            what = "picture" if self._modality == "vision" else "sound"
            raise FileError(f"the file {self._path} has no {what}; give one that has, or `none`")
        self._container = _opened(self._path)

    def _frames(self, kind: str) -> Iterator[tuple[Any, Fraction]]:
        """Decoded frames with their time in seconds from the container's start; counts damaged packets."""
        container = self._container
        if container is None:
            raise SourceError(f"{self.origin} is not open: call open() before samples()")
        start = Fraction(container.start_time or 0, av.time_base)
        for packet in container.demux(getattr(container.streams, kind)[0]):
            try:
                decoded = packet.decode()
            except av.error.InvalidDataError:
                self.info["damaged"] += 1
                continue
            for frame in decoded:
                if frame.pts is not None:
                    yield frame, frame.pts * frame.time_base - start

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None


class FilePicture(_Media):
    """The file's frames as JPEG, each at its presentation time."""

    def __init__(self, path: Path, settings: CameraSettings, *, paced: bool = True) -> None:
        super().__init__(path, "vision", paced=paced)
        self._quality = [cv2.IMWRITE_JPEG_QUALITY, settings.jpeg_quality]

    def open(self) -> None:
        super().open()
        stream = self._container.streams.video[0]
        rate = float(stream.average_rate or 0)
        self.info["got"] = {"width": stream.width, "height": stream.height, "rate_hz": rate}

    def samples(self, alive: Callable[[], bool], epoch_ns: int) -> Iterator[Sample]:
        yield from pace(self._schedule(epoch_ns), alive, paced=self._paced)

    def _schedule(self, epoch_ns: int) -> Iterator[ScheduledSample]:
        for frame, at_s in self._frames("video"):
            yield ScheduledSample(epoch_ns + round(at_s * 1_000_000_000), partial(self._jpeg, frame))

    def _jpeg(self, frame: Any) -> bytes:
        return cv2.imencode(".jpg", frame.to_ndarray(format="bgr24"), self._quality)[1].tobytes()


class FileSound(_Media):
    """The file's sound, mono at 16 kHz, in blocks; the last one may be shorter."""

    def __init__(self, path: Path, settings: MicrophoneSettings, *, paced: bool = True) -> None:
        super().__init__(path, "audio", paced=paced)
        self._block = round(settings.block_ms * RATE_HZ / 1000)

    def open(self) -> None:
        super().open()
        stream = self._container.streams.audio[0]
        self.info["got"] = {"rate_hz": stream.rate, "channels": stream.channels}

    def samples(self, alive: Callable[[], bool], epoch_ns: int) -> Iterator[Sample]:
        yield from pace(self._schedule(epoch_ns), alive, paced=self._paced)

    def _schedule(self, epoch_ns: int) -> Iterator[ScheduledSample]:
        done = 0
        rest: Int16Array = np.empty(0, np.int16)
        for piece in self._pieces():
            rest = np.concatenate((rest, piece))
            while len(rest) >= self._block:
                block, rest = rest[: self._block], rest[self._block :]
                done += len(block)
                yield ScheduledSample(epoch_ns + round(done * 1e9 / RATE_HZ), block.copy)
        if len(rest):
            yield ScheduledSample(epoch_ns + round((done + len(rest)) * 1e9 / RATE_HZ), rest.copy)

    def _pieces(self) -> Iterator[Int16Array]:
        """Sound from the container's start without gaps, at 16 kHz."""
        resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE_HZ)
        expected = Fraction(0)
        for frame, at_s in self._frames("audio"):
            if at_s - expected > _GAP_S:
                yield np.zeros(round((at_s - expected) * RATE_HZ), np.int16)
                expected = at_s
            expected += Fraction(frame.samples, frame.sample_rate)
            frame.pts = None  # else the resampler would correct by the stamps; time is counted in samples here
            for out in resampler.resample(frame):
                yield out.to_ndarray()[0]
        for out in resampler.resample(None):
            yield out.to_ndarray()[0]
