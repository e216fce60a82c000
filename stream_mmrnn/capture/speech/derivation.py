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

from stream_mmrnn.capture.encoders.speech_detector import MIN_CHUNKS, SILENCE, VOICE, SpeechDetector
from stream_mmrnn.capture.speech import whisper
from stream_mmrnn.capture.speech.agreement import LocalAgreement, Word
from stream_mmrnn.capture.speech.sound_chunks import CHUNK_NS, CHUNK_S, LATE_NS, SoundChunks
from stream_mmrnn.capture.speech.whisper import Whisper
from stream_mmrnn.core.settings import SpeechSettings
from stream_mmrnn.core.types import FloatArray, Sample

_BEFORE_CHUNKS = 10
"""Sound before the detected beginning that belongs to an utterance: the detector needs some time."""
_DIP_CHUNKS = 3
"""So much silence is decoded at once: if it becomes a pause, the words are known when it does."""


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
        self._chunks = SoundChunks()
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
        words: list[Sample] = []
        if self._chunks.breaks_off(sample):
            words += self.finish()
            self._clear_sound()
        for chunk in self._chunks.feed(sample):
            words += self._hear(chunk, sample)
        return words

    def finish(self) -> list[Sample]:
        """The words of an utterance that the end of the stream, or a gap, cuts off."""
        words: list[Sample] = []
        if self._sound and (due_ns := self._chunks.due_ns) is not None:
            words = self._end(Sample(due_ns, due_ns, b""))
        self._end_utterance()
        return words

    # ---- chunks -> words -----------------------------------------------------------------------------------------

    def _hear(self, chunk: FloatArray, sample: Sample) -> list[Sample]:
        """The words that a chunk completes; `sample` is the block in which it ends."""
        [probability] = self._detector.feed(chunk)
        if not self._sound:
            self._before.append(chunk)
            if probability < VOICE:
                return []
            self._sound = list(self._before)
            self._before.clear()
            self._voiced = self._fresh = 1
            return []
        self._sound.append(chunk)
        if probability >= SILENCE:
            self._voiced, self._fresh, self._silent = self._voiced + 1, self._fresh + 1, 0
            self._undecoded = True
        else:
            self._silent += 1
        if self._silent * CHUNK_S >= self._settings.pause_s:
            words = self._end(sample)
            self._before.extend(self._sound[-self._silent :])
            self._end_utterance()
            return words
        return self._go_on(sample)

    def _go_on(self, sample: Sample) -> list[Sample]:
        """Within an utterance: a hypothesis where it is time for one."""
        words: list[Sample] = []
        if self._fresh * CHUNK_S >= self._settings.step_s or (self._silent == _DIP_CHUNKS and self._fresh):
            if self._late(sample):
                self.info["skipped"] += 1
                self._fresh = 0
            elif self._voiced >= MIN_CHUNKS:
                words = self._texts(self._decode(), sample)
        if len(self._sound) * CHUNK_S >= self._settings.window_s:
            words += self._shorten(sample)
        return words

    def _late(self, sample: Sample) -> bool:
        return self._clock_ns is not None and self._clock_ns() - sample.capture_ns > LATE_NS

    def _decode(self) -> list[Word]:
        """The words that a further hypothesis confirms."""
        self.info["hypotheses"] += 1
        self._fresh, self._undecoded = 0, False
        voice_s = (len(self._sound) - self._silent) * CHUNK_S
        agreement, sound = self._agreement, np.concatenate(self._sound)
        return agreement.agree(self._whisper.transcribe(sound, voice_s, agreement.said, agreement.end_s))

    def _end(self, sample: Sample) -> list[Sample]:
        """All words that have not gone out."""
        if self._voiced < MIN_CHUNKS:
            return []
        words = self._decode() if self._undecoded else []
        return self._texts(words + self._agreement.commit(), sample)

    def _shorten(self, sample: Sample) -> list[Sample]:
        """Leave the part of a long utterance whose words went out; all of it, if that is not at least a half."""
        last = len(self._sound) - 1  # one chunk stays: the utterance goes on
        chunks = min(int(self._agreement.end_s / CHUNK_S), last)
        words: list[Sample] = []
        if chunks < last // 2:
            words, chunks = self._end(sample), last
        self._sound = self._sound[chunks:]
        self._agreement.cut(chunks * CHUNK_S)
        self._undecoded = True
        return words

    def _texts(self, words: list[Word], sample: Sample) -> list[Sample]:
        """The words with the times of their ends: not after the last voice, and never before an earlier word."""
        end_ns = self._chunks.end_ns
        start_ns = end_ns - len(self._sound) * CHUNK_NS
        voice_ns = end_ns - self._silent * CHUNK_NS
        made = []
        for word in words:
            at_ns = min(start_ns + round(word.end_s * 1e9), voice_ns)
            self._newest_ns = min(max(self._newest_ns, at_ns), end_ns)  # time may have run backwards
            made.append(Sample(self._newest_ns, sample.capture_ns, word.text.encode()))
        return made
