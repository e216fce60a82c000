"""SpeechDetector: 16 kHz sound -> every 32 ms the probability of speech, by silero VAD.

Works sample by sample: the probabilities are the same, bit for bit, for any block length.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.config import models_folder
from stream_mmrnn.core.topics import AUDIO_RATE_HZ
from stream_mmrnn.core.types import FloatArray
from stream_mmrnn.graph.runtime import Binding, Graph, shared

CHUNK = 512
"""Samples per probability: the 32 ms that silero was trained on."""
_CONTEXT = 64  # as is the 4 ms before
VOICE, SILENCE = 0.5, 0.35
"""Of the probability: an utterance begins above the one and pauses below the other, as in silero's own code."""
MIN_CHUNKS = 4
"""With less voice it is a noise, no word."""


def _bind(graph: Graph) -> Binding:
    binding = graph.bind(
        {"input": (1, _CONTEXT + CHUNK), "sr": ()},
        {"output": (1, 1)},
        {"state": ("stateN", (2, 1, 128))},
    )
    binding.inputs["sr"][...] = AUDIO_RATE_HZ
    return binding


class SpeechDetector:
    """The detector's network, its chunk and its last output."""

    def __init__(self, folder: Path | None = None) -> None:
        """Load the graph, by default the package's; raises ModelError if the file is missing."""
        graph = shared((folder or models_folder() / "encoders") / "silero_vad.onnx")
        self.path = graph.path
        self._binding, self._spare = _bind(graph), _bind(graph)  # the second for runs that must not change the state
        self.state: npt.NDArray[np.float32] = self._binding.state["state"]
        self.chunk: FloatArray = self._binding.inputs["input"][0]
        """The end of the previous chunk, then this one."""
        self.reset()

    def prewarm(self) -> None:
        """Run the graph on dummy sound; no state changes."""
        self._spare.run()

    def reset(self) -> None:
        """Clear the state, the chunk and the last output."""
        self.probability = np.float32(0)
        self.state[...] = 0
        self.clear_samples()

    def clear_samples(self) -> None:
        """Forget the samples so far and keep the state."""
        self.chunk[...] = 0
        self.filled = 0

    def feed(self, sound: FloatArray) -> list[np.float32]:
        """The probabilities of the chunks that these samples (float32, -1 to 1) complete."""
        made: list[np.float32] = []
        at = 0
        while at < len(sound):
            count = min(CHUNK - self.filled, len(sound) - at)
            start = _CONTEXT + self.filled
            self.chunk[start : start + count] = sound[at : at + count]
            at += count
            self.filled += count
            if self.filled == CHUNK:
                self.filled = 0
                self._binding.run()
                self.probability = self._binding.outputs["output"][0, 0]
                self.chunk[:_CONTEXT] = self.chunk[CHUNK:]
                made.append(self.probability)
        return made
