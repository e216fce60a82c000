"""Recording: an MCAP file read back as the sequence of envelopes that was on the bus.

Times in the file are Unix times: the bus's monotonic ones plus `wall_offset_ns` from the metadata, so viewers show
dates, and reading gives back the exact stamps. Damaged files are read by `damaged_file`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from mcap.opcode import Opcode
from mcap.records import Metadata

from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.errors import FileError, RecordingError
from stream_mmrnn.core.message_columns import MessageColumns
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.recording import label_file
from stream_mmrnn.recording.column_reader import ColumnReader, Records
from stream_mmrnn.recording.mcap_format import (
    FORMAT,
    MAGIC,
    MAX_RECORD_BYTES,
    METADATA,
    METADATA_END,
    METADATA_SO_FAR,
    METADATA_WALL,
    RECORD,
    UNREADABLE,
    is_sound,
    number,
    stream_of,
    unpack_chunk,
)

_BATCH = 64
_OURS = (Opcode.CHUNK, Opcode.METADATA)


def _stamp(text: str) -> int:
    """A time in the metadata; raises ValueError if it is out of range."""
    value = int(text)
    if abs(value) >= 2**62:
        raise ValueError(f"{text[:32]!r} is no time")
    return value


def _sound(record: Metadata) -> Metadata:
    """The record; raises RecordingError if it is damaged."""
    if not is_sound(record.metadata):
        raise RecordingError("the checksum of its metadata is wrong")
    return record


class _Filled(NamedTuple):
    """A part of a file, up to its first damaged record."""

    records: Records
    notes: list[Metadata]
    fault: Exception | None
    ended: bool


def _fill(found: Iterator[tuple[int, bytes]], records: Records) -> _Filled:
    """Unpack records until there are enough to be decoded; what `records` held is overwritten."""
    notes: list[Metadata] = []
    records.ends = []
    try:
        for opcode, content in found:
            if opcode == Opcode.CHUNK:
                records.add(unpack_chunk(content))
            else:
                notes.append(_sound(Metadata.read(stream_of(content))))
            if records.full:
                return _Filled(records, notes, None, False)
    except UNREADABLE as e:
        return _Filled(records, notes, e, True)
    return _Filled(records, notes, None, True)


class Recording:
    """A recording as an iterable of the envelopes that were on the bus, in their order, and of the labels beside it."""

    def __init__(self, path: Path, labels_beside: bool = True) -> None:
        """Open and read the head. `labels_beside`: whether labels that were given afterwards are among the messages.

        Raises:
            FileError: missing, unreadable, not an MCAP file, or not made by this program.

        """
        self.path, self._labels_beside = path, labels_beside
        self.metadata: dict[str, str] = {}
        self.end: dict[str, str] = {}
        """Metadata at the end; empty if the file was cut off or is not read to its end yet."""
        self.wall_steps: list[tuple[int, int]] = []
        """(time, step in ns) of each time the wall clock was set, as far as the file was read. Times in the file are
        not affected."""
        self.so_far: dict[str, str] = {}
        """The last periodic metadata, as far as the file was read."""
        self.damage = ""
        """One sentence once reading met damage or a cut; "" for a whole file."""
        try:
            self.metadata = self._head()
            self.session = self.metadata["session"]
            if not re.match(topics.SESSION_NAME, self.session):
                raise ValueError("its session has no name that a session may have")
            self._offset_ns = _stamp(self.metadata["wall_offset_ns"])
            self.started_unix_ns = _stamp(self.metadata["started_ns"]) + self._offset_ns
        except UNREADABLE as e:
            raise FileError(f"{path} has a damaged head ({type(e).__name__}); nothing can be read from it") from e

    def _head(self) -> dict[str, str]:
        """The metadata at the beginning of the file."""
        for opcode, data in self._records():
            if opcode == Opcode.CHUNK:
                break
            record = Metadata.read(stream_of(data))
            if record.name == METADATA and record.metadata.get("format") == FORMAT:
                if not is_sound(record.metadata):
                    raise RecordingError("its checksum is wrong")
                self.damage = ""
                return dict(record.metadata)
        raise FileError(
            f"{self.path} is no recording of this program in format {FORMAT}"
            + (f": {self.damage}" if self.damage else "; record it again, or use the release that made it")
        )

    def _records(self) -> Iterator[tuple[int, bytes]]:
        """(opcode, content) of the top-level records that hold messages or metadata of this program, in file order.

        If the file was cut off, iteration ends there and `damage` is set. Indexes are skipped: sequential reading does
        not need them, and parsing them would cost more than the messages.
        """
        try:
            file = self.path.open("rb")
        except OSError as e:
            raise FileError(f"the recording {self.path} cannot be read: {e.strerror}") from e
        with file:
            size = os.fstat(file.fileno()).st_size
            if file.read(len(MAGIC)) != MAGIC:
                raise FileError(f"{self.path} is no MCAP file")
            at = len(MAGIC)
            while True:
                head = file.read(RECORD.size)
                if len(head) < RECORD.size:
                    break
                opcode, length = RECORD.unpack(head)
                at += RECORD.size + length
                if at > size or length > MAX_RECORD_BYTES:
                    break
                if opcode in _OURS:
                    yield opcode, file.read(length)
                else:
                    file.seek(at)
                if opcode == Opcode.FOOTER:
                    if file.read(len(MAGIC)) == MAGIC:
                        return
                    break
            self.damage = f"{self.path.name} was cut off or damaged at byte {file.tell()} of {size}"

    def envelopes(self, wanted: Collection[str] | None = None) -> Iterator[Envelope]:
        """Messages of the topics in `wanted` (None: all), in the order of the bus.

        If the file was cut off or damaged, the intact part is returned and `damage` is set.
        """
        return chain.from_iterable(self.batches(wanted))

    def batches(self, wanted: Collection[str] | None = None) -> Iterator[list[Envelope]]:
        """The same in batches, which is faster than one generator step per message."""
        for columns in self.columns(wanted):
            batch = columns.envelopes()
            # small ones: a caller may be asked to stop between two
            yield from (batch[at : at + _BATCH] for at in range(0, len(batch), _BATCH))

    def columns(self, wanted: Collection[str] | None = None) -> Iterator[MessageColumns]:
        """The same as columns: some seconds of a session at once.

        The next part is read and decompressed by a thread meanwhile. Labels that were given afterwards are among them.

        Raises:
            FileError: labels are wanted, and those beside the recording cannot be read.

        """
        has_labels = self._labels_beside and (wanted is None or topics.LABEL in wanted)
        beside = label_file.read(self.path, self.metadata) if has_labels else None
        if beside is None:
            yield from self._columns(wanted)
            return
        merge = label_file.Merge(self.session, beside)
        yield from map(merge.into, self._columns(wanted))
        yield from merge.rest()

    def _columns(self, wanted: Collection[str] | None) -> Iterator[MessageColumns]:
        """The same without labels that were given afterwards."""
        self.wall_steps = []
        reader = ColumnReader(self.session, self._offset_ns, wanted)
        found = self._records()
        ended, spare = False, Records()
        with ThreadPoolExecutor(1, "recording") as thread:
            filling = thread.submit(_fill, found, Records())
            while not ended:
                records, notes, broken, ended = filling.result()
                if not ended:
                    filling = thread.submit(_fill, found, spare)
                columns, fault = reader.decode(records)
                spare = records
                if fault is None:
                    self._note(notes)
                fault = fault or broken
                if fault is not None:
                    ended = True
                    filling.result()  # it may note a cut further on
                    self.damage = f"{self.path.name} has a damaged record ({fault})"
                yield columns

    def _note(self, notes: Iterable[Metadata]) -> None:
        for record in notes:
            if record.name == METADATA_END:
                self.end = record.metadata
            elif record.name == METADATA_SO_FAR:
                self.so_far = record.metadata
            elif record.name == METADATA_WALL:
                self.wall_steps.append((number(record.metadata, "at_ns"), number(record.metadata, "step_ns")))

    def predictions(self) -> Iterator[wire.PredictionMessage]:
        for envelope in self.envelopes({topics.PREDICTION}):
            yield wire.unpack(envelope.payload, wire.PredictionMessage)
