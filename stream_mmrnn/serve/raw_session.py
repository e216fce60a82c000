"""RawSession: a served session whose client sends samples instead of ticks, on the server's side.

Its pushes are numbered as ticks of other sessions are, and each gets one answer: the predictions that it completes.
Knows nothing about sockets, engines or other sessions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec
import numpy as np
from msgspec.structs import replace

from stream_mmrnn.core.errors import BadTick, SnapshotError, UsageError
from stream_mmrnn.core.types import Payload, Tick
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.session_input import Extra, SessionInput, bytes_of

_PUSHES = "pushes"
_MAX_TICKS = 256
"""A push that is further ahead is refused: its answer would be too long."""


class PendingPush(msgspec.Struct):
    """A push, until all its ticks are stepped."""

    number: int
    peer: bytes
    left: int = 0
    """Ticks that wait to be stepped."""
    predictions: list[protocol.Pred] = msgspec.field(default_factory=list)
    error: str = ""
    """Why it was refused, or its ticks were."""


class RawSession:
    """The input of one session, and its pushes that have no answer yet."""

    def __init__(self, made: SessionInput) -> None:
        self.input = made
        self.next = 0
        """Number of the next push."""
        self.pending: deque[PendingPush] = deque()

    def begin(self, request: protocol.PushSample, peer: bytes) -> PendingPush:
        """Take a push. Raises BadTick where it is not the next one."""
        if request.push != self.next:
            raise BadTick(f"push {request.push} of session {request.session!r} is not the next one, {self.next}")
        self.next += 1
        push = PendingPush(request.push, peer)
        self.pending.append(push)
        return push

    def ticks(self, request: protocol.PushSample) -> Iterator[Tick]:
        """The ticks that a push completes. Raises UsageError where it does not fit the model or its stream."""
        made = self.input
        at_ns = made.newest_ns if request.at_ns is None else made.zero_ns + request.at_ns
        most_ns = _MAX_TICKS * made.spec.tick_ns
        if not 0 <= at_ns - made.zero_ns < 2**62 or at_ns - made.newest_ns > most_ns:
            raise UsageError(
                f"at_s is {(at_ns - made.zero_ns) / 1e9:g}: expected 0 or more, and at most {most_ns / 1e9:g} s after "
                "what was pushed before; push in shorter pieces, or advance in steps"
            )
        if not request.stream:
            yield from made.advance(at_ns)
        elif request.vector:
            yield from made.push_vector(request.stream, _numbers(request.data), at_ns)
        else:
            row = made.stream(request.stream)
            data: Payload = request.data
            if row.kind == "audio":
                if len(request.data) % 2:
                    raise UsageError(f"{request.stream}: sound is int16, and this is {len(request.data)} bytes")
                data = np.frombuffer(request.data, "<i2")
            elif row.kind == "signal":
                data = _numbers(request.data)
            yield from made.push(row, data, at_ns)

    def done(self) -> Iterator[PendingPush]:
        """The oldest pushes that have all their predictions, in order; they are removed."""
        while self.pending and not self.pending[0].left:
            yield self.pending.popleft()

    def since_begin(self, pred: protocol.Pred) -> protocol.Pred:
        """A prediction with its number and end in the session's own time: from 1, and in nanoseconds from 0."""
        period_ns, zero_ns = self.input.spec.tick_ns, self.input.zero_ns
        return replace(pred, tick=pred.tick - zero_ns // period_ns, event_ns=pred.event_ns - zero_ns)

    def snapshot(self) -> dict[str, bytes | str]:
        """What continues it on another server, while none of its ticks waits. Raises SnapshotError."""
        return {**self.input.snapshot(), _PUSHES: str(self.next)}

    @staticmethod
    def is_in(extra: Extra) -> bool:
        """Whether a snapshot is of a raw session."""
        return _PUSHES in extra

    def restore(self, extra: Extra) -> None:
        """Continue from a snapshot. Raises SnapshotError."""
        number = bytes_of(extra, _PUSHES)
        if not number.isdigit():
            raise SnapshotError("the snapshot has no number of pushes; close the session to begin anew")
        self.input.restore(extra)
        self.next = int(number)


def _numbers(data: bytes) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    if len(data) % 4:
        raise UsageError(f"numbers are float32, and these are {len(data)} bytes")
    return np.frombuffer(data, "<f4")
