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
from mcap.records import (
    Attachment,
    Channel,
    ChunkIndex,
    DataEnd,
    Footer,
    Header,
    McapRecord,
    Message,
    Metadata,
    MetadataIndex,
    Statistics,
)
from mcap.writer import CompressionType, Writer
from small_recordings import envelopes, write

from stream_mmrnn.core.errors import FileError
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.mcap_format import MAGIC, METADATA, METADATA_END, METADATA_SO_FAR, RECORD, stream_of
from stream_mmrnn.recording.pieces import BEGINNING, Foreign, pieces
from stream_mmrnn.recording.recorder import Recorder
from stream_mmrnn.recording.repair import repair
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


def with_added(
    data: bytes, added: dict[int, list[bytes]], summary: bool = True, crc: bool = True, header: bytes = b""
) -> bytes:
    """The file with more records before each of some of its records, and an index at the end for where all is now.

    `summary`: without it the file has no index, as the specification allows; `crc`: without it, no checksum of it;
    `header`: the head record of another program.
    """
    out, moved, rest = bytearray(MAGIC), dict[int, int](), []
    records = records_of(data)
    end = next(i for i, (opcode, _, _) in enumerate(records) if opcode == Opcode.DATA_END)
    for i, (_, at, content) in enumerate(records[:end]):
        for more in added.get(i, []):
            out += more
        moved[at] = len(out)
        out += header if header and not i else content
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


@pytest.mark.slow
@settings(max_examples=10)
@given(st.text(max_size=20), st.text(max_size=20))
def test_a_head_of_another_program_is_no_damage(whole: Path, profile: str, library: str) -> None:
    path, out = whole.with_name("anew.mcap"), whole.with_name("repaired.mcap")
    path.write_bytes(with_added(whole.read_bytes(), {}, header=packed(Header(profile, library))))
    assert (verify(path)["state"], verify(path)["holes"]) == ("whole", [])
    assert info(path)["whole"]
    assert read_by_mcap(path) == read_by_mcap(whole)
    path.write_bytes(path.read_bytes()[:-200])
    out.unlink(missing_ok=True)
    assert repair(path, out)["result"]["state"] == "whole"
    assert verify(out)["messages"] == verify(whole)["messages"]


@pytest.mark.parametrize("compression", [CompressionType.ZSTD, CompressionType.NONE])
def test_a_file_of_another_program_is_refused(tmp_path: Path, compression: CompressionType) -> None:
    path = tmp_path / "theirs.mcap"
    with path.open("wb") as file:
        writer = Writer(file, compression=compression)
        writer.start("ros2", "theirs")
        channel = writer.register_channel("/a", "json", writer.register_schema("x", "jsonschema", b"{}"))
        for i in range(10):
            writer.add_message(channel, i, b"{}", i, i)
        writer.finish()
    with pytest.raises(FileError, match="is no recording of this program"):
        verify(path)


def test_a_damaged_head_of_ours_is_none_of_another_program(whole: Path) -> None:
    data, path = whole.read_bytes(), whole.with_name("head.mcap")
    for at in range(len(MAGIC), len(BEGINNING)):
        damaged = bytearray(data)
        damaged[at] ^= 0x20
        path.write_bytes(damaged)
        assert verify(path)["state"] == "damaged", at


@pytest.mark.slow
@settings(max_examples=12)
@given(st.data())
def test_a_repair_keeps_the_records_of_other_programs(whole: Path, data: st.DataObject) -> None:
    """All but those that belong to channels by number, which are counted; in their order."""
    before = whole.read_bytes()
    at = st.sampled_from([p for p in places(before)[:-1] if p > 3])  # after the last, the cut leaves no intact record
    added = data.draw(st.dictionaries(at, st.lists(foreign, min_size=1, max_size=3), min_size=1))
    path, out = whole.with_name("cut.mcap"), whole.with_name("kept.mcap")
    path.write_bytes(with_added(before, added)[:-200])
    out.unlink(missing_ok=True)
    result = repair(path, out)
    assert (result["was"], result["result"]["state"], result["foreign_left_out"]) == ("cut off", "whole", 0)
    wanted = [record for _, records in sorted(added.items()) for record in records]
    ours = (METADATA, METADATA_END, METADATA_SO_FAR)
    got = []
    for opcode, _, content in records_of(out.read_bytes()):
        if opcode == Opcode.DATA_END:
            break
        is_metadata = opcode == Opcode.METADATA and Metadata.read(stream_of(content[RECORD.size :])).name not in ours
        if is_metadata or opcode == Opcode.ATTACHMENT or opcode >= 0x10:
            got.append(content)
    assert got == wanted
    assert read_by_mcap(out) == read_by_mcap(whole)
    with out.open("rb") as file:
        assert len(list(make_reader(file).iter_attachments())) == sum(r[0] == Opcode.ATTACHMENT for r in wanted)


def test_a_repair_counts_what_it_cannot_keep(whole: Path) -> None:
    channel = packed(Channel(9, "/theirs", "json", {}, 0))
    message = packed(Message(9, 1, b"{}", 1, 0))
    before = whole.read_bytes()
    path, out = whole.with_name("theirs.mcap"), whole.with_name("without.mcap")
    path.write_bytes(with_added(before, {places(before)[4]: [channel, message]})[:-200])
    result = repair(path, out)
    assert (result["foreign_left_out"], result["result"]["state"]) == (2, "whole")
    assert verify(out)["messages"] == verify(whole)["messages"]


def test_a_repair_keeps_the_steps_of_the_wall_clock(tmp_path: Path) -> None:
    path, out = tmp_path / "a.mcap", tmp_path / "b.mcap"
    recorder = Recorder(path, "live", {"config": "{}", "raw": "true", "part": "1"})
    for envelope in envelopes(0, 20):
        recorder.write(envelope)
    recorder.flush_due(2**62)
    recorder.note_wall_step(5, 7)
    recorder.close({"ended": "clean"})
    steps = info(path)["wall_steps"]
    assert steps == [{"at_ns": 5, "step_ns": 7}]
    path.write_bytes(path.read_bytes()[:-100])
    repair(path, out)
    assert info(out)["wall_steps"] == steps


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
