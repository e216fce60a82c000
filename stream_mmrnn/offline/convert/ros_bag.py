"""Reads ROS 2 bags (rosbag2 with MCAP storage) without ROS: the messages of a bag, decoded by their own definitions.

The only module that reads MCAP files of others; mcap-ros2-support does it (extra `ros`). Knows nothing about sessions.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import msgspec

from stream_mmrnn.core.errors import FileError
from stream_mmrnn.core.extras import need

_MAGIC = b"\x89MCAP0\r\n"
_STAMP_NS = 10_000_000_000
"""A stamp in a header that is further from the time of the recording is of another clock, or was never set."""


class Message(msgspec.Struct, gc=False):
    """One message of a bag. All times are nanoseconds since 1970."""

    topic: str
    kind: str
    """`sensor_msgs/Imu`."""
    log_ns: int
    """When the recorder received it."""
    stamp_ns: int
    """The stamp in its header, if it has one that fits; else `log_ns`."""
    restamped: bool
    """Whether its header's stamp does not fit."""
    data: Any
    """The decoded message: its fields are attributes."""


class Topic(msgspec.Struct):
    """A topic of a bag."""

    name: str
    kind: str
    count: int = 0
    first: Any = None
    """Its first message."""
    begin_ns: int = 0
    end_ns: int = 0
    restamped: int = 0
    decoded: bool = False
    """Whether one of its messages was decoded: then a later one that cannot be is a fault of that one alone."""
    unreadable: str = ""
    """Why its messages cannot be decoded."""


class Bag:
    """A bag: a folder as `ros2 bag record` makes it, or one of its files."""

    def __init__(self, path: Path) -> None:
        """Raises FileError where there is none, and UsageError where the extra `ros` is missing."""
        need("a ROS 2 bag", "ros", "mcap_ros2")
        self.path = path
        self.damage = ""
        """What is wrong with the file that was read last; what came before was read."""
        self.topics: dict[str, Topic] = {}
        """After the first pass (`inspect`)."""
        self._files = _files(path)

    def inspect(self) -> dict[str, Topic]:
        """Read the bag once: its topics by name, each with its first message."""
        self.topics = {}
        for message in self.messages():
            topic = self.topics[message.topic]
            if not topic.count:
                topic.first, topic.begin_ns, topic.end_ns = message.data, message.log_ns, message.log_ns
            topic.count += 1
            topic.restamped += message.restamped
            topic.begin_ns = min(topic.begin_ns, message.stamp_ns)
            topic.end_ns = max(topic.end_ns, message.log_ns)
        return self.topics

    def messages(self, only: Collection[str] | None = None) -> Iterator[Message]:
        """The messages of these topics in the order in which they were recorded, as far as they can be read.

        Raises:
            FileError: a file is no MCAP file.

        """
        for file in self._files:
            yield from self._messages(file, only)

    def _messages(self, path: Path, only: Collection[str] | None) -> Iterator[Message]:
        from mcap_ros2.decoder import DecoderFactory

        decoders = DecoderFactory()
        try:
            for schema, channel, raw in _records(path, only):
                topic = self.topics.setdefault(channel.topic, Topic(channel.topic, _kind(schema)))
                if topic.unreadable:
                    continue
                try:
                    decode = decoders.decoder_for(channel.message_encoding, schema)
                    if decode is None:
                        raise ValueError(f"it is {channel.message_encoding or 'of no encoding'}, not CDR of ROS 2")
                    data = decode(raw.data)
                except Exception as e:  # definitions and bytes are of others: the decoder raises whatever it meets
                    if topic.decoded:
                        self.damage = f"a message of {channel.topic} cannot be decoded ({_said(e)})"
                    else:
                        topic.unreadable = _said(e)
                    continue
                topic.decoded = True
                stamp_ns = _stamp_of(data)
                fits = stamp_ns is not None and abs(stamp_ns - raw.log_time) <= _STAMP_NS
                # nothing is recorded before it happens
                at_ns = min(stamp_ns, raw.log_time) if fits and stamp_ns is not None else raw.log_time
                yield Message(channel.topic, topic.kind, raw.log_time, at_ns, stamp_ns is not None and not fits, data)
        except OSError as e:
            raise FileError(f"{path} cannot be read: {e.strerror}") from e
        except FileError:
            raise
        except Exception as e:  # lengths and chunks are of others: libraries raise whatever they meet
            self.damage = f"{path.name} is damaged: {_said(e)}"


def _records(path: Path, only: Collection[str] | None) -> Iterator[Any]:
    """Schema, channel and message; of a file that was cut off, those before the cut, in the order of the file."""
    from mcap.reader import NonSeekingReader, SeekingReader

    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise FileError(f"{path} is no MCAP file; import takes bags of ROS 2 with MCAP storage")
        file.seek(0)
        try:
            seeking = SeekingReader(file)
            whole = seeking.get_summary() is not None
        except Exception:  # without its end, a file has no summary
            whole = False
        file.seek(0)
        reader = seeking if whole else NonSeekingReader(file)
        yield from reader.iter_messages(None if only is None else list(only), log_time_order=whole)


def _files(path: Path) -> list[Path]:
    """The files of a bag, in the order in which they were recorded."""
    if not path.exists():
        raise FileError(f"there is no {path}")
    if path.is_dir():
        files = sorted(path.glob("*.mcap"), key=lambda p: [int(n) for n in re.findall(r"\d+", p.stem)] or [0])
        if not files:
            other = next(iter(sorted(p.name for p in path.iterdir() if p.suffix in (".db3", ".zstd"))), "")
            has = f"it has {other}" if other else "it is empty or something else"
            raise FileError(
                f"{path} is no ROS 2 bag with MCAP storage ({has}); ros2 bag convert makes one of any other bag"
            )
        return files
    return [path]


def _kind(schema: Any) -> str:
    """`sensor_msgs/msg/Imu` and `sensor_msgs/Imu` are the same."""
    return "" if schema is None else str(schema.name).replace("/msg/", "/")


def _stamp_of(data: Any) -> int | None:
    stamp = getattr(getattr(data, "header", None), "stamp", None)
    sec, nanosec = getattr(stamp, "sec", None), getattr(stamp, "nanosec", None)
    return None if sec is None or nanosec is None else int(sec) * 1_000_000_000 + int(nanosec)


def _said(e: BaseException) -> str:
    return (str(e) or type(e).__name__).splitlines()[0][:200]
