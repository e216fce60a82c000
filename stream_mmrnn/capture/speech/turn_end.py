"""`from:STREAM/turn_end`: the samples of a sound -> once a pause, how likely the turn has ended there.

A pause that is 7 chunks of the speech detector long (224 ms) is judged by smart-turn v3.2 (pipecat, Daily; BSD-2) on
the 8 s of sound that end there; before the stream began, that is silence. Its logit has the time of the end of that
sound. Live this is a process beside that of the sound's own encoder: features never wait for it.

Numbers and times depend only on the sound, with one exception: where it is late in a live session, pauses are left out
and counted.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.encoders.signal import SignalEncoder
from stream_mmrnn.capture.encoders.speech_detector import CHUNK, MIN_CHUNKS, SILENCE, VOICE, SpeechDetector
from stream_mmrnn.capture.speech.mel import HOP, log_mel
from stream_mmrnn.capture.speech.sound_chunks import LATE_NS, SoundChunks
from stream_mmrnn.core.config import models_folder
from stream_mmrnn.core.errors import SnapshotError
from stream_mmrnn.core.types import FloatArray, Sample
from stream_mmrnn.graph.runtime import shared

NAME = "smart-turn-v3.2"
"""Its name in `origin`."""
PAUSE_CHUNKS = 7
"""So old is a pause when it is judged: 224 ms."""
WINDOW_CHUNKS = 250
"""Of the sound that is judged: 8 s, as smart-turn was trained."""
MAX_LOGIT = 8.0
"""A larger one is clipped, on both sides. The weights are quantised: their own logits lie between -5.4 and 4.7."""
_MELS = 80
_EPSILON = np.float32(1e-7)


def _file(folder: Path | None, name: str = "smart_turn") -> Path:
    return (folder or models_folder() / "encoders") / f"{name}.onnx"


class SmartTurn:
    """The network."""

    def __init__(self, folder: Path | None = None) -> None:
        """Load it, by default the package's; raises ModelError if the file is missing."""
        graph = shared(_file(folder))
        frames = WINDOW_CHUNKS * CHUNK // HOP
        self._binding = graph.bind({"input_features": (1, _MELS, frames)}, {"logits": (1, 1)}, {})

    def features(self, sound: FloatArray) -> FloatArray:
        """What it takes of 8 s of sound (float32, -1 to 1): as in pipecat, bit for bit."""
        scaled = (sound - sound.mean()) / np.sqrt(sound.var() + _EPSILON)
        return log_mel(scaled.astype(np.float64), _MELS)

    def logit(self, sound: FloatArray) -> np.float32:
        """How likely the turn ends with this sound (float32, -1 to 1, at most 8 s): above 0 more likely than not."""
        whole = np.zeros(WINDOW_CHUNKS * CHUNK, np.float32)
        whole[len(whole) - len(sound) :] = sound
        self._binding.inputs["input_features"][0] = self.features(whole)
        self._binding.run()
        complete = float(self._binding.outputs["logits"][0, 0])  # a probability, whatever its name
        with np.errstate(divide="ignore"):
            logit = np.log(np.float64(complete)) - np.log1p(-np.float64(complete))
        return np.float32(np.clip(logit, -MAX_LOGIT, MAX_LOGIT))


class TurnEndEncoder(SignalEncoder):
    """The derivation's numbers unchanged: one per vector, the logit."""

    size = 1

    def __init__(self, folder: Path | None = None) -> None:
        """Raises OSError if a file of weights is missing."""
        # the detector chooses the moments, so it is a part of what the numbers mean
        constants = repr((PAUSE_CHUNKS, WINDOW_CHUNKS, MAX_LOGIT, VOICE, SILENCE, MIN_CHUNKS)).encode()
        weights = b"".join(_file(folder, name).read_bytes() for name in ("smart_turn", "silero_vad"))
        self.origin = f"{NAME}@{hashlib.sha256(weights + constants).hexdigest()}"


class PauseDetector:
    """The probabilities of speech, chunk by chunk -> when a pause has to be judged: once each, after enough voice."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the voice so far."""
        self.voiced = self.silent = 0
        """Chunks with voice since the last pause, and of silence since then."""

    def feed(self, probability: float) -> bool:
        """Whether a pause is `PAUSE_CHUNKS` old with this chunk."""
        if probability >= (SILENCE if self.voiced else VOICE):
            self.voiced, self.silent = self.voiced + 1, 0
        elif self.voiced:
            self.silent += 1
        if self.silent < PAUSE_CHUNKS:
            return False
        was_speech = self.voiced >= MIN_CHUNKS
        self.reset()
        return was_speech


class TurnEnd:
    """The derivation. The last 8 s of one sound in memory."""

    def __init__(
        self,
        parent: str,
        clock_ns: Callable[[], int] | None = None,
        judge: Callable[[FloatArray], np.float32] | None = None,
    ) -> None:
        """`clock_ns`: of a live session, where pauses are left out if this is late. `judge`: instead of the network."""
        self.origin = f"from:{parent}/turn_end ({NAME})"
        self.info: dict[str, Any] = {"pauses": 0, "skipped": 0}
        """Counts: pauses that were judged, and those that were left out."""
        self._clock_ns, self._given = clock_ns, judge
        self._detector, self._pause, self._chunks = SpeechDetector(), PauseDetector(), SoundChunks()
        self._clear()

    @cached_property
    def _judge(self) -> Callable[[FloatArray], np.float32]:
        if self._given is not None:
            return self._given
        network = SmartTurn()
        network.logit(np.zeros(0, np.float32))  # the first run takes longer
        return network.logit

    def reset(self) -> None:
        """Clear the state, and load the network if it is not loaded."""
        assert self._judge is not None
        self._clear()

    def _clear(self) -> None:
        self._detector.reset()
        self._pause.reset()
        self._chunks.reset()
        self._sound: deque[FloatArray] = deque(maxlen=WINDOW_CHUNKS)

    def derive(self, sample: Sample) -> list[Sample]:
        """The logits of the pauses that a block of sound makes old enough. Raises WireError where it is no sound."""
        if self._chunks.breaks_off(sample):
            self._clear()
        made = []
        for chunk in self._chunks.feed(sample):
            self._sound.append(chunk)
            [probability] = self._detector.feed(chunk)
            if not self._pause.feed(float(probability)):
                continue
            if self._clock_ns is not None and self._clock_ns() - sample.capture_ns > LATE_NS:
                self.info["skipped"] += 1
                continue
            self.info["pauses"] += 1
            logit = np.array([self._judge(np.concatenate(self._sound))], np.float32)
            made.append(Sample(self._chunks.end_ns, sample.capture_ns, logit))
        return made

    def finish(self) -> list[Sample]:
        """Nothing: a pause that is not old enough yet is none."""
        return []

    # ---- state ---------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, npt.NDArray[Any]]:
        """The sound in memory, the detector's state, and when sound is due."""
        chunks = self._chunks
        due_ns = -1 if chunks.due_ns is None else chunks.due_ns
        sound = np.concatenate([*self._sound, chunks.partial])
        return {
            "sound": np.round(sound * 32768).astype(np.int16),
            "context": self._detector.chunk.copy(),
            "detector": self._detector.state.copy(),
            "counts": np.array([len(self._sound), self._pause.voiced, self._pause.silent, due_ns], np.int64),
        }

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Continue from a snapshot; raises SnapshotError if it does not fit."""
        like = self.snapshot()
        fits = all(name in state and state[name].dtype == array.dtype for name, array in like.items())
        if not fits or any(state[name].shape != like[name].shape for name in ("context", "detector", "counts")):
            raise SnapshotError("the snapshot is of another version of turn_end; begin anew")
        count, voiced, silent, due_ns = state["counts"].tolist()
        whole, rest = divmod(state["sound"].size, CHUNK)
        if state["sound"].ndim != 1 or whole != count or not 0 <= count <= WINDOW_CHUNKS:
            raise SnapshotError("the snapshot's sound and its length disagree; begin anew")
        self._clear()
        sound = state["sound"].astype(np.float32) / np.float32(32768)
        self._sound.extend(sound[: count * CHUNK].reshape(count, CHUNK))
        self._chunks.partial = sound[count * CHUNK :] if rest else np.zeros(0, np.float32)
        self._chunks.due_ns = None if due_ns < 0 else due_ns
        self._detector.chunk[...] = state["context"]
        self._detector.state[...] = state["detector"]
        self._pause.voiced, self._pause.silent = voiced, silent
