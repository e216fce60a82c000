"""The synthetic person's voice: a turn -> its waveform, by harmonics with moving formants.

Simple, but a voice activity detector takes it for speech. Pure.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.sources import RATE_HZ
from stream_mmrnn.capture.sources.talker import VOWELS, Phone, Turn

FloatArray = npt.NDArray[np.float32]

_STEP = 80
"""Samples between two points of the contours: 5 ms."""
_HARMONICS = 36
_BANDWIDTHS_HZ = np.array([70.0, 90.0, 130.0, 200.0], np.float32)
_FORMANTS_HZ = {
    "a": (730, 1150, 2440, 3500),
    "e": (530, 1840, 2480, 3500),
    "i": (300, 2250, 3000, 3600),
    "o": (520, 900, 2410, 3400),
    "u": (330, 900, 2240, 3300),
    "y": (320, 2100, 2900, 3600),
    "m": (260, 1100, 2200, 3300),
    "n": (260, 1500, 2500, 3400),
    "l": (360, 1300, 2700, 3400),
    "r": (400, 1150, 1600, 3200),
    "w": (320, 750, 2200, 3300),
}
_NEUTRAL_HZ = (450, 1450, 2450, 3400)
_VOICED = {
    "m": 0.35,
    "n": 0.35,
    "l": 0.5,
    "r": 0.5,
    "w": 0.4,
    "v": 0.25,
    "z": 0.2,
    "b": 0.15,
    "d": 0.15,
    "g": 0.15,
}
_NOISE_HZ = {
    "s": 5500,
    "z": 5500,
    "c": 4500,
    "x": 4500,
    "f": 5000,
    "v": 4500,
    "h": 1800,
    "t": 4200,
    "d": 3500,
}
_NOISE_HZ |= {"k": 2200, "q": 2200, "g": 2000, "p": 1200, "b": 1000, "j": 3000}
_BURSTS = "tdkgpbq"


def _loudness(letter: str) -> float:
    return 1.0 if letter in VOWELS else _VOICED.get(letter, 0.0)


def _smooth(contour: FloatArray, width: int) -> FloatArray:
    kernel = np.hanning(width + 2)[1:-1]
    kernel /= kernel.sum()
    padded = np.pad(contour, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, kernel, "valid").astype(np.float32)


def _noise(phone: Phone, rng: np.random.Generator) -> FloatArray:
    count = round((phone.end_s - phone.start_s) * RATE_HZ)
    spectrum = np.fft.rfft(rng.standard_normal(count))
    hz = np.fft.rfftfreq(count, 1 / RATE_HZ)
    centre = _NOISE_HZ[phone.letter]
    sound = np.fft.irfft(spectrum * np.exp(-(((hz - centre) / (0.35 * centre)) ** 2)), count)
    if phone.letter in _BURSTS:  # a closure, then a decaying burst
        at = np.arange(count) / count
        shape = np.where(at < 0.5, 0.0, np.exp(-(at - 0.5) * 10))
    else:
        shape = np.sin(np.pi * np.arange(count) / count)
    return (sound * shape).astype(np.float32)


def speak(turn: Turn, rng: np.random.Generator) -> FloatArray:
    """The sound of a turn, with peaks a little below 1."""
    steps = int((turn.end_s - turn.start_s) * RATE_HZ / _STEP) + 12
    loud = np.zeros(steps, np.float32)
    pitch = np.full(steps, np.nan, np.float32)
    formants = np.tile(np.array(_NEUTRAL_HZ, np.float32), (steps, 1))
    phones = [p for w in turn.words for p in w.phones]
    for p in phones:
        a, b = (int((t - turn.start_s) * RATE_HZ / _STEP) for t in (p.start_s, p.end_s))
        loud[a:b] = _loudness(p.letter)
        pitch[a:b] = p.pitch_hz
        formants[a:b] = _FORMANTS_HZ.get(p.letter, _NEUTRAL_HZ)
    known = ~np.isnan(pitch)
    pitch = np.interp(np.arange(steps), np.flatnonzero(known), pitch[known]).astype(np.float32)
    # a real voice is never perfectly steady
    pitch = _smooth(pitch * (1 + 0.02 * rng.standard_normal(steps).astype(np.float32)), 15)
    loud = _smooth(loud, 7)
    formants = np.stack([_smooth(formants[:, i], 9) for i in range(4)], axis=1)

    hz = pitch[:, None] * np.arange(1, _HARMONICS + 1, dtype=np.float32)
    level = loud[:, None] / np.arange(1, _HARMONICS + 1, dtype=np.float32)
    for i in range(4):
        f = formants[:, i : i + 1]
        level = level * f * f / np.sqrt((f * f - hz * hz) ** 2 + (hz * _BANDWIDTHS_HZ[i]) ** 2)
    level[hz > 7500] = 0.0

    between = (np.arange(_STEP, dtype=np.float32) / _STEP)[None, :]
    pitches = pitch[:-1, None] * (1 - between) + pitch[1:, None] * between
    phase = (2 * np.pi / RATE_HZ * np.cumsum(pitches.ravel().astype(np.float64))).astype(np.float32)
    sound = np.zeros(len(phase), np.float32)
    for h in range(_HARMONICS):
        levels = level[:-1, h, None] * (1 - between) + level[1:, h, None] * between
        sound += levels.ravel() * np.sin((h + 1) * phase)
    breath = np.repeat(loud[:-1], _STEP) * rng.standard_normal(len(sound)).astype(np.float32)
    sound += 0.03 * breath
    for p in phones:
        if p.letter in _NOISE_HZ:
            noise = _noise(p, rng)
            start = round((p.start_s - turn.start_s) * RATE_HZ)
            sound[start : start + len(noise)] += 0.8 * noise[: len(sound) - start]
    result: FloatArray = np.tanh(sound * 0.35)
    return result
