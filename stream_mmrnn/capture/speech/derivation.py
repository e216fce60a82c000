"""`from:STREAM/speech`: the samples of a sound -> each word as a text, at the time when it ends.

A speech detector finds utterances; only they are decoded, so that silence gives no words. While an utterance goes on,
it is decoded again and again, and words go out when two hypotheses agree (`LocalAgreement`). A pause sends the rest.

The words depend only on the sound, with one exception: where the recogniser is late in a live session, it leaves out
hypotheses and counts them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stream_mmrnn.capture.encoders.speech_detector import CHUNK, SpeechDetector
from stream_mmrnn.capture.speech import whisper
from stream_mmrnn.capture.speech.agreement import LocalAgreement, Word
from stream_mmrnn.capture.speech.whisper import Whisper
from stream_mmrnn.core.config import SpeechSettings
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.topics import AUDIO_RATE_HZ
from stream_mmrnn.core.types import FloatArray, Sample

_SAMPLE_NS = 62_500  # 1e9 / 16,000, exactly
_CHUNK_S = CHUNK / AUDIO_RATE_HZ
_VOICE, _SILENCE = 0.5, 0.35
"""Of the speech probability: an utterance begins above the one and pauses below the other, as in silero's own code."""
_BEFORE_CHUNKS = 10
"""Sound before the detected beginning that belongs to an utterance: the detector needs some time."""
_MIN_CHUNKS = 4
"""With less voice it is a noise, no word."""
_DIP_CHUNKS = 3
"""So much silence is decoded at once: if it becomes a pause, the words are known when it does."""
_JITTER_NS = 10_000_000
"""A difference between a block's time and the end of the block before that is no gap."""
_GAP_NS = 1_000_000_000
"""A shorter gap is filled with silence; a longer one, or time that runs backwards, ends the utterance."""
_LATE_NS = 3_000_000_000
"""So far behind the sound, hypotheses within an utterance are left out."""


class Speech:
    """The derivation. One utterance in memory, at most a window long."""

    def __init__(self, parent: str, settings: SpeechSettings, clock_ns: Callable[[], int] | None = None) -> None:
        """`clock_ns`: of a live session, where hypotheses are left out if the recogniser is late.

        Raises:
            UsageError: the extra is not installed.
            ModelError: there is no such model.

        """
        whisper.check(settings)
        self.origin = f"from:{parent}/speech (whisper {Path(settings.model).name})"
        self.info: dict[str, Any] = {"hypotheses": 0, "skipped": 0}
        """Counts: pieces of sound that were decoded, and those that were left out."""
        self._settings, self._clock_ns = settings, clock_ns
        self._detector = SpeechDetector()
        self._clear()

    @cached_property
    def _whisper(self) -> Whisper:
        return Whisper(self._settings)

    def reset(self) -> None:
        """Clear the state, and load the model if it is not loaded."""
        assert self._whisper is not None
        self._clear()

    def _clear(self) -> None:
        self._newest_ns = 0
        """Of the last word that went out."""
        self._clear_sound()

    def _clear_sound(self) -> None:
        self._detector.reset()
        self._due_ns: int | None = None
        self._partial = np.zeros(0, np.float32)
        """Samples that do not fill a chunk of the detector yet."""
        self._before: deque[FloatArray] = deque(maxlen=_BEFORE_CHUNKS)
        self._end_utterance()

    def _end_utterance(self) -> None:
        self._sound: list[FloatArray] = []
        """The chunks of the utterance; none between utterances."""
        self._agreement = LocalAgreement()
        self._voiced = self._silent = self._fresh = 0
        """Chunks with voice, of silence since then, and with voice since the last hypothesis was due."""
        self._undecoded = True
        """Whether there is voice, or a cut, since the last hypothesis."""

    # ---- sound -> chunks -----------------------------------------------------------------------------------------

    def derive(self, sample: Sample) -> list[Sample]:
        """The words that a block of sound completes. Raises WireError where it is not 16-bit mono."""
        block = sample.data
        if isinstance(block, bytes) or block.dtype != np.int16 or block.ndim != 1:
            raise WireError("a block of sound is not one row of 16-bit samples; send mono int16 at 16 kHz")
        start_ns = sample.event_ns - len(block) * _SAMPLE_NS
        gap_ns = 0 if self._due_ns is None else start_ns - self._due_ns
        words: list[Sample] = []
        sound = block.astype(np.float32) / np.float32(32768)
        if not -_JITTER_NS < gap_ns < _GAP_NS:
            words += self.finish()
            self._clear_sound()
        elif gap_ns >= _JITTER_NS:
            sound = np.concatenate([np.zeros(gap_ns // _SAMPLE_NS, np.float32), sound])
        self._due_ns = sample.event_ns
        self._partial = np.concatenate([self._partial, sound])
        while len(self._partial) >= CHUNK:
            chunk, self._partial = self._partial[:CHUNK], self._partial[CHUNK:]
            words += self._hear(chunk, sample)
        return words

    def finish(self) -> list[Sample]:
        """The words of an utterance that the end of the stream, or a gap, cuts off."""
        words: list[Sample] = []
        if self._sound and self._due_ns is not None:
            words = self._end(Sample(self._due_ns, self._due_ns, b""))
        self._end_utterance()
        return words

    # ---- chunks -> words -----------------------------------------------------------------------------------------

    def _hear(self, chunk: FloatArray, sample: Sample) -> list[Sample]:
        """The words that a chunk completes; `sample` is the block in which it ends."""
        [probability] = self._detector.feed(chunk)
        if not self._sound:
            self._before.append(chunk)
            if probability < _VOICE:
                return []
            self._sound = list(self._before)
            self._before.clear()
            self._voiced = self._fresh = 1
            return []
        self._sound.append(chunk)
        if probability >= _SILENCE:
            self._voiced, self._fresh, self._silent = self._voiced + 1, self._fresh + 1, 0
            self._undecoded = True
        else:
            self._silent += 1
        if self._silent * _CHUNK_S >= self._settings.pause_s:
            words = self._end(sample)
            self._before.extend(self._sound[-self._silent :])
            self._end_utterance()
            return words
        return self._go_on(sample)

    def _go_on(self, sample: Sample) -> list[Sample]:
        """Within an utterance: a hypothesis where it is time for one."""
        words: list[Sample] = []
        if self._fresh * _CHUNK_S >= self._settings.step_s or (self._silent == _DIP_CHUNKS and self._fresh):
            if self._late(sample):
                self.info["skipped"] += 1
                self._fresh = 0
            elif self._voiced >= _MIN_CHUNKS:
                words = self._texts(self._decode(), sample)
        if len(self._sound) * _CHUNK_S >= self._settings.window_s:
            words += self._shorten(sample)
        return words

    def _late(self, sample: Sample) -> bool:
        return self._clock_ns is not None and self._clock_ns() - sample.capture_ns > _LATE_NS

    def _decode(self) -> list[Word]:
        """The words that a further hypothesis confirms."""
        self.info["hypotheses"] += 1
        self._fresh, self._undecoded = 0, False
        voice_s = (len(self._sound) - self._silent) * _CHUNK_S
        agreement, sound = self._agreement, np.concatenate(self._sound)
        return agreement.agree(self._whisper.transcribe(sound, voice_s, agreement.said, agreement.end_s))

    def _end(self, sample: Sample) -> list[Sample]:
        """All words that have not gone out."""
        if self._voiced < _MIN_CHUNKS:
            return []
        words = self._decode() if self._undecoded else []
        return self._texts(words + self._agreement.commit(), sample)

    def _shorten(self, sample: Sample) -> list[Sample]:
        """Leave the part of a long utterance whose words went out; all of it, if that is not at least a half."""
        last = len(self._sound) - 1  # one chunk stays: the utterance goes on
        chunks = min(int(self._agreement.end_s / _CHUNK_S), last)
        words: list[Sample] = []
        if chunks < last // 2:
            words, chunks = self._end(sample), last
        self._sound = self._sound[chunks:]
        self._agreement.cut(chunks * _CHUNK_S)
        self._undecoded = True
        return words

    def _texts(self, words: list[Word], sample: Sample) -> list[Sample]:
        """The words with the times of their ends: not after the last voice, and never before an earlier word."""
        partial_ns = len(self._partial) * _SAMPLE_NS
        end_ns = sample.event_ns - partial_ns
        start_ns = end_ns - len(self._sound) * CHUNK * _SAMPLE_NS
        voice_ns = end_ns - self._silent * CHUNK * _SAMPLE_NS
        made = []
        for word in words:
            at_ns = min(start_ns + round(word.end_s * 1e9), voice_ns)
            self._newest_ns = min(max(self._newest_ns, at_ns), end_ns)  # time may have run backwards
            made.append(Sample(self._newest_ns, sample.capture_ns, word.text.encode()))
        return made
