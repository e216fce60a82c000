"""AudioEncoder: 16 kHz sound -> every 20 ms 80 log-mel values and the probability of speech.

Works sample by sample: the vectors are the same, bit for bit, for any block length.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.encoders.speech_detector import CHUNK, SpeechDetector
from stream_mmrnn.core.config import models_folder
from stream_mmrnn.core.errors import SnapshotError, WireError
from stream_mmrnn.core.topics import AUDIO_RATE_HZ
from stream_mmrnn.core.types import FloatArray, Sample
from stream_mmrnn.graph.runtime import Binding, Graph, shared

RATE = AUDIO_RATE_HZ
HOP = 320
"""Samples per vector: 20 ms."""
WINDOW = 400
"""The log-mel window, 25 ms: a hop and the end of the previous one."""
MELS = 80
SPEECH = MELS
"""Index of the speech probability in a vector."""

_SAMPLE_NS = 62_500  # 1e9 / 16,000, exactly
_TOLERANCE_NS = 10_000_000
_RESET_NS = 1_000_000_000


def _bind(logmel: Graph) -> Binding:
    return logmel.bind({"samples": (1, WINDOW)}, {"features": (1, MELS)}, {})


class AudioEncoder:
    """One vector per hop; the speech probability is the detector's newest output (every 32 ms)."""

    size = MELS + 1

    def __init__(self, folder: Path | None = None) -> None:
        """Load both graphs, by default the package's; raises ModelError if a file is missing."""
        folder = folder or models_folder() / "encoders"
        logmel, self._detector = shared(folder / "logmel80.onnx"), SpeechDetector(folder)
        both = hashlib.sha256(logmel.path.read_bytes() + self._detector.path.read_bytes()).hexdigest()
        self.origin = f"logmel80+silero_vad@{both}"
        self._logmel = _bind(logmel)
        self._spare = _bind(logmel)
        """A second binding of the same graph, for warm-up runs that must not change the state."""
        self._window: FloatArray = self._logmel.inputs["samples"][0]
        self._hop = np.zeros(HOP, np.float32)
        self.reset()

    def prewarm(self) -> None:
        """Run both graphs on dummy sound: code and weights are then in the CPU caches, and no state changes."""
        for _ in range(2):  # the second run finds the caches filled
            self._spare.run()
            self._detector.prewarm()

    def reset(self) -> None:
        """Clear the state of window and detector."""
        self._detector.reset()
        self._due_ns: int | None = None
        self._clear_samples()

    def snapshot(self) -> dict[str, npt.NDArray[Any]]:
        """Window, chunk and hop with their fill, the detector's state and last output, and when sound is due."""
        due_ns = -1 if self._due_ns is None else self._due_ns
        return {
            "window": self._window.copy(),
            "chunk": self._detector.chunk.copy(),
            "hop": self._hop.copy(),
            "detector": self._detector.state.copy(),
            "speech": np.array([self._detector.probability], np.float32),
            "filled": np.array([self._in_hop, self._detector.filled, due_ns], np.int64),
        }

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Continue from a snapshot; raises SnapshotError if it is of another shape."""
        mine = self.snapshot()
        shapes = {name: values.shape for name, values in state.items()}
        if shapes != {name: values.shape for name, values in mine.items()}:
            raise SnapshotError(f"the snapshot holds {shapes}, which is no state of {self.origin}")
        in_hop, in_chunk, due_ns = map(int, state["filled"])
        if not (0 <= in_hop < HOP and 0 <= in_chunk < CHUNK):
            raise SnapshotError("the snapshot of an audio encoder says that more is filled than there is")
        detector = self._detector
        self._window[...], detector.chunk[...], self._hop[...] = state["window"], state["chunk"], state["hop"]
        detector.state[...] = state["detector"]
        detector.probability, detector.filled = np.float32(state["speech"][0]), in_chunk
        self._in_hop, self._due_ns = in_hop, None if due_ns < 0 else due_ns

    def _clear_samples(self) -> None:
        self._window[...] = 0
        self._in_hop = 0
        self._detector.clear_samples()

    def _check_gap(self, start_ns: int) -> None:
        """Clear samples or state if there is a gap before the block.

        A hop must not span a gap, else its samples and its time would not fit. The tolerance is half a hop: a lost
        block of 10 ms or more is noticed, the jitter of a device's stamps (about 1 ms) is not. After a gap the samples
        so far are cleared; the detector's state and last output are kept, because a voice that spoke 20 ms ago
        probably still speaks. They are cleared when time jumps by more than a second.
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
                self._hop /= np.float32(32768)
                end_ns = sample.event_ns - (len(block) - at) * _SAMPLE_NS
                done.append(Sample(end_ns, sample.capture_ns, self._complete(), sample.device_ns))
        return done

    def _complete(self) -> FloatArray:
        """The vector of the hop that is full."""
        self._window[: WINDOW - HOP] = self._window[HOP:].copy()
        self._window[WINDOW - HOP :] = self._hop
        self._logmel.run()
        self._detector.feed(self._hop)
        vector = np.empty(self.size, np.float32)
        vector[:MELS] = self._logmel.outputs["features"][0]
        vector[SPEECH] = self._detector.probability
        return vector
