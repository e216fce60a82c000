"""How long the encoder of faces takes, by picture, on one core.

    python -m tools.time_face ../shared/data/clips/*.mpg

Each clip's pictures are enlarged to 640 x 480 as JPEG before the clock starts. Prints the time of the pictures in which
a face is followed (CPU time, which other programs on the machine change less, and time of the clock), and of those that
are searched.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import av
import cv2
import numpy as np

from stream_mmrnn.capture.encoders.face import PRESENT, FaceEncoder
from stream_mmrnn.core.types import Sample

SIZE = (640, 480)
FRAME_NS = 40_000_000
WARM = 5


def jpegs(clip: Path) -> list[bytes]:
    with av.open(str(clip)) as container:
        pictures = [frame.to_ndarray(format="bgr24") for frame in container.decode(video=0)]
    return [cv2.imencode(".jpg", cv2.resize(p, SIZE, interpolation=cv2.INTER_CUBIC))[1].tobytes() for p in pictures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, nargs="+")
    encoder = FaceEncoder()
    took: dict[str, list[tuple[float, float]]] = {"followed": [], "searched": []}
    found = total = 0
    for clip in parser.parse_args().clips:
        encoder.reset()
        for k, data in enumerate(jpegs(clip)):
            searched = encoder.detections
            cpu, clock = time.process_time(), time.perf_counter()
            (made,) = encoder.encode(Sample(k * FRAME_NS, 0, data))
            spent = (time.process_time() - cpu) * 1e3, (time.perf_counter() - clock) * 1e3
            total, found = total + 1, found + int(made.data[PRESENT])
            if total > WARM:
                took["followed" if encoder.detections == searched else "searched"].append(spent)
    print(f"{total} pictures of {SIZE[0]} x {SIZE[1]}, a face in {found}")
    for what, times in took.items():
        if times:
            (cpu, clock), (cpu_99, clock_99) = np.median(times, 0), np.percentile(times, 99, axis=0)
            text = f"CPU {cpu:.1f} ms (p99 {cpu_99:.1f}), clock {clock:.1f} ms (p99 {clock_99:.1f})"
            print(f"{what} ({len(times)}): median {text}")


if __name__ == "__main__":
    main()
