"""DamagedFileReader: what is known of a recording that was cut off or damaged, from the pieces that are intact.

Channels are defined in the chunk that first used them, in the metadata that is written every few seconds, and in the
index at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
from mcap.records import Channel, Schema

from stream_mmrnn.core.errors import FileError
from stream_mmrnn.recording.mcap_format import FORMAT, METADATA, METADATA_END, METADATA_SO_FAR, number
from stream_mmrnn.recording.pieces import (
    BEGINNING,
    Chunk,
    Finish,
    Foreign,
    Hole,
    Index,
    MetadataRecord,
    index_of,
    pieces,
)

_HEAD_KEYS = {"session", "wall_offset_ns", "started_ns"}


class DamagedFileReader:
    """One file: its metadata, its channels, and its damage.

    The fields are complete after the first `walk`. What damage destroyed (head, channels) may be repeated later in the
    file, so a second walk of a damaged file names more messages.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = path.stat().st_size if path.is_file() else 0
        self.head: dict[str, str] = {}
        self.head_damaged = False
        self.end: dict[str, str] = {}
        self.so_far: dict[str, str] = {}
        self.holes: list[Hole] = []
        self.index_faults = 0
        """Indexes that do not match their chunk: other readers would miss messages; ours does not use indexes."""
        self.finished = False
        self.channels: dict[int, Channel] = {}
        self.schemas: dict[int, Schema] = {}
        self.names: dict[int, tuple[str, str]] = {}
        """(topic, origin) of channels, also of those whose definitions are lost, from the periodic metadata."""
        self.chunks = 0

    def walk(self) -> Iterator[Chunk | MetadataRecord | Foreign | Hole]:
        """Read the file once: the chunks, and what is between them but indexes.

        Raises:
            FileError: missing, unreadable, or not a recording of this program.

        """
        self.holes, self.index_faults, self.finished = [], 0, False
        copies: dict[str, str] = {}
        offsets: list[int] = []
        expected: list[bytes] = []
        found: list[bytes] = []
        count = 0
        for piece in pieces(self.path):
            if isinstance(piece, Index):
                found.append(piece.content)
                continue
            if isinstance(piece, Foreign):
                count += piece.messages
                yield piece
                continue
            # at a cut, missing indexes are not an error
            self.index_faults += expected != found and not isinstance(piece, Hole)
            expected, found = [], []
            if isinstance(piece, Chunk):
                self._define(piece.definitions)
                offsets.append(piece.at)
                expected = index_of(piece.messages)
                count += len(piece.messages)
            elif isinstance(piece, MetadataRecord):
                self._note(piece, copies)
            elif isinstance(piece, Hole):
                self.holes.append(piece)
            else:
                self.finished = True
                self.index_faults += piece.messages not in (None, count) or piece.chunks not in (None, offsets)
                self._define(piece.definitions)
            if not isinstance(piece, Finish):
                yield piece
        self.chunks = len(offsets)
        self._finish(copies)

    def _finish(self, copies: dict[str, str]) -> None:
        if self.so_far:  # written by a release with metadata checksums: metadata without one is damaged
            self.head = self.head if "checksum" in self.head else {}
            self.end = self.end if "checksum" in self.end else {}
        if not self.head.keys() >= _HEAD_KEYS:
            self.head = {}
        self.head_damaged = not self.head
        self.head = self.head or copies
        channels = any("origin" in channel.metadata for channel in self.channels.values())
        if not (self.head or self.end or self.so_far or channels or self._begins_like_ours()):
            raise FileError(f"{self.path} is no recording of this program; a file of another one is for other tools")

    def _begins_like_ours(self) -> bool:
        with self.path.open("rb") as file:
            begins = file.read(len(BEGINNING))
        return bool(begins) and BEGINNING.startswith(begins)

    def _define(self, definitions: list[Schema | Channel]) -> None:
        for record in definitions:
            if isinstance(record, Schema):
                self.schemas[record.id] = record
            else:
                self.channels[record.id] = record
                self.names[record.id] = (record.topic, record.metadata.get("origin", ""))

    def _note(self, note: MetadataRecord, copies: dict[str, str]) -> None:
        if note.name == METADATA and note.metadata.get("format") == FORMAT:
            self.head = self.head or note.metadata
        elif note.name == METADATA_END:
            self.end = note.metadata
        elif note.name == METADATA_SO_FAR and "checksum" in note.metadata:
            self.so_far = note.metadata
            try:
                copies.update(msgspec.json.decode(note.metadata.get("head", "{}"), type=dict[str, str]))
                names = msgspec.json.decode(note.metadata.get("channels", "{}"), type=dict[int, tuple[str, str]])
            except msgspec.MsgspecError:
                return
            self.names = names | self.names

    @property
    def began_ns(self) -> int:
        """Unix time at which the recording began."""
        return number(self.head, "started_ns") + number(self.head, "wall_offset_ns")

    @property
    def tail(self) -> Hole | None:
        """The hole at the end of the file; None if it has an intact index."""
        return self.holes[-1] if self.holes and self.holes[-1].end == self.bytes else None

    @property
    def cut(self) -> bool:
        """Whether the file has no end: the recorder did not finish it, or it was truncated."""
        return not (self.finished and self.end)

    @property
    def damaged(self) -> bool:
        """Whether the file has damage other than a missing end."""
        inside = [h for h in self.holes if h is not self.tail]
        return bool(inside or self.index_faults or (self.head_damaged and self.chunks))
