"""Messages of ROS 2 -> samples: which kind of stream a message is, and its numbers, picture or sound. Pure.

Fields are those of the message definitions in sensor_msgs, std_msgs and audio_common_msgs (both packages of that name).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.topics import AUDIO_RATE_HZ

STANDARD_GRAVITY = 9.80665
"""m/s² in 1 g: `sensor_msgs/Imu` has m/s², streams of this program have g, as `activity` learnt them."""
_PAINT16, _PAFLOAT32 = 8, 1
"""Formats of PortAudio, which `audio_common_msgs/AudioInfo` of ROS 2's audio_common names."""
_JPEG_QUALITY = 90
_COLOURS = {"rgb8": (3, "RGB2BGR"), "bgr8": (3, ""), "rgba8": (4, "RGBA2BGR"), "bgra8": (4, "BGRA2BGR"),
            "mono8": (1, "GRAY2BGR"), "8UC1": (1, "GRAY2BGR"), "8UC3": (3, "")}  # fmt: skip
"""Encoding of sensor_msgs/Image: bytes of a pixel, and OpenCV's conversion to blue, green, red."""

Array = npt.NDArray[Any]


class Sound(NamedTuple):
    """How the bytes of a topic's sound are to be read."""

    rate_hz: int
    channels: int


def signal(data: Any, kind: str) -> Array:
    """The numbers of an Imu (acceleration in g, rotation in rad/s: x, y, z each) or of a MultiArray."""
    values = data.data if kind != "sensor_msgs/Imu" else _of_imu(data)
    with np.errstate(over="ignore"):  # what is too large for float32 is infinite: the encoder counts and refuses it
        return np.asarray(values, np.float32)


def _of_imu(data: Any) -> list[float]:
    a, w, g = data.linear_acceleration, data.angular_velocity, STANDARD_GRAVITY
    return [a.x / g, a.y / g, a.z / g, w.x, w.y, w.z]


def picture(data: Any, kind: str) -> bytes:
    """JPEG bytes: those of a CompressedImage, or made of an Image.

    Raises:
        WireError: it is no picture that can be read.

    """
    if kind == "sensor_msgs/CompressedImage":
        found = bytes(data.data)
        return found if found[:3] == b"\xff\xd8\xff" else _jpeg(_decoded(found, str(data.format)))
    return _jpeg(_pixels(data))


def _decoded(found: bytes, form: str) -> Array:
    import cv2

    pixels = cv2.imdecode(np.frombuffer(found, np.uint8), cv2.IMREAD_COLOR) if found else None
    if pixels is None:
        raise WireError(f"a compressed image ({form[:40]!r}) cannot be decoded")
    return pixels


def _pixels(data: Any) -> Array:
    import cv2

    if data.encoding not in _COLOURS:
        raise WireError(
            f"images of the encoding {str(data.encoding)[:40]!r} are not supported: use {', '.join(_COLOURS)}"
        )
    depth, conversion = _COLOURS[data.encoding]
    height, width, step = int(data.height), int(data.width), int(data.step)
    raw = np.frombuffer(bytes(data.data), np.uint8)
    if not 0 < width * depth <= step or height < 1 or len(raw) < height * step:
        raise WireError(f"an image of {width} x {height} has {len(raw)} bytes, {step} a row")
    pixels = raw[: height * step].reshape(height, step)[:, : width * depth].reshape(height, width, depth)
    return cv2.cvtColor(pixels, getattr(cv2, f"COLOR_{conversion}")) if conversion else pixels


def _jpeg(pixels: Array) -> bytes:
    import cv2

    done, jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    if not done:
        raise WireError(f"an image of shape {list(pixels.shape)} cannot be encoded as JPEG")
    return bytes(jpeg.tobytes())


def sound_format(first: Any, info: Any) -> Sound | str:
    """How a topic's sound is to be read, or why it cannot be. `info`: the AudioInfo of the bag, if it has one."""
    audio = getattr(first, "audio", first)
    own = getattr(audio, "info", None)  # ros2 audio_common: each message has it
    if own is not None:
        if own.format not in (_PAINT16, _PAFLOAT32):
            return (
                f"its samples have PortAudio's format {own.format}, expected {_PAINT16} (int16) or {_PAFLOAT32} (float)"
            )
        return _checked(own.rate, own.channels)
    if info is not None:
        coding, form = str(info.coding_format).lower(), str(info.sample_format).upper()
        if coding not in ("wave", "wav", "") or form not in ("S16LE", ""):
            return f"it is {coding or form}, expected wave and S16LE: record it so, or convert it"
        return _checked(info.sample_rate, info.channels)
    head = bytes(audio.data[:3])
    if head == b"ID3" or (len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0):
        return "it looks like MP3, expected 16-bit samples: record it with the format wave"
    return Sound(AUDIO_RATE_HZ, 1)


def _checked(rate_hz: int, channels: int) -> Sound | str:
    if not 1000 <= rate_hz <= 384_000 or not 1 <= channels <= 64:
        return f"it has {rate_hz} samples a second in {channels} channels"
    return Sound(int(rate_hz), int(channels))


def sound(data: Any, form: Sound) -> Array:
    """Samples, int16 or float [frames, channels]; an incomplete frame at the end is left out."""
    audio = getattr(data, "audio", data)
    content = getattr(audio, "audio_data", None)
    if content is None:
        whole = np.frombuffer(bytes(audio.data), np.uint8)
        values: Array = whole[: len(whole) // 2 * 2].view("<i2")
    elif audio.info.format == _PAINT16:
        values = np.asarray(content.int16_data, np.int16)
    else:
        values = np.asarray(content.float32_data, np.float32)
    return values[: len(values) // form.channels * form.channels].reshape(-1, form.channels)


def text(data: Any, kind: str) -> bytes:
    return str(data.data).strip().encode()


KINDS: dict[str, str] = {
    "sensor_msgs/Imu": "signal",
    "std_msgs/Float32MultiArray": "signal",
    "std_msgs/Float64MultiArray": "signal",
    "sensor_msgs/Image": "vision",
    "sensor_msgs/CompressedImage": "vision",
    "audio_common_msgs/AudioData": "audio",
    "audio_common_msgs/AudioDataStamped": "audio",
    "audio_common_msgs/AudioStamped": "audio",
    "std_msgs/String": "text",
}
"""What kind of stream a message's topic becomes."""
AUDIO_INFO = "audio_common_msgs/AudioInfo"
READ: dict[str, Callable[[Any, str], Any]] = {"signal": signal, "vision": picture, "text": text}
"""By kind of stream, what makes a sample's data of a message."""
