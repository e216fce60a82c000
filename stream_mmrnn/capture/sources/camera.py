"""A camera through OpenCV: a device number, a device file, a video file or a URL (http, rtsp, udp).

The only live source of pictures; `file` reads clips by their own times.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2

from stream_mmrnn.capture.sources.pacing import wait_until
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import SourceError
from stream_mmrnn.core.settings import CameraSettings
from stream_mmrnn.core.types import Sample

_TIMEOUT_MS = 2000
_LOST_NS = 2_000_000_000
_LOST_FAILURES = 10
_QUEUED_NS = 4_000_000
"""A frame that `grab` returns faster than this was queued: it is older than its stamp would say."""
_MAX_QUEUED_FRAMES = 300

# Our errors are one sentence each; what the libraries print beside them is switched off. OpenCV reads these at the
# first capture, so it is early enough to set them here. A value that the user has set is kept.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
os.environ.setdefault("OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT", str(_TIMEOUT_MS // 1000))


def _is_url(device: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", device) is not None


def _capture(device: str) -> cv2.VideoCapture:
    if device.isdigit():
        # with the backend's name, else OpenCV tries every backend when there is no camera
        return cv2.VideoCapture(int(device), cv2.CAP_V4L2 if sys.platform == "linux" else cv2.CAP_ANY)
    if _is_url(device):
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _TIMEOUT_MS, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _TIMEOUT_MS]
        # one thread: a decoder with n threads holds n frames back
        return cv2.VideoCapture(device, cv2.CAP_FFMPEG, [*limits, cv2.CAP_PROP_N_THREADS, 1])
    return cv2.VideoCapture(device)


class Camera:
    """Frames as JPEG, stamped as soon as the device delivers them.

    While a camera gives no frames, `grab` blocks for up to two seconds before `alive` is checked again.
    """

    def __init__(self, device: str, settings: CameraSettings) -> None:
        self.origin = f"camera:{device}"
        self.info: dict[str, Any] = {
            "asked": {"width": settings.width, "height": settings.height, "rate_hz": settings.rate_hz},
            "failed_grabs": 0,
            "stale": 0,
        }
        self._device = device
        self._settings = settings
        self._capture: cv2.VideoCapture | None = None
        self._is_file = not device.isdigit() and not _is_url(device) and Path(device).is_file()

    def open(self) -> None:
        """Open the camera.

        Raises:
            SourceError: it is not there, or gives no picture within about two seconds.

        """
        self.close()
        try:
            capture = _capture(self._device)
        except cv2.error as e:
            raise SourceError(f"{self.origin} cannot be opened: {e.err}; give a number, a file or a URL") from e
        if not capture.isOpened():
            capture.release()
            raise SourceError(f"{self.origin} cannot be opened: expected a camera there; is it connected, or in use?")
        if not self._is_file and not _is_url(self._device):
            capture.set(cv2.CAP_PROP_FRAME_WIDTH, self._settings.width)
            capture.set(cv2.CAP_PROP_FRAME_HEIGHT, self._settings.height)
            capture.set(cv2.CAP_PROP_FPS, self._settings.rate_hz)
        self.info["got"] = {
            "width": int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)),
            "height": int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT)),
            # OpenCV invents the rate of a network stream
            "rate_hz": 0.0 if _is_url(self._device) else capture.get(cv2.CAP_PROP_FPS),
            "backend": capture.getBackendName(),
        }
        self.info["stale"] = 0
        self._capture = capture

    def samples(self, alive: Callable[[], bool], epoch_ns: int) -> Iterator[Sample]:
        """Frames as they come.

        Raises:
            SourceError: the camera is lost.

        """
        capture = self._capture
        if capture is None:
            raise SourceError(f"{self.origin} is not open: call open() before samples()")
        quality = [cv2.IMWRITE_JPEG_QUALITY, self._settings.jpeg_quality]
        period_ns = round(1e9 / (self.info["got"]["rate_hz"] or 30.0)) if self._is_file else 0
        last_ns = now_ns()
        failures = 0
        # OpenCV reads frames of a network stream ahead to detect its format; they come out in one burst
        stale = _is_url(self._device)
        while alive():
            before_ns = now_ns()
            grabbed = capture.grab()
            event_ns = now_ns()  # stamped here, because OpenCV invents the time stamps of some backends
            if not grabbed:
                if self._is_file:
                    return
                failures += 1
                self.info["failed_grabs"] += 1
                if failures >= _LOST_FAILURES or event_ns - last_ns > _LOST_NS:
                    raise SourceError(f"{self.origin} is lost: it gives no more frames; check its connection")
                time.sleep(0.02)
                continue
            if stale and event_ns - before_ns < _QUEUED_NS and self.info["stale"] < _MAX_QUEUED_FRAMES:
                self.info["stale"] += 1
                last_ns = event_ns
                continue
            stale = False
            good, frame = capture.retrieve()
            if not good:
                self.info["failed_grabs"] += 1
                continue
            capture_ns = now_ns()
            failures, last_ns = 0, event_ns
            # a damaged frame may be empty, for which imencode raises an exception
            if frame is None or frame.size == 0:
                continue
            good, jpeg = cv2.imencode(".jpg", frame, quality)
            if good:
                yield Sample(event_ns, capture_ns, jpeg.tobytes())
            if period_ns and not wait_until(event_ns + period_ns, alive):
                return

    def close(self) -> None:
        if self._capture is not None:
            self._capture.release()
            self._capture = None


def list_cameras() -> list[tuple[str, str]]:
    """The cameras that can be opened now, as (source, description), for the `devices` verb."""
    if sys.platform == "linux":
        found = sorted(int(p.name[5:]) for p in Path("/dev").glob("video*") if p.name[5:].isdigit())
    else:
        found = list(range(5))
    result = []
    for number in found:
        capture = _capture(str(number))
        if capture.isOpened():
            width, height = (int(capture.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
            rate = capture.get(cv2.CAP_PROP_FPS)
            result.append((f"camera:{number}", f"{width}x{height} at {rate:g} Hz ({capture.getBackendName()})"))
        capture.release()
    return result
