"""A recording as plain files: Parquet and CSV tables, WAV and MP4.

Every file counts its time from the same moment (`zero_ns`), so that sound, pictures and tables lie over each other, and
tables carry the nanoseconds themselves. Files are made beside their places and moved there when all of them are whole.
Knows nothing about how a recording is laid out.
"""

from __future__ import annotations

import contextlib
import csv
import io
import shutil
import tempfile
import wave
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import msgspec
import numpy as np

from stream_mmrnn import topics, wire
from stream_mmrnn.errors import FileError, UsageError, WireError
from stream_mmrnn.interchange.heads import Column, columns_of
from stream_mmrnn.recording import Recording
from stream_mmrnn.repeats import Repeats
from stream_mmrnn.types import Envelope

FORMATS = ("parquet", "wav", "mp4", "csv")
Codec = Literal["h264", "mjpeg"]
_RATE_HZ = topics.AUDIO_RATE_HZ
_ROWS_AT_ONCE = 4096
_SILENCE = bytes(2 * _RATE_HZ)
_TIME_BASE = Fraction(1, 90_000)
"""Of the pictures' presentation times: what MP4 commonly counts in."""
_LAST = _TIME_BASE.denominator // 25
_MIN_GAP_S = 0.005
_MAX_GAP_S = 24 * 3600
_MANIFEST = "manifest.json"


class Seen(msgspec.Struct):
    """What is in a recording, as one reading shows."""

    counts: dict[str, int]
    zero_ns: int
    """The beginning: of the session, or of what is earlier."""
    end_ns: int
    columns: list[Column]
    damage: str


def look(path: Path) -> Seen:
    """Read a recording once; raises FileError where it is none."""
    recording = Recording(path)
    counts: dict[str, int] = {}
    zero_ns = end_ns = None
    first: wire.PredictionMessage | None = None
    for e in recording.envelopes():
        counts[e.topic] = counts.get(e.topic, 0) + 1
        if e.topic == topics.CLOCK:
            continue
        begin_ns = e.event_ns
        if e.topic.startswith(topics.RAW) and topics.kind_of(e.topic) == "audio":
            begin_ns -= round(len(e.payload) * 1e9 / _RATE_HZ)
        zero_ns = begin_ns if zero_ns is None else min(zero_ns, begin_ns)
        end_ns = e.event_ns if end_ns is None else max(end_ns, e.event_ns)
        if first is None and e.topic == topics.PREDICTION:
            with contextlib.suppress(WireError):
                first = wire.unpack(e.payload, wire.PredictionMessage)
    return Seen(counts, zero_ns or 0, end_ns or 0, columns_of(recording, first), recording.damage)


class Writer(Protocol):
    """One file, or several of a kind."""

    def add(self, envelope: Envelope) -> None: ...

    def close(self) -> dict[str, Any]:
        """Finish it; what to say of it."""


class Wav:
    """The sound of one stream: what is missing is silence, so that a sample's place is its time."""

    def __init__(self, path: Path, zero_ns: int) -> None:
        self._zero_ns = zero_ns
        self._file = wave.open(str(path), "wb")  # noqa: SIM115
        self._file.setnchannels(1)
        self._file.setsampwidth(2)
        self._file.setframerate(_RATE_HZ)
        self._written = 0
        self._samples = self._cut = 0
        self._gaps: list[dict[str, float]] = []

    def add(self, envelope: Envelope) -> None:
        sound = np.asarray(envelope.payload, "<i2")
        begin = round((envelope.event_ns - self._zero_ns) * _RATE_HZ / 1e9) - len(sound)
        ahead = begin - self._written
        if abs(ahead) < max(len(sound) // 2, round(_MIN_GAP_S * _RATE_HZ)):
            ahead = 0  # stamps jitter, and a device's rate is a little off
        if ahead > _MAX_GAP_S * _RATE_HZ:
            raise FileError(f"{envelope.topic} has a gap of more than a day; its stamps are wrong")
        if ahead > 0:
            self._gaps.append({"at_s": self._written / _RATE_HZ, "seconds": ahead / _RATE_HZ})
            self._silence(ahead)
        elif ahead < 0:
            self._cut += min(-ahead, len(sound))
            sound = sound[-ahead:]
        self._file.writeframesraw(sound.tobytes())
        self._written += len(sound)
        self._samples += len(sound)

    def _silence(self, samples: int) -> None:
        self._written += samples
        while samples > 0:
            piece = _SILENCE[: 2 * samples]
            self._file.writeframesraw(piece)
            samples -= len(piece) // 2

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {"samples": self._samples, "cut": self._cut, "gaps": self._gaps}


class Mp4:
    """The pictures of one stream, each shown at its own time. As H.264, or the very JPEGs that were recorded."""

    def __init__(self, path: Path, zero_ns: int, codec: Codec) -> None:
        import av

        self._zero_ns, self._codec = zero_ns, codec
        # else the first picture's time would be one of whole milliseconds, and all others off by as much
        options = {"movie_timescale": str(_TIME_BASE.denominator)}
        self._file = av.open(str(path), "w", format="mp4", options=options)
        self._stream: Any = None
        self._last = -1
        self._frames = self._undecodable = self._same_time = 0

    def add(self, envelope: Envelope) -> None:
        import av

        at = round((envelope.event_ns - self._zero_ns) / 1e9 / _TIME_BASE)
        if at <= self._last:
            self._same_time += 1  # a file of pictures has one at a time
            return
        jpeg = bytes(envelope.payload)
        try:
            with av.open(io.BytesIO(jpeg), format="mjpeg") as picture:
                frame = next(picture.decode(video=0))
                if self._stream is None:
                    self._begin(picture.streams.video[0], frame)
        except (av.FFmpegError, StopIteration, ValueError, IndexError):
            self._undecodable += 1
            return
        self._last = at
        self._frames += 1
        if self._codec == "mjpeg":
            packet = av.Packet(jpeg)
            packet.pts = packet.dts = at
            packet.time_base = _TIME_BASE
            packet.duration = _LAST  # of the last one: the others last until the next
            packet.stream = self._stream
            packet.is_keyframe = True
            self._file.mux(packet)
            return
        frame = frame.reformat(self._stream.width, self._stream.height, "yuv420p")
        frame.pts, frame.time_base = at, _TIME_BASE
        self._file.mux(self._stream.encode(frame))

    def _begin(self, like: Any, frame: Any) -> None:
        """Pictures of a later size are scaled to that of the first."""
        if self._codec == "mjpeg":
            self._stream = self._file.add_stream_from_template(like)
            self._stream.time_base = _TIME_BASE
            return
        self._stream = self._file.add_stream("libx264", rate=30, options={"crf": "18", "preset": "veryfast"})
        self._stream.time_base = self._stream.codec_context.time_base = _TIME_BASE
        # H.264 wants sides of even length
        self._stream.width, self._stream.height = frame.width // 2 * 2, frame.height // 2 * 2
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.max_b_frames = 0

    def close(self) -> dict[str, Any]:
        if self._stream is not None and self._codec == "h264":
            self._file.mux(self._stream.encode(None))
        self._file.close()
        return {"frames": self._frames, "undecodable": self._undecodable, "same_time": self._same_time}


Row = Sequence[Any]


class Parquet:
    """One table, written some thousand rows at a time."""

    def __init__(self, path: Path, schema: Any, row: Callable[[Envelope], Row | None]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._pa, self._schema, self._row = pa, schema, row
        self._file = pq.ParquetWriter(path, schema, compression="zstd")
        self._rows: list[Row] = []
        self._count = 0

    def add(self, envelope: Envelope) -> None:
        row = self._row(envelope)
        if row is not None:
            self._rows.append(row)
            self._count += 1
            if len(self._rows) >= _ROWS_AT_ONCE:
                self._flush()

    def _flush(self) -> None:
        columns = zip(*self._rows, strict=True)
        arrays = [self._pa.array(c, field.type) for c, field in zip(columns, self._schema, strict=True)]
        self._file.write_batch(self._pa.record_batch(arrays, schema=self._schema))
        self._rows = []

    def close(self) -> dict[str, Any]:
        if self._rows:
            self._flush()
        self._file.close()
        return {"rows": self._count}


class Csv:
    """One table as text."""

    def __init__(self, path: Path, names: Sequence[str], row: Callable[[Envelope], Row | None]) -> None:
        self._file = path.open("x", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file)
        self._writer.writerow(names)
        self._row = row
        self._count = 0

    def add(self, envelope: Envelope) -> None:
        row = self._row(envelope)
        if row is not None:
            self._writer.writerow(row)
            self._count += 1

    def close(self) -> dict[str, Any]:
        self._file.close()
        return {"rows": self._count}


class _Rows:
    """What tables have for rows."""

    def __init__(self, zero_ns: int, wall_offset_ns: int, columns: Sequence[Column]) -> None:
        self._zero_ns, self._wall_ns, self._columns = zero_ns, wall_offset_ns, columns
        self.malformed = 0

    def _when(self, event_ns: int) -> list[Any]:
        return [event_ns, event_ns + self._wall_ns, (event_ns - self._zero_ns) / 1e9]

    def features(self, e: Envelope) -> Row | None:
        return [*self._when(e.event_ns), e.seq, e.capture_ns, e.publish_ns, e.device_ns, e.origin, e.payload]

    def words(self, e: Envelope) -> Row | None:
        modality = topics.TOPICS[e.topic].modality
        text = bytes(e.payload).decode("utf-8", "replace")
        return [*self._when(e.event_ns), *([modality] if modality else []), text]

    def ticks(self) -> Callable[[Envelope], Row | None]:
        repeats, modalities = Repeats(), list(topics.MODALITIES)

        def row(e: Envelope) -> Row | None:
            t = self._unpack(e, wire.TickMessage)
            if t is None or not repeats.first(e.session, t.tick):
                return None
            seen = [v for m in modalities for v in (t.present.get(m), t.age_ns.get(m))]
            return [t.tick, *self._when(t.event_ns), t.closed.by, *seen]

        return row

    def predictions(self) -> Callable[[Envelope], Row | None]:
        repeats = Repeats()  # an engine that went on after a crash says some twice

        def row(e: Envelope) -> Row | None:
            p = self._unpack(e, wire.PredictionMessage)
            if p is None or not repeats.first(e.session, p.tick):
                return None
            heads = p.heads
            values = [heads[c.head][c.index] if c.index < len(heads.get(c.head, ())) else None for c in self._columns]
            return [p.tick, *self._when(p.event_ns), p.step_start_ns, p.step_end_ns, *values]

        return row

    def _unpack(self, e: Envelope, kind: Any) -> Any:
        try:
            return wire.unpack(e.payload, kind)
        except WireError:
            self.malformed += 1
            return None


_WHEN = ("event_ns", "unix_ns", "seconds")


class Planned(NamedTuple):
    """A file to be made."""

    name: str
    topics: tuple[str, ...]
    make: Callable[[Path], Writer]


def _plan(formats: Sequence[str], seen: Seen, rows: _Rows, codec: Codec) -> Iterator[Planned]:
    """Each file that there is something for."""

    def has(topic: str) -> bool:
        return seen.counts.get(topic, 0) > 0

    names = ["tick", *_WHEN, "step_start_ns", "step_end_ns", *(c.label for c in seen.columns)]
    for name, modality in topics.MODALITIES.items():
        raw, feature = topics.raw(name), topics.feature(name)
        if "wav" in formats and modality.kind == "audio" and has(raw):
            yield Planned(f"{name}.wav", (raw,), partial(Wav, zero_ns=seen.zero_ns))
        if "mp4" in formats and modality.kind == "vision" and has(raw):
            yield Planned(f"{name}.mp4", (raw,), partial(Mp4, zero_ns=seen.zero_ns, codec=codec))
        if "parquet" in formats and has(feature):
            make = partial(Parquet, schema=_feature_schema(), row=rows.features)
            yield Planned(f"features_{name}.parquet", (feature,), make)
    if "parquet" in formats and has(topics.TICK):
        yield Planned("ticks.parquet", (topics.TICK,), partial(Parquet, schema=_tick_schema(), row=rows.ticks()))
    if "parquet" in formats and has(topics.PREDICTION):
        make = partial(Parquet, schema=_prediction_schema(seen.columns), row=rows.predictions())
        yield Planned("predictions.parquet", (topics.PREDICTION,), make)
    words = tuple(topics.raw(m.name) for m in topics.MODALITIES.values() if m.kind == "text")
    if "csv" in formats and any(map(has, words)):
        yield Planned("text.csv", words, partial(Csv, names=[*_WHEN, "modality", "text"], row=rows.words))
    if "csv" in formats and has(topics.LABEL):
        yield Planned("labels.csv", (topics.LABEL,), partial(Csv, names=[*_WHEN, "label"], row=rows.words))
    if "csv" in formats and has(topics.PREDICTION):
        yield Planned("predictions.csv", (topics.PREDICTION,), partial(Csv, names=names, row=rows.predictions()))


def _fields(*fields: tuple[str, Any]) -> Any:
    import pyarrow as pa

    return pa.schema(list(fields))


def _when_fields() -> list[tuple[str, Any]]:
    import pyarrow as pa

    return [("event_ns", pa.int64()), ("unix_ns", pa.int64()), ("seconds", pa.float64())]


def _feature_schema() -> Any:
    import pyarrow as pa

    numbers = [(n, pa.int64()) for n in ("seq", "capture_ns", "publish_ns", "device_ns")]
    return _fields(*_when_fields(), *numbers, ("origin", pa.string()), ("values", pa.list_(pa.float32())))


def _tick_schema() -> Any:
    import pyarrow as pa

    seen = [f for m in topics.MODALITIES for f in ((f"present.{m}", pa.bool_()), (f"age_ns.{m}", pa.int64()))]
    return _fields(("tick", pa.int64()), *_when_fields(), ("closed_by", pa.string()), *seen)


def _prediction_schema(columns: Sequence[Column]) -> Any:
    import pyarrow as pa

    numbers = [(n, pa.int64()) for n in ("step_start_ns", "step_end_ns")]
    return _fields(("tick", pa.int64()), *_when_fields(), *numbers, *((c.label, pa.float32()) for c in columns))


def unpack(
    path: Path,
    folder: Path,
    formats: Sequence[str] = FORMATS,
    *,
    codec: Codec = "h264",
    force: bool = False,
    progress: Callable[[int, int], None] = lambda done, of: None,
    alive: Callable[[], bool] = lambda: True,
) -> dict[str, Any]:
    """Write what is in a recording as plain files into `folder`, and say what they are.

    `progress` is told how many messages are done, and of how many. Where `alive` says no, nothing is written, and
    `stopped` is true.

    Raises:
        UsageError: an unknown format, or one whose package is not installed.
        FileError: the recording is none, a file is there already (unless `force`), or the disk does not take it.

    """
    unknown = [f for f in formats if f not in FORMATS]
    if unknown or not formats:
        raise UsageError(f"there is no format {unknown[0] if unknown else ''!r}; use some of {','.join(FORMATS)}")
    if "parquet" in formats:
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as e:
            raise UsageError(
                "Parquet needs the extra `export` (pyarrow missing): pip install 'stream-mmrnn[export]'"
            ) from e
    seen = look(path)
    recording = Recording(path)
    wall_offset_ns = recording.started_unix_ns - int(recording.metadata["started_ns"])
    rows = _Rows(seen.zero_ns, wall_offset_ns, seen.columns)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=".unpack-", dir=folder))
    except OSError as e:
        raise FileError(f"{folder} cannot be written: {e.strerror}; choose another place") from e
    try:
        planned = list(_plan(formats, seen, rows, codec))
        _refuse([folder / file.name for file in planned] + [folder / _MANIFEST], force)
        about = _write(recording, beside, planned, seen.counts, progress, alive)
        document: dict[str, Any] = {
            "recording": str(path),
            "session": recording.session,
            "zero_ns": seen.zero_ns,
            "zero_unix_ns": seen.zero_ns + wall_offset_ns,
            "seconds": round((seen.end_ns - seen.zero_ns) / 1e9, 3),
            "files": about or {},
            "malformed": rows.malformed,
            "damage": recording.damage,
        }
        if about is None:
            return {**document, "folder": str(folder), "stopped": True}
        (beside / _MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(document)))
        for name in [*about, _MANIFEST]:
            (beside / name).replace(folder / name)
    except OSError as e:
        raise FileError(f"{folder} cannot be written: {e.strerror or e}; make room, or choose another place") from e
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return {**document, "folder": str(folder), "stopped": False}


def _refuse(files: Sequence[Path], force: bool) -> None:
    there = [f.name for f in files if f.exists()]
    if there and not force:
        raise FileError(f"{files[0].parent} holds {', '.join(there)} already; choose another folder, or say --force")


def _write(
    recording: Recording,
    beside: Path,
    planned: Sequence[Planned],
    counts: dict[str, int],
    progress: Callable[[int, int], None],
    alive: Callable[[], bool],
) -> dict[str, Any] | None:
    """What is to be said of each file, or None where it was stopped."""
    writers: dict[str, Writer] = {}
    by_topic: dict[str, list[Writer]] = {}
    about: dict[str, Any] = {}
    try:
        for file in planned:
            writers[file.name] = file.make(beside / file.name)
            for topic in file.topics:
                by_topic.setdefault(topic, []).append(writers[file.name])
        done, count = 0, sum(counts.get(topic, 0) for topic in by_topic)
        for batch in recording.batches(set(by_topic)):
            for envelope in batch:
                for writer in by_topic[envelope.topic]:
                    writer.add(envelope)
            done += len(batch)
            progress(done, count)
            if not alive():
                return None
        while writers:
            name = next(iter(writers))
            about[name] = writers.pop(name).close()
    finally:
        for writer in writers.values():  # of a failure: what they say is of no use
            with contextlib.suppress(Exception):
                writer.close()
    return about
