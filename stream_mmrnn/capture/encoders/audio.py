"""AudioEncoder: 16 kHz sound -> every 20 ms 80 log-mel values and the probability of speech.

Works hop by hop (see `HopEncoder`).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.encoders.hops import HOP, HopEncoder
from stream_mmrnn.capture.encoders.speech_detector import CHUNK, SpeechDetector
from stream_mmrnn.core.config import models_folder
from stream_mmrnn.core.errors import SnapshotError
from stream_mmrnn.core.types import FloatArray
from stream_mmrnn.graph.runtime import Binding, Graph, shared

WINDOW = 400
"""The log-mel window, 25 ms: a hop and the end of the previous one."""
MELS = 80
SPEECH = MELS
"""Index of the speech probability in a vector."""
NAME = "logmel80+silero_vad"
"""The encoder's name in `origin`."""


def _bind(logmel: Graph) -> Binding:
    return logmel.bind({"samples": (1, WINDOW)}, {"features": (1, MELS)}, {})


class AudioEncoder(HopEncoder):
    """One vector per hop; the speech probability is the detector's newest output (every 32 ms)."""

    size = MELS + 1

    def __init__(self, folder: Path | None = None) -> None:
        """Load both graphs, by default the package's; raises ModelError if a file is missing."""
        folder = folder or models_folder() / "encoders"
        logmel, self._detector = shared(folder / "logmel80.onnx"), SpeechDetector(folder)
        both = hashlib.sha256(logmel.path.read_bytes() + self._detector.path.read_bytes()).hexdigest()
        self.origin = f"{NAME}@{both}"
        self._logmel = _bind(logmel)
        self._spare = _bind(logmel)
        """A second binding of the same graph, for warm-up runs that must not change the state."""
        self._window: FloatArray = self._logmel.inputs["samples"][0]
        super().__init__()

    def prewarm(self) -> None:
        """Run both graphs on dummy sound: code and weights are then in the CPU caches, and no state changes."""
        for _ in range(2):  # the second run finds the caches filled
            self._spare.run()
            self._detector.prewarm()

    def reset(self) -> None:
        """Clear the state of window and detector."""
        self._detector.reset()
        super().reset()

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
        self._check_state(state)
        in_hop, in_chunk, due_ns = map(int, state["filled"])
        if not 0 <= in_chunk < CHUNK:
            raise SnapshotError("the snapshot of an audio encoder says that more is filled than there is")
        detector = self._detector
        self._window[...], detector.chunk[...], self._hop[...] = state["window"], state["chunk"], state["hop"]
        detector.state[...] = state["detector"]
        detector.probability, detector.filled = np.float32(state["speech"][0]), in_chunk
        self._in_hop, self._due_ns = in_hop, None if due_ns < 0 else due_ns

    def _clear_samples(self) -> None:
        super()._clear_samples()
        self._window[...] = 0
        self._detector.clear_samples()

    def _complete(self) -> FloatArray:
        """Log-mel values and speech probability of the hop that is full."""
        self._hop /= np.float32(32768)
        self._window[: WINDOW - HOP] = self._window[HOP:].copy()
        self._window[WINDOW - HOP :] = self._hop
        self._logmel.run()
        self._detector.feed(self._hop)
        vector = np.empty(self.size, np.float32)
        vector[:MELS] = self._logmel.outputs["features"][0]
        vector[SPEECH] = self._detector.probability
        return vector
