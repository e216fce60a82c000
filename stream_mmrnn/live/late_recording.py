"""The beginning of a recording in the middle of a session: which messages it starts with.

It starts at a checkpoint of the engine: an opening of the session, the state of aligner and model, and every message
after the last one that this state has seen. So a replay gives the predictions that the session gave. Pure: no sockets,
no files.
"""

from __future__ import annotations

from msgspec.structs import replace

from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.live.checkpoint import Newest, mark


class LateBeginning:
    """Keeps the session's messages from its first `session` message on, until it is known where to begin."""

    def __init__(self, session: str) -> None:
        self._session = session
        self._kept: list[Envelope] = []

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, envelope: Envelope) -> None:
        if envelope.session in (self._session, topics.EVERYONE) and (self._kept or envelope.topic == topics.SESSION):
            self._kept.append(envelope)

    def at(self, newest: Newest | None) -> list[Envelope] | None:
        """The messages of a recording that begins at this checkpoint; None if it is from before what is kept, or too
        large for a message.
        """
        if newest is None:
            return None
        place = next((i for i, e in enumerate(self._kept) if mark(e) == newest.mark), None)
        content = wire.pack(wire.CheckpointMessage(newest.next_end_ns, newest.content))
        if place is None or len(content) > wire.MAX_JSON_BYTES:
            return None
        last = next(e for e in reversed(self._kept[: place + 1]) if e.topic == topics.SESSION)
        at_ns = newest.mark.publish_ns
        state = Envelope(topics.CHECKPOINT, self._session, 0, newest.next_end_ns, at_ns, at_ns, content)
        # the last tick that is closed ends one nanosecond later
        opening = self._opening(last, newest.next_end_ns - 1, newest.expected)
        return [opening, state, *(e for e in self._kept[place + 1 :] if not _is_seen(e, newest.closed))]

    def without_state(self) -> list[Envelope]:
        """The messages of a recording that begins with a new state."""
        if not self._kept:
            return []
        first, *rest = self._kept
        try:
            said = wire.unpack(first.payload, wire.SessionMessage)
        except WireError:
            return self._kept
        return [self._opening(first, said.event_ns, said.streams), *rest]

    @staticmethod
    def _opening(said: Envelope, event_ns: int, expected: tuple[str, ...]) -> Envelope:
        payload = wire.pack(wire.SessionMessage("open", event_ns, expected))
        return replace(said, event_ns=event_ns, payload=payload)


def _is_seen(envelope: Envelope, closed: int) -> bool:
    """Whether it is a prediction that was made before the checkpoint and came after it."""
    if envelope.topic != topics.PREDICTION:
        return False
    try:
        return wire.tick_index(envelope.payload) <= closed
    except WireError:
        return False
