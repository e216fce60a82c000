"""Digits as images, sounds and words in one stream: the current digit and the next one.

A hidden rule gives a sequence of items; each item comes in one to three modalities, at random times. The sound always
has noise. Everything random is new in every training sequence. `logmel` computes what the runtime's log-mel graph
computes, for many hops at once.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.encoders.audio import MELS, WINDOW
from stream_mmrnn.capture.encoders.hops import HOP, RATE
from stream_mmrnn.capture.encoders.text import TextEncoder
from stream_mmrnn.core.config import models_folder
from stream_mmrnn.core.errors import ConfigError, FileError
from stream_mmrnn.core.strict_toml import convert
from stream_mmrnn.core.types import FloatArray
from stream_mmrnn.predict.columns import MAX_AGE_S
from stream_mmrnn.training.data import Array, Task, Ticks
from stream_mmrnn.training.datasets import fsdd, mnist
from stream_mmrnn.training.datasets.audio import Int16Array
from stream_mmrnn.training.datasets.mnist import ByteArray
from stream_mmrnn.training.recipe import Recipe
from stream_mmrnn.training.tasks.common import Words, find, require

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RULES = {"up": 1, "down": -1, "by two": 2}
"""Added to the digit from item to item, modulo 10."""
SIZES = {"vision": 784, "audio": MELS, "text": TextEncoder.size}
KNOWN_S = 0.2
"""Ticks earlier than this after the start of an item are not scored."""
VALIDATION_INDICES = range(5, 10)
"""FSDD recordings of the official training split that are used for validation."""

_TICK_S = 0.04
_TICK = round(_TICK_S * RATE)
_FRAME_S = 0.04
_TALKERS = 6
_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")

_Count = Annotated[int, msgspec.Meta(ge=1)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class DigitsOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`data.options`."""

    train: _Count = 200
    """Sequences per epoch, all new."""
    validation: _Count = 60
    test: _Count = 150
    items: Annotated[int, msgspec.Meta(ge=3)] = 12
    """Items per sequence."""
    complete: _Share = 0.0
    """Probability that an item comes in all three modalities."""
    snr_db: float = -5.0
    noise: tuple[Literal["white", "babble"], ...] = ("white", "babble")
    """One of these is chosen per sequence."""
    typos: _Share = 0.1
    """Probability that a letter is mistyped."""
    speakers: Literal["official", "independent"] = "official"
    """The authors' split, with every speaker in both parts; or speakers that are in the test only."""
    validation_speakers: tuple[str, ...] = ("yweweler",)
    test_speakers: tuple[str, ...] = ("theo",)
    images: _Count = 5000
    """Number of images for validation: the last ones of MNIST's training set."""
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Seed of the validation and test sequences; independent of the training seed."""


# ---- sound ---------------------------------------------------------------------------------------------------------


def _mel_filters() -> FloatArray:
    """Slaney's triangular mel filters, [201, 80], as in the graph of the audio encoder."""

    def hz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    top = 15 + 27 * np.log(RATE / 2 / 1000) / np.log(6.4)
    edges = hz(np.linspace(0, top, MELS + 2))
    bins = np.arange(WINDOW // 2 + 1) * RATE / WINDOW
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return (np.maximum(0, np.minimum(rising, falling)) * 2 / (edges[2:] - edges[:-2])).astype(np.float32)


_FILTERS = _mel_filters()
_HANN = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)).astype(np.float32)


def logmel(samples: Int16Array) -> FloatArray:
    """The output of the runtime's audio encoder from the first sample on, [hops, 80]: see logmel80.card.md."""
    hops = len(samples) // HOP
    before = np.zeros(WINDOW - HOP, np.float32)
    stream = np.concatenate([before, samples[: hops * HOP].astype(np.float32) / np.float32(32768)])
    windows = np.lib.stride_tricks.sliding_window_view(stream, WINDOW)[::HOP]
    spectrum = np.fft.rfft(windows * _HANN, axis=1)
    power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32)
    return (np.log(np.maximum(power @ _FILTERS, np.float32(1e-6))) + np.float32(4)) * np.float32(0.1)


def _upsampled(samples: Int16Array) -> FloatArray:
    """Resample 8 kHz -> 16 kHz (nothing above 4 kHz), scaled to a root mean square of 1."""
    # silence on both sides, because the Fourier transform treats the sound as periodic
    padded = np.pad(samples.astype(np.float64), 64)
    doubled = np.fft.irfft(np.fft.rfft(padded), 2 * len(padded))[128:-128]
    return (doubled / max(float(np.sqrt(np.mean(doubled**2))), 1e-9)).astype(np.float32)


def _babble(recordings: Sequence[FloatArray], count: int, rng: np.random.Generator) -> FloatArray:
    """Babble noise: several talkers at once, reversed, so it contains no digit; root mean square 1."""
    total = np.zeros(count, np.float32)
    for _ in range(_TALKERS):
        at = -int(rng.integers(RATE // 2))
        while at < count:
            recording = recordings[int(rng.integers(len(recordings)))][::-1]
            begin, end = max(at, 0), min(at + len(recording), count)
            if end > begin:
                total[begin:end] += recording[begin - at : end - at]
            at += len(recording)
    return total / max(float(np.sqrt(np.mean(total**2))), 1e-9)


# ---- words ---------------------------------------------------------------------------------------------------------


def _neighbours() -> dict[str, str]:
    found: dict[str, str] = {}
    for y, row in enumerate(_KEYS):
        for x, key in enumerate(row):
            # each row is half a key to the right of the row above
            near = [(y, x - 1), (y, x + 1), (y - 1, x), (y - 1, x + 1), (y + 1, x - 1), (y + 1, x)]
            found[key] = "".join(_KEYS[j][i] for j, i in near if 0 <= j < len(_KEYS) and 0 <= i < len(_KEYS[j]))
    return found


_NEAR = _neighbours()


def misspelt(word: str, rate: float, rng: np.random.Generator) -> str:
    """Typing errors: a letter is swapped with the next, dropped, or replaced by a neighbouring key; never empty."""
    typed: list[str] = []
    i = 0
    while i < len(word):
        kind = int(rng.integers(3)) if rng.random() < rate else -1
        if kind == 0 and i + 1 < len(word):
            typed += word[i + 1], word[i]
            i += 1
        elif kind == 2:
            typed.append(str(rng.choice(list(_NEAR[word[i]]))))
        elif kind != 1:
            typed.append(word[i])
        i += 1
    return "".join(typed) or word


# ---- sequences -----------------------------------------------------------------------------------------------------


class Pool(msgspec.Struct, frozen=True):
    """The images and recordings of one split; splits are disjoint."""

    images: tuple[ByteArray, ...]
    """By digit, [N, 784]."""
    voices: dict[str, tuple[tuple[FloatArray, ...], ...]]
    """By speaker and digit, at 16 kHz and a root mean square of 1."""


def _pool(images: ByteArray, labels: ByteArray, recordings: Sequence[fsdd.FsddRecording], where: str) -> Pool:
    spoken: dict[str, list[list[FloatArray]]] = defaultdict(lambda: [[] for _ in WORDS])
    for r in recordings:
        spoken[r.speaker][r.digit].append(_upsampled(r.samples))
    by_digit = tuple(images[labels == d].reshape(-1, SIZES["vision"]) for d in range(10))
    for d in range(10):
        if not spoken or not len(by_digit[d]) or not all(of[d] for of in spoken.values()):
            raise FileError(
                f"the {where} data have no image or no recording of the digit {d}; give all of MNIST and FSDD"
            )
    return Pool(by_digit, {speaker: tuple(map(tuple, of)) for speaker, of in sorted(spoken.items())})


class Maker:
    """Makes sequences from the items of a pool."""

    def __init__(self, recipe: Recipe, options: DigitsOptions, babble: Sequence[FloatArray]) -> None:
        """`babble`: recordings of the training split, used as noise in all splits."""
        self._options, self._babble = options, babble
        self._order = list(recipe.modalities)
        self._heads = [h.name for h in recipe.heads]
        self.words = Words()

    def __call__(self, pool: Pool, name: str, rng: np.random.Generator) -> Ticks:
        """One sequence; everything is drawn from `rng`."""
        o, n = self._options, self._options.items
        rule = list(RULES)[int(rng.integers(len(RULES)))]
        speaker = list(pool.voices)[int(rng.integers(len(pool.voices)))]
        digits = (int(rng.integers(10)) + RULES[rule] * np.arange(n + 1)) % 10
        lasts, gaps = rng.uniform(0.6, 1.0, n), rng.uniform(0.1, 0.6, n + 1)
        start = np.cumsum(gaps[:-1]) + np.concatenate([[0.0], np.cumsum(lasts[:-1])])
        end = start + lasts
        drawn = np.where(rng.random(n) < o.complete, 7, rng.integers(1, 8, n))  # one bit per modality, never zero
        count = int(np.ceil((end[-1] + gaps[-1]) / _TICK_S))
        ends = _TICK_S * np.arange(1, count + 1)
        spans = [
            (int(digit), a, b, int(bits)) for digit, a, b, bits in zip(digits[:-1], start, end, drawn, strict=True)
        ]

        newest = {m: np.full(count, -np.inf) for m in SIZES}
        features: dict[str, FloatArray] = {m: np.zeros((count, size), np.float32) for m, size in SIZES.items()}
        newest["audio"] = ends
        samples = self._sound([(d, a, b) for d, a, b, bits in spans if bits & 2], pool, speaker, count * _TICK, rng)
        hops = logmel(samples)
        features["audio"] = (hops[::2] + hops[1::2]) / np.float32(2)
        for digit, a, b, bits in spans:
            if bits & 1:
                frames = np.arange(a + rng.uniform(0.005, 0.1), b - rng.uniform(0.005, 0.1), _FRAME_S)
                frames += rng.uniform(-0.005, 0.005, len(frames))  # camera frames have jitter
                places = _tick_of(frames, count)
                np.maximum.at(newest["vision"], places, frames)
                images = pool.images[digit]
                features["vision"][places] = images[int(rng.integers(len(images)))] / np.float32(255)
            if bits & 4:
                typed_s = rng.uniform(a, b - 0.1)
                place = _tick_of(np.array([typed_s]), count)[0]
                newest["text"][place] = typed_s
                features["text"][place] = self.words[misspelt(WORDS[digit], o.typos, rng)]

        now, following = np.zeros(count, np.int64), np.zeros(count, np.int64)
        counts, later = np.zeros(count, np.float32), np.zeros(count, np.float32)
        for i, (digit, a, b, _) in enumerate(spans):
            here = (ends >= a + KNOWN_S) & (ends <= b)
            now[here], counts[here] = digit, 1
            # two digits determine the rule, so from the third item the next digit can be known
            following[here], later[here] = digits[i + 1], i >= 2
        targets: dict[str, Array] = {"digit": now, "next_digit": following}
        weights = {"digit": counts, "next_digit": later}
        times = np.stack([newest[m] for m in self._order], 1)
        age_s = np.minimum(ends[:, None] - np.maximum.accumulate(times, 0), MAX_AGE_S)
        return Ticks(
            {m: features[m] for m in self._order},
            np.isfinite(times).astype(np.float32),
            age_s.astype(np.float32),
            {h: targets[h] for h in self._heads},
            {h: weights[h] for h in self._heads},
            name,
            {"speaker": speaker, "rule": rule},
        )

    def _sound(
        self, spoken: list[tuple[int, float, float]], pool: Pool, speaker: str, count: int, rng: np.random.Generator
    ) -> Int16Array:
        """The sound of the whole sequence: spoken items at one level, noise at another level throughout."""
        o = self._options
        sound = np.zeros(count, np.float32)
        for digit, a, b in spoken:
            choices = pool.voices[speaker][digit]
            recording = choices[int(rng.integers(len(choices)))]
            begin = round((a + rng.uniform(0, 0.05)) * RATE)
            end = min(begin + len(recording), round(b * RATE))
            sound[begin:end] = recording[: end - begin]
        loud = 10 ** (-o.snr_db / 20)
        if o.noise[int(rng.integers(len(o.noise)))] == "white":
            # twice the power: half of it is above 4 kHz, where an 8 kHz recording has no signal to mask
            sound += np.float32(loud * np.sqrt(2)) * rng.standard_normal(count, np.float32)
        else:
            sound += np.float32(loud) * _babble(self._babble, count, rng)
        sound *= np.float32(32768 * 10 ** rng.uniform(-2.0, -1.3))
        return np.clip(np.rint(sound), -32768, 32767).astype(np.int16)


def _tick_of(times_s: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """The tick of each time: tick k (from 0) covers (k T, (k + 1) T]."""
    return np.clip(np.ceil(times_s / _TICK_S).astype(np.int64) - 1, 0, count - 1)


def _spoken(
    recordings: list[fsdd.FsddRecording], o: DigitsOptions
) -> tuple[list[fsdd.FsddRecording], list[fsdd.FsddRecording], list[fsdd.FsddRecording]]:
    """Recordings for training, validation and test."""
    if o.speakers == "independent":
        rest, test = fsdd.speaker_split(recordings, o.test_speakers)
        train, validation = fsdd.speaker_split(rest, o.validation_speakers)
        return train, validation, test
    rest, test = fsdd.official_split(recordings)
    return (
        [r for r in rest if r.index not in VALIDATION_INDICES],
        [r for r in rest if r.index in VALIDATION_INDICES],
        test,
    )


def make(recipe: Recipe, places: list[Path]) -> Task:
    """`places` contain MNIST and FSDD, each as an archive or a folder."""
    o = convert(recipe.data.options, DigitsOptions)
    classes = tuple("0123456789")
    require(recipe, SIZES, {"digit": classes, "next_digit": classes})
    if recipe.tick_ms != 1000 * _TICK_S:
        raise ConfigError(f"data.kind `digits` has ticks of {1000 * _TICK_S:g} ms: set tick_ms to that")
    if not o.noise:
        raise ConfigError("data.options.noise is empty; use white, babble or both")
    at = find(places, "mnist")
    images, labels = mnist.load(at, "train")
    test_images, test_labels = mnist.load(at, "test")
    train, validation, test = _spoken(fsdd.load(find(places, "fsdd", "free-spoken-digit", "recordings")), o)
    cut = max(len(images) - o.images, 0)
    learnt = _pool(images[:cut], labels[:cut], train, "training")
    held = _pool(images[cut:], labels[cut:], validation, "validation")
    tested = _pool(test_images, test_labels, test, "test")
    maker = Maker(recipe, o, [x for of in learnt.voices.values() for digit in of for x in digit])

    def epoch(rng: np.random.Generator) -> Iterator[Ticks]:
        for i in range(o.train):
            yield maker(learnt, f"train {i}", rng)

    def fixed(pool: Pool, name: str, split: int, count: int) -> list[Ticks]:
        return [maker(pool, f"{name} {i}", np.random.default_rng([o.seed, split, i])) for i in range(count)]

    logmel_sha = hashlib.sha256((models_folder() / "encoders" / "logmel80.onnx").read_bytes()).hexdigest()
    origins = {"audio": f"logmel80@{logmel_sha}", "text": maker.words.origin}
    split = (
        "FSDD's official split (recordings 0 to 4 of each digit and speaker for the test, every speaker in both "
        "parts), recordings 5 to 9 for validation"
        if o.speakers == "official"
        else f"FSDD by speaker ({', '.join(o.test_speakers)} for the test, {', '.join(o.validation_speakers)} for "
        f"validation, {', '.join(learnt.voices)} to train)"
    )
    tuned = fixed(held, "validation", 1, o.validation)
    return Task(
        epoch,
        tuned,
        fixed(tested, "test", 2, o.test),
        {m: origin for m, origin in origins.items() if m in recipe.modalities},
        "Composed sequences of real material: MNIST images (LeCun, Bottou, Bengio and Haffner 1998; CC BY-SA 3.0), "
        "Free Spoken Digit Dataset recordings (Jackson et al., doi:10.5281/zenodo.1342401; CC BY-SA 4.0) brought from "
        f"8 to 16 kHz, and the digits' English words, {o.typos:.0%} of the letters mistyped. {o.items} items a "
        "sequence, in one voice, each for 0.6 to 1 s in a random non-empty set of modalities, by a hidden rule (up, "
        f"down, by two, modulo 10); {' or '.join(o.noise)} noise throughout at {o.snr_db:g} dB in the speech's band, "
        "new in every training sequence. Scored from 0.2 s after an item's start, whether or not its word was typed or "
        "its sound was heard by then; the next digit from the third item on. MNIST's official split, the last "
        f"{o.images} training images for validation; {split}. {o.validation} sequences for validation and {o.test} for "
        f"the test, by seed {o.seed}.",
        epoch_ticks=o.train * sum(map(len, tuned)) // max(len(tuned), 1),
    )
