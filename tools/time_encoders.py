"""How long the slow encoders take, on one core: that of faces by picture, smart-turn by pause.

    python -m tools.time_encoders face ../shared/data/clips/*.mpg
    python -m tools.time_encoders turn_end

Prints CPU time, which other programs on the machine change less, and time of the clock.

`face`: each clip's pictures are enlarged to 640 x 480 as JPEG before the clock starts; the pictures in which a face is
followed count apart from those that are searched. `turn_end`: 8 s of noise, as many times as `--calls` says; the time
does not depend on the sound.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import av
import cv2
import numpy as np

from stream_mmrnn.capture.encoders.face import PRESENT, FaceEncoder
from stream_mmrnn.capture.speech.turn_end import SmartTurn
from stream_mmrnn.core.topics import AUDIO_RATE_HZ
from stream_mmrnn.core.types import Sample

SIZE = (640, 480)
FRAME_NS = 40_000_000
WARM = 5

Times = list[tuple[float, float]]
"""Of the CPU and of the clock, in milliseconds."""


class Stopwatch:
    """Measures from its making."""

    def __init__(self) -> None:
        self._cpu, self._clock = time.process_time(), time.perf_counter()

    def spent(self) -> tuple[float, float]:
        return (time.process_time() - self._cpu) * 1e3, (time.perf_counter() - self._clock) * 1e3


def show(what: str, times: Times) -> None:
    if times:
        (cpu, clock), (cpu_99, clock_99) = np.median(times, 0), np.percentile(times, 99, axis=0)
        text = f"CPU {cpu:.1f} ms (p99 {cpu_99:.1f}), clock {clock:.1f} ms (p99 {clock_99:.1f})"
        print(f"{what} ({len(times)}): median {text}")


def jpegs(clip: Path) -> list[bytes]:
    with av.open(str(clip)) as container:
        pictures = [frame.to_ndarray(format="bgr24") for frame in container.decode(video=0)]
    return [cv2.imencode(".jpg", cv2.resize(p, SIZE, interpolation=cv2.INTER_CUBIC))[1].tobytes() for p in pictures]


def face(clips: list[Path]) -> None:
    encoder = FaceEncoder()
    took: dict[str, Times] = {"followed": [], "searched": []}
    found = total = 0
    for clip in clips:
        encoder.reset()
        for k, data in enumerate(jpegs(clip)):
            searched = encoder.detections
            watch = Stopwatch()
            (made,) = encoder.encode(Sample(k * FRAME_NS, 0, data))
            spent = watch.spent()
            total, found = total + 1, found + int(made.data[PRESENT])
            if total > WARM:
                took["followed" if encoder.detections == searched else "searched"].append(spent)
    print(f"{total} pictures of {SIZE[0]} x {SIZE[1]}, a face in {found}")
    for what, times in took.items():
        show(what, times)


def turn_end(calls: int) -> None:
    network = SmartTurn()
    sound = np.random.default_rng(0).uniform(-0.1, 0.1, 8 * AUDIO_RATE_HZ).astype(np.float32)
    took: dict[str, Times] = {"features": [], "features and network": []}
    for k in range(WARM + calls):
        for times, run in zip(took.values(), (network.features, network.logit), strict=True):
            watch = Stopwatch()
            run(sound)
            if k >= WARM:
                times.append(watch.spent())
    for what, times in took.items():
        show(what, times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    encoders = parser.add_subparsers(dest="encoder", required=True)
    encoders.add_parser("face").add_argument("clips", type=Path, nargs="+")
    encoders.add_parser("turn_end").add_argument("--calls", type=int, default=200)
    asked = parser.parse_args()
    if asked.encoder == "face":
        face(asked.clips)
    else:
        turn_end(asked.calls)


if __name__ == "__main__":
    main()
