"""Recordings to which another program has added records: nothing is damaged, and the package `mcap` reads the same."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcap.data_stream import RecordBuilder
from mcap.opcode import Opcode
from mcap.reader import NonSeekingReader, make_reader
from mcap.records import Attachment, ChunkIndex, DataEnd, Footer, McapRecord, Metadata, MetadataIndex, Statistics
from small_recordings import envelopes, write

from stream_mmrnn.recording.damaged_file import Foreign, pieces
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.mcap_format import MAGIC, RECORD, stream_of
from stream_mmrnn.recording.report import info, verify


def packed(record: McapRecord) -> bytes:
    builder = RecordBuilder()
    record.write(builder)
    data: bytes = builder.end()
    return data


def records_of(data: bytes) -> list[tuple[int, int, bytes]]:
    """Opcode, offset and bytes of each record at the top level."""
    found, at = [], len(MAGIC)
    while at < len(data) - len(MAGIC):
        opcode, length = RECORD.unpack_from(data, at)
        end = at + RECORD.size + length
        found.append((opcode, at, data[at:end]))
        at = end
    return found


def with_added(data: bytes, added: dict[int, list[bytes]], summary: bool = True, crc: bool = True) -> bytes:
    """The file with more records before each of some of its records, and an index at the end for where all is now.

    `summary`: without it the file has no index, as the specification allows; `crc`: without it, no checksum of it.
    """
    out, moved, rest = bytearray(MAGIC), dict[int, int](), []
    records = records_of(data)
    end = next(i for i, (opcode, _, _) in enumerate(records) if opcode == Opcode.DATA_END)
    for i, (_, at, content) in enumerate(records[:end]):
        for more in added.get(i, []):
            out += more
        moved[at] = len(out)
        out += content
    for more in added.get(end, []):
        out += more
    out += packed(DataEnd(0))
    start = len(out)
    if summary:
        for opcode, _, content in records[end + 1 :]:
            stream = stream_of(content[RECORD.size :])
            if opcode == Opcode.CHUNK_INDEX:
                chunk = ChunkIndex.read(stream)
                shift = moved[chunk.chunk_start_offset] - chunk.chunk_start_offset
                chunk.chunk_start_offset += shift
                chunk.message_index_offsets = {c: at + shift for c, at in chunk.message_index_offsets.items()}
                rest.append(packed(chunk))
            elif opcode == Opcode.METADATA_INDEX:
                index = MetadataIndex.read(stream)
                index.offset = moved[index.offset]
                rest.append(packed(index))
            elif opcode == Opcode.STATISTICS:
                statistics = Statistics.read(stream)
                statistics.attachment_count = sum(a[0] == Opcode.ATTACHMENT for of in added.values() for a in of)
                rest.append(packed(statistics))
            elif opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
                rest.append(content)
    out += b"".join(rest)
    footer = packed(Footer(start if summary else 0, 0, 0))[:-4]
    checksum = zlib.crc32(bytes(out[start:]) + footer) if crc and summary else 0
    return bytes(out) + footer + checksum.to_bytes(4, "little") + MAGIC


def unknown(opcode: int, content: bytes) -> bytes:
    return RECORD.pack(opcode, len(content)) + content


foreign = st.one_of(
    st.builds(
        lambda name, data: packed(Attachment(1, 2, name, "text/plain", data)),
        st.text(max_size=9),
        st.binary(max_size=99),
    ),
    st.builds(lambda name, value: packed(Metadata(name, {"a": value})), st.text(max_size=9), st.text(max_size=9)),
    st.builds(unknown, st.integers(0x10, 0xFF), st.binary(max_size=200)),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("whole") / "a.mcap", envelopes(0, 40))


def places(data: bytes) -> list[int]:
    """Before which records another one may stand: after the head, and not between a chunk and its indexes."""
    records = records_of(data)
    end = next(i for i, (opcode, _, _) in enumerate(records) if opcode == Opcode.DATA_END)
    return [i for i in range(2, end + 1) if records[i][0] != Opcode.MESSAGE_INDEX]


def read_by_mcap(path: Path) -> list[tuple[str, int, int, bytes]]:
    with path.open("rb") as file:
        reader = make_reader(file, validate_crcs=True)
        return [(c.topic, m.sequence, m.publish_time, m.data) for _, c, m in reader.iter_messages(log_time_order=False)]


@pytest.mark.slow
@settings(max_examples=60)
@given(st.data(), st.booleans())
def test_records_of_other_programs_are_no_damage(whole: Path, data: st.DataObject, crc: bool) -> None:
    before = whole.read_bytes()
    added = data.draw(st.dictionaries(st.sampled_from(places(before)), st.lists(foreign, min_size=1, max_size=4)))
    path = whole.with_name("more.mcap")
    path.write_bytes(with_added(before, added, crc=crc))
    report = verify(path)
    assert (report["state"], report["why"], report["holes"]) == ("whole", "", [])
    assert report["messages"] == verify(whole)["messages"]
    assert info(path)["whole"]
    assert list(map(repr, Recording(path).envelopes())) == list(map(repr, Recording(whole).envelopes()))
    assert read_by_mcap(path) == read_by_mcap(whole)
    skipped = [piece for piece in pieces(path) if isinstance(piece, Foreign)]
    assert len(skipped) == sum(a[0] != Opcode.METADATA for of in added.values() for a in of)


def test_an_index_is_not_needed_where_the_specification_lets_it_be_absent(whole: Path) -> None:
    path = whole.with_name("bare.mcap")
    path.write_bytes(with_added(whole.read_bytes(), {}, summary=False))
    assert verify(path)["state"] == "whole"
    with path.open("rb") as file:
        count = sum(1 for _ in NonSeekingReader(file, validate_crcs=True).iter_messages(log_time_order=False))
    assert count == sum(verify(path)["messages"].values())


def test_a_damaged_attachment_is_damage_and_costs_only_itself(whole: Path) -> None:
    before = whole.read_bytes()
    at = places(before)[3]
    path = whole.with_name("bad.mcap")
    damaged = bytearray(packed(Attachment(1, 2, "notes", "text/plain", b"what was said")))
    damaged[-8] ^= 1
    path.write_bytes(with_added(before, {at: [bytes(damaged)]}))
    report = verify(path)
    assert (report["state"], len(report["holes"])) == ("damaged", 1)
    assert report["holes"][0]["why"] == "an attachment is damaged"
    assert report["messages"] == verify(whole)["messages"]


@pytest.mark.slow
@given(st.integers(0, 0xFF), st.binary(max_size=40))
def test_bytes_that_are_no_record_are_damage(whole: Path, opcode: int, content: bytes) -> None:
    """Whatever type they seem to be of: no intact record comes after as many bytes as they claim to have."""
    before = whole.read_bytes()
    path = whole.with_name("noise.mcap")
    noise = RECORD.pack(opcode, len(content) + 3) + content
    path.write_bytes(with_added(before, {places(before)[3]: [noise]}))
    report = verify(path)
    assert report["state"] == "damaged"
    assert report["messages"] == verify(whole)["messages"]
