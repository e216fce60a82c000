"""ColumnReader: the records of many chunks -> messages as columns, without a Python object for each message.

Features and the clock in the layout that this program writes are decoded at once for all messages of a channel; other
messages, and other layouts, one by one. Knows nothing about files: see `mcap_file`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
from mcap.opcode import Opcode
from mcap.records import Channel, Schema

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import RecordingError
from stream_mmrnn.core.message_columns import ChannelColumns, Integers, MessageColumns
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.recording.mcap_format import FEATURES, RECORD, UNREADABLE, stream_of
from stream_mmrnn.recording.schemas import (
    JSON_KINDS,
    Bytes,
    Decode,
    clock_columns,
    decode_clock,
    decode_features,
    decode_json,
    feature_columns,
    gathered,
)

BLOCK_BYTES = 4 * 2**20
"""So many bytes of records are decoded together: numpy's calls cost nothing then, and 16 recordings fit in memory."""
_HEAD = np.dtype(
    [("opcode", "u1"), ("length", "<u8"), ("channel", "<u2"), ("seq", "<u4"), ("log", "<u8"), ("publish", "<u8")]
)
"""Head of a message record; of other records the first two fields are valid."""
_MESSAGE, _SCHEMA, _CHANNEL = int(Opcode.MESSAGE), int(Opcode.SCHEMA), int(Opcode.CHANNEL)
_CALLS = 16
"""Steps of the walk between two looks at whether it has ended."""
_BEYOND = 2**62
"""Times and lengths from here on are handled as Python's integers: sums of them would not fit into 64 bits."""


class _Channel(NamedTuple):
    """A channel of a file, and its decoder."""

    topic: str
    session: str
    origin: str
    decode: Decode


def decoder_of(topic: str, schema: Schema, offset_ns: int) -> Decode:
    """The decoder of a channel's messages; it raises RecordingError if one is invalid."""
    if topic.startswith(topics.FEATURE) or schema.name == FEATURES:  # samples of a signal have the same form
        return decode_features
    if topic == topics.CLOCK:
        return decode_clock
    if topic in JSON_KINDS:
        return decode_json
    parse: Any = None

    def decode(data: bytes, at: int, end: int) -> tuple[int, None, Any, int]:
        nonlocal parse
        try:
            if parse is None:
                from mcap_protobuf.decoder import DecoderFactory

                parse = DecoderFactory().decoder_for("protobuf", schema)
            message = parse(data[at:end])
            payload = message.message.encode() if hasattr(message, "message") else bytes(message.data)
            event_ns = int(message.timestamp.seconds * 1_000_000_000 + message.timestamp.nanos)
        except Exception as e:  # schema and message come from outside; protobuf's errors share no base
            raise RecordingError(f"a message on {topic} is no {schema.name[:64]}") from e
        audio = schema.name == "foxglove.RawAudio"
        return event_ns - offset_ns, None, np.frombuffer(payload, "<i2") if audio else payload, 0

    return decode


class Records:
    """The records of some chunks, one after another."""

    def __init__(self) -> None:
        self.data: Bytes = np.zeros(BLOCK_BYTES, np.uint8)
        self.ends: list[int] = []
        """The end of each chunk's records in `data`."""

    @property
    def full(self) -> bool:
        """Whether enough was added to be decoded."""
        return bool(self.ends) and self.ends[-1] >= BLOCK_BYTES

    def add(self, records: bytes) -> None:
        """Add the records of one chunk."""
        begin = self.ends[-1] if self.ends else 0
        end = begin + len(records)
        if end + _HEAD.itemsize > len(self.data):  # a head is read past the end of a short record
            self.data = np.concatenate([self.data[:begin], np.zeros(len(records) + BLOCK_BYTES // 8, np.uint8)])
        self.data[begin:end] = np.frombuffer(records, np.uint8)
        self.ends.append(end)


class ColumnReader:
    """Decodes the messages of the topics in `wanted` (None: all) of successive records."""

    def __init__(self, session: str, offset_ns: int, wanted: Collection[str] | None) -> None:
        """`session`: the recording's; `offset_ns`: what times in the file are ahead of the bus's."""
        self._session, self._offset_ns, self._wanted = session, offset_ns, wanted
        self._channels: dict[int, _Channel | None] = {}
        """None for channels that are not wanted: their messages are skipped without decoding."""
        self._schemas: dict[int, Schema] = {}
        self._data: Bytes = np.zeros(0, np.uint8)

    def decode(self, records: Records) -> tuple[MessageColumns, Exception | None]:
        """The messages up to the first fault, and the fault. Nothing in them refers to the bytes of `records`."""
        self._data = records.data
        offsets, heads, fault = _walk(records)
        begin, good = 0, len(offsets)
        places: dict[_Channel, list[Integers]] = {}
        # a channel is defined before its messages, and may be defined anew
        for at in (*np.flatnonzero(heads["opcode"] != _MESSAGE).tolist(), good):
            unknown = self._assign(heads["channel"], begin, at, places)
            if unknown is not None:
                good, fault = unknown
                break
            if at == good:
                break
            try:
                self._define(heads["opcode"][at], offsets[at], heads["length"][at])
            except UNREADABLE as e:
                good, fault = at, e
                break
            begin = at + 1
        channels: list[ChannelColumns] = []
        single: list[tuple[int, _Channel]] = []
        for channel, parts in places.items():
            left = np.sort(np.concatenate(parts))
            if channel.decode in (decode_features, decode_clock):
                left = self._columns(channel, heads, offsets, left, channels)
            single += [(at, channel) for at in left.tolist()]
        others: list[tuple[int, Envelope]] = []
        for place, channel in sorted(single, key=lambda one: one[0]):
            if place >= good:
                break
            try:
                others.append((place, self._single(channel, heads[place], int(offsets[place]))))
            except UNREADABLE as e:
                good, fault = place, e
                break
        return MessageColumns(0, len(offsets), channels, others).between(0, good), fault

    def _define(self, opcode: int, at: int, length: int) -> None:
        begin = at + RECORD.size
        content = self._data[begin : begin + int(length)].tobytes()
        if opcode == _SCHEMA:
            schema = Schema.read(stream_of(content))
            self._schemas[schema.id] = schema
        elif opcode == _CHANNEL:
            record = Channel.read(stream_of(content))
            topic = record.topic
            session = topics.EVERYONE if topic == topics.CLOCK else self._session
            decode = decoder_of(topic, self._schemas[record.schema_id], self._offset_ns)
            channel = _Channel(topic, session, record.metadata.get("origin", ""), decode)
            self._channels[record.id] = channel if self._wanted is None or topic in self._wanted else None

    def _assign(
        self, numbers: np.ndarray[Any, Any], begin: int, end: int, places: dict[_Channel, list[Integers]]
    ) -> tuple[int, Exception] | None:
        """Add the places `begin` to `end` of messages to those of their channels, if these are wanted; `numbers`: of
        the channels. Returns place and fault of the first one whose channel is not known.
        """
        numbers = numbers[begin:end]
        fault: tuple[int, Exception] | None = None
        for number in np.unique(numbers).tolist() if begin < end else ():
            mine = begin + np.flatnonzero(numbers == number)
            if number not in self._channels:
                if fault is None or mine[0] < fault[0]:
                    fault = int(mine[0]), KeyError(number)
                continue
            channel = self._channels[number]
            if channel is not None:
                places.setdefault(channel, []).append(mine)
        return fault

    def _columns(
        self,
        channel: _Channel,
        heads: np.ndarray[Any, Any],
        offsets: Integers,
        place: Integers,
        channels: list[ChannelColumns],
    ) -> Integers:
        """Add the messages at `place` to `channels`; returns the places of those in an unusual layout."""
        lengths = heads["length"][place]
        beyond = heads["publish"][place] >= _BEYOND
        left = [place[beyond]]
        for length in np.unique(lengths).tolist():
            here = place[(lengths == length) & ~beyond]
            at = offsets[here] + _HEAD.itemsize
            published = heads["publish"][here].astype(np.int64) - self._offset_ns
            size = length - (_HEAD.itemsize - RECORD.size)
            if channel.decode is decode_clock:
                usual, event_ns = clock_columns(self._data, at, size)
                captured, device_ns, values = published, np.zeros(len(at), np.int64), None
            else:
                usual, event_ns, captured, device_ns, values = feature_columns(self._data, at, size)
            seq = heads["seq"][here].astype(np.int64)
            found = ChannelColumns(*channel[:3], here, seq, event_ns, captured, published, device_ns, values)
            if usual.all():
                channels.append(found)
            else:
                channels.append(found.take(np.flatnonzero(usual)))
                left.append(here[~usual])
        return np.concatenate(left)

    def _single(self, channel: _Channel, head: np.void, at: int) -> Envelope:
        """A message in any layout; raises one of UNREADABLE."""
        end = at + RECORD.size + int(head["length"])
        message = self._data[at + _HEAD.itemsize : end].tobytes()
        event_ns, capture_ns, payload, device_ns = channel.decode(message, 0, len(message))
        publish_ns = int(head["publish"]) - self._offset_ns
        if capture_ns is None:
            capture_ns = publish_ns
        seq = int(head["seq"])
        return Envelope(
            channel.topic,
            channel.session,
            seq,
            event_ns,
            capture_ns,
            publish_ns,
            payload,
            channel.origin,
            0,
            device_ns,
        )


def _walk(records: Records) -> tuple[Integers, np.ndarray[Any, Any], Exception | None]:
    """The offsets and heads of all records up to the first that is invalid, and its fault.

    The chunks are walked side by side: record i of all of them at once.
    """
    data, ends = records.data, records.ends
    at = np.array([0, *ends[:-1]] if ends else [], np.int64)
    end = np.array(ends, np.int64)
    # the lower half of a length: no step is endless or goes back, and a wrong one is found below
    sizes = np.ndarray((len(data) - RECORD.size,), "<u4", data, 1, (1,))
    found = [at]
    while len(found) % _CALLS or (at < end).any():
        at = at + sizes[at]
        at += RECORD.size
        np.minimum(at, end, out=at)
        found.append(at)
    every = np.array(found).T
    offsets = every[every < end[:, None]]
    heads = gathered(data, offsets, _HEAD.itemsize).view(_HEAD)
    lengths = heads["length"]
    most = (end[np.searchsorted(end, offsets, "right")] - offsets - RECORD.size).astype(np.uint64)
    too_long = lengths > most
    too_short = (heads["opcode"] == _MESSAGE) & (lengths < _HEAD.itemsize - RECORD.size)
    bad = np.flatnonzero(too_long | too_short)
    if not len(bad):
        return offsets, heads, None
    first = int(bad[0])
    why = "a record is longer than its chunk" if too_long[first] else "a message is shorter than its head"
    return offsets[:first], heads[:first], RecordingError(why)
