"""Journal: the last seconds of what an engine reads, and its newest checkpoints, for the engine that replaces it.

The bus does not send twice. All its readers see one order, so an engine that restores a checkpoint and gets the
messages after it has missed nothing. Pure: no sockets, no clock; the content of a checkpoint is opaque.
"""

from __future__ import annotations

from collections import deque

import msgspec

from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.types import Mark

Frames = tuple[bytes, bytes, bytes]
"""A message as it was on the wire."""

_CHECKPOINTS = 4
_ATTEMPTS = 3
"""Engines that may go on from one place before that place is held to be what ends them."""
_OVERHEAD_BYTES = 200
"""What a message takes in memory beside its frames."""


class Keep(msgspec.Struct, frozen=True, tag=True):
    """An engine's checkpoint: where it stands in the bus's order, and what it had published by then."""

    mark: Mark
    """The last message that the state has seen."""
    sent: Mark | None
    """The last prediction that had been published; None where there was none."""
    content: bytes


class Ask(msgspec.Struct, frozen=True, tag=True):
    """An engine that has heard `until` on the bus asks for everything up to it."""

    until: Mark


class Newest(msgspec.Struct, frozen=True, tag=True):
    """A recorder that begins in the middle of a session asks for the newest checkpoint. It ends no engine."""


class JournalAnswer(msgspec.Struct, frozen=True):
    """A checkpoint and what came after it."""

    content: bytes = b""
    """b"" is the beginning: nothing was seen yet."""
    messages: list[Frames] = []
    refused: str = ""
    """Why there is none; the session has to begin anew."""
    mark: Mark | None = None
    """To `Newest`: the last message that the checkpoint has seen."""


request = msgspec.msgpack.Decoder(Keep | Ask | Newest)


def read_request(content: bytes) -> Keep | Ask | Newest:
    """What an engine or a recorder says; raises WireError where it is none of the three."""
    try:
        asked: Keep | Ask | Newest = request.decode(content)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise WireError(f"this is no request to a journal: {e}") from e
    return asked


class Journal:
    """A ring of messages, bounded in time and bytes."""

    def __init__(self, keep_s: float, keep_bytes: int, complete: bool) -> None:
        """`complete`: it hears everything from the session's beginning on."""
        self._keep_ns, self._keep_bytes = round(keep_s * 1e9), keep_bytes
        self._ring: deque[tuple[int, Frames]] = deque()
        self._complete = complete
        self._checkpoints: deque[Keep] = deque(maxlen=_CHECKPOINTS)
        self._attempts = 0
        self.bytes = 0
        self.kept = 0
        """Checkpoints that came."""

    def __len__(self) -> int:
        return len(self._ring)

    def add(self, frames: Frames, at_ns: int) -> None:
        """The next message of the bus; what is too old or too much is forgotten."""
        self._ring.append((at_ns, frames))
        self.bytes += _size(frames)
        while self.bytes > self._keep_bytes or at_ns - self._ring[0][0] > self._keep_ns:
            self.bytes -= _size(self._ring.popleft()[1])
            self._complete = False
            if not self._ring:
                break

    def save(self, checkpoint: Keep) -> None:
        """Remember a checkpoint; one that was made again by an engine that went over the same messages is known."""
        if any(known.mark == checkpoint.mark for known in self._checkpoints):
            return
        self._checkpoints.append(checkpoint)
        self._attempts = 0
        self.kept += 1

    def heard(self, mark: Mark) -> bool:
        return self._find(mark) is not None

    def answer(self, ask: Ask) -> JournalAnswer:
        """The newest checkpoint whose predictions have all reached the bus, and what came after it until `ask.until`.

        A prediction that was still in the dead process's queue is made again: a checkpoint from after it is passed
        over.
        """
        until = self._find(ask.until)
        if until is None:
            return JournalAnswer(refused="the journal has not received what the engine has")
        if self._attempts >= _ATTEMPTS:
            self._checkpoints.clear()
            self._complete, self._attempts = False, 0
            return JournalAnswer(refused=f"{_ATTEMPTS} engines in a row ended on the same messages")
        for checkpoint in reversed(self._checkpoints):
            after = self._find(checkpoint.mark)
            if after is not None and (checkpoint.sent is None or self.heard(checkpoint.sent)):
                self._attempts += 1
                return JournalAnswer(checkpoint.content, self._between(after + 1, until + 1))
        if self._complete:
            self._attempts += 1
            return JournalAnswer(messages=self._between(0, until + 1))
        return JournalAnswer(refused="the journal does not reach back to a checkpoint of the engine")

    def newest(self) -> JournalAnswer:
        """The newest checkpoint whose predictions have all reached the bus, without what came after it."""
        for checkpoint in reversed(self._checkpoints):
            if checkpoint.sent is None or self.heard(checkpoint.sent):
                return JournalAnswer(checkpoint.content, mark=checkpoint.mark)
        return JournalAnswer(refused="there is no checkpoint of the engine yet")

    def _between(self, start: int, end: int) -> list[Frames]:
        own = topics.PREDICTION.encode()
        return [frames for i, (_, frames) in enumerate(self._ring) if start <= i < end and frames[0] != own]

    def _find(self, mark: Mark) -> int | None:
        """Where in the ring a message is; the newest are looked at first."""
        topic = mark.topic.encode()
        for i, (_, frames) in enumerate(reversed(self._ring)):
            if frames[0] == topic:
                try:
                    found = wire.mark_of(frames)
                except WireError:
                    continue
                if found == mark:
                    return len(self._ring) - 1 - i
        return None


def _size(frames: Frames) -> int:
    return sum(map(len, frames)) + _OVERHEAD_BYTES
