"""Predictions as a ROS 2 bag (rosbag2 with MCAP storage), without ROS.

Each head is a topic `/stream_mmrnn/HEAD` of `std_msgs/Float32MultiArray`, at the end of each tick; its labels stand in
the layout, separated by commas. `/diagnostics` says of each input when it begins and ceases to come. Knows nothing
about recordings.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.extras import need
from stream_mmrnn.core.types import ModelSpec, Prediction

_OK, _STALE = 0, 3
"""Levels of diagnostic_msgs/DiagnosticStatus."""
_SEPARATOR = "=" * 80
_ARRAY = f"""std_msgs/MultiArrayLayout layout
float32[] data
{_SEPARATOR}
MSG: std_msgs/MultiArrayLayout
std_msgs/MultiArrayDimension[] dim
uint32 data_offset
{_SEPARATOR}
MSG: std_msgs/MultiArrayDimension
string label
uint32 size
uint32 stride
"""
_DIAGNOSTICS = f"""std_msgs/Header header
diagnostic_msgs/DiagnosticStatus[] status
{_SEPARATOR}
MSG: std_msgs/Header
builtin_interfaces/Time stamp
string frame_id
{_SEPARATOR}
MSG: builtin_interfaces/Time
int32 sec
uint32 nanosec
{_SEPARATOR}
MSG: diagnostic_msgs/DiagnosticStatus
byte OK=0
byte WARN=1
byte ERROR=2
byte STALE=3
byte level
string name
string message
string hardware_id
diagnostic_msgs/KeyValue[] values
{_SEPARATOR}
MSG: diagnostic_msgs/KeyValue
string key
string value
"""
_KINDS = {"std_msgs/msg/Float32MultiArray": _ARRAY, "diagnostic_msgs/msg/DiagnosticArray": _DIAGNOSTICS}


class PredictionBag:
    """A bag of the predictions of one session, complete when this is closed; after an error nothing is left."""

    def __init__(self, path: Path, spec: ModelSpec, session: str, wall_offset_ns: int) -> None:
        """`path`: the folder to make. `wall_offset_ns`: what makes times since 1970 of event times.

        Raises:
            UsageError: the extra `ros` is missing.
            FileError: `path` is there already, or cannot be made.

        """
        need("a ROS 2 bag", "ros", "mcap_ros2")
        from mcap_ros2.writer import Writer

        if path.exists():
            raise FileError(f"{path} is there already; choose another name for the bag")
        self.path, self._session, self._wall_ns = path, session, wall_offset_ns
        self._heads = {head.name: (_topic(head.name), ",".join(head.labels)) for head in spec.heads}
        if len({topic for topic, _ in self._heads.values()}) < len(self._heads):
            raise UsageError(f"two heads of the model {spec.name} would be one topic of ROS; rename one")
        self._model = {"key": "model", "value": f"{spec.name} {spec.sha256}"}
        self._present: dict[str, bool] = {}
        self._counts: Counter[str] = Counter()
        self._span_ns: tuple[int, int] | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
            self._file: IO[bytes] = self._data.open("wb")
        except OSError as e:
            raise self._unwritable(e) from e
        self._writer = Writer(self._file)
        self._schemas = {kind: self._writer.register_msgdef(kind, text) for kind, text in _KINDS.items()}

    @property
    def _data(self) -> Path:
        return self._folder / f"{self.path.name}_0.mcap"

    def add(self, prediction: Prediction) -> None:
        """Raises FileError where it cannot be written."""
        tick = prediction.tick
        at_ns = tick.event_ns + self._wall_ns
        changed = [name for name, there in tick.present.items() if self._present.get(name) is not there]
        self._present = dict(tick.present)
        try:
            if changed:
                status = [self._status(name, there, tick.age_ns[name]) for name, there in tick.present.items()]
                stamp = {"sec": at_ns // 10**9, "nanosec": at_ns % 10**9}
                array = {"header": {"stamp": stamp, "frame_id": ""}, "status": status}
                self._write("/diagnostics", "diagnostic_msgs/msg/DiagnosticArray", at_ns, tick.index, array)
            for name, values in prediction.heads.items():
                topic, label = self._heads[name]
                size = len(values)
                layout = {"dim": [{"label": label, "size": size, "stride": size}], "data_offset": 0}
                array = {"layout": layout, "data": values.tolist()}
                self._write(topic, "std_msgs/msg/Float32MultiArray", at_ns, tick.index, array)
        except OSError as e:
            raise self._unwritable(e) from e
        self._span_ns = (self._span_ns or (at_ns, at_ns))[0], at_ns

    def _status(self, name: str, there: bool, age_ns: int) -> dict[str, Any]:
        said = "comes" if there else "no sample yet" if age_ns < 0 else f"no sample for {age_ns / 1e9:.2f} s"
        return {
            "level": _OK if there else _STALE,
            "name": f"stream_mmrnn: {name}",
            "message": said,
            "hardware_id": self._session,
            "values": [self._model],
        }

    def _write(self, topic: str, kind: str, at_ns: int, tick: int, message: dict[str, Any]) -> None:
        self._writer.write_message(topic, self._schemas[kind], message, at_ns, at_ns, tick & 0xFFFFFFFF)
        self._counts[topic] += 1

    def close(self) -> None:
        """Complete the bag. Raises FileError where it cannot be written."""
        try:
            self._writer.finish()
            self._file.close()
            (self._folder / "metadata.yaml").write_text(self._metadata(), encoding="utf-8")
            self._folder.chmod(0o755)
            self._folder.replace(self.path)
        except OSError as e:
            self.abandon()
            raise self._unwritable(e) from e

    def abandon(self) -> None:
        """Leave nothing."""
        self._file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _unwritable(self, e: OSError) -> FileError:
        return FileError(f"{self.path} cannot be written: {e.strerror}; make room, or choose another place")

    def _metadata(self) -> str:
        """What `ros2 bag` reads first. JSON is YAML."""
        begin_ns, end_ns = self._span_ns or (0, 0)
        start, duration = {"nanoseconds_since_epoch": begin_ns}, {"nanoseconds": end_ns - begin_ns}
        counted = {"starting_time": start, "duration": duration, "message_count": self._counts.total()}
        topics = [
            {
                "topic_metadata": {
                    "name": topic,
                    "type": next(kind for kind in _KINDS if ("Diagnostic" in kind) is (topic == "/diagnostics")),
                    "serialization_format": "cdr",
                    "offered_qos_profiles": "",
                },
                "message_count": count,
            }
            for topic, count in self._counts.items()
        ]
        about = {
            "version": 5,
            "storage_identifier": "mcap",
            **counted,
            "topics_with_message_count": topics,
            "compression_format": "",
            "compression_mode": "",
            "relative_file_paths": [self._data.name],
            "files": [{"path": self._data.name, **counted}],
        }
        return json.dumps({"rosbag2_bagfile_information": about}, indent=2) + "\n"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()


def _topic(head: str) -> str:
    """A head's topic: names of ROS have letters, digits and `_`, and do not begin with a digit."""
    name = re.sub(r"[^A-Za-z0-9_]", "_", head)
    return f"/stream_mmrnn/{'_' if name[:1].isdigit() else ''}{name}"
