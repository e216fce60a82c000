"""FaceEncoder: a JPEG picture -> the lips, mouth, eyes and head pose of its largest face, 99 numbers.

A face that was found is followed: the next picture is cut out where it was, so the detector runs only where there is no
face to follow. That region and the last measures of the mouth are the state.

There is no gaze: the mesh has the lids and no pupils, and from lids and pose nothing true can be said about it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from stream_mmrnn.capture.encoders import face_measures, face_networks, mouth_movement
from stream_mmrnn.capture.encoders.face_measures import Points
from stream_mmrnn.capture.encoders.face_networks import FaceDetector, FaceMesh, Picture, Region, region_of
from stream_mmrnn.capture.encoders.image import MAX_SIDE, checked_size, decode, reduction
from stream_mmrnn.capture.encoders.mouth_movement import MouthMovement
from stream_mmrnn.core.config import models_folder
from stream_mmrnn.core.errors import SnapshotError
from stream_mmrnn.core.types import FloatArray, Sample

LIPS = slice(0, 80)
"""x, y of 40 points in the face's own frame, see `face_measures.lips`."""
MOUTH = slice(80, 84)
"""Between the lips: opening and width; of the mouth with its lips: opening and width. 1 is the distance of the eyes."""
MOUTH_CHANGE = slice(84, 88)
"""By how much the four have changed since the last picture, per second; 0 where it showed no face."""
EYES_CLOSED = slice(88, 90)
"""The person's right eye and left eye: about 0 is open, 1 closed."""
POSE = slice(90, 93)
"""Yaw, pitch and roll of the head, in radians."""
CONFIDENCE = 93
"""How sure the mesh is that it sees a face, 0 to 1."""
PRESENT = 94
"""1 if there is a face. Without one, the whole vector is 0."""
MOVEMENT = slice(95, 99)
"""How much the mouth moves: logarithms, see `MouthMovement.feed`."""
SIZE = 99

_LOWEST_CONFIDENCE = 0.5
"""The mesh's confidence below which the face is lost; as in MediaPipe."""
_SEARCHED_SIDE = 480
"""Pixels of a picture's shorter side that suffice to search it."""
_FOLLOWED_SIDE = 128
"""Pixels of the face's square that suffice to follow it: two thirds of what the mesh takes."""
_LARGEST_CHANGE = 20.0
"""Per second: two pictures with almost the same time must not give a huge number."""
_RESET_NS = 1_000_000_000
_VERSION = "2"
"""Of what these modules compute; raise it with each change that gives other numbers."""


class FaceEncoder:
    """One vector per picture."""

    size = SIZE

    def __init__(self, folder: Path | None = None) -> None:
        """Load both graphs, by default the package's; raises ModelError if a file is missing."""
        cv2.setNumThreads(1)  # one core is enough for the work; more threads only add jitter
        folder = folder or models_folder() / "encoders"
        self._detector, self._mesh = FaceDetector(folder), FaceMesh(folder)
        own = (_VERSION, _LOWEST_CONFIDENCE, _SEARCHED_SIDE, _FOLLOWED_SIDE, _LARGEST_CHANGE, _RESET_NS)
        used = (face_measures.CONSTANTS, face_networks.CONSTANTS, mouth_movement.CONSTANTS, *own)
        parts = repr((self._detector.sha256, self._mesh.sha256, *used))
        self.origin = f"face@{hashlib.sha256(parts.encode()).hexdigest()}"
        self._movement = MouthMovement()
        self.detections = 0
        """How often the detector has run."""
        self.reset()

    def prewarm(self) -> None:
        """Does nothing: a run takes milliseconds, more than warm caches save."""

    def reset(self) -> None:
        """Forget the face."""
        self._region: Region | None = None
        self._picture = (0, 0)
        self._mouth = np.zeros(4, np.float32)
        self._event_ns = 0
        self._movement.reset()

    def snapshot(self) -> dict[str, npt.NDArray[Any]]:
        """The region of the face, its last measures and time, and the picture's size."""
        followed = self._region is not None
        return {
            "region": np.array(self._region or (0, 0, 0, 0), np.float64),
            "mouth": self._mouth.copy(),
            "known": np.array([followed, self._event_ns, *self._picture], np.int64),
            **self._movement.snapshot(),
        }

    def restore(self, state: dict[str, npt.NDArray[Any]]) -> None:
        """Continue from a snapshot; raises SnapshotError if it is of another shape, or holds no numbers."""
        mine = {name: (values.shape, values.dtype) for name, values in self.snapshot().items()}
        if {name: (values.shape, values.dtype) for name, values in state.items()} != mine:
            raise SnapshotError(f"the snapshot is no state of {self.origin}; take one of this encoder")
        followed, event_ns, width, height = map(int, state["known"])
        region = Region(*map(float, state["region"]))
        finite = all(np.isfinite(state[name]).all() for name in ("mouth", "mean", "lips"))
        if not finite or (followed and not region.fits(MAX_SIDE, MAX_SIDE)):
            raise SnapshotError("the snapshot of a face encoder has a face that cannot be; take another one")
        self._region = region if followed else None
        self._mouth, self._event_ns, self._picture = state["mouth"].copy(), event_ns, (width, height)
        self._movement.restore(state)

    def encode(self, sample: Sample) -> list[Sample]:
        """The picture's vector, with its times; raises WireError if it cannot be decoded."""
        size = checked_size(sample.data)
        continues = size == self._picture and 0 <= sample.event_ns - self._event_ns <= _RESET_NS
        followed = self._region if continues else None
        times = reduction(min(size), _SEARCHED_SIDE)
        if followed is not None:
            times = max(times, reduction(followed.side, _FOLLOWED_SIDE))
        picture = decode(sample.data, times)
        found = self._face(picture, None if followed is None else followed.scaled(1 / times))
        vector = np.zeros(SIZE, np.float32)
        if found is None:
            self.reset()
        else:
            points, confidence = found
            if followed is None:
                self._movement.reset()
            self._measure(vector, points, confidence, None if followed is None else sample.event_ns)
            vector[MOVEMENT] = self._movement.feed(vector[LIPS], vector[MOUTH], sample.event_ns)
            self._region = region_of(points).scaled(times)
        self._picture, self._event_ns = size, sample.event_ns
        return [Sample(sample.event_ns, sample.capture_ns, vector, sample.device_ns)]

    def _face(self, picture: Picture, region: Region | None) -> tuple[Points, float] | None:
        """Points and confidence of the face, first where it was, then where the detector finds one."""
        if region is not None and (found := self._points(picture, region)) is not None:
            return found
        self.detections += 1
        region = self._detector.find(picture)
        if region is None or (rough := self._points(picture, region)) is None:
            return None
        # the detector's box is rough; the mesh's own region is what it will see from now on
        return self._points(picture, region_of(rough[0]))

    def _points(self, picture: Picture, region: Region) -> tuple[Points, float] | None:
        """Points and confidence of the face in a region; None if there is none, or the next region would be none."""
        points, confidence = self._mesh.points(picture, region)
        height, width = picture.shape[:2]
        if not (confidence >= _LOWEST_CONFIDENCE and face_measures.is_face(points)):
            return None
        return (points, confidence) if region_of(points).fits(width, height) else None

    def _measure(self, vector: FloatArray, points: Points, confidence: float, event_ns: int | None) -> None:
        """Fill the vector of a face; `event_ns` is None where the last picture did not show it."""
        mouth = face_measures.mouth(points)
        vector[LIPS], vector[MOUTH] = face_measures.lips(points), mouth
        if event_ns is not None and event_ns > self._event_ns:
            change = (mouth - self._mouth) * np.float32(1e9 / (event_ns - self._event_ns))
            vector[MOUTH_CHANGE] = np.clip(change, -_LARGEST_CHANGE, _LARGEST_CHANGE)
        vector[EYES_CLOSED], vector[POSE] = face_measures.eyes_closed(points), face_measures.head_pose(points)
        vector[CONFIDENCE], vector[PRESENT] = confidence, 1
        self._mouth = mouth
