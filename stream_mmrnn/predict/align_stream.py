"""One stream of a session for the aligner: order, duplicates, the samples of open ticks and their reduction."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import msgspec
import numpy as np

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import SessionError
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.core.types import FloatArray, ModalitySpec

_add, _divide = np.add, np.divide
MAX_PENDING = 1024
"""Limit on the messages of one stream after a gap; sequence numbers further back are refused."""
NEVER = -(2**62)
"""An event time before all others."""
FLOAT32 = np.dtype(np.float32)
_COUNTS = tuple(np.array(n, np.float32) for n in range(64))
"""Divisors as 0-d arrays: numpy handles them twice as fast as its own scalars."""


def stacked(newest: Sequence[FloatArray], size: int) -> FloatArray:
    """The samples of a tick one after another, oldest first, as `size` numbers; zeros stand before too few."""
    out = np.zeros(size, np.float32)
    both = np.concatenate(newest)
    out[size - len(both) :] = both
    return out


OpenSample = tuple[int, int, FloatArray]
"""A sample in an open tick: event time, sequence number, features."""


class StreamCounts(msgspec.Struct):
    """Account of a stream's feature messages: received = used + dropped (by the reasons below) + in open ticks."""

    received: int = 0
    used: int = 0
    late: int = 0
    """Dense stream, arrived after its tick had closed: dropped."""
    duplicate: int = 0
    quarantined: int = 0
    """Event time too far from the clock, wrong size, a value that is not finite or too large, or another encoder."""
    superseded: int = 0
    """Replaced by a newer sample of the same tick (reduction `last`, or more than `stack` samples)."""
    unclosed: int = 0
    """Its tick was still open when the session ended."""
    outside: int = 0
    """Its session was not open."""
    late_joined: int = 0
    """Sparse stream, late: joined the next open tick. Counted in `used`; not a loss."""
    non_monotonic: int = 0
    """Its event time was not newer than the one before; not a loss by itself."""

    def dropped(self) -> dict[str, int]:
        """Counts by reason, without zeros."""
        names = ("late", "duplicate", "quarantined", "superseded", "unclosed", "outside")
        return {n: getattr(self, n) for n in names if getattr(self, n)}


class StreamState(msgspec.Struct, frozen=True, array_like=True):
    """Serializable state of one stream of a session."""

    next_seq: int
    pending: list[tuple[int, int]]
    seen: list[int]
    newest_ns: int
    head_ns: int
    last_used_ns: int
    open: dict[int, list[tuple[int, int, bytes]]]


class AlignedStream:
    """One modality of one session, and the stream that feeds it."""

    __slots__ = (
        "all_true",
        "counts",
        "dense",
        "encoder",
        "expected",
        "head_ns",
        "in_range",
        "last_used_ns",
        "lateness_ns",
        "magnitudes",
        "name",
        "newest_ns",
        "next_seq",
        "open",
        "pending",
        "reduction",
        "seen",
        "shape",
        "source",
        "spec",
        "topic",
        "zeros",
    )

    def __init__(
        self,
        spec: ModalitySpec,
        features: str,
        stream: Stream,
        lateness_ns: int,
        counts: StreamCounts,
        zeros: FloatArray,
    ) -> None:
        """`features`: the name of the feature vectors; `stream`: whose they are."""
        self.spec, self.name, self.encoder = spec, spec.name, spec.encoder
        self.counts, self.zeros = counts, zeros
        self.topic = topics.FEATURE + features
        self.source = stream.name
        self.dense = stream.dense
        self.reduction = spec.reduction or stream.reduction
        self.shape = (spec.size // spec.stack,)
        self.lateness_ns = lateness_ns
        self.expected = True
        self.next_seq = 0
        self.pending: list[tuple[int, int]] = []
        """Heap of (seq, event_ns) after a gap in the sequence numbers."""
        self.seen: set[int] = set()
        """Recent sequence numbers of this publisher: they distinguish a duplicate from a message out of order."""
        self.newest_ns = NEVER
        """Newest event time before the first gap."""
        self.head_ns = NEVER
        """Newest event time of all."""
        self.last_used_ns = NEVER
        self.open: dict[int, list[OpenSample]] = {}
        """Samples by tick index, in event order."""
        self.magnitudes = np.empty(self.shape, np.float32)
        """Scratch buffer: absolute values of the last sample."""
        self.in_range = np.ones(self.shape, np.bool_)
        """Scratch buffer: which of them are below the limit."""
        self.all_true = self.in_range.tobytes()

    def order(self, seq: int, event_ns: int) -> bool:
        """Record a sequence number; False for a duplicate."""
        if seq < self.next_seq and event_ns > self.head_ns:
            # the publisher restarted: its numbers begin again at 0, its time goes on
            self.next_seq = seq
            self.pending.clear()
            self.seen.clear()
        if seq in self.seen or seq < self.next_seq - MAX_PENDING:
            return False
        self.seen.add(seq)
        self.forget()
        self.head_ns = max(self.head_ns, event_ns)
        if seq == self.next_seq and not self.pending:
            self.next_seq = seq + 1  # in order: the usual case
            self.newest_ns = max(self.newest_ns, event_ns)
        elif seq >= self.next_seq:
            heapq.heappush(self.pending, (seq, event_ns))
            if len(self.pending) > MAX_PENDING:
                self.next_seq = self.pending[0][0]
            self._advance()
        return True

    def state(self) -> StreamState:
        return StreamState(
            self.next_seq,
            list(self.pending),
            sorted(self.seen),  # the same state gives the same bytes
            self.newest_ns,
            self.head_ns,
            self.last_used_ns,
            {k: [(at, seq, values.tobytes()) for at, seq, values in samples] for k, samples in self.open.items()},
        )

    def restore(self, state: StreamState) -> None:
        """Continue from `state`; raises SessionError if its vectors have another size."""
        size = self.shape[0] * FLOAT32.itemsize
        if any(len(values) != size for samples in state.open.values() for _, _, values in samples):
            raise SessionError(f"the aligner's state holds no vectors of {self.shape[0]} numbers for {self.name!r}")
        self.next_seq, self.newest_ns, self.head_ns = state.next_seq, state.newest_ns, state.head_ns
        self.last_used_ns = state.last_used_ns
        self.pending = list(state.pending)
        heapq.heapify(self.pending)  # the snapshot may come from outside: do not rely on its order
        self.seen = set(state.seen)
        self.open = {
            k: [(at, seq, np.frombuffer(values, FLOAT32)) for at, seq, values in samples]
            for k, samples in state.open.items()
        }

    def forget(self) -> None:
        """Bound the set of sequence numbers: `order` refuses numbers far behind anyway."""
        if len(self.seen) > 4 * MAX_PENDING:
            self.seen = {s for s in self.seen if s >= self.next_seq - MAX_PENDING}

    def _advance(self) -> None:
        while self.pending and self.pending[0][0] <= self.next_seq:
            seq, event_ns = heapq.heappop(self.pending)
            self.next_seq = seq + 1
            self.newest_ns = max(self.newest_ns, event_ns)

    def give_up_gaps(self, horizon_ns: int) -> None:
        """Stop waiting for missing messages whose successors are older than `horizon_ns`."""
        while self.pending and self.pending[0][1] <= horizon_ns:
            self.next_seq = self.pending[0][0]
            self._advance()

    def reduce(self, samples: list[OpenSample]) -> FloatArray:
        """One vector from the samples of a tick."""
        count, counts = len(samples), self.counts
        newest_ns, _, newest = samples[-1]
        if newest_ns > self.last_used_ns:
            self.last_used_ns = newest_ns
        reduction = self.reduction
        if reduction == "last":
            counts.used += 1
            counts.superseded += count - 1
            return newest
        if reduction == "stack":
            kept = samples[-self.spec.stack :]
            counts.used += len(kept)
            counts.superseded += count - len(kept)
            return stacked([s[2] for s in kept], self.spec.size)
        counts.used += count
        if count == 1:
            return newest
        total: FloatArray = _add(samples[0][2], samples[1][2])
        for sample in samples[2:]:
            _add(total, sample[2], total)
        if reduction == "mean":
            _divide(total, _COUNTS[count] if count < len(_COUNTS) else np.array(count, np.float32), total)
        return total
