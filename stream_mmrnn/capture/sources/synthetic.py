"""The source that needs no hardware: a person who talks in turns and another who answers, generated from a seed.

Each modality runs in its own process and generates its part of the same dialogue (`talker`). Faults can be configured:
late delivery, lost samples, a stream that freezes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.sources import RATE_HZ
from stream_mmrnn.capture.sources.pacing import ScheduledSample, pace
from stream_mmrnn.capture.sources.talker import Turn, answers, openness, turns
from stream_mmrnn.capture.sources.voice import speak
from stream_mmrnn.core.errors import SourceSpecError
from stream_mmrnn.core.settings import SyntheticSettings
from stream_mmrnn.core.streams import SELF, Stream
from stream_mmrnn.core.types import Payload, Sample

_BLOCK = RATE_HZ // 50
_LEVEL = 0.3
_HISS = 3.0
_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 90]
# numbers that keep the random streams of one seed independent; the faults have one for each modality
_VOICE, _ROOM, _FAULTS = 1, 2, 3
_OTHER = 10
_FAULT_STREAMS = {"vision": 0, "audio": 1, "text": 2}
_SECOND_PERSON = {"vision": 5, "audio": 2, "text": 2}


class Synthetic:
    """Pictures, sound or words of a person; the same seed gives the same event times and data."""

    def __init__(self, stream: Stream, settings: SyntheticSettings, *, paced: bool = True) -> None:
        if stream.kind not in _FAULT_STREAMS:
            raise SourceSpecError(f"there is no synthetic {stream.kind}; use one of {', '.join(_FAULT_STREAMS)}")
        self.origin = f"synthetic:{settings.seed}"
        self.info: dict[str, Any] = {"dropped": 0, "frozen": 0}
        self._kind, other = stream.kind, stream.person != SELF
        if self._kind == "vision":
            self.info["got"] = {
                "width": settings.width,
                "height": settings.height,
                "rate_hz": settings.rate_hz,
            }
        self._settings, self._paced = settings, paced
        self._turns = partial(answers if other else turns, settings.seed)
        self._voice, self._room = (_OTHER + n if other else n for n in (_VOICE, _ROOM))
        self._faults = _FAULTS + _FAULT_STREAMS[stream.kind] + (_SECOND_PERSON[stream.kind] if other else 0)
        self._wave: tuple[int, npt.NDArray[np.float32]] = (-1, np.empty(0, np.float32))

    def open(self) -> None:
        """Does nothing."""

    def samples(self, alive: Callable[[], bool], epoch_ns: int) -> Iterator[Sample]:
        make = {"vision": self._frames, "audio": self._blocks, "text": self._words}[self._kind]
        yield from pace(self._with_faults(make(), epoch_ns), alive, paced=self._paced)

    def close(self) -> None:
        """Does nothing."""

    def _with_faults(
        self, events: Iterator[tuple[int, Callable[[], Payload]]], epoch_ns: int
    ) -> Iterator[ScheduledSample]:
        s = self._settings
        for index, (at_ns, make) in enumerate(events):
            at_s = at_ns / 1e9
            if s.freeze_every_s and at_s >= s.freeze_every_s and at_s % s.freeze_every_s < s.freeze_s:
                self.info["frozen"] += 1
                yield ScheduledSample(epoch_ns + at_ns, None)
                continue
            delay_ns = 0
            if s.drop or s.jitter_ms:
                # seeded by the sample's number, so that a worker that starts late generates the same faults
                rng = np.random.default_rng((s.seed, self._faults, index))
                if rng.random() < s.drop:
                    self.info["dropped"] += 1
                    yield ScheduledSample(epoch_ns + at_ns, None)
                    continue
                delay_ns = round(abs(rng.normal(0.0, s.jitter_ms)) * 1e6)
            yield ScheduledSample(epoch_ns + at_ns, make, delay_ns)

    def _words(self) -> Iterator[tuple[int, Callable[[], Payload]]]:
        for turn in self._turns():
            for word in turn.words:
                yield round(word.end_s * 1e9), word.text.encode

    def _blocks(self) -> Iterator[tuple[int, Callable[[], Payload]]]:
        coming = self._turns()
        turn = next(coming)
        for k in itertools.count():
            # the voice may fade out after the last word
            while (turn.end_s + 0.1) * RATE_HZ < k * _BLOCK:
                turn = next(coming)
            yield (k + 1) * _BLOCK * 1_000_000_000 // RATE_HZ, partial(self._block, turn, k)

    def _block(self, turn: Turn, k: int) -> npt.NDArray[np.int16]:
        seed = self._settings.seed
        sound = _HISS * np.random.default_rng((seed, self._room, k)).standard_normal(_BLOCK)
        start = k * _BLOCK - round(turn.start_s * RATE_HZ)
        if start > -_BLOCK:
            if self._wave[0] != turn.number:
                rng = np.random.default_rng((seed, self._voice, turn.number))
                self._wave = (turn.number, speak(turn, rng) * (_LEVEL * 32767))
            piece = self._wave[1][max(0, start) : max(0, start + _BLOCK)]
            at = max(0, -start)
            sound[at : at + len(piece)] += piece
        return np.rint(sound).astype(np.int16)

    def _frames(self) -> Iterator[tuple[int, Callable[[], Payload]]]:
        coming = self._turns()
        turn = next(coming)
        for i in itertools.count():
            at_s = i / self._settings.rate_hz
            while turn.end_s < at_s:
                turn = next(coming)
            yield round(at_s * 1e9), partial(self._frame, at_s, openness(turn, at_s))

    def _frame(self, at_s: float, mouth: float) -> bytes:
        """A face in front of a wall: it sways and blinks, and its mouth opens with the loudness of the voice."""
        width, height = self._settings.width, self._settings.height
        picture = np.full((height, width, 3), (96, 88, 80), np.uint8)
        unit = min(width, height) / 100
        x = width / 2 + 3 * unit * math.sin(0.7 * at_s)
        y = height / 2 + 1.5 * unit * math.sin(1.1 * at_s)

        def oval(dx: float, dy: float, rx: float, ry: float, colour: tuple[int, int, int]) -> None:
            centre = (round(x + dx * unit), round(y + dy * unit))
            axes = (max(1, round(rx * unit)), max(1, round(ry * unit)))
            cv2.ellipse(picture, centre, axes, 0, 0, 360, colour, -1, cv2.LINE_AA)

        oval(0, -6, 31, 41, (40, 50, 70))
        oval(0, 0, 28, 36, (150, 180, 225))
        lid = 0.6 if at_s % 3.7 < 0.15 else 4.0
        for side in (-11, 11):
            oval(side, -8, 5, lid, (250, 250, 250))
            oval(side, -8, 2.2, min(lid, 2.2), (60, 40, 30))
        oval(0, 3, 2.5, 4, (130, 160, 205))
        oval(0, 18, 10 - 2 * mouth, 1 + 7 * mouth, (60, 50, 150))
        return cv2.imencode(".jpg", picture, _JPEG)[1].tobytes()
