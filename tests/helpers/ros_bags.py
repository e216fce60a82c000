"""ROS 2 bags for tests, written by rosbags, as a robot's recorder writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

AUDIO = {
    "audio_common_msgs/msg/AudioData": "uint8[] data",
    "audio_common_msgs/msg/AudioDataStamped": "std_msgs/Header header\naudio_common_msgs/AudioData audio",
    "audio_common_msgs/msg/AudioInfo": "uint8 channels\nuint32 sample_rate\nstring sample_format\nuint32 bitrate\n"
    "string coding_format",
}
"""Of audio_common_msgs, which is in no release of ROS 2 itself."""
ZERO_NS = 1_700_000_000_000_000_000


def types() -> Any:
    typesys = pytest.importorskip("rosbags.typesys", reason="pip install rosbags")
    store = typesys.get_typestore(typesys.Stores.ROS2_HUMBLE)
    found: dict[str, Any] = {}
    for name, text in AUDIO.items():
        found |= typesys.get_types_from_msg(text, name)
    store.register(found)
    return store


class BagWriter:
    """`add` messages to a bag with MCAP storage."""

    def __init__(self, path: Path) -> None:
        rosbag2 = pytest.importorskip("rosbags.rosbag2", reason="pip install rosbags")
        self.path, self.types = path, types()
        self._writer = rosbag2.Writer(path, version=9, storage_plugin=rosbag2.StoragePlugin.MCAP)
        self._writer.open()
        self._connections: dict[str, Any] = {}

    def add(self, topic: str, kind: str, at_ns: int, **fields: Any) -> None:
        if topic not in self._connections:
            self._connections[topic] = self._writer.add_connection(topic, kind, typestore=self.types)
        message = self.types.types[kind](**fields)
        data = self.types.serialize_cdr(message, kind)
        self._writer.write(self._connections[topic], at_ns, data)

    def of(self, kind: str, **fields: Any) -> Any:
        return self.types.types[kind](**fields)

    def header(self, at_ns: int) -> Any:
        stamp = self.of("builtin_interfaces/msg/Time", sec=at_ns // 10**9, nanosec=at_ns % 10**9)
        return self.of("std_msgs/msg/Header", stamp=stamp, frame_id="")

    def imu(self, at_ns: int, acceleration: tuple[float, ...], rotation: tuple[float, ...], log_ns: int = 0) -> None:
        def vector(values: tuple[float, ...]) -> Any:
            x, y, z = values
            return self.of("geometry_msgs/msg/Vector3", x=x, y=y, z=z)

        no = np.zeros(9)
        upright = self.of("geometry_msgs/msg/Quaternion", x=0.0, y=0.0, z=0.0, w=1.0)
        self.add(
            "/imu", "sensor_msgs/msg/Imu", log_ns or at_ns,
            header=self.header(at_ns), orientation=upright, orientation_covariance=no,
            angular_velocity=vector(rotation), angular_velocity_covariance=no,
            linear_acceleration=vector(acceleration), linear_acceleration_covariance=no,
        )  # fmt: skip

    def image(self, topic: str, at_ns: int, pixels: Any, encoding: str) -> None:
        height, width = pixels.shape[:2]
        data = np.ascontiguousarray(pixels).reshape(-1)
        self.add(
            topic, "sensor_msgs/msg/Image", at_ns, header=self.header(at_ns), height=height, width=width,
            encoding=encoding, is_bigendian=0, step=data.size // height, data=data,
        )  # fmt: skip

    def jpeg(self, topic: str, at_ns: int, data: bytes, form: str = "jpeg") -> None:
        found = np.frombuffer(data, np.uint8)
        self.add(
            topic, "sensor_msgs/msg/CompressedImage", at_ns, header=self.header(at_ns), format=form, data=found
        )  # fmt: skip

    def audio(self, topic: str, at_ns: int, sound: Any) -> None:
        data = np.frombuffer(np.asarray(sound, "<i2").tobytes(), np.uint8)
        inner = self.of("audio_common_msgs/msg/AudioData", data=data)
        self.add(
            topic, "audio_common_msgs/msg/AudioDataStamped", at_ns, header=self.header(at_ns), audio=inner
        )  # fmt: skip

    def close(self) -> Path:
        self._writer.close()
        return self.path


def write_walk(path: Path) -> Path:
    """Three seconds of an Imu at 50 Hz, two steps a second."""
    bag = BagWriter(path)
    for k in range(150):
        step = float(np.sin(2 * np.pi * 2 * k / 50))
        bag.imu(ZERO_NS + k * 20_000_000, (9.8 + 3 * step, step, 0.0), (0.0, 0.2 * step, 0.0))
    return bag.close()
