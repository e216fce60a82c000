"""Recordings as columns: the same messages as one by one, with the same good part of a damaged chunk."""

from __future__ import annotations

import struct
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcap.data_stream import RecordBuilder
from mcap.records import Channel, Schema
from small_recordings import envelopes, write

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import RecordingError
from stream_mmrnn.core.message_columns import MessageColumns
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.recording import column_reader
from stream_mmrnn.recording.column_reader import ColumnReader, Records
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.schemas import decode_clock, decode_features, encode_clock, encode_features

OFFSET = 77
DECODERS = {1: ("feature/a", decode_features), 2: ("feature/b", decode_features), 3: ("clock", decode_clock)}


def definition(record: Schema | Channel) -> bytes:
    builder = RecordBuilder()
    record.write(builder)
    data: bytes = builder.end()
    return data


DEFINITIONS = b"".join(
    [
        definition(Schema(1, b"", "protobuf", "stream_mmrnn.Features")),
        definition(Schema(2, b"", "protobuf", "stream_mmrnn.Clock")),
        *(
            definition(Channel(number, topic, "protobuf", {"origin": f"o{number}"}, 2 if topic == topics.CLOCK else 1))
            for number, (topic, _) in DECODERS.items()
        ),
    ]
)


def message(channel: int, seq: int, publish_ns: int, data: bytes) -> bytes:
    return struct.pack("<BQHIQQ", 5, 22 + len(data), channel, seq, 0, publish_ns) + data


@st.composite
def contents(draw: st.DrawFn) -> tuple[int, bytes]:
    """The channel and the content of a message: usual, in another layout, or invalid."""
    channel = draw(st.sampled_from([1, 1, 1, 2, 3]))
    event = draw(st.one_of(st.integers(-5, 5), st.sampled_from([2**63 - 1, -(2**63)])))
    numbers = np.arange(draw(st.sampled_from([0, 3, 3, 3, 40])), dtype=np.float32)
    device = draw(st.sampled_from([0, 0, 9]))
    e = Envelope("feature/a", "s", 0, event, 5, 0, numbers, "", 0, device)
    if channel == 3:
        usual = encode_clock(e)
        return channel, draw(st.sampled_from([usual, usual, usual, usual + usual, usual[:-1], b""]))
    usual = encode_features(e)
    other = usual[9:18] + usual[:9] + usual[18:]  # protobuf allows any order
    return channel, draw(st.sampled_from([usual, usual, usual, other, usual[:-1], b"", b"\xff\xff"]))


def one_by_one(chunks: list[list[tuple[int, bytes]]]) -> tuple[list[Envelope], bool]:
    """The messages up to the first invalid one, and whether there was one."""
    out: list[Envelope] = []
    for seq, (channel, data) in enumerate(m for chunk in chunks for m in chunk):
        if channel not in DECODERS:
            return out, True
        topic, decode = DECODERS[channel]
        try:
            event_ns, capture_ns, payload, device_ns = decode(data, 0, len(data))
        except RecordingError:
            return out, True
        capture_ns = seq if capture_ns is None else capture_ns
        session = topics.EVERYONE if topic == topics.CLOCK else "s"
        out.append(Envelope(topic, session, seq, event_ns, capture_ns, seq, payload, f"o{channel}", 0, device_ns))
    return out, False


def values(e: Envelope) -> tuple[object, ...]:
    payload = e.payload if isinstance(e.payload, bytes) else (e.payload.dtype.str, e.payload.tobytes())
    return (e.topic, e.session, e.seq, e.event_ns, e.capture_ns, e.publish_ns, payload, e.origin, e.device_ns)


def check(columns: MessageColumns, expected: list[Envelope]) -> None:
    for got, e in zip_longest(columns.envelopes(), expected):
        assert values(got) == values(e)
    for end in range(len(expected) + 5):
        assert len(columns.between(0, end).envelopes()) <= len(expected)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(contents(), max_size=8), max_size=6), st.booleans())
def test_columns_are_what_decoding_one_by_one_gives(chunks: list[list[tuple[int, bytes]]], unknown: bool) -> None:
    if unknown and chunks:
        chunks[-1].insert(len(chunks[-1]) // 2, (99, b""))
    records, seq = Records(), 0
    for i, chunk in enumerate(chunks):
        data = DEFINITIONS if i == 0 else b""
        for channel, content in chunk:
            data += message(channel, seq, seq + OFFSET, content)
            seq += 1
        records.add(data)
    expected, invalid = one_by_one(chunks)
    columns, fault = ColumnReader("s", OFFSET, None).decode(records)
    check(columns, expected)
    assert (fault is not None) == invalid


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (b"\x05" + struct.pack("<Q", 21) + bytes(21), "a message is shorter than its head"),
        (b"\x05" + struct.pack("<Q", 2**63) + bytes(40), "a record is longer than its chunk"),
        (b"\x05" + struct.pack("<Q", 2**32 + 22) + bytes(22), "a record is longer than its chunk"),
        (b"\x05\x01", "a record is longer than its chunk"),
        (b"\x0f" + struct.pack("<Q", 1), "a record is longer than its chunk"),
        (message(9, 0, 0, b""), "9"),
        (b"\x04" + struct.pack("<Q", 3) + b"\xff\xff\xff", ""),
    ],
)
def test_what_comes_before_an_invalid_record_is_read(record: bytes, says: str) -> None:
    good = [message(3, i, i + OFFSET, encode_clock(Envelope("clock", "", 0, i, 0, 0, b""))) for i in range(3)]
    records = Records()
    records.add(DEFINITIONS + good[0])
    records.add(good[1] + record + good[2])
    records.add(good[2])
    columns, fault = ColumnReader("s", OFFSET, None).decode(records)
    assert [e.seq for e in columns.envelopes()] == [0, 1]
    assert fault is not None
    assert says in str(fault)


def test_the_first_of_several_faults_counts() -> None:
    good = message(3, 0, OFFSET, encode_clock(Envelope("clock", "", 0, 0, 0, 0, b"")))
    unknown, invalid = message(99, 1, OFFSET, b""), message(1, 2, OFFSET, b"\xff\xff")
    for record, following, says in ((unknown, invalid, "99"), (invalid, unknown, "is no Features")):
        records = Records()
        records.add(DEFINITIONS + good + record + good + following + b"\x05")
        columns, fault = ColumnReader("s", OFFSET, None).decode(records)
        assert len(columns.envelopes()) == 1
        assert says in str(fault)


def test_an_unknown_record_is_skipped() -> None:
    records = Records()
    for i in range(2):
        clock = message(3, i, i + OFFSET, encode_clock(Envelope("clock", "", 0, i, 0, 0, b"")))
        records.add((b"" if i else DEFINITIONS) + b"\x81" + struct.pack("<Q", 3) + b"abc" + clock)
    columns, fault = ColumnReader("s", OFFSET, None).decode(records)
    assert ([e.seq for e in columns.envelopes()], fault) == ([0, 1], None)


def test_a_channel_that_is_defined_anew_counts_from_there_on() -> None:
    def clock(i: int) -> bytes:
        return message(3, i, i + OFFSET, encode_features(Envelope("", "", 0, i, 0, 0, np.ones(2, np.float32))))

    again = definition(Channel(3, "feature/late", "protobuf", {}, 1))
    records = Records()
    records.add(DEFINITIONS + message(3, 0, OFFSET, encode_clock(Envelope("clock", "", 0, 4, 0, 0, b""))) + again)
    records.add(clock(1))
    columns, fault = ColumnReader("s", OFFSET, None).decode(records)
    assert fault is None
    assert [(e.topic, e.seq) for e in columns.envelopes()] == [("clock", 0), ("feature/late", 1)]


def test_a_time_beyond_64_bits_is_read_as_it_was() -> None:
    data = encode_clock(Envelope("clock", "", 0, 4, 0, 0, b""))
    records = Records()
    records.add(DEFINITIONS + message(3, 0, 2**64 - 1, data) + message(3, 1, OFFSET, data))
    columns, _ = ColumnReader("s", OFFSET, None).decode(records)
    assert [e.publish_ns for e in columns.envelopes()] == [2**64 - 1 - OFFSET, 0]


def test_several_recordings_are_read_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a thread that decompresses; one decompressor for all of them crashed the program."""
    monkeypatch.setattr(column_reader, "BLOCK_BYTES", 1 << 12)
    path = write(tmp_path / "a.mcap", envelopes(0, 400))
    whole = [values(e) for e in Recording(path).envelopes()]
    assert len(whole) == 3 * 400 + 1
    running = [Recording(path).columns() for _ in range(8)]
    got: list[list[tuple[object, ...]]] = [[] for _ in running]
    for parts in zip(*running, strict=True):
        for mine, part in zip(got, parts, strict=True):
            mine += [values(e) for e in part.envelopes()]
    assert all(mine == whole for mine in got)


def test_a_reader_that_stops_early_leaves_no_thread(tmp_path: Path) -> None:
    import threading

    path = write(tmp_path / "a.mcap", envelopes(0, 40))
    columns = Recording(path).columns()
    next(columns)
    columns.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("recording")]
