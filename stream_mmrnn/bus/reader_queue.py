"""ReaderQueue: the bounded queue of a reader, with a drop policy and counts.

`latest` keeps the newest message of each stream, `drop_oldest` the newest `length` of all. Every message that was put
is delivered, waiting, or dropped for a reason. Pure: no sockets, no clocks.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from typing import Literal

from stream_mmrnn.core.topics import counted_as
from stream_mmrnn.core.types import Envelope

Keeping = Literal["latest", "drop_oldest"]
Reason = Literal["superseded", "oldest", "stale"]
"""`superseded`: replaced by a newer one of its stream; `oldest`: the queue was full; `stale`: too old after the reader
paused."""


class ReaderQueue:
    """At most `length` envelopes, oldest first. produced = delivered + dropped + waiting, per topic."""

    def __init__(self, policy: Keeping, length: int) -> None:
        self._length = length
        self._queue: deque[Envelope] | None = deque() if policy == "drop_oldest" else None
        self._newest: OrderedDict[tuple[str, str], Envelope] = OrderedDict()
        self.delivered: Counter[str] = Counter()
        self.dropped: dict[str, Counter[str]] = {}
        """By topic, then by reason."""

    def __len__(self) -> int:
        return len(self._newest) if self._queue is None else len(self._queue)

    def drop(self, envelope: Envelope, reason: Reason) -> None:
        """Count a message as dropped."""
        self.dropped.setdefault(counted_as(envelope.topic), Counter())[reason] += 1

    def put(self, envelope: Envelope) -> None:
        if self._queue is None:
            key = (envelope.topic, envelope.session)
            before = self._newest.pop(key, None)
            if before is not None:
                self.drop(before, "superseded")
            self._newest[key] = envelope
        else:
            self._queue.append(envelope)
        if len(self) > self._length:
            self.drop(self._pop(), "oldest")

    def _pop(self) -> Envelope:
        return self._newest.popitem(last=False)[1] if self._queue is None else self._queue.popleft()

    def pop(self) -> Envelope | None:
        """The oldest message; None if the queue is empty."""
        if not len(self):
            return None
        envelope = self._pop()
        self.delivered[counted_as(envelope.topic)] += 1
        return envelope

    def clear(self) -> None:
        """Drop all messages as stale, after the reader paused."""
        while len(self):
            self.drop(self._pop(), "stale")

    def waiting(self) -> Counter[str]:
        """Number of queued messages, by topic."""
        return Counter(counted_as(e.topic) for e in (self._newest.values() if self._queue is None else self._queue))
