"""MediaPipe's face detector (BlazeFace) and face mesh as functions of a picture.

Pictures are BGR pixels; positions are pixels of the picture that was given, from its upper left corner.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.encoders.face_measures import Points, roll_of
from stream_mmrnn.graph.runtime import shared

Picture = npt.NDArray[np.uint8]

DETECTOR_SIDE = 128
MESH_SIDE = 192
_POINTS = 468
_ANCHORS = 896
_MARGIN = 1.5
"""Side of the square that the mesh sees, by the side of the face; as in MediaPipe."""
_LOWEST_SCORE = 0.5
"""The detector's score from which a box is a face; as in MediaPipe."""
CONSTANTS = repr((_MARGIN, _LOWEST_SCORE))
"""All that the functions depend on beside the graphs, as text."""


class Region(NamedTuple):
    """A square of a picture, turned by `angle` radians, clockwise in the picture."""

    x: float
    """Of the middle."""
    y: float
    side: float
    angle: float

    def scaled(self, by: float) -> Region:
        """The same in a picture that is larger by this factor."""
        return Region(self.x * by, self.y * by, self.side * by, self.angle)

    def fits(self, width: int, height: int) -> bool:
        """Whether a face there can be seen: its middle is in the picture, and it is neither tiny nor far too large."""
        inside = 0 <= self.x < width and 0 <= self.y < height
        return bool(np.isfinite(self).all() and inside and 16 <= self.side <= 4 * max(width, height))


def region_of(points: Points) -> Region:
    """The square around a face, with a margin, turned as the eyes are."""
    angle = roll_of(points)
    along, down = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    flat = points[:, :2]
    across = np.stack([flat @ along, flat @ down])
    low, high = across.min(1), across.max(1)
    x, y = (low[0] + high[0]) / 2 * along + (low[1] + high[1]) / 2 * down
    return Region(float(x), float(y), float((high - low).max()) * _MARGIN, angle)


def _anchors() -> npt.NDArray[np.float32]:
    """The middles of BlazeFace's anchors, as parts of the picture: two for each 8 pixels, then six for each 16."""
    found = []
    for cells, times in ((16, 2), (8, 6)):
        middles = (np.arange(cells) + 0.5) / cells
        y, x = np.meshgrid(middles, middles, indexing="ij")
        found.append(np.repeat(np.stack([x.ravel(), y.ravel()], 1), times, axis=0))
    return np.concatenate(found).astype(np.float32)


class FaceDetector:
    """Finds the largest face of a picture."""

    def __init__(self, folder: Path) -> None:
        """Load the graph; raises ModelError if its file is missing."""
        graph = shared(folder / "blazeface.onnx")
        self.sha256 = graph.sha256
        self._binding = graph.bind(
            {"image": (1, DETECTOR_SIDE, DETECTOR_SIDE, 3)},
            {"boxes": (1, _ANCHORS, 16), "scores": (1, _ANCHORS)},
            {},
        )
        self._anchors = _anchors()

    def find(self, picture: Picture) -> Region | None:
        """Where its largest face is; None if there is none."""
        height, width = picture.shape[:2]
        scale = DETECTOR_SIDE / max(width, height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        left, top = (DETECTOR_SIDE - size[0]) // 2, (DETECTOR_SIDE - size[1]) // 2
        image = self._binding.inputs["image"][0]
        image[...] = 0
        small = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
        image[top : top + size[1], left : left + size[0]] = small[:, :, ::-1]
        self._binding.run()
        boxes, scores = self._binding.outputs["boxes"][0], self._binding.outputs["scores"][0]
        faces = np.flatnonzero(scores >= _LOWEST_SCORE)
        if not len(faces):
            return None
        best = faces[np.argmax(boxes[faces, 2] * boxes[faces, 3])]
        # a box is its middle and size, then points: the eyes first; in pixels, from the anchor's middle
        x, y = boxes[best, :2] + self._anchors[best] * DETECTOR_SIDE - (left, top)
        eyes = boxes[best, 4:8].reshape(2, 2)
        across = eyes[1] - eyes[0]
        angle = float(np.arctan2(across[1], across[0]))
        side = float(boxes[best, 2:4].max()) * _MARGIN
        return Region(float(x), float(y), side, angle).scaled(1 / scale)


class FaceMesh:
    """The points of the face in a region."""

    def __init__(self, folder: Path) -> None:
        """Load the graph; raises ModelError if its file is missing."""
        graph = shared(folder / "facemesh.onnx")
        self.sha256 = graph.sha256
        self._binding = graph.bind(
            {"image": (1, MESH_SIDE, MESH_SIDE, 3)}, {"points": (1, _POINTS, 3), "face": (1, 1)}, {}
        )

    def points(self, picture: Picture, region: Region) -> tuple[Points, float]:
        """The points, and how likely it is that they are those of a face."""
        scale = region.side / MESH_SIDE
        cos, sin = np.cos(region.angle) * scale, np.sin(region.angle) * scale
        turn = np.array([[cos, -sin], [sin, cos]])
        corner = np.array([region.x, region.y]) - turn @ np.full(2, MESH_SIDE / 2)
        # OpenCV counts from the middle of the first pixel
        shift = corner + turn @ np.full(2, 0.5) - 0.5
        crop = cv2.warpAffine(
            picture,
            np.column_stack([turn, shift]),
            (MESH_SIDE, MESH_SIDE),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )
        cv2.cvtColor(crop, cv2.COLOR_BGR2RGB, dst=self._binding.inputs["image"][0])
        self._binding.run()
        found: npt.NDArray[Any] = self._binding.outputs["points"][0].astype(np.float64)
        flat = found[:, :2] @ turn.T + corner
        return np.column_stack([flat, found[:, 2] * scale]), float(self._binding.outputs["face"][0, 0])
