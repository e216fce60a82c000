"""Labelled recordings of a sensor that is shaken or still, beside a picture that has nothing to do with it.

They are written as `import` writes recordings: streams from `[streams.NAME]`, the package's own encoders, labels as the
bus would have carried them.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from stream_mmrnn.capture.encoders.image import ImageEncoder
from stream_mmrnn.capture.encoders.signal import SignalEncoder
from stream_mmrnn.capture.sources.synthetic import Synthetic
from stream_mmrnn.core import topics
from stream_mmrnn.core.settings import StreamSettings, SyntheticSettings
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.core.types import Envelope, FloatArray, Sample
from stream_mmrnn.offline.convert.imported import Messages, without_devices, write

BEGIN_NS = 1_000_000_000
_CLOCK_NS = 10_000_000


@dataclass(frozen=True)
class Movement:
    """What the sensor does while a label is true: each axis is gravity and a swing, with noise."""

    hz: float = 0.0
    size_g: float = 0.0


SHAKE, STILL = Movement(3.0, 0.5), Movement()


@dataclass(frozen=True)
class Experiment:
    """How the recordings of an experiment differ from those of the plain one."""

    movements: dict[str, Movement] = field(default_factory=lambda: {"shake": SHAKE, "still": STILL})
    rate_hz: float = 50.0
    seconds: float = 15.0
    bout_s: float = 3.75
    """How long a label is true."""
    noise_g: float = 0.05
    label_late_s: float = 0.0
    picture: bool = True
    only_in: dict[str, int] = field(default_factory=dict)
    """By label, the only recording that has it."""


def recordings(folder: Path, experiment: Experiment, seed: int = 0, count: int = 3) -> list[Path]:
    """Write so many recordings; each person begins at another time and holds the sensor another way."""
    folder.mkdir(exist_ok=True)
    return [_recording(folder / f"{i}.mcap", experiment, np.random.default_rng((seed, i)), i) for i in range(count)]


def bouts(experiment: Experiment, rng: np.random.Generator, number: int = 0) -> list[tuple[float, str]]:
    """Begin in seconds and label of each movement."""
    names = [n for n in experiment.movements if experiment.only_in.get(n, number) == number]
    begins = np.arange(0.0, experiment.seconds, experiment.bout_s)
    begins[1:] += rng.uniform(-0.4, 0.4, len(begins) - 1)
    first = int(rng.integers(len(names)))
    return [(float(b), names[(first + k) % len(names)]) for k, b in enumerate(begins)]


def readings(
    experiment: Experiment, done: Sequence[tuple[float, str]], rng: np.random.Generator
) -> tuple[FloatArray, FloatArray]:
    """Times in seconds [N], and three accelerations [N, 3] in g."""
    times = np.arange(1, round(experiment.seconds * experiment.rate_hz) + 1) / experiment.rate_hz
    which = np.searchsorted([b for b, _ in done], times, "right") - 1
    moves = [experiment.movements[name] for _, name in done]
    hz, size = np.array([m.hz for m in moves])[which], np.array([m.size_g for m in moves])[which]
    gravity = rng.standard_normal(3)
    gravity /= np.linalg.norm(gravity)
    along = rng.standard_normal(3)
    along /= np.linalg.norm(along)
    swing = size * np.sin(2 * np.pi * hz * times + rng.uniform(0, 2 * np.pi))
    values = gravity + swing[:, None] * along + experiment.noise_g * rng.standard_normal((len(times), 3))
    return times, values.astype(np.float32)


def _recording(path: Path, experiment: Experiment, rng: np.random.Generator, number: int) -> Path:
    done = bouts(experiment, rng, number)
    times, values = readings(experiment, done, rng)
    streams = {"imu": StreamSettings("push", kind="signal"), "text": StreamSettings("tcp:5556")}
    if experiment.picture:
        streams["camera"] = StreamSettings("synthetic", kind="vision")
    settings = without_devices("shaken", streams)
    end_ns = BEGIN_NS + round(experiment.seconds * 1e9)
    made = Messages("shaken")
    imu = SignalEncoder()

    def at(seconds: float) -> int:
        return BEGIN_NS + round(seconds * 1e9)

    def of_imu() -> Iterator[tuple[int, Callable[[], list[Envelope]]]]:
        for s, row in zip(times, values, strict=True):
            sample = Sample(at(s), at(s), row)
            yield at(s), lambda x=sample: [made.of("feature/imu", y, x.event_ns, imu.origin) for y in imu.encode(x)]

    def of_camera() -> Iterator[tuple[int, Callable[[], list[Envelope]]]]:
        encoder = ImageEncoder()
        small = SyntheticSettings(seed=int(rng.integers(1000)), width=160, height=120, rate_hz=10.0)
        source = Synthetic(Stream.of("camera", "vision"), small, paced=False)
        for x in itertools.takewhile(lambda x: x.event_ns <= end_ns, source.samples(lambda: True, BEGIN_NS)):
            arrives = Sample(x.event_ns, x.event_ns, x.data)
            yield (
                x.event_ns,
                lambda x=arrives: [made.of("feature/camera", y, x.event_ns, encoder.origin) for y in encoder.encode(x)],
            )

    def of_labels() -> Iterator[tuple[int, Callable[[], list[Envelope]]]]:
        for begin_s, name in done:
            at_ns = at(begin_s + experiment.label_late_s)
            yield at_ns, lambda t=at_ns, n=name: [made.of(topics.LABEL, Sample(t, t, n.encode()), t)]

    def of_clock() -> Iterator[tuple[int, Callable[[], list[Envelope]]]]:
        for t in range(BEGIN_NS, end_ns + 500_000_000, _CLOCK_NS):
            yield t, lambda t=t: [made.clock(t)]

    def messages() -> Iterator[Envelope]:
        yield made.session("open", BEGIN_NS, list(streams))
        parts = [of_labels(), of_imu(), of_clock(), *([of_camera()] if experiment.picture else [])]
        for _, envelopes in heapq.merge(*parts, key=lambda e: e[0]):
            yield from envelopes()

    write(path, settings, messages(), (BEGIN_NS, end_ns), {}, 0, lambda _: None)
    return path
