"""ProsodyEncoder: 16 kHz sound -> every 20 ms how something is said: pitch, voicing, loudness, tilt, rate, and slopes.

Works hop by hop (see `HopEncoder`) and is causal: a vector depends on the sound up to its event time only. There are no
weights; `origin` names the version of this code and its constants.

Sources of the methods:

- pitch and voicing: YIN, steps 1 to 5 (de Cheveigne and Kawahara 2002, J. Acoust. Soc. Am. 111, 1917-1930), with the
  window at the newest samples;
- tilt: the alpha ratio of eGeMAPS (Eyben et al. 2016, IEEE Trans. Affective Computing 7, 190-202);
- speaking rate: voiced peaks of the level between dips of 2 dB (de Jong and Wempe 2009, Behavior Research Methods 41,
  385-390), here as soon as the level has fallen again.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.encoders.hops import HOP, RATE, HopEncoder
from stream_mmrnn.core.errors import SnapshotError
from stream_mmrnn.core.types import FloatArray

PITCH = 0
"""Octaves above the running mean of the voice's pitch; 0 where there is no voice."""
VOICING = 1
"""How periodic the sound is: 1 less the smallest normalised difference of YIN; 0 to 1."""
LOUDNESS = 2
"""Root mean square of the last 40 ms without its mean (DC), in dB of full scale: a full sine has -3, silence -101."""
LOUDNESS_ABOVE = 3
"""Decibels above the running mean of the voice's loudness; 0 before the first voice."""
TILT = 4
"""Decibels of the energy from 50 to 1,000 Hz above that from 1,000 to 5,000 Hz; -6 in silence and in white noise."""
SPEAKING_RATE = 5
"""Syllable nuclei a second, as a sum over the past that falls with a time constant of a second."""
SLOPED = (PITCH, VOICING, LOUDNESS, TILT, SPEAKING_RATE)
"""What has slopes, in this order: least squares, a second; 0 where less than a third of the hops has a value."""
SLOPES_200 = 6
"""Index of the first slope over the last 200 ms."""
SLOPES_600 = SLOPES_200 + len(SLOPED)
"""Index of the first slope over the last 600 ms."""
SIZE = SLOPES_600 + len(SLOPED)

MIN_PITCH_HZ, MAX_PITCH_HZ = 60, 400
VOICED = 0.7
"""From which voicing on there is a voice."""

_VERSION = 1  # to raise when this code changes what it computes
_MIN_LAG, _MAX_LAG = RATE // MAX_PITCH_HZ, -(-RATE // MIN_PITCH_HZ)
_WINDOW = 400  # samples that are compared with those a lag before: 25 ms
_FRAME = _WINDOW + _MAX_LAG + 1  # one lag more, for the parabola
_FFT = 720
_DIP = 0.15  # the first lag that is better is taken, else the best
_NOISE = 2 * _WINDOW * 4**2  # difference of noise of 4 units (-78 dB), which is added: silence has no period
_LEVEL_WINDOW = 640
_QUANTISATION = 1 / 12  # power of rounding to integers
_FULL_SCALE_DB = 20 * math.log10(32768)
_TILT_WINDOW = 512
_TILT_HZ = (50, 1_000, 5_000)
_SHORT, _LONG = 10, 30  # hops of the slopes
_ENOUGH = 1 / 3
_MEAN_HOPS = 500  # the running means forget with a time constant of 10 s of voice
_DIP_DB = 2.0
_RATE_S = 1.0
_CONSTANTS = (
    *(_VERSION, HOP, RATE, SLOPED, MIN_PITCH_HZ, MAX_PITCH_HZ, VOICED, _WINDOW, _FFT, _DIP, _NOISE, _LEVEL_WINDOW),
    *(_TILT_WINDOW, _TILT_HZ, _SHORT, _LONG, _ENOUGH, _MEAN_HOPS, _DIP_DB, _RATE_S),
)

_HOP_S = HOP / RATE
_DECAY = math.exp(-_HOP_S / _RATE_S)
_LAGS = np.arange(1, _MAX_LAG + 2, dtype=np.float64)
_HANN = np.hanning(_TILT_WINDOW + 1)[:-1]
_LOW, _MIDDLE, _HIGH = (-(-hz * _TILT_WINDOW // RATE) for hz in _TILT_HZ)
_TILT_NOISE = _QUANTISATION * _TILT_WINDOW * float(np.square(_HANN).mean())
_TIMES_S = np.arange(1 - _LONG, 1) * _HOP_S
_WINDOWS = np.arange(1 - _LONG, 1) > np.array([[-_SHORT], [-_LONG]])
_SHAPES = np.concatenate([_WINDOWS, _WINDOWS * _TIMES_S, _WINDOWS * _TIMES_S**2])
"""1, t and t squared in the short and the long window, 0 outside: what the sums of least squares are made with."""
_ENOUGH_HOPS = np.array([_SHORT, _LONG]) * _ENOUGH

Numbers = npt.NDArray[np.float64]


class _Voice(NamedTuple):
    """What is kept of the voice beyond the last 600 ms."""

    hops: float = 0.0
    """Voiced hops so far, up to `_MEAN_HOPS`."""
    pitch: float = 0.0
    """Running mean, octaves above 1 Hz."""
    loudness: float = 0.0
    """Running mean, dB."""
    speaking_rate: float = 0.0
    rises: float = 0.0
    """1 while the level is past a dip and has not fallen from its peak yet."""
    turn: float = 0.0
    """The highest level since the dip, or the lowest since the peak, dB."""
    peak_voiced: float = 0.0
    """1 if there was a voice since the dip."""

    def hear(self, pitch: float, voiced: bool, loudness: float) -> _Voice:
        """The next hop."""
        hops, mean_pitch, mean_loudness = self.hops, self.pitch, self.loudness
        if voiced:
            hops = min(hops + 1, _MEAN_HOPS)
            mean_pitch += (pitch - mean_pitch) / hops
            mean_loudness += (loudness - mean_loudness) / hops
        rises, turn, peak_voiced = self.rises, self.turn, self.peak_voiced
        speaking_rate = self.speaking_rate * _DECAY
        if rises:
            turn = max(turn, loudness)
            peak_voiced = max(peak_voiced, float(voiced))
            if loudness < turn - _DIP_DB:
                speaking_rate += peak_voiced / _RATE_S
                rises, turn = 0.0, loudness
        else:
            turn = min(turn, loudness)
            if loudness > turn + _DIP_DB:
                rises, turn, peak_voiced = 1.0, loudness, float(voiced)
        return _Voice(hops, mean_pitch, mean_loudness, speaking_rate, rises, turn, peak_voiced)


class ProsodyEncoder(HopEncoder):
    """One vector per hop; its indices are the constants of this module.

    After a gap the last sounds and the slopes begin anew; the running means and the speaking rate go on.
    """

    size = SIZE
    origin = f"prosody@{hashlib.sha256(repr(_CONSTANTS).encode()).hexdigest()}"

    def __init__(self) -> None:
        """Start with no sound and no voice."""
        self._frame: Numbers = np.zeros(_FRAME)
        """The last samples, newest first."""
        self._values: Numbers = np.zeros((len(SLOPED), _LONG))
        self._present: Numbers = np.zeros((len(SLOPED), _LONG))
        """1 where a value counts for a slope."""
        super().__init__()

    def prewarm(self) -> None:
        """Does nothing: there are no weights to load into caches."""

    def reset(self) -> None:
        """Clear the state and forget the voice."""
        self._voice = _Voice()
        super().reset()

    def snapshot(self) -> dict[str, npt.NDArray[Any]]:
        """Hop and frame, the values of the last 600 ms, what is known of the voice, and when sound is due."""
        return {
            "hop": self._hop.copy(),
            "frame": self._frame.copy(),
            "values": self._values.copy(),
            "present": self._present.copy(),
            "voice": np.array(self._voice),
            "filled": np.array([self._in_hop, -1 if self._due_ns is None else self._due_ns], np.int64),
        }

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Continue from a snapshot; raises SnapshotError if it is of another shape or holds what cannot be."""
        self._check_state(state)
        voice = _Voice(*map(float, state["voice"]))
        if not (all(np.isfinite(values).all() for values in state.values()) and 0 <= voice.hops <= _MEAN_HOPS):
            raise SnapshotError(
                f"the snapshot holds numbers that cannot be in a state of {self.origin}; take a new one"
            )
        self._hop[...], self._frame[...] = state["hop"], state["frame"]
        self._values[...], self._present[...] = state["values"], state["present"]
        self._voice = voice
        in_hop, due_ns = map(int, state["filled"])
        self._in_hop, self._due_ns = in_hop, None if due_ns < 0 else due_ns

    def _clear_samples(self) -> None:
        super()._clear_samples()
        self._frame[...] = 0
        self._present[...] = 0

    def _complete(self) -> FloatArray:
        """The vector of the hop that is full."""
        self._frame[HOP:] = self._frame[:-HOP].copy()
        self._frame[:HOP] = self._hop[::-1]
        energy = np.cumsum(np.square(self._frame))  # of integers, hence exact
        pitch, voicing = _pitch(self._frame, energy)
        loudness, tilt = _loudness(self._frame, float(energy[_LEVEL_WINDOW - 1])), _tilt(self._frame)
        voiced = voicing >= VOICED
        self._voice = voice = self._voice.hear(pitch, voiced, loudness)
        self._keep((pitch, voicing, loudness, tilt, voice.speaking_rate), (voiced, True, True, True, True))
        vector = np.empty(SIZE, np.float32)
        vector[PITCH] = pitch - voice.pitch if voiced else 0
        vector[VOICING] = voicing
        vector[LOUDNESS] = loudness
        vector[LOUDNESS_ABOVE] = loudness - voice.loudness if voice.hops else 0
        vector[TILT] = tilt
        vector[SPEAKING_RATE] = voice.speaking_rate
        vector[SLOPES_200:] = self._slopes()
        return vector

    def _keep(self, values: tuple[float, ...], present: tuple[bool, ...]) -> None:
        for kept, new in ((self._values, values), (self._present, present)):
            kept[:, :-1] = kept[:, 1:].copy()
            kept[:, -1] = new

    def _slopes(self) -> Numbers:
        """Those over the short window, then those over the long one: [2 * len(SLOPED)], a second."""
        sums = (self._present[:, None] * _SHAPES).sum(-1)
        with_values = ((self._present * self._values)[:, None] * _SHAPES[:4]).sum(-1)
        n, t, tt, y, ty = sums[:, :2], sums[:, 2:4], sums[:, 4:], with_values[:, :2], with_values[:, 2:]
        enough = n >= _ENOUGH_HOPS
        slopes = np.where(enough, n * ty - t * y, 0) / np.where(enough, n * tt - t * t, 1)
        return slopes.T.ravel()


def _pitch(frame: Numbers, energy: Numbers) -> tuple[float, float]:
    """Pitch (octaves above 1 Hz) and voicing of the newest samples; 0, 0 if no lag is better than its neighbours.

    `energy`: the sums of the squares of `frame` up to each sample.
    """
    spectrum = np.fft.rfft(frame[:_WINDOW], _FFT).conj() * np.fft.rfft(frame, _FFT)
    products = np.rint(np.fft.irfft(spectrum, _FFT)[1 : _MAX_LAG + 2])
    at_lag = energy[_WINDOW:] - energy[: _MAX_LAG + 1]
    difference = energy[_WINDOW - 1] + at_lag - 2 * products + _NOISE
    normalised = difference * _LAGS / np.cumsum(difference)
    searched = normalised[_MIN_LAG - 2 :]  # the first and the last are neighbours only
    here = searched[1:-1]
    minima = np.flatnonzero((here < searched[:-2]) & (here <= searched[2:]))
    if not len(minima):
        return 0.0, 0.0
    depths = here[minima]
    good = np.flatnonzero(depths < _DIP)
    best = int(minima[good[0] if len(good) else depths.argmin()])
    before, low, after = map(float, searched[best : best + 3])
    lag = _MIN_LAG + best + (before - after) / (2 * (before - 2 * low + after))
    return math.log2(RATE / lag), min(max(1 - low, 0.0), 1.0)


def _loudness(frame: Numbers, energy: float) -> float:
    """In dB of full scale, of the newest samples, whose squares have the sum `energy`."""
    mean = float(frame[:_LEVEL_WINDOW].sum()) / _LEVEL_WINDOW
    power = max(energy / _LEVEL_WINDOW - mean * mean, 0.0)
    return 10 * math.log10(power + _QUANTISATION) - _FULL_SCALE_DB


def _tilt(frame: Numbers) -> float:
    """The energy of low frequencies over that of high ones, dB."""
    spectrum = np.fft.rfft(frame[:_TILT_WINDOW] * _HANN)
    power = np.square(spectrum.real) + np.square(spectrum.imag) + _TILT_NOISE
    return 10 * math.log10(float(power[_LOW:_MIDDLE].sum()) / float(power[_MIDDLE:_HIGH].sum()))
