"""Rates, ages and sequence gaps of the topics on the bus."""

from __future__ import annotations

from collections.abc import Collection

from stream_mmrnn.core.sequence import SequenceTracker
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.viewers.dashboard.limits import MAX_SESSIONS, ms

_BUCKET_NS = 50_000_000
_BUCKETS = 40
RATE_NS = _BUCKETS * _BUCKET_NS
"""Rates are averages over 40 buckets of 50 ms: 2 s."""


class Rate:
    """Events per second over the last 2 s, in a fixed number of buckets."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._first = 0
        self.total = 0

    def observe(self, at_ns: int) -> None:
        bucket = at_ns // _BUCKET_NS
        if self.total == 0:
            self._first = bucket
        self.total += 1
        self._counts[bucket] = self._counts.get(bucket, 0) + 1
        if len(self._counts) > _BUCKETS + 2:
            del self._counts[min(self._counts)]

    def per_s(self, now_ns: int) -> float:
        """Over the complete buckets before now: 2 s of them, or fewer in the first seconds."""
        current = now_ns // _BUCKET_NS
        since = max(current - _BUCKETS, min(self._first, current - 1))
        count = sum(n for bucket, n in self._counts.items() if since <= bucket < current)
        return count / ((current - since) * _BUCKET_NS / 1e9)


class StreamView:
    """One topic."""

    def __init__(self) -> None:
        self.rate = Rate()
        self.newest_ns: int | None = None
        """Event time of the newest message."""
        self.lost = 0
        """Messages that this viewer missed, by their sequence numbers."""

    def age_ms(self, now_ns: int) -> float | None:
        return None if self.newest_ns is None else ms(now_ns - self.newest_ns)


class Streams:
    """All topics that were seen."""

    def __init__(self) -> None:
        self.views: dict[str, StreamView] = {}
        self._numbers: SequenceTracker[tuple[str, str]] = SequenceTracker(MAX_SESSIONS)

    def observe(self, envelope: Envelope, at_ns: int) -> None:
        stream = self.views.setdefault(envelope.topic, StreamView())
        stream.rate.observe(at_ns)
        stream.newest_ns = envelope.event_ns
        # the first number seen is where this viewer joined
        stream.lost += self._numbers.observe((envelope.topic, envelope.session), envelope.seq, envelope.seq)

    def skip(self, names: Collection[str]) -> None:
        """Forget the sequence numbers of these topics: what comes next does not count as a gap."""
        self._numbers.forget([key for key in self._numbers.numbers() if key[0] in names])

    def age_ms(self, topic: str, now_ns: int) -> float | None:
        stream = self.views.get(topic)
        return None if stream is None else stream.age_ms(now_ns)
