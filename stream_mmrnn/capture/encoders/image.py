"""ImageEncoder: a JPEG picture -> 1280 features of EfficientNet-Lite0 at 128 x 128. Has no state."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.encoders import Stateless
from stream_mmrnn.core.config import models_folder
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.types import Payload, Sample
from stream_mmrnn.graph.runtime import shared

PICTURE = 128
MAX_SIDE = 8192
"""The largest camera size that can be set. A limit, so that a small forged header cannot make us allocate gigabytes."""

# start-of-frame markers: C0 to CF without C4 (Huffman tables), C8 (reserved) and CC (arithmetic coding)
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height from a JPEG's header, or None if the bytes are no JPEG; nothing is decoded."""
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _START_OF_FRAME:
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        if marker == 0xFF:  # a fill byte
            at += 1
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


_DECODE_AT = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
"""The decoder's flag to decode at a size divided by this, which is much faster."""


def reduction(side: float, needed: float) -> int:
    """By what to divide a side of so many pixels (1, 2, 4 or 8) so that as many as are needed remain."""
    return next((times for times in (8, 4, 2) if side >= times * needed), 1)


def checked_size(data: Payload) -> tuple[int, int]:
    """Width and height of a JPEG; raises WireError if the bytes are none, or one of a size that is not taken."""
    size = jpeg_size(data) if isinstance(data, bytes) else None
    if size is None or not 0 < min(size) <= max(size) <= MAX_SIDE:
        raise WireError(f"a picture is not a JPEG of 1 to {MAX_SIDE} pixels a side; encode it as JPEG")
    return size


def decode(data: Payload, divided_by: int) -> npt.NDArray[np.uint8]:
    """A JPEG as BGR pixels, at its size divided by 1, 2, 4 or 8; raises WireError if it is damaged."""
    try:
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), _DECODE_AT[divided_by])
    except cv2.error as e:
        raise WireError("a JPEG picture is damaged and cannot be decoded; it is dropped") from e
    if picture is None:
        raise WireError("a JPEG picture is damaged and cannot be decoded; it is dropped")
    return picture.astype(np.uint8, copy=False)


def shrink(data: Payload) -> npt.NDArray[np.uint8]:
    """A JPEG as 128 x 128 BGR pixels; raises WireError if it cannot be decoded."""
    picture = decode(data, reduction(min(checked_size(data)), PICTURE))
    return cv2.resize(picture, (PICTURE, PICTURE), interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)


class ImageEncoder(Stateless):
    """One feature vector per picture."""

    size = 1280

    def __init__(self) -> None:
        """Load the graph; raises ModelError if its file is missing."""
        cv2.setNumThreads(1)  # one core is enough for the work; more threads only add jitter
        graph = shared(models_folder() / "encoders" / "efficientnet-lite0-128.onnx")
        self.origin = f"efficientnet-lite0-128@{graph.sha256}"
        self._binding = graph.bind({"image": (1, PICTURE, PICTURE, 3)}, {"features": (1, self.size)}, {})

    def encode(self, sample: Sample) -> list[Sample]:
        """The picture's features, with its times; raises WireError if it cannot be decoded."""
        cv2.cvtColor(shrink(sample.data), cv2.COLOR_BGR2RGB, dst=self._binding.inputs["image"][0])
        self._binding.run()
        return [
            Sample(sample.event_ns, sample.capture_ns, self._binding.outputs["features"][0].copy(), sample.device_ns)
        ]
