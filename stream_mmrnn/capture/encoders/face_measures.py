"""What the points of one face say: lips, mouth, eyes, and where the head points.

Knows nothing about pictures and networks: it takes the 468 points of MediaPipe's face mesh. Their numbers are those of
its canonical face (mediapipe/modules/face_geometry/data/canonical_face_model.obj, Apache-2.0), whose coordinates of
some points are copied here.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.types import FloatArray

Points: TypeAlias = npt.NDArray[np.float64]
"""[468, 3], in pixels: x to the right, y down, z away from the camera, on the scale of x."""

LIP_POINTS = (
    *(61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291, 146, 91, 181, 84, 17, 314, 405, 321, 375),  # outer line
    *(78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308, 95, 88, 178, 87, 14, 317, 402, 318, 324),  # inner line
)
"""The points of the lips, in the order of the vector: of each line the upper half from the person's right corner to the
left one, then the lower half, without the corners, from right to left."""
_GAPS = ((13, 14), (78, 308), (0, 17), (61, 291))
"""The ends of the four measures of the mouth."""
_EYES = ((33, 160, 158, 133, 153, 144), (263, 387, 385, 362, 380, 373))
"""Of the person's right and left eye: outer corner, two points of the upper lid, inner corner, two of the lower lid."""
_OUTER_CORNERS = (33, 263)
_MOUTH_CORNERS = (61, 291)
_OPEN_EYE = 0.3
"""Height of an open eye by its width."""
_SMALLEST_FACE = 1.0
"""Distance of the eyes' outer corners, in pixels, below which there is nothing to measure."""

_HALF = {
    33: (-4.445859, 2.663991, 3.173422),
    133: (-1.856432, 2.585245, 3.757904),
    127: (-7.743095, 2.364999, -2.005167),
    234: (-7.664182, 0.673132, -2.435867),
    54: (-6.279331, 6.615427, 1.425850),
    98: (-1.405627, -1.714196, 5.241087),
}
_OTHER_HALF = {263: 33, 362: 133, 356: 127, 454: 234, 284: 54, 327: 98}
_MIDDLE = {
    10: (0.0, 8.261778, 4.481535),
    168: (0.0, 3.271027, 5.236015),
    6: (0.0, 2.473255, 5.788627),
    4: (0.0, -0.463170, 7.586580),
}
_MIRRORED = {point: (-_HALF[of][0], *_HALF[of][1:]) for point, of in _OTHER_HALF.items()}
_RIGID: dict[int, tuple[float, ...]] = {**_HALF, **_MIRRORED, **_MIDDLE}
"""Points that neither mouth nor lids move, on the canonical face: x to the right, y up, z to the camera."""
_RIGID_POINTS = list(_RIGID)
_CANONICAL = np.array(list(_RIGID.values())) - np.mean(list(_RIGID.values()), axis=0)

CONSTANTS = repr((LIP_POINTS, _GAPS, _EYES, _OPEN_EYE, _RIGID))
"""All that the measures depend on, as text."""


def roll_of(points: Points) -> float:
    """The angle of the line from the right to the left eye, in radians; positive is clockwise in the picture."""
    x, y, _ = points[_OUTER_CORNERS[1]] - points[_OUTER_CORNERS[0]]
    return float(np.arctan2(y, x))


def is_face(points: Points) -> bool:
    """Whether the points can be measured: finite, and the eyes apart."""
    return bool(np.isfinite(points).all() and _between_eyes(points) >= _SMALLEST_FACE)


def _distances(points: Points, begins: list[int], ends: list[int]) -> npt.NDArray[np.float64]:
    """Between points in space; all at once, because each call of numpy costs microseconds."""
    apart = points[begins] - points[ends]
    found: npt.NDArray[np.float64] = np.sqrt((apart * apart).sum(1))
    return found


def _between_eyes(points: Points) -> float:
    return float(_distances(points, [_OUTER_CORNERS[0]], [_OUTER_CORNERS[1]])[0])


def lips(points: Points) -> FloatArray:
    """The 40 points of the lips, x and y of each, [80], in the face's own frame.

    The origin is the middle between the corners of the mouth, x runs along the line of the eyes, to the person's left,
    y down the face, and 1 is the distance of the eyes' outer corners in space.
    """
    angle = roll_of(points)
    along = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    middle = points[list(_MOUTH_CORNERS), :2].mean(0)
    flat: FloatArray = ((points[list(LIP_POINTS), :2] - middle) @ along / _between_eyes(points)).ravel()
    return flat.astype(np.float32)


def mouth(points: Points) -> FloatArray:
    """Opening and width between the lips, then of the mouth with its lips, [4]: 1 is the distance of the eyes."""
    begins, ends = zip(*_GAPS, strict=True)
    return (_distances(points, list(begins), list(ends)) / _between_eyes(points)).astype(np.float32)


def eyes_closed(points: Points) -> FloatArray:
    """How far the person's right and left eye are closed, [2]: about 0 is open, 1 closed.

    1 less the eye's aspect ratio (Soukupova and Cech 2016, "Real-time eye blink detection using facial landmarks") by
    that of an open eye. Eyes differ: narrow ones are never 0, wide ones below it.
    """
    outer, up, up_in, inner, low_in, low = (list(of_both) for of_both in zip(*_EYES, strict=True))
    apart = _distances(points, outer + up + up_in, inner + low + low_in).reshape(3, 2)
    shape = (apart[1] + apart[2]) / 2 / np.maximum(apart[0], 1e-6)
    closed: FloatArray = np.clip(1 - shape / _OPEN_EYE, -1, 1).astype(np.float32)
    return closed


def head_pose(points: Points) -> FloatArray:
    """Yaw, pitch and roll of the head in radians, [3]; all are 0 where it looks straight into the camera.

    Yaw is positive where the nose points to the right of the picture, pitch where it points up, roll where the head
    leans clockwise. The rotation that fits the canonical face best to the points (Kabsch 1976); depth is the network's
    guess from one picture, so a yaw is rather too small.
    """
    seen = points[_RIGID_POINTS] * np.array([1.0, -1.0, -1.0])
    u, _, vt = np.linalg.svd((seen - seen.mean(0)).T @ _CANONICAL)
    mirror = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
    turn: npt.NDArray[Any] = u @ mirror @ vt
    nose = turn[:, 2]
    yaw, pitch = np.arctan2(nose[0], nose[2]), np.arcsin(np.clip(nose[1], -1, 1))
    return np.array([yaw, pitch, np.arctan2(-turn[1, 0], turn[0, 0])], np.float32)
