"""Picture and sound of a media file in real time, by the file's own time stamps.

Both streams count from the container's start, so that two processes that read one file agree. PyAV decodes both,
because OpenCV guesses the frame times of some containers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.sources import ENDS_EARLY, RATE_HZ, WARNINGS
from stream_mmrnn.capture.sources.media_end import missing_bytes
from stream_mmrnn.capture.sources.pacing import ScheduledSample, pace
from stream_mmrnn.core.errors import FileError, SourceError
from stream_mmrnn.core.settings import CameraSettings
from stream_mmrnn.core.settings import MicrophoneSettings as MicrophoneSettings
from stream_mmrnn.core.types import Sample
from stream_mmrnn.core.wire import encodable

_GAP_S = Fraction(1, 20)
"""A gap between time stamps that is longer than this is filled with silence, to keep the rest in time."""
_PROBED_PACKETS = 2000
"""A stream of which so many first packets of the file hold none counts as one that begins later."""
_WORDS = {"vision": "picture", "audio": "sound"}

Int16Array = npt.NDArray[np.int16]


def _opened(path: Path) -> Any:
    try:
        return av.open(str(path))
    except av.error.FFmpegError as e:
        raise FileError(f"the file {path} cannot be read: {e.strerror}; give a file with picture or sound") from e
    except OSError as e:
        raise FileError(f"the file {path} cannot be read: {e.strerror}; give a media file that exists") from e


def streams_of(path: Path) -> set[str]:
    """Which of `vision` and `audio` the file holds: streams that have data, not only a header.

    Raises:
        FileError: it is missing, cannot be read, or holds neither.

    """
    with _opened(path) as container:
        if container.format.name == "tty":  # FFmpeg renders any text file as a video
            raise FileError(f"the file {path} is text; give a file with picture or sound")
        # the cover picture of a music file is not a video
        pictures = (s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic)
        declared = {s.index: "vision" for s in pictures} | {s.index: "audio" for s in container.streams.audio}
        has = _with_data(container, declared) if declared else set()
    if not has:
        named = " and ".join(f"no {_WORDS[what]}" for what in dict.fromkeys(declared.values()) or _WORDS)
        why = ": its header declares some, and no data follows" if declared else ""
        raise FileError(f"the file {path} has {named} in it{why}; give a file with picture or sound")
    return has


def _with_data(container: Any, declared: dict[int, str]) -> set[str]:
    found, wanted, count = set(), set(declared.values()), 0
    with contextlib.suppress(av.error.FFmpegError):
        for packet in container.demux():
            if packet.size and packet.stream.index in declared:
                found.add(declared[packet.stream.index])
            count += 1
            if found == wanted or count == _PROBED_PACKETS:
                return wanted
    return found


def require(path: Path, modality: str) -> None:
    """Raises FileError if the file holds nothing of this modality (see `streams_of`)."""
    if modality not in streams_of(path):
        raise FileError(f"the file {path} has no {_WORDS[modality]} in it; give one that has, or `none`")


class _Media:
    """The base of both: an open container and its start time."""

    def __init__(self, path: Path, modality: str, *, paced: bool) -> None:
        self.origin = f"file:{encodable(path.name)}"
        self.info: dict[str, Any] = {"damaged": 0, WARNINGS: [], ENDS_EARLY: False}
        self._path, self._modality, self._paced = path, modality, paced
        self._container: Any = None

    def open(self) -> None:
        self.close()
        require(self._path, self._modality)
        self._container = _opened(self._path)

    def _frames(self, kind: str) -> Iterator[tuple[Any, Fraction]]:
        """Decoded frames with their time in seconds from the container's start; counts damaged packets."""
        container = self._container
        if container is None:
            raise SourceError(f"{self.origin} is not open: call open() before samples()")
        start = Fraction(container.start_time or 0, av.time_base)
        at_s, corrupt = Fraction(0), False
        for packet in self._packets(getattr(container.streams, kind)[0]):
            try:
                decoded = packet.decode()
            except av.error.FFmpegError:
                self.info["damaged"] += 1
                continue
            if packet.size:  # the last one may only be shorter than others
                self.info["damaged"], corrupt = self.info["damaged"] + corrupt, packet.is_corrupt
            for frame in decoded:
                if frame.pts is not None:
                    at_s = frame.pts * frame.time_base - start
                    yield frame, at_s
        self._tell_end(float(at_s))

    def _packets(self, stream: Any) -> Iterator[Any]:
        try:
            yield from self._container.demux(stream)
        except av.error.FFmpegError as e:
            self.info[ENDS_EARLY] = True
            self._warn(f"{self._path.name} cannot be read to its end ({e.strerror})")

    def _tell_end(self, at_s: float) -> None:
        if missing := missing_bytes(self._path):
            self.info[ENDS_EARLY] = True
            self._warn(f"{self._path.name} ends early, after {at_s:.1f} s: {missing} bytes that it names are missing")
        if damaged := self.info["damaged"]:
            self._warn(f"{self._path.name} is damaged ({damaged} packets of its {_WORDS[self._modality]})")

    def _warn(self, text: str) -> None:
        if text not in self.info[WARNINGS]:
            self.info[WARNINGS].append(text)

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
    """The file's sound, mono at 16 kHz, in blocks; the last one may be shorter.

    Mono is the mix of all channels, or one of them (`channel`, from 1 on).
    """

    def __init__(self, path: Path, settings: MicrophoneSettings, *, channel: int = 0, paced: bool = True) -> None:
        super().__init__(path, "audio", paced=paced)
        self.info["bad_samples"] = 0
        self._block = round(settings.block_ms * RATE_HZ / 1000)
        self._channel = channel

    def open(self) -> None:
        super().open()
        stream = self._container.streams.audio[0]
        self.info["got"] = {"rate_hz": stream.rate, "channels": stream.channels}
        if self._channel > stream.channels:
            raise FileError(f"the file {self._path} has {stream.channels} channels, and no channel {self._channel}")

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
        resampler, form = None, None
        loudness = _MixLoudness()
        expected = Fraction(0)
        for frame, at_s in self._frames("audio"):
            if at_s - expected > _GAP_S:
                yield np.zeros(round((at_s - expected) * RATE_HZ), np.int16)
                expected = at_s
            expected += Fraction(frame.samples, frame.sample_rate)
            sound = self._cleaned(frame, loudness)
            if (sound.format.name, sound.layout.name, sound.sample_rate) != form:
                yield from _outputs(resampler, None)
                form = (sound.format.name, sound.layout.name, sound.sample_rate)
                resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE_HZ)
            sound.pts = None  # else the resampler would correct by the stamps; time is counted in samples here
            for piece in _outputs(resampler, sound):
                loudness.mixed(piece)
                yield piece
            if loudness.cancels:
                self._warn(
                    f"the channels of {self._path.name} cancel each other, so that their mix is silent; choose one of "
                    "them in the settings: [streams.NAME] with its source, and channel = 1"
                )
        yield from _outputs(resampler, None)

    def _cleaned(self, frame: Any, loudness: _MixLoudness) -> Any:
        """The frame without samples that are not finite, or the chosen channel of it."""
        form, channels = frame.format.name.removesuffix("p"), frame.layout.nb_channels
        if form not in _SCALES or (channels == 1 and form not in _FLOATS):
            return frame
        data = frame.to_ndarray()
        given = rows = data if frame.format.is_planar else data.reshape(-1, channels).T
        if form in _FLOATS and (bad := ~(np.abs(rows) < _LOUDEST)).any():
            rows = np.where(bad, rows.dtype.type(0), rows)
            self.info["bad_samples"] += int(bad.sum())
            self._warn(f"{self._path.name} has samples that are no numbers; they become silence, and are counted")
        layout = frame.layout.name
        if self._channel:
            rows, layout = rows[self._channel - 1 : self._channel], "mono"
        else:
            loudness.given(rows, form, frame.sample_rate)
        if rows is given:
            return frame
        made = av.AudioFrame.from_ndarray(np.ascontiguousarray(rows.T).reshape(1, -1), format=form, layout=layout)
        made.sample_rate = frame.sample_rate
        return made


_FLOATS = ("flt", "dbl")
_LOUDEST = 1e6
"""Full scale is 1. Larger numbers are no sound, and would be infinite in the resampler's sums."""
_SCALES = {"u8": 128.0, "s16": 2.0**15, "s32": 2.0**31, "flt": 1.0, "dbl": 1.0}
"""Full scale by FFmpeg's name of the format."""


class _MixLoudness:
    """Compares the loudness of the channels with that of their mix, in mean squares times seconds."""

    _LEAST_S = 0.5
    _QUIET, _CANCELLED = 1e-5, 1e-3
    """Mean squares: a channel below the first is silent, a mix below the second times a channel is cancelled."""

    def __init__(self) -> None:
        self._loud_s = self._given = self._mixed = 0.0

    def given(self, rows: npt.NDArray[Any], form: str, rate_hz: int) -> None:
        if len(rows) > 1:
            sound = rows.astype(np.float64) / _SCALES[form] - (form == "u8")
            loudest, seconds = float(np.square(sound).mean(1).max()), rows.shape[1] / rate_hz
            self._given += loudest * seconds
            self._loud_s += seconds if loudest > self._QUIET else 0.0

    def mixed(self, piece: Int16Array) -> None:
        self._mixed += float(np.square(piece / 2.0**15).sum()) / RATE_HZ

    @property
    def cancels(self) -> bool:
        return self._loud_s >= self._LEAST_S and self._mixed < self._CANCELLED * self._given


def _outputs(resampler: Any, frame: Any) -> Iterator[Int16Array]:
    """What a resampler gives for a frame, or with None for its end."""
    if resampler is not None:
        for out in resampler.resample(frame):
            yield out.to_ndarray()[0]
