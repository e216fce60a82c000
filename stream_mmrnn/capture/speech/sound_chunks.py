"""SoundChunks: blocks of sound of any length -> the chunks of the speech detector, one after the other.

Knows nothing about what is made of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stream_mmrnn.capture.encoders.speech_detector import CHUNK
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.topics import AUDIO_RATE_HZ
from stream_mmrnn.core.types import FloatArray, Sample

SAMPLE_NS = 62_500  # 1e9 / 16,000, exactly
CHUNK_NS = CHUNK * SAMPLE_NS
CHUNK_S = CHUNK / AUDIO_RATE_HZ
LATE_NS = 3_000_000_000
"""So far behind the sound of a live session, what is made of sound leaves out work."""
_JITTER_NS = 10_000_000
"""A difference between a block's time and the end of the block before that is no gap."""
_GAP_NS = 1_000_000_000
"""A shorter gap is filled with silence; a longer one, or time that runs backwards, breaks the sound off."""


class SoundChunks:
    """The samples that do not fill a chunk yet, and when sound is due."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the sound so far."""
        self.due_ns: int | None = None
        """End of the newest block; None before the first."""
        self.partial = np.zeros(0, np.float32)

    @property
    def end_ns(self) -> int:
        """End of the newest chunk."""
        return (self.due_ns or 0) - len(self.partial) * SAMPLE_NS

    def breaks_off(self, sample: Sample) -> bool:
        """Whether the sound so far does not go on in this block; `reset` before `feed` then."""
        gap_ns = self._gap_ns(sample)
        return not -_JITTER_NS < gap_ns < _GAP_NS

    def feed(self, sample: Sample) -> Iterator[FloatArray]:
        """The chunks (float32, -1 to 1) that a block completes; `end_ns` is the end of the one that was given last.

        Raises:
            WireError: it is not 16-bit mono.

        """
        block, gap_ns = _block(sample), self._gap_ns(sample)
        sound = block.astype(np.float32) / np.float32(32768)
        if gap_ns >= _JITTER_NS:
            sound = np.concatenate([np.zeros(gap_ns // SAMPLE_NS, np.float32), sound])
        self.due_ns = sample.event_ns
        self.partial = np.concatenate([self.partial, sound])
        while len(self.partial) >= CHUNK:
            chunk, self.partial = self.partial[:CHUNK], self.partial[CHUNK:]
            yield chunk

    def _gap_ns(self, sample: Sample) -> int:
        """From the end of the sound so far to the beginning of a block."""
        return 0 if self.due_ns is None else sample.event_ns - len(_block(sample)) * SAMPLE_NS - self.due_ns


def _block(sample: Sample) -> np.ndarray[tuple[int], np.dtype[np.int16]]:
    block = sample.data
    if isinstance(block, bytes) or block.dtype != np.int16 or block.ndim != 1:
        raise WireError("a block of sound is not one row of 16-bit samples; send mono int16 at 16 kHz")
    return block
