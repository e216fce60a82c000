"""Lines that are typed on a page, on their way to the bus: the server's thread takes them, another publishes them."""

from __future__ import annotations

from collections import deque

import msgspec

from stream_mmrnn.bus import Publisher
from stream_mmrnn.core import topics
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.viewers.dashboard.state import LiveState

_MAX_WAITING = 64


class TypedLines:
    """The lines for one session."""

    def __init__(self, view: LiveState, max_line_bytes: int) -> None:
        self._view, self._max = view, max_line_bytes
        self._waiting: deque[bytes] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, body: bytes) -> str:
        """Queue the line in the body of a POST; why not, or "". Runs in the server's thread, which has no socket."""
        if why := self._view.typing()["why"]:
            return str(why)
        try:
            line = msgspec.json.decode(body, type=str).strip().encode()
        except (msgspec.MsgspecError, UnicodeError):
            return "a line is a JSON string"
        if not line or len(line) > self._max:
            return f"a line has 1 to {self._max} bytes, this one has {len(line)}"
        if len(self._waiting) >= _MAX_WAITING:
            return "more was typed than could be sent; wait a moment"
        self._waiting.append(line)
        return ""

    def publish(self, publisher: Publisher, session: str) -> None:
        while self._waiting:
            at_ns = now_ns()
            publisher.publish(topics.TYPED, session, at_ns, at_ns, self._waiting.popleft(), "page")
