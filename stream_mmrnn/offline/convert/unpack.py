"""Unpack a recording into plain files: Parquet and CSV tables, WAV and MP4.

Time in every file starts at the same moment (`zero_ns`), so that sound, pictures and tables are aligned; tables also
have the nanoseconds. Files are written to a temporary folder and moved into place when all of them are complete.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.dedup import TickDeduplicator
from stream_mmrnn.core.errors import FileError, UsageError, WireError
from stream_mmrnn.core.extras import need
from stream_mmrnn.core.prediction_decoder import PredictionDecoder
from stream_mmrnn.core.streams import Stream, text_topics
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.core.wire import encodable
from stream_mmrnn.offline.convert.writers import Codec, Csv, Mp4, Parquet, Row, Wav, Writer
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.settings import streams_of
from stream_mmrnn.viewers.columns import Column, columns_of

FORMATS = ("parquet", "wav", "mp4", "csv")
_RATE_HZ = topics.AUDIO_RATE_HZ
_MANIFEST = "manifest.json"


class Contents(msgspec.Struct):
    """The contents of a recording, from one pass over it."""

    counts: dict[str, int]
    zero_ns: int
    """The earliest time that any message covers; labels, which may be given afterwards, do not count."""
    end_ns: int
    columns: list[Column]
    damage: str
    streams: dict[str, Stream]
    modalities: list[str]
    """Those that a tick may have had."""


def inspect(path: Path, labels_beside: bool = True) -> Contents:
    """Read a recording once, with or without the labels beside it; raises FileError if it is none."""
    recording = Recording(path, labels_beside)
    table = streams_of(recording.metadata)
    counts: dict[str, int] = {}
    zero_ns = end_ns = None
    first: wire.PredictionMessage | None = None
    for e in recording.envelopes():
        counts[e.topic] = counts.get(e.topic, 0) + 1
        if e.topic in (topics.CLOCK, topics.LABEL):
            continue
        begin_ns = e.event_ns
        kind = table[topics.stream_of(e.topic)].kind if topics.stream_of(e.topic) in table else None
        if kind == "audio" and e.topic.startswith(topics.RAW):
            begin_ns -= round(len(e.payload) * 1e9 / _RATE_HZ)
        zero_ns = begin_ns if zero_ns is None else min(zero_ns, begin_ns)
        end_ns = e.event_ns if end_ns is None else max(end_ns, e.event_ns)
        if first is None and e.topic == topics.PREDICTION:
            with contextlib.suppress(WireError):
                first = wire.unpack(e.payload, wire.PredictionMessage)
    names = [row.modality_of(name) for row in table.values() for name in row.features()]
    names += [name for name in (first.present if first else ()) if name not in names]
    columns = columns_of(recording, first)
    return Contents(counts, zero_ns or 0, end_ns or 0, columns, recording.damage, table, names)


class _Rows:
    """Makes the tables' rows from messages."""

    def __init__(self, zero_ns: int, wall_offset_ns: int, columns: Sequence[Column], modalities: Sequence[str]) -> None:
        self._zero_ns, self._wall_ns, self._columns = zero_ns, wall_offset_ns, columns
        self._modalities = modalities
        self._decoder = PredictionDecoder()  # shared by all tables of predictions
        self._deduplicator = TickDeduplicator()
        self._malformed_ticks = 0

    @property
    def malformed(self) -> int:
        """Messages that could not be read."""
        return self._decoder.unreadable + self._malformed_ticks

    def _when(self, event_ns: int) -> list[Any]:
        return [event_ns, event_ns + self._wall_ns, (event_ns - self._zero_ns) / 1e9]

    def features(self, e: Envelope) -> Row | None:
        return [*self._when(e.event_ns), e.seq, e.capture_ns, e.publish_ns, e.device_ns, e.origin, e.payload]

    def words(self, e: Envelope) -> Row | None:
        modality = topics.stream_of(e.topic)
        text = bytes(e.payload).decode("utf-8", "replace")
        return [*self._when(e.event_ns), modality, text]

    def labels(self, e: Envelope) -> Row | None:
        return [*self._when(e.event_ns), bytes(e.payload).decode("utf-8", "replace"), topics.tier_of(e.origin)]

    def ticks(self, e: Envelope) -> Row | None:
        tick = self._old_tick(e) if e.topic == topics.TICK else self._prediction(e)
        if tick is None:
            return None
        seen = [v for m in self._modalities for v in (tick.present.get(m), tick.age_ns.get(m))]
        return [tick.tick, *self._when(tick.event_ns), tick.closed.by, *seen]

    def predictions(self, e: Envelope) -> Row | None:
        p = self._prediction(e)
        if p is None:
            return None
        heads = p.heads
        values = [heads[c.head][c.index] if c.index < len(heads.get(c.head, ())) else None for c in self._columns]
        return [p.tick, *self._when(p.event_ns), p.step_start_ns, p.step_end_ns, *values]

    def _prediction(self, e: Envelope) -> wire.PredictionMessage | None:
        try:
            return self._decoder.decode(e)
        except WireError:
            return None

    def _old_tick(self, e: Envelope) -> wire.TickMessage | None:
        """A message of the `tick` channel, which recordings up to 0.1.0 have."""
        try:
            tick = wire.unpack(e.payload, wire.TickMessage)
        except WireError:
            self._malformed_ticks += 1
            return None
        return tick if self._deduplicator.first(e.session, tick.tick) else None


_WHEN = ("event_ns", "unix_ns", "seconds")


class Planned(NamedTuple):
    """A file to write."""

    name: str
    topics: tuple[str, ...]
    make: Callable[[Path], Writer]


def _plan(formats: Sequence[str], seen: Contents, rows: _Rows, codec: Codec) -> Iterator[Planned]:
    """The files for which there are messages."""

    def has(topic: str) -> bool:
        return seen.counts.get(topic, 0) > 0

    names = ["tick", *_WHEN, "step_start_ns", "step_end_ns", *(c.label for c in seen.columns)]
    for name, stream in seen.streams.items():
        raw = topics.raw(name)
        if "wav" in formats and stream.kind == "audio" and has(raw):
            yield Planned(f"{name}.wav", (raw,), partial(Wav, zero_ns=seen.zero_ns))
        if "mp4" in formats and stream.kind == "vision" and has(raw):
            yield Planned(f"{name}.mp4", (raw,), partial(Mp4, zero_ns=seen.zero_ns, codec=codec))
        make = partial(Parquet, schema=_feature_schema(), row=rows.features)
        if "parquet" in formats and stream.kind == "signal" and has(raw):
            yield Planned(f"raw_{name}.parquet", (raw,), make)
        for features in stream.features():
            if "parquet" in formats and has(topics.FEATURE + features):
                yield Planned(f"features_{features}.parquet", (topics.FEATURE + features,), make)
    ticks = topics.TICK if has(topics.TICK) else topics.PREDICTION
    if "parquet" in formats and has(ticks):
        make = partial(Parquet, schema=_tick_schema(seen.modalities), row=rows.ticks)
        yield Planned("ticks.parquet", (ticks,), make)
    if "parquet" in formats and has(topics.PREDICTION):
        make = partial(Parquet, schema=_prediction_schema(seen.columns), row=rows.predictions)
        yield Planned("predictions.parquet", (topics.PREDICTION,), make)
    words = tuple(text_topics(seen.streams.values()))
    if "csv" in formats and any(map(has, words)):
        yield Planned("text.csv", words, partial(Csv, names=[*_WHEN, "modality", "text"], row=rows.words))
    if "csv" in formats and has(topics.LABEL):
        yield Planned("labels.csv", (topics.LABEL,), partial(Csv, names=[*_WHEN, "label", "tier"], row=rows.labels))
    if "csv" in formats and has(topics.PREDICTION):
        yield Planned("predictions.csv", (topics.PREDICTION,), partial(Csv, names=names, row=rows.predictions))


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


def _tick_schema(modalities: Sequence[str]) -> Any:
    import pyarrow as pa

    seen = [f for m in modalities for f in ((f"present.{m}", pa.bool_()), (f"age_ns.{m}", pa.int64()))]
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
    """Write a recording as plain files into `folder`; returns a description of them.

    `progress` is called with the number of messages done and their total. If `alive` becomes false, nothing is written
    and `stopped` is true in the result.

    Raises:
        UsageError: an unknown format, or one whose package is not installed.
        FileError: it is no recording, a file exists already (unless `force`), or a file cannot be written.

    """
    unknown = [f for f in formats if f not in FORMATS]
    if unknown or not formats:
        raise UsageError(f"there is no format {unknown[0] if unknown else ''!r}; use some of {','.join(FORMATS)}")
    if "parquet" in formats:
        need("Parquet", "export", "pyarrow")
    seen = inspect(path)
    recording = Recording(path)
    wall_offset_ns = recording.started_unix_ns - int(recording.metadata["started_ns"])
    rows = _Rows(seen.zero_ns, wall_offset_ns, seen.columns, seen.modalities)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".unpack-", dir=folder))
    except OSError as e:
        raise FileError(f"{folder} cannot be written: {e.strerror}; choose another place") from e
    try:
        planned = list(_plan(formats, seen, rows, codec))
        _refuse([folder / file.name for file in planned] + [folder / _MANIFEST], force)
        about = _write(recording, temporary, planned, seen.counts, progress, alive)
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
        (temporary / _MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(encodable(document))))
        for name in [*about, _MANIFEST]:
            (temporary / name).replace(folder / name)
    except OSError as e:
        raise FileError(f"{folder} cannot be written: {e.strerror or e}; make room, or choose another place") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {**document, "folder": str(folder), "stopped": False}


def _refuse(files: Sequence[Path], force: bool) -> None:
    there = [f.name for f in files if f.exists()]
    if there and not force:
        raise FileError(f"{files[0].parent} has {', '.join(there)} already; choose another folder, or use --force")
    if odd := next((f for f in files if f.exists() and not f.is_file()), None):
        raise FileError(f"{odd} is no regular file, so that nothing can take its place; choose another folder")


def _write(
    recording: Recording,
    folder: Path,
    planned: Sequence[Planned],
    counts: dict[str, int],
    progress: Callable[[int, int], None],
    alive: Callable[[], bool],
) -> dict[str, Any] | None:
    """Write the planned files; a description of each, or None if it was stopped."""
    writers: dict[str, Writer] = {}
    by_topic: dict[str, list[Writer]] = {}
    about: dict[str, Any] = {}
    try:
        for file in planned:
            writers[file.name] = file.make(folder / file.name)
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
        for writer in writers.values():  # after a failure
            with contextlib.suppress(Exception):
                writer.close()
    return about
