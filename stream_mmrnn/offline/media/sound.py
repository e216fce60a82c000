"""Sound of files, one person a channel, and when each of them speaks.

Who speaks when is told by a file beside the sound, else found by the package's speech detector. Knows nothing about
models.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.encoders.speech_detector import CHUNK, MIN_CHUNKS, SILENCE, VOICE, SpeechDetector
from stream_mmrnn.capture.resampler import SoundInput
from stream_mmrnn.capture.sources.file import FileSound
from stream_mmrnn.core.errors import FileError
from stream_mmrnn.core.settings import MicrophoneSettings
from stream_mmrnn.core.topics import AUDIO_RATE_HZ
from stream_mmrnn.training.datasets.audio import pcm

Array = npt.NDArray[Any]
Seconds = npt.NDArray[np.float64]

_JOIN_CHUNKS = 1
"""A gap as short is none."""


class Conversation(NamedTuple):
    name: str
    sound: tuple[Array, Array]
    """16 kHz of each person, int16."""
    voice: tuple[Seconds, Seconds]
    """When each of them speaks, [K, 2] in seconds."""


def read(path: Path) -> Conversation:
    """A WAV file with one person a channel; `NAME.rttm` beside it says who speaks when, else the speech detector does.

    Raises:
        FileError: the file has not two channels, or cannot be read.

    """
    sound = channels(path)
    if len(sound) != 2:
        raise FileError(
            f"{path} has {len(sound)} channel{'s' * (len(sound) > 1)}, expected two: one person a channel; of people "
            "one at a time, `--measure utterances` measures the ends of what they say"
        )
    rttm = path.with_suffix(".rttm")
    spoken = _conversation_rttm(rttm) if rttm.is_file() else (heard(sound[0]), heard(sound[1]))
    return Conversation(path.stem, (sound[0], sound[1]), spoken)


def channels(path: Path) -> list[Array]:
    """The channels of a WAV file at 16 kHz, int16; of another media file the mix of them.

    Raises:
        FileError: it cannot be read, or holds no sound.

    """
    if path.suffix.lower() != ".wav":
        source = FileSound(path, MicrophoneSettings(), paced=False)
        source.open()
        try:
            blocks = [np.asarray(sample.data, np.int16) for sample in source.samples(lambda: True, 0)]
        finally:
            source.close()
        return [np.concatenate(blocks)]
    try:
        rate_hz, samples = pcm(str(path), path.read_bytes())
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror}; give a WAV file with one person a channel") from e
    return [_at_16_khz(np.ascontiguousarray(channel), rate_hz) for channel in np.atleast_2d(samples.T)]


def _at_16_khz(samples: Array, rate_hz: int) -> Array:
    made = SoundInput(0)
    silence = np.zeros(rate_hz // 10, np.int16)  # what the resampler still holds comes out with it
    return np.concatenate([made.feed(samples, rate_hz, None), made.feed(silence, rate_hz, None)])


def heard(sound: Array) -> Seconds:
    """When somebody speaks, by the package's speech detector: [K, 2] seconds. It sees the whole file, so a gap of
    one chunk (32 ms) is closed, and what has less voice than a word is left out.
    """
    speaks, spans = False, list[list[int]]()
    for i, probability in enumerate(SpeechDetector().feed(sound.astype(np.float32) / np.float32(32768))):
        now = bool(probability > (SILENCE if speaks else VOICE))
        if now and spans and i - spans[-1][1] <= _JOIN_CHUNKS:
            spans[-1][1] = i + 1
        elif now:
            spans.append([i, i + 1])
        speaks = now
    long = [span for span in spans if span[1] - span[0] >= MIN_CHUNKS]
    return np.array(long, np.float64).reshape(-1, 2) * CHUNK / AUDIO_RATE_HZ


class Turn(NamedTuple):
    """A row of an .rttm file."""

    channel: int
    speaker: str
    begin_s: float
    end_s: float


def rttm_turns(path: Path) -> list[Turn]:
    """`SPEAKER file channel start duration <NA> <NA> name ...` (NIST Rich Transcription), by their start; channel 1 or
    2. Raises FileError.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split()
        if not fields or fields[0] != "SPEAKER":
            continue
        try:
            channel, start_s, length_s = {"1": 1, "2": 2}[fields[2]], float(fields[3]), float(fields[4])
        except (ValueError, IndexError, KeyError) as e:
            raise FileError(
                f"{path}, line {number}: expected `SPEAKER file channel start duration`, with channel 1 or 2"
            ) from e
        speaker = fields[7] if len(fields) > 7 else ""
        found.append(Turn(channel, speaker, start_s, start_s + length_s))
    return sorted(found, key=lambda turn: (turn.begin_s, turn.end_s))


def _conversation_rttm(path: Path) -> tuple[Seconds, Seconds]:
    turns = rttm_turns(path)
    one, other = (
        np.array([(t.begin_s, t.end_s) for t in turns if t.channel == channel]).reshape(-1, 2) for channel in (1, 2)
    )
    return one, other
