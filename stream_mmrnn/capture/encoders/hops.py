"""HopEncoder: blocks of 16 kHz sound of any length -> one vector per hop of 20 ms; gaps are noticed.

The vectors are the same, bit for bit, for any block length.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.errors import SnapshotError, WireError
from stream_mmrnn.core.topics import AUDIO_RATE_HZ
from stream_mmrnn.core.types import FloatArray, Sample

RATE = AUDIO_RATE_HZ
HOP = 320
"""Samples per vector: 20 ms."""

_SAMPLE_NS = 62_500  # 1e9 / 16,000, exactly
_TOLERANCE_NS = 10_000_000
_RESET_NS = 1_000_000_000


class HopEncoder(ABC):
    """What the encoders of sound have in common: the hop that is being filled, and when its next sample is due."""

    origin: str
    _in_hop: int
    """How many samples of the hop are there."""
    _due_ns: int | None
    """When the next sample begins; None before the first."""

    def __init__(self) -> None:
        """Start with no sound."""
        self._hop: FloatArray = np.zeros(HOP, np.float32)
        self.reset()

    @abstractmethod
    def snapshot(self) -> dict[str, npt.NDArray[Any]]:
        """The state, by name; `hop` is the hop and `filled` begins with the number of its samples that are there."""

    @abstractmethod
    def _complete(self) -> FloatArray:
        """The vector of `_hop`, which is full: float32 [HOP], values of 16-bit samples. May change `_hop`."""

    def reset(self) -> None:
        """Clear the state."""
        self._due_ns = None
        self._clear_samples()

    def _clear_samples(self) -> None:
        """Forget the samples so far, as after a gap; what is known of the voice stays."""
        self._in_hop = 0

    def _check_state(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Raise SnapshotError if this is no snapshot of such an encoder."""
        shapes = {name: values.shape for name, values in state.items()}
        if shapes != {name: values.shape for name, values in self.snapshot().items()}:
            raise SnapshotError(f"the snapshot holds {shapes}, which is no state of {self.origin}")
        if not 0 <= int(state["filled"][0]) < HOP:
            raise SnapshotError("the snapshot of an audio encoder says that more is filled than there is")

    def _check_gap(self, start_ns: int) -> None:
        """Clear samples or state if there is a gap before the block.

        A hop must not span a gap, else its samples and its time would not fit. The tolerance is half a hop: a lost
        block of 10 ms or more is noticed, the jitter of a device's stamps (about 1 ms) is not. After a gap the samples
        so far are cleared; the state of the voice is kept, because a voice that spoke 20 ms ago probably still speaks.
        It is cleared when time jumps by more than a second.
        """
        if self._due_ns is None:
            return
        gap_ns = start_ns - self._due_ns
        if not -_RESET_NS <= gap_ns <= _RESET_NS:
            self.reset()
        elif abs(gap_ns) >= _TOLERANCE_NS:
            self._clear_samples()

    def encode(self, sample: Sample) -> list[Sample]:
        """The vectors of the hops that the block completes; raises WireError where it is not 16-bit mono."""
        block = sample.data
        if isinstance(block, bytes) or block.dtype != np.int16 or block.ndim != 1:
            raise WireError("a block of sound is not one row of 16-bit samples; send mono int16 at 16 kHz")
        self._check_gap(sample.event_ns - len(block) * _SAMPLE_NS)
        self._due_ns = sample.event_ns
        done: list[Sample] = []
        at = 0
        while at < len(block):
            count = min(HOP - self._in_hop, len(block) - at)
            self._hop[self._in_hop : self._in_hop + count] = block[at : at + count]
            at += count
            self._in_hop += count
            if self._in_hop == HOP:
                self._in_hop = 0
                end_ns = sample.event_ns - (len(block) - at) * _SAMPLE_NS
                done.append(Sample(end_ns, sample.capture_ns, self._complete(), sample.device_ns))
        return done
