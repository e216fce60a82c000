"""Streams of picture, sound and words to learn voice activity from, as the runtime would serve them.

Every stream goes through the runtime's own encoders and aligner: what a model is trained on is what it is
served. Knows nothing about networks. See train_voice_activity.py.
"""

from __future__ import annotations

import io
import itertools
import re
import sys
import tarfile
import wave
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from stream_mmrnn.align import Aligner, stamps_of
from stream_mmrnn.config import Camera, Microphone, models_folder
from stream_mmrnn.config import Synthetic as SyntheticSettings
from stream_mmrnn.encoders.audio import AudioEncoder
from stream_mmrnn.encoders.image import ImageEncoder
from stream_mmrnn.encoders.text import TextEncoder
from stream_mmrnn.engine import MAX_AGE_S
from stream_mmrnn.runtime import Graph
from stream_mmrnn.sources.file import Picture, Sound, streams_of
from stream_mmrnn.sources.synthetic import Synthetic
from stream_mmrnn.topics import CLOCK, EVERYONE, MODALITIES, feature
from stream_mmrnn.types import Envelope, ModalitySpec, Sample, Tick

RATE = 16_000
SEEDS = {"train": (1001, 1002, 1003, 1004), "test": (0, 1)}
"""Of the synthetic person; 0 is what a user sees first, so it is held out."""
TICK_NS = 40_000_000
BINS_S = ((0.0, 0.2), (0.2, 0.6), (0.6, 1.2), (1.2, 2.0))
EPOCH_NS = 1_000 * TICK_NS
SIZES = {"vision": 1280, "audio": 81, "text": 256}
LATENESS_NS = {"vision": 80_000_000, "audio": 80_000_000, "text": 0}
DELAY_NS = {"vision": 20_000_000, "audio": 1_000_000, "text": 2_000_000}
"""How long after its event a feature is there, about as live: it decides the order of the messages."""
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Stream(NamedTuple):
    """What one recording or composition is before it is encoded."""

    sound: Any
    """int16 at 16 kHz, as the microphone has it; what is said about speech comes from `clean`."""
    clean: Any
    frames: list[tuple[float, Any]]
    """Seconds and the features of a picture."""
    words: list[tuple[float, str]]
    """Seconds and a text."""


class Ticks(NamedTuple):
    """One stream as the engine gets it, and what it should have said. T ticks each."""

    features: dict[str, Any]
    """[T, size]; a modality that the stream never had is missing."""
    present: Any
    """[T, 3]"""
    age: Any
    """[T, 3] seconds"""
    target: Any
    """[T, 5]: the four bins, then speech now; NaN where the stream ends before it can be known."""


class Clip(NamedTuple):
    name: str
    sound: Any
    frames: list[list[tuple[float, Any]]]
    """Some versions of the pictures, each with its own light and side."""


class Corpus(NamedTuple):
    """One side of the split: nothing in it is in the other."""

    speakers: list[list[tuple[str, Any]]]
    """For each speaker, digits with their word."""
    dialogues: list[Any]
    """Words of both sides with their start and end."""
    clips: list[Clip]
    synthetic: list[Stream]
    """The project's own synthetic person, one stream a seed, as its source gives it."""


class Encoders:
    """The runtime's encoders, one of each, and what the models must know of them."""

    def __init__(self) -> None:
        self.vision, self.audio, self.text = ImageEncoder(), AudioEncoder(), TextEncoder()
        self.specs = [ModalitySpec(name, SIZES[name], encoder=getattr(self, name).origin) for name in MODALITIES]
        graph = Graph(models_folder() / "encoders" / "silero_vad.onnx")
        self._detector = graph.bind(
            {"input": (1, 576), "sr": ()}, {"output": (1, 1)}, {"state": ("stateN", (2, 1, 128))}
        )
        self._detector.inputs["sr"][...] = RATE
        self._text_cache: dict[str, Any] = {}

    def word(self, text: str) -> Any:
        if text not in self._text_cache:
            self._text_cache[text] = self.text.encode(Sample(0, 0, text.encode()))[0].data
        return self._text_cache[text]

    def speech(self, sound: Any) -> Any:
        """Whether silero's detector hears speech, for each sample: what the labels are made of."""
        self._detector.state["state"][...] = 0
        x = np.zeros(-(-len(sound) // 512) * 512 + 64, np.float32)
        x[64 : 64 + len(sound)] = sound / 32768
        heard = np.zeros(len(sound), np.bool_)
        for at in range(0, len(sound), 512):
            self._detector.inputs["input"][0] = x[at : at + 576]
            self._detector.run()
            heard[at : at + 512] = self._detector.outputs["output"][0, 0] > 0.5
        return heard


# --- reading


def _upsample(x: Any) -> Any:
    """8 kHz -> 16 kHz with a windowed sinc."""
    n = np.arange(-32, 33)
    taps = np.sinc(n / 2) * np.hamming(len(n))
    wide = np.zeros(2 * len(x))
    wide[::2] = x
    return np.convolve(wide, taps, "same")


def _trim(x: Any) -> Any:
    """Without the quiet at both ends: the gaps between words are ours to set."""
    frames = np.abs(x[: len(x) // 160 * 160]).reshape(-1, 160).max(1)
    loud = np.flatnonzero(frames > 0.05 * frames.max())
    return x[loud[0] * 160 : (loud[-1] + 1) * 160] if len(loud) else x


def load_digits(path: Path) -> list[list[tuple[str, Any]]]:
    """Spoken digits, one list a speaker, in the alphabetical order of the speakers."""
    found: dict[str, list[tuple[str, Any]]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            match = re.search(r"(\d)_([a-z]+)_\d+\.wav$", member.name)
            data = tar.extractfile(member) if match else None
            if match is None or data is None:
                continue
            with wave.open(io.BytesIO(data.read())) as file:
                sound = np.frombuffer(file.readframes(file.getnframes()), np.int16)
            sound = _trim(_upsample(sound.astype(np.float64)))
            found.setdefault(match[2], []).append((DIGITS[int(match[1])], sound / np.abs(sound).max()))
    return [found[name] for name in sorted(found)]


def _words(data: bytes) -> list[tuple[float, float, str]]:
    words = []
    for line in data.decode("latin-1").splitlines():
        parts = line.split()
        if len(parts) == 4:
            text = re.sub(r"\[laughter-(.*)\]", r"\1", parts[3])
            text = re.sub(r"\[.*?\]|<.*?>|[-_{}]", "", text)
            if text:
                words.append((float(parts[1]), float(parts[2]), text.lower()))
    return words


def load_dialogues(path: Path, counts: dict[str, int]) -> dict[str, list[Any]]:
    """The words of some dialogues of each split, evenly chosen."""
    files: dict[str, bytes] = {}
    names: dict[str, list[str]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            words = re.search(r"sw(\d+)([AB])-ms98-a-word\.text$", member.name)
            split = re.search(r"splits/(\w+)\.txt$", member.name)
            data = tar.extractfile(member) if words or split else None
            if data and words:
                files[words[1] + words[2]] = data.read()
            elif data and split:
                names[split[1]] = sorted(data.read().decode().split())
    found = {}
    for split_name, count in counts.items():
        there = [n for n in names[split_name] if n + "A" in files and n + "B" in files]
        chosen = there[:: max(1, len(there) // count)][:count]
        found[split_name] = [(_words(files[n + "A"]), _words(files[n + "B"])) for n in chosen]
    return found


def load_clip(path: Path, encoders: Encoders, versions: int) -> Clip:
    """Sound and picture features of a media file, read by the runtime's own source."""
    streams = streams_of(path)
    sound = Sound(path, Microphone(), paced=False)
    sound.open()
    samples = np.concatenate([s.data for s in sound.samples(lambda: True, 0)])
    sound.close()
    pictures: list[list[tuple[float, Any]]] = []
    if "vision" in streams:
        source = Picture(path, Camera(), paced=False)
        source.open()
        jpegs = [(s.event_ns / 1e9, s.data) for s in source.samples(lambda: True, 0)]
        source.close()
        for version in range(versions):
            pictures.append([(at, _look(jpeg, encoders, version)) for at, jpeg in jpegs])
    return Clip(path.name, samples, pictures)


def _look(jpeg: Any, encoders: Encoders, version: int) -> Any:
    """Features of a picture; version 0 as it is, the others mirrored, darker, brighter."""
    if version:
        picture = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
        if version % 2:
            picture = cv2.flip(picture, 1)
        picture = cv2.convertScaleAbs(picture, alpha=(1.0, 0.8, 1.2)[version % 3], beta=5 * (version % 3))
        jpeg = cv2.imencode(".jpg", picture)[1].tobytes()
    return encoders.vision.encode(Sample(0, 0, jpeg))[0].data


def load_synthetic(seed: int, seconds: float, encoders: Encoders) -> Stream:
    """The runtime's synthetic source, all three modalities."""

    def samples(modality: str) -> list[Sample]:
        source = Synthetic(modality, SyntheticSettings(seed=seed), paced=False)
        coming = source.samples(lambda: True, 0)
        return list(itertools.takewhile(lambda s: s.event_ns <= seconds * 1e9, coming))

    sound = np.concatenate([s.data for s in samples("audio")])
    frames = [(s.event_ns / 1e9, encoders.vision.encode(s)[0].data) for s in samples("vision")]
    words = [(s.event_ns / 1e9, bytes(s.data).decode()) for s in samples("text")]
    return Stream(sound, sound, frames, words)


def load(data: Path, encoders: Encoders) -> tuple[Corpus, Corpus]:
    """The two sides of the split, by speaker, by dialogue and by clip: to train on, and held out."""
    for name in ("fsdd.tar.xz", "switchboard_words.tar.xz", "clips/dialogue.wav", "clips/speech.mp4"):
        if not (data / name).is_file():
            sys.exit(f"{data / name} is missing; give the folder with the data as --data")
    speakers = load_digits(data / "fsdd.tar.xz")
    dialogues = load_dialogues(data / "switchboard_words.tar.xz", {"train": 300, "test": 30})
    clips = data / "clips"
    faces = sorted(clips.glob("*.mpg"))
    seen = [load_clip(path, encoders, 3) for path in (*faces[:-2], clips / "speech.mp4")]
    held = [load_clip(path, encoders, 1) for path in (clips / "dialogue.wav", *faces[-2:])]
    people = {s: [load_synthetic(n, 60, encoders) for n in SEEDS[s]] for s in SEEDS}
    return (
        Corpus(speakers[:-1], dialogues["train"], seen, people["train"]),
        Corpus(speakers[-1:], dialogues["test"], held, people["test"]),
    )


# --- composing


def _runs(words: Iterable[tuple[float, float, str]]) -> list[list[tuple[float, float, str]]]:
    """Words that follow each other within 0.15 s."""
    runs: list[list[tuple[float, float, str]]] = []
    for word in words:
        if runs and word[0] - runs[-1][-1][1] < 0.15:
            runs[-1].append(word)
        else:
            runs.append([word])
    return runs


def _say(run: Any, out: Any, voice: Any, rng: Any) -> list[tuple[float, str]]:
    """Fill a run's time with spoken digits; gives back the digits' words at their ends."""
    said = []
    at, end = max(run[0][0], 0.0), run[-1][1]
    loud = 0.35 * 10 ** (rng.uniform(-4, 2) / 20)
    while at < end - 0.1:
        tries = sorted((voice[rng.integers(len(voice))] for _ in range(4)), key=lambda t: len(t[1]))
        fitting = [t for t in tries if len(t[1]) / RATE < end - at + 0.1]
        text, sound = fitting[rng.integers(len(fitting))] if fitting else tries[0]
        start = int(at * RATE)
        # cut off where the run is over: the pause that follows is the dialogue's own
        sound = sound[: min(int((end - at + 0.15) * RATE), len(out) - start)] * loud
        out[start : start + len(sound)] += sound
        at += len(sound) / RATE
        said.append((at, text))
        at += rng.uniform(0.01, 0.08)
    return said


def compose(corpus: Corpus, seconds: float, rng: Any) -> Stream:
    """Digits spoken at the times of a real dialogue, one side or both, with its words or the digits'."""
    sides = corpus.dialogues[rng.integers(len(corpus.dialogues))]
    start = rng.uniform(0, max(min(side[-1][1] for side in sides if side) - seconds, 0))
    both = rng.random() < 0.3
    first = int(rng.integers(2))
    clean = np.zeros(int(seconds * RATE))
    mode = rng.choice(["words", "words", "lines", "digits"])
    late_s = rng.uniform(0, 0.4) if rng.random() < 0.5 else 0.0
    texts: list[tuple[float, str]] = []
    for side in (first, 1 - first) if both else (first,):
        voice = corpus.speakers[rng.integers(len(corpus.speakers))]
        words = [(a - start, b - start, w) for a, b, w in sides[side] if a >= start and b < start + seconds]
        for run in _runs(words):
            said = _say(run, clean, voice, rng)
            if mode == "digits":
                texts += said
            elif mode == "lines":
                texts.append((run[-1][1], " ".join(w for _, _, w in run)))
            else:
                texts += [(b, w) for _, b, w in run]
    texts = sorted((t + late_s, w) for t, w in texts if t + late_s < seconds)
    return Stream(*_microphone(clean, rng), _unrelated(corpus, seconds, rng), texts)


def _unrelated(corpus: Corpus, seconds: float, rng: Any) -> list[tuple[float, Any]]:
    """In 3 of 10 streams, pictures that do not go with the sound: to see somebody is not to hear somebody."""
    films = [c.frames[0] for c in corpus.clips if c.frames]
    if rng.random() > 0.3 or not films:
        return []
    frames = []
    until = -1.0
    for k in range(int(seconds * 25)):
        if k / 25 > until:
            film = films[rng.integers(len(films))]
            still, until = film[rng.integers(len(film))][1], k / 25 + rng.uniform(0.5, 4)
        frames.append(((k + 1) / 25, still))
    return frames


def chain(corpus: Corpus, seconds: float, rng: Any) -> Stream:
    """Real clips one after another with a rest in between, picture and sound together."""
    sound = np.zeros(int(seconds * RATE))
    frames: list[tuple[float, Any]] = []
    at = rng.uniform(0, 1)
    while at < seconds:
        clip = corpus.clips[rng.integers(len(corpus.clips))]
        piece = clip.sound / 32768 * 10 ** (rng.uniform(-6, 6) / 20)
        start = int(at * RATE)
        piece = piece[: len(sound) - start]
        sound[start : start + len(piece)] += piece
        shown = clip.frames[rng.integers(len(clip.frames))] if clip.frames else []
        frames += [(at + t, f) for t, f in shown]
        at += len(clip.sound) / RATE
        rest = rng.exponential(0.8) if rng.random() < 0.6 else 0.0
        if shown:  # the picture stands still while nobody speaks
            frames += [(at + k / 25, shown[-1][1]) for k in range(1, int(rest * 25))]
        at += rest
    frames = sorted((f for f in frames if f[0] < seconds), key=lambda f: f[0])
    return Stream(*_microphone(sound, rng), frames, [])


def perform(corpus: Corpus, rng: Any) -> Stream:
    """The synthetic person, with a microphone's gain and noise."""
    stream = corpus.synthetic[rng.integers(len(corpus.synthetic))]
    sound, clean = _microphone(stream.sound / 32768, rng)
    return stream._replace(sound=sound, clean=clean)


def _microphone(clean: Any, rng: Any) -> tuple[Any, Any]:
    """What a microphone makes of a sound: its own gain and the room's noise. Also the sound as it was."""
    spectrum = np.fft.rfft(rng.standard_normal(len(clean)))
    colour = rng.uniform(0, 1)  # 0 white, 0.5 pink, 1 brown
    spectrum /= np.maximum(np.arange(len(spectrum)), len(clean) / RATE * 20) ** colour
    noise = np.fft.irfft(spectrum, len(clean))
    noise *= 10 ** (rng.uniform(-75, -32) / 20) / noise.std()
    gain = 10 ** (rng.uniform(-14, 6) / 20)
    noisy, pure = (np.clip(x, -1, 1) * 32767 for x in ((clean + noise) * gain, clean))
    return noisy.astype(np.int16), pure.astype(np.int16)


def as_it_is(clip: Clip) -> Stream:
    return Stream(clip.sound, clip.sound, clip.frames[0] if clip.frames else [], [])


# --- encoding


def encode(stream: Stream, encoders: Encoders) -> Ticks:
    """Through the runtime's encoders and aligner, message by message; then the labels."""
    session = "s"
    encoders.audio.reset()
    heard: list[tuple[int, Any]] = []
    for at in range(0, len(stream.sound), 320):
        block = stream.sound[at : at + 320]
        end_ns = EPOCH_NS + (at + len(block)) * 62_500
        heard += [(s.event_ns, s.data) for s in encoders.audio.encode(Sample(end_ns, end_ns, block))]
    end_ns = EPOCH_NS + len(stream.sound) * 62_500
    inputs = {
        "vision": [(EPOCH_NS + round(t * 1e9), f) for t, f in stream.frames],
        "audio": heard,
        "text": [(EPOCH_NS + round(t * 1e9), encoders.word(w)) for t, w in stream.words],
    }
    inputs = {n: [i for i in items if EPOCH_NS < i[0] <= end_ns] for n, items in inputs.items()}
    messages: list[Envelope] = []
    for name, items in inputs.items():
        origin = getattr(encoders, name).origin
        for seq, (event_ns, payload) in enumerate(items):
            there = event_ns + DELAY_NS[name]
            messages.append(Envelope(feature(name), session, seq, event_ns, event_ns, there, payload, origin))
    for seq, now in enumerate(range(EPOCH_NS, end_ns + 200_000_000, 10_000_000)):
        messages.append(Envelope(CLOCK, EVERYONE, seq, now, now, now, b""))
    messages.sort(key=lambda m: m.publish_ns)
    aligner = Aligner(encoders.specs, TICK_NS, LATENESS_NS)
    aligner.push(messages[0])  # the clock's first word
    aligner.open(session, EPOCH_NS, [n for n in MODALITIES if inputs[n]])
    ticks: list[Tick] = []
    for message in messages[1:]:
        ticks += aligner.push(message)
    ticks += aligner.close(session, end_ns, stamps_of(messages[-1]))
    ticks = [t for t in ticks if t.event_ns <= end_ns]
    lost = {n: c.dropped() for n, c in aligner.counts.items() if c.late + c.quarantined + c.duplicate}
    assert not lost, f"the aligner dropped training data: {lost}"
    return Ticks(
        {n: np.stack([t.features[n] for t in ticks]) for n in MODALITIES if inputs[n]},
        np.array([[t.present[n] for n in MODALITIES] for t in ticks], np.float32),
        np.array([[_age_s(t.age_ns[n]) for n in MODALITIES] for t in ticks], np.float32),
        targets(encoders.speech(stream.clean), [t.event_ns - EPOCH_NS for t in ticks]),
    )


def _age_s(age_ns: int) -> float:
    """As the engine does."""
    return MAX_AGE_S if age_ns < 0 else min(age_ns / 1e9, MAX_AGE_S)


def targets(speech: Any, ends_ns: Sequence[int]) -> Any:
    """A bin is active where at least half of it is speech; last column: the tick itself."""
    total = np.concatenate([[0], np.cumsum(speech)])
    ends = np.array(ends_ns) // 62_500
    out = np.full((len(ends), len(BINS_S) + 1), np.nan, np.float32)
    for i, (start_s, stop_s) in enumerate((*BINS_S, (-TICK_NS / 1e9, 0.0))):
        a, b = ends + round(start_s * RATE), ends + round(stop_s * RATE)
        known = (a >= 0) & (b <= len(speech))
        out[known, i] = (total[b[known]] - total[a[known]]) * 2 >= (b - a)[known]
    return out
