"""Messages of the bus as columns: by channel the stamps and vectors of many messages, in one order with the others.

Knows nothing about files, models or ticks.
"""

from __future__ import annotations

from itertools import repeat
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.types import Envelope, FloatArray

Integers = npt.NDArray[np.int64]


class ChannelColumns(msgspec.Struct, frozen=True, gc=False, eq=False):
    """N messages with one topic, session and origin, as columns: feature vectors of one size, or clock messages."""

    topic: str
    session: str
    origin: str
    place: Integers
    """[N] places in the order of all messages, ascending."""
    seq: Integers
    event_ns: Integers
    capture_ns: Integers
    publish_ns: Integers
    device_ns: Integers
    """[N]; see `Envelope` for these four."""
    values: FloatArray | None
    """[N, size]; None for the clock, whose payload is empty."""

    def __len__(self) -> int:
        return len(self.place)

    def take(self, rows: Any) -> ChannelColumns:
        """The messages at `rows`: a slice, or indices in the order that they are to have."""
        return ChannelColumns(
            self.topic,
            self.session,
            self.origin,
            self.place[rows],
            self.seq[rows],
            self.event_ns[rows],
            self.capture_ns[rows],
            self.publish_ns[rows],
            self.device_ns[rows],
            None if self.values is None else self.values[rows],
        )

    def between(self, begin: int, end: int) -> ChannelColumns:
        """The messages with places from `begin` on and before `end`."""
        first, last = np.searchsorted(self.place, (begin, end)).tolist()
        return self if last - first == len(self.place) else self.take(slice(first, last))


class MessageColumns(msgspec.Struct, frozen=True, gc=False, eq=False):
    """Messages in one order: most of them as columns, the others one by one."""

    begin: int
    end: int
    """Places are from `begin` on and before `end`; some may be empty."""
    channels: list[ChannelColumns]
    others: list[tuple[int, Envelope]]
    """(place, message), by place."""

    def between(self, begin: int, end: int) -> MessageColumns:
        """The messages with places from `begin` on and before `end`."""
        channels = [c for c in (c.between(begin, end) for c in self.channels) if len(c)]
        return MessageColumns(begin, end, channels, [other for other in self.others if begin <= other[0] < end])

    def envelopes(self) -> list[Envelope]:
        """The messages one by one, in their order."""
        begin = self.begin
        out: list[Envelope | None] = [None] * (self.end - begin)
        for place, envelope in self.others:
            out[place - begin] = envelope
        for c in self.channels:
            topic, session, origin = c.topic, c.session, c.origin
            columns = (c.seq, c.event_ns, c.capture_ns, c.publish_ns, c.device_ns)
            numbers = zip((c.place - begin).tolist(), *(column.tolist() for column in columns), strict=True)
            payloads = repeat(b"") if c.values is None else c.values
            for (place, seq, event_ns, capture_ns, publish_ns, device_ns), payload in zip(numbers, payloads):  # noqa: B905 - `repeat` has no end
                out[place] = Envelope(
                    topic, session, seq, event_ns, capture_ns, publish_ns, payload, origin, 0, device_ns
                )
        return [envelope for envelope in out if envelope is not None]
