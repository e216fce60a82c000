"""ReaderQueue: the messages that a reader has not taken yet, bounded, with a named policy and counts.

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
"""`superseded`: a newer one of its stream came; `oldest`: the backlog was full; `stale`: from before the reader was
away."""


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
        """Count a message that is not delivered."""
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
        """The oldest that waits; None where none does."""
        if not len(self):
            return None
        envelope = self._pop()
        self.delivered[counted_as(envelope.topic)] += 1
        return envelope

    def clear(self) -> None:
        """Drop all that waits: it is from before the reader was away."""
        while len(self):
            self.drop(self._pop(), "stale")

    def waiting(self) -> Counter[str]:
        """How many wait, by topic."""
        return Counter(counted_as(e.topic) for e in (self._newest.values() if self._queue is None else self._queue))
