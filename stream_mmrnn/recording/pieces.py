"""The intact pieces of a recording's file in order, and the damage between them; knows nothing about what they mean.

A chunk, metadata record or attachment is intact if its checksum matches. Records that other programs may have added are
skipped as the specification of MCAP says, where an intact record comes after them. After damage the search goes on at
the next intact chunk or metadata record of this program, which its first bytes (signature) tell.
"""

from __future__ import annotations

import contextlib
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec
from mcap.data_stream import RecordBuilder
from mcap.opcode import Opcode
from mcap.records import Attachment, Channel, ChunkIndex, Footer, Header, McapRecord, Metadata, Schema, Statistics

from stream_mmrnn.core.errors import FileError, RecordingError
from stream_mmrnn.recording.mcap_format import (
    LIBRARY,
    MAGIC,
    MAX_RECORD_BYTES,
    METADATA,
    RECORD,
    UNREADABLE,
    is_sound,
    stream_of,
    unpack_chunk,
)

_SIGNATURES = re.compile(rb"\x04\x00\x00\x00zstd.{8}\x28\xb5\x2f\xfd|.\x00\x00\x00" + METADATA.encode(), re.DOTALL)
"""Signatures: bytes near the beginning of a chunk and of a metadata record of this program."""
_BEFORE_CHUNK_SIGNATURE = RECORD.size + 28
_MAX_SIGNATURES = 10_000
"""Limit on signatures tried per file, so that a malicious file cannot take forever."""
_WINDOW_BYTES = 4 * 2**20
_OVERLAP_BYTES = 128
_MESSAGE_HEAD = struct.Struct("<HIQQ")
_FOOTER_BYTES = RECORD.size + 20 + len(MAGIC)
_ATTACHMENT_BYTES = 8 + 8 + 4 + 4 + 8 + 4
"""Of the shortest one: two times, the lengths of name, media type and data, the checksum."""
_MOST_FOREIGN = 10_000
"""Records without a checksum in a row. A limit, so that a malicious file cannot take forever."""


class Message(msgspec.Struct, frozen=True, gc=False):
    """A message record. Times are Unix times."""

    channel_id: int
    seq: int
    log_ns: int
    publish_ns: int
    data: bytes
    at: int
    """Its offset in the chunk."""


class Chunk(NamedTuple):
    at: int
    definitions: list[Schema | Channel]
    messages: list[Message]


class MetadataRecord(NamedTuple):
    """A metadata record of this program, or of another one."""

    at: int
    name: str
    metadata: dict[str, str]


class Index(NamedTuple):
    """The message index of one channel for the chunk before."""

    at: int
    content: bytes


class Foreign(NamedTuple):
    """A record of another program: an attachment, a message outside of chunks, or one of an unknown type."""

    at: int
    opcode: int
    content: bytes

    @property
    def messages(self) -> int:
        """1 for a message, which the statistics at the end count; else 0."""
        return int(self.opcode == Opcode.MESSAGE)


class Hole(NamedTuple):
    """A damaged or missing range of bytes."""

    at: int
    end: int
    why: str


class Finish(NamedTuple):
    """The end of a finished file, with an intact index or, as in some files of other programs, without one."""

    at: int
    messages: int | None
    """How many the index says; None where it does not."""
    chunks: list[int] | None
    """Offsets of the chunks, as the index says; None where it does not."""
    definitions: list[Schema | Channel]


Piece = Chunk | MetadataRecord | Index | Foreign | Hole | Finish


def _written(record: McapRecord) -> bytes:
    builder: Any = RecordBuilder()
    record.write(builder)
    data: bytes = builder.end()
    return data


BEGINNING = MAGIC + _written(Header("", LIBRARY))
"""The first bytes of every recording of this program."""


def pieces(path: Path) -> Iterator[Piece]:
    """The pieces of a file in order. A file that was cut off ends with a hole, possibly an empty one.

    Raises:
        FileError: missing, unreadable, or not an MCAP file.

    """
    try:
        with path.open("rb") as file:
            yield from _Walk(path, file).pieces()
    except OSError as e:
        raise FileError(f"the recording {path} cannot be read: {e.strerror}") from e


class _Walk:
    """One pass over a file, which skips damage."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = file.seek(0, os.SEEK_END)
        self._tries = 0
        self._trusted = 0
        """Records without a checksum are intact up to here: an intact record comes after them."""

    def _bytes(self, at: int, end: int) -> bytes:
        """Fewer bytes at the end of the file, which may have been truncated since it was opened."""
        self._file.seek(at)
        return self._file.read(max(end - at, 0))

    def pieces(self) -> Iterator[Piece]:
        size = self._size
        if not size:
            raise FileError(f"{self._path} is empty: it is no recording")
        at = verified = len(MAGIC)
        # indexes have no checksum: if one has a wrong length, the search begins after the last verified record
        if self._bytes(0, at) != MAGIC[:size]:
            if self._find_signature(0) is None:
                raise FileError(f"{self._path} is no MCAP file")
            yield Hole(0, at, "the beginning is damaged")
        while True:
            try:
                piece, end = self._piece(at)
            except UNREADABLE as e:
                found = self._find_signature(verified)
                if found is None:
                    yield Hole(min(at, size), size, str(e))
                    return
                yield Hole(at if found > at else verified, found, str(e))
                at = found
                continue
            if piece is not None:
                yield piece
            if isinstance(piece, Finish):
                return
            at = end
            if isinstance(piece, Chunk | MetadataRecord):
                verified = end

    def _piece(self, at: int) -> tuple[Piece | None, int]:
        """The record at byte `at`, and its end; raises one of `UNREADABLE`."""
        begin = at + RECORD.size
        if begin > self._size:
            raise RecordingError("the file was cut off there")
        opcode, length = RECORD.unpack(self._bytes(at, begin))
        end = begin + length
        if not _is_in_data(opcode) or length > MAX_RECORD_BYTES:
            raise RecordingError("no record begins there")
        if end > self._size:
            raise RecordingError("the file was cut off there")
        if (at == len(MAGIC)) != (opcode == Opcode.HEADER):
            raise RecordingError("the beginning is damaged" if at == len(MAGIC) else "no record begins there")
        if opcode not in _CHECKS:
            if not self._is_before_record(end):
                raise RecordingError("no record begins there")
            return Foreign(at, opcode, self._bytes(begin, end)), end
        content = self._bytes(begin, end)
        if opcode == Opcode.ATTACHMENT:
            stated = int.from_bytes(content[-4:], "little")
            if len(content) < _ATTACHMENT_BYTES or stated not in (0, zlib.crc32(content[:-4])):
                raise RecordingError("an attachment is damaged")
            Attachment.read(stream_of(content))
            return Foreign(at, opcode, content), end
        if opcode == Opcode.CHUNK:
            return _chunk(at, unpack_chunk(content)), end
        if opcode == Opcode.METADATA:
            record = Metadata.read(stream_of(content))
            if _written(record) != self._bytes(at, end) or not is_sound(record.metadata):
                raise RecordingError("metadata is damaged")
            return MetadataRecord(at, record.name, record.metadata), end
        if opcode == Opcode.MESSAGE_INDEX:
            if length < 6 or int.from_bytes(content[2:6], "little") != length - 6 or (length - 6) % 16:
                raise RecordingError("an index is damaged")
            return Index(at, content), end
        if opcode == Opcode.DATA_END:
            return self._finish(end), self._size
        if self._bytes(0, end) != BEGINNING and not self._is_foreign_header(content, end):
            raise RecordingError("the beginning is damaged")
        return None, end

    def _is_foreign_header(self, content: bytes, end: int) -> bool:
        """Whether another program wrote the file anew: a head that is no damaged one of ours.

        It has no checksum, so it must be as long as its two texts, and an intact record must come after it.
        """
        header = Header.read(stream_of(content))
        same = sum(a == b for a, b in zip(content, BEGINNING[len(MAGIC) + RECORD.size :], strict=False))
        is_ours = len(content) == len(BEGINNING) - len(MAGIC) - RECORD.size and same > len(content) // 2
        return not is_ours and _written(header)[RECORD.size :] == content and self._is_before_record(end)

    def _is_before_record(self, at: int) -> bool:
        """Whether an intact record with a checksum or a fixed form comes at byte `at`, or after others without one."""
        following = at
        for _ in range(_MOST_FOREIGN):
            if following <= self._trusted:
                return True
            head = self._bytes(following, following + RECORD.size)
            if len(head) < RECORD.size:
                return False
            opcode, length = RECORD.unpack(head)
            if opcode in _CHECKS:
                try:
                    self._piece(following)
                except UNREADABLE:
                    return False
                self._trusted = following
                return True
            if not _is_in_data(opcode) or length > MAX_RECORD_BYTES:
                return False
            following += RECORD.size + length
        return False

    def _finish(self, at: int) -> Finish:
        """Read the index at the file's end; raises RecordingError if it is damaged."""
        index = self._bytes(at, self._size)
        footer_at = len(index) - _FOOTER_BYTES
        if footer_at < 0 or not index.endswith(MAGIC):
            raise RecordingError("the file was cut off there")
        footer = Footer.read(stream_of(index[footer_at + RECORD.size :]))
        if footer.summary_crc not in (0, zlib.crc32(index[: -len(MAGIC) - 4])):  # 0: not computed
            raise RecordingError("the index at the end is damaged")
        # if its offset is wrong (bytes before it were lost or added), it still defines the channels
        chunks = [] if footer.summary_start == at else [-1]
        finish = Finish(at, None, chunks, [])
        if not footer.summary_start and not footer_at:
            return finish._replace(chunks=None)
        begin = 0
        while begin < footer_at:
            opcode, length = RECORD.unpack_from(index, begin)
            begin += RECORD.size
            record = stream_of(index[begin : begin + length])
            if opcode == Opcode.STATISTICS:
                finish = finish._replace(messages=Statistics.read(record).message_count)
            elif opcode == Opcode.CHUNK_INDEX:
                chunks.append(ChunkIndex.read(record).chunk_start_offset)
            elif opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
                finish.definitions.append((Schema if opcode == Opcode.SCHEMA else Channel).read(record))
            begin += length
        return finish if chunks else finish._replace(chunks=None)

    def _find_signature(self, after: int) -> int | None:
        """The offset of the next intact chunk or metadata record, found by its signature."""
        while after < self._size:
            window = self._bytes(after, after + _WINDOW_BYTES)
            for match in _SIGNATURES.finditer(window):
                back = (
                    _BEFORE_CHUNK_SIGNATURE if window[match.start() + 4 : match.start() + 8] == b"zstd" else RECORD.size
                )
                if match.start() < back:
                    continue
                self._tries += 1
                if self._tries > _MAX_SIGNATURES:
                    return None
                with contextlib.suppress(*UNREADABLE):
                    if isinstance(self._piece(after + match.start() - back)[0], Chunk | MetadataRecord):
                        return after + match.start() - back
            # a signature may cross the window's end, and its record begins before it
            after += max(len(window) - _OVERLAP_BYTES, _OVERLAP_BYTES)
        return None


_CHECKS = (
    *(Opcode.HEADER, Opcode.CHUNK, Opcode.METADATA, Opcode.MESSAGE_INDEX, Opcode.DATA_END),
    Opcode.ATTACHMENT,
)
"""Types whose damage can be noticed: those that a recorder writes before the index at the end, and attachments."""
_SUMMARY_ONLY = (
    *(Opcode.FOOTER, Opcode.CHUNK_INDEX, Opcode.ATTACHMENT_INDEX, Opcode.STATISTICS, Opcode.METADATA_INDEX),
    Opcode.SUMMARY_OFFSET,
)


def _is_in_data(opcode: int) -> bool:
    """Whether such a record may stand before the index at the end; a reader skips types that it does not know."""
    return opcode != 0 and opcode not in _SUMMARY_ONLY


def _chunk(offset: int, records: bytes) -> Chunk:
    """A chunk up to its first invalid record (possible in another program's file)."""
    chunk = Chunk(offset, [], [])
    at, size, is_message, head_size = 0, len(records), Opcode.MESSAGE, _MESSAGE_HEAD.size
    while at + RECORD.size <= size:
        opcode, length = RECORD.unpack_from(records, at)
        begin = at + RECORD.size
        end = begin + length
        if end > size or (opcode == is_message and length < head_size):
            break
        if opcode == is_message:
            channel_id, seq, log_ns, publish_ns = _MESSAGE_HEAD.unpack_from(records, begin)
            data = records[begin + head_size : end]
            chunk.messages.append(Message(channel_id, seq, log_ns, publish_ns, data, at))
        elif opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
            kind = Schema if opcode == Opcode.SCHEMA else Channel
            try:
                chunk.definitions.append(kind.read(stream_of(records[begin:end])))
            except UNREADABLE:
                break
        at = end
    return chunk


def index_of(messages: list[Message]) -> list[bytes]:
    """The expected message indexes after a chunk, one per channel."""
    entries: dict[int, list[int]] = {}
    for m in messages:
        entries.setdefault(m.channel_id, []).extend((m.log_ns, m.at))
    return [struct.pack(f"<HI{len(n)}Q", channel_id, 8 * len(n), *n) for channel_id, n in entries.items()]
