"""Sound of another rate or with two channels -> mono at 16 kHz, by PyAV. Knows nothing about devices.

PyAV is imported when a rate is converted: sound at 16 kHz needs none.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.topics import AUDIO_RATE_HZ

Int16Array = npt.NDArray[np.int16]
_SAMPLE_NS = 1_000_000_000 // AUDIO_RATE_HZ


class Resampler:
    """The same samples come out for any chunks that go in."""

    def __init__(self, rate_hz: int, channels: int = 1) -> None:
        try:
            import av
        except ModuleNotFoundError as e:
            raise UsageError(f"sound of {rate_hz} Hz is converted by PyAV; install av, or give sound at 16 kHz") from e
        self.rate_hz, self._channels = rate_hz, channels
        self._make_frame = av.AudioFrame.from_ndarray
        self._layout = "mono" if channels == 1 else "stereo"
        self._resampler = av.AudioResampler(format="s16", layout="mono", rate=AUDIO_RATE_HZ)
        self._frames_in = self._frames_out = 0

    def feed(self, data: Int16Array) -> Int16Array:
        """What comes out for `data` (frames, channels interleaved)."""
        frame = self._make_frame(data.reshape(1, -1), format="s16", layout=self._layout)
        frame.sample_rate = self.rate_hz
        pieces = [out.to_ndarray()[0] for out in self._resampler.resample(frame)]
        sound: Int16Array = np.concatenate([np.empty(0, np.int16), *pieces])
        self._frames_in += len(data) // self._channels
        self._frames_out += len(sound)
        return sound

    @property
    def held_s(self) -> float:
        """How much of the input is still in the filter: the output ends that much before the input."""
        return self._frames_in / self.rate_hz - self._frames_out / AUDIO_RATE_HZ


class SoundInput:
    """Sound from a program, in pieces of any length and rate -> 16 kHz, with the end time of each piece."""

    def __init__(self, begin_ns: int) -> None:
        """`begin_ns`: when the first piece begins, unless its end is given."""
        self.end_ns = begin_ns
        """Where the sound ends."""
        self.begun = False
        self._resampler: Resampler | None = None

    @property
    def resampling(self) -> bool:
        """Whether a resampler holds a part of the sound, which no snapshot has."""
        return self._resampler is not None

    def feed(self, sound: Int16Array, rate_hz: int, end_ns: int | None) -> Int16Array:
        """What comes out for a piece of mono sound, which ends at `end_ns`, or follows the piece before it."""
        if rate_hz != AUDIO_RATE_HZ:
            if self._resampler is None or self._resampler.rate_hz != rate_hz:
                self._resampler = Resampler(rate_hz)
            sound = self._resampler.feed(sound)
            if end_ns is not None:
                end_ns -= round(self._resampler.held_s * 1e9)
        if end_ns is None:
            end_ns = self.end_ns + len(sound) * _SAMPLE_NS
        self.end_ns, self.begun = end_ns, True
        return sound


class BlockResampler:
    """The same in blocks of equal length, with the end time of each."""

    def __init__(self, rate_hz: int, channels: int, block: int) -> None:
        self._resampler, self._block = Resampler(rate_hz, channels), block
        self._rest: Int16Array = np.empty(0, np.int16)

    def feed(self, data: Int16Array, end_ns: int) -> list[tuple[Int16Array, int]]:
        """The blocks that `data` completes; `end_ns` is when `data` (frames, channels interleaved) ended."""
        sound = np.concatenate([self._rest, self._resampler.feed(data)])
        whole = len(sound) // self._block
        self._rest = sound[whole * self._block :]
        blocks = []
        for i in range(whole):
            after = len(sound) - (i + 1) * self._block
            at_ns = end_ns - round((self._resampler.held_s + after / AUDIO_RATE_HZ) * 1e9)
            blocks.append((sound[i * self._block : (i + 1) * self._block], at_ns))
        return blocks
