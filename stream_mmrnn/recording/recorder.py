"""Recorder: writes the bus as one MCAP file per session, chunk by chunk."""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec
from mcap.data_stream import RecordBuilder
from mcap.records import ChunkIndex, MetadataIndex
from mcap.writer import CompressionType, IndexType, Writer

from stream_mmrnn.core import streams, topics
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import FileError, WireError
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.recording.append_file import Disk, Tail
from stream_mmrnn.recording.mcap_format import (
    FORMAT,
    LIBRARY,
    METADATA,
    METADATA_END,
    METADATA_SO_FAR,
    METADATA_WALL,
    UNWRITABLE,
    checked,
    encoded,
    scheme,
)

_HEAD_PERIOD_NS = 10_000_000_000


_INDEXES_AT_ONCE = 256


_MAX_CHANNELS = 1024
"""A channel is a topic and an origin. Normal sessions have about twenty."""


class _Indexes:
    """The writer's index list, kept in a temporary file: in memory, an hour's chunk index takes 20 MB.

    The writer appends to it and iterates over it once. Entries that cannot be written to disk stay in memory.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        weakref.finalize(self, file.close)
        self._waiting: list[bytes] = []
        self._kept = 0
        """Bytes written to the file; always complete records."""

    def append(self, index: ChunkIndex | MetadataIndex) -> None:
        builder = RecordBuilder()
        index.write(builder)
        self._waiting.append(builder.end())  # type: ignore[no-untyped-call]
        if len(self._waiting) >= _INDEXES_AT_ONCE:
            piece = b"".join(self._waiting)
            with contextlib.suppress(OSError):
                self._file.seek(self._kept)
                self._file.write(piece)
                self._file.flush()
                self._kept += len(piece)
                self._waiting = []

    def __iter__(self) -> Iterator[_Written]:
        """The entries in order, several per item; closes the file."""
        self._file.seek(0)
        for at in range(0, self._kept, 1 << 20):
            yield _Written(self._file.read(min(1 << 20, self._kept - at)))
        yield _Written(b"".join(self._waiting))
        self._file.close()

    def __del__(self) -> None:
        self._file.close()


class _Written(NamedTuple):
    """Records that are encoded already."""

    data: bytes

    def write(self, builder: RecordBuilder) -> None:
        builder.write(self.data)


class Recorder:
    """Writes the envelopes of one session, and closes chunks often, so that a crash loses little.

    Data that the disk refuses stays in memory until it accepts it (`trouble` says why); the caller must bound how much
    it writes meanwhile. Only `sync` may be called from another thread.
    """

    def __init__(
        self,
        path: Path,
        session: str,
        metadata: Mapping[str, str],
        chunk_ms: float = 250.0,
        wall_offset_ns: int | None = None,
        open_disk: Callable[[Path], Disk] = Disk,
        table: Mapping[str, streams.Stream] | None = None,
    ) -> None:
        """`metadata`: additional metadata for the file's head. `table`: the session's streams by name; without it, the
        usual ones.

        `wall_offset_ns`: offset of the previous part, because all parts of a recording share it; None measures it.

        Raises:
            FileError: the file cannot be created, or exists already.

        """
        from stream_mmrnn.core import clock

        self.path, self.session = path, session
        table = streams.usual() if table is None else table
        self._kinds = {topics.raw(row.name): row.kind for row in table.values()}
        self._chunk_ns = int(chunk_ms * 1e6)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._disk = open_disk(path)
        except OSError as e:
            raise FileError(f"the recording {path} cannot be made: {e.strerror}; choose another path") from e
        self._tail = Tail(self._disk)
        self._writer: Any = Writer(
            self._tail,  # type: ignore[arg-type]
            chunk_size=1 << 20,
            compression=CompressionType.ZSTD,
            index_types=IndexType.ALL,
        )
        with contextlib.suppress(OSError):
            for kind in ("chunk_indices", "metadata_indexes"):
                file = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  # unlinked: it disappears with the process
                setattr(self._writer, f"_Writer__{kind}", _Indexes(file))
        self._writer.start(profile="", library=LIBRARY)
        self._offset_ns = clock.wall_offset_ns() if wall_offset_ns is None else wall_offset_ns
        self._schemas: dict[str, int] = {}
        self._channels: dict[tuple[str, str], int] = {}
        self._last_log_ns = 0
        self.messages = 0
        self.unwritable = 0
        """Messages that could not be encoded."""
        self.counts: dict[str, int] = {}
        """Written messages by topic; `refused` counts the unwritable ones."""
        self.refused: dict[str, int] = {}
        self._head = {
            "format": FORMAT,
            "session": session,
            "wall_offset_ns": str(self._offset_ns),
            "started_ns": str(now_ns()),
            **metadata,
        }
        self._head_again = (0, 0)
        """When the head was last repeated, and the number of channels then."""
        self._writer.add_metadata(METADATA, checked(self._head))
        self._chunked_ns = now_ns()
        self._tail.drain()

    @property
    def trouble(self) -> str:
        """The last write error, while writing fails; else ""."""
        return self._tail.trouble

    def _channel(self, envelope: Envelope) -> int:
        key = (envelope.topic, envelope.origin)
        if key not in self._channels:
            if not topics.is_recorded(envelope.topic):
                raise WireError(f"{envelope.topic} is not recorded")
            if len(self._channels) >= _MAX_CHANNELS:
                raise WireError(f"a file has at most {_MAX_CHANNELS} channels")
            encoding, schema = scheme(envelope.topic, self._kinds.get(envelope.topic))
            if schema[0] not in self._schemas:
                self._schemas[schema[0]] = self._writer.register_schema(*schema)
            about = {"origin": envelope.origin, "modality": topics.stream_of(envelope.topic)}
            self._channels[key] = self._writer.register_channel(
                envelope.topic, encoding, self._schemas[schema[0]], about
            )
        return self._channels[key]

    def write(self, envelope: Envelope) -> None:
        """Append one message, in call order; a message that cannot be encoded is counted in `unwritable`."""
        publish_ns = envelope.publish_ns + self._offset_ns
        try:
            if not 0 <= publish_ns < 2**63:
                raise WireError(f"publish_ns {envelope.publish_ns} is no time that a file can hold")
            data = encoded(envelope, self._offset_ns, self._kinds.get(envelope.topic))
            channel = self._channel(envelope)
        except UNWRITABLE:
            self.unwritable += 1
            self.refused[envelope.topic] = self.refused.get(envelope.topic, 0) + 1
            return
        received_ns = envelope.received_ns or now_ns()
        self._last_log_ns = max(self._last_log_ns, received_ns + self._offset_ns)
        self._writer.add_message(channel, self._last_log_ns, data, publish_ns, envelope.seq)
        self.messages += 1
        self.counts[envelope.topic] = self.counts.get(envelope.topic, 0) + 1

    def note_wall_step(self, at_ns: int, step_ns: int) -> None:
        """Record that the wall clock was set: times in the file keep the offset from the beginning."""
        self._writer.add_metadata(METADATA_WALL, checked({"at_ns": str(at_ns), "step_ns": str(step_ns)}))

    def flush_due(self, at_ns: int) -> bool:
        """Close the chunk if it is due, and write buffered data; call it often. True if a chunk was closed: all
        messages so far are then in the file or in the buffer.
        """
        closed = at_ns - self._chunked_ns >= self._chunk_ns
        if closed:
            self._chunked_ns = at_ns
            self._writer.flush()
        self._tail.drain()
        return closed

    @property
    def news(self) -> bool:
        """Whether there are channels that are not in the periodic metadata yet."""
        return len(self._channels) != self._head_again[1]

    def note(self, so_far: Mapping[str, str], at_ns: int) -> None:
        """Write the periodic metadata. Call it right after `flush_due` has closed a chunk."""
        channels = {str(number): key for key, number in self._channels.items()}
        so_far = {**so_far, "channels": msgspec.json.encode(channels).decode()}
        if at_ns - self._head_again[0] >= _HEAD_PERIOD_NS or self.news:
            self._head_again = (at_ns, len(self._channels))
            so_far["head"] = msgspec.json.encode(self._head).decode()
        self._writer.add_metadata(METADATA_SO_FAR, checked({"at_ns": str(at_ns), **so_far}))
        self._tail.drain()

    def sync(self) -> None:
        """Fsync the file; raises OSError if the disk reports lost data."""
        self._disk.sync()

    def close(self, end: Mapping[str, str]) -> bool:
        """Finish the file with the metadata `end`. False if the disk refused the rest: the file is readable, but has
        no end.
        """
        self._writer.flush()
        counts = {"messages": str(self.messages), "unwritable": str(self.unwritable)}
        self._writer.add_metadata(METADATA_END, checked({**counts, **end}))
        self._writer.finish()
        taken = self._tail.drain()
        with contextlib.suppress(OSError):
            self._disk.sync()
        self._disk.close()
        return taken

    def abandon(self) -> None:
        """Close the file without an end."""
        self._disk.close()

    @property
    def bytes(self) -> int:
        """Size of the file, including buffered data."""
        return self._tail.size
