"""A running session as a page shows it, read from its bus by a program that is no part of it.

It runs in a thread of its own while somebody looks, and ends with the session. Knows nothing about HTTP.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from stream_mmrnn.bus import Publisher, Subscriber
from stream_mmrnn.bus.registry import Entry
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import StreamError, WireError
from stream_mmrnn.core.streams import text_topics, usual
from stream_mmrnn.viewers.dashboard.board import Board
from stream_mmrnn.viewers.dashboard.raw_streams import RawStreams
from stream_mmrnn.viewers.dashboard.state import LiveState
from stream_mmrnn.viewers.dashboard.typed_lines import TypedLines

_PERIOD_NS = 100_000_000
_IDLE_NS = 15_000_000_000
"""A view at which nobody has looked for so long ends."""
_LISTEN_NS = 600_000_000
"""So long after its beginning every process has sent a status."""
_QUEUE = 256


class SessionView:
    """One session, from its registry entry. `posts`: `/text`."""

    def __init__(
        self,
        entry: Entry,
        show: Callable[[Board, bytes], None],
        extra: Callable[[LiveState, bool], dict[str, Any]],
        max_line_bytes: int,
    ) -> None:
        """`show` replaces a board's state. `extra`: what is added to each state, from the view and whether the session
        is over.
        """
        self.entry, self._show, self._extra = entry, show, extra
        table = {row.name: row for row in entry.streams} or usual()  # an older release's entry has none
        self.board = Board()
        self.live = LiveState(table=table)
        self.live.began_ns = now_ns() - (time.time_ns() - entry.began_unix_ns)
        self._typed = TypedLines(self.live, max_line_bytes)
        self._ops: deque[Any] = deque(maxlen=16)
        self.posts: Mapping[str, Callable[[bytes], str]] = {"/text": self._typed.take}
        self._words = text_topics(table.values())
        self.closed = threading.Event()
        self.looked_ns = now_ns()
        self.error = ""
        self.over = False
        """The session has ended."""
        self._was_alive = self._in_order = False
        """Whether the session was seen running, and its orderly end."""
        self._thread = threading.Thread(target=self._run, name="session-view", daemon=True)
        self._thread.start()

    def ask(self, op: Any) -> None:
        """Ask the session's supervisor for something: the `op` of a `RequestMessage`."""
        self._ops.append(op)

    def close(self) -> None:
        """End it; waits for its thread."""
        self.closed.set()
        self.board.closing = True
        self._thread.join(2.0)

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        with contextlib.suppress(StreamError), contextlib.ExitStack() as stack:
            address = self.entry.address()
            wanted = [topics.FEATURE, *self._words, topics.LABEL, topics.CLOCK, topics.PREDICTION, topics.STATUS]
            subscriber = Subscriber(address, [*wanted, topics.SESSION], _QUEUE, "drop_oldest", midway=True)
            stack.callback(subscriber.close)
            raw = RawStreams(address, _QUEUE, [t for t in (self.live.picture_topic, self.live.sound_topic) if t])
            stack.callback(raw.close)
            publisher: Publisher | None = None
            due_ns = now_ns() + _LISTEN_NS
            while not self.closed.is_set() and now_ns() - self.looked_ns < _IDLE_NS:
                envelope = subscriber.receive(50)
                if envelope is not None:
                    self._observe(envelope)
                for envelope in raw.read(self.board.clients > 0):
                    self.live.observe(envelope)
                    if envelope.topic == self.live.picture_topic and isinstance(envelope.payload, bytes):
                        self.board.picture = envelope.payload
                if (self._ops or len(self._typed)) and publisher is None:
                    publisher = Publisher(address, _QUEUE)
                    stack.callback(publisher.close)
                    publisher.wait_for_reader(topics.REQUEST, 2.0)
                if publisher is not None:
                    self._publish(publisher)
                if self.board.clients:
                    self.looked_ns = now_ns()
                    if self.looked_ns >= due_ns:
                        due_ns = self.looked_ns + _PERIOD_NS
                        self._update()
                if not self.over:
                    self._look()

    def _look(self) -> None:
        listed = self.entry.is_listed()  # first: others remove the file of a process that is gone
        if not self.entry.alive():
            self.over = True
            return
        self._was_alive = True
        self._in_order = self._in_order or not listed

    def _observe(self, envelope: Any) -> None:
        if envelope.topic != topics.SESSION:
            self.live.observe(envelope)
            return
        with contextlib.suppress(WireError):
            message = wire.unpack(envelope.payload, wire.SessionMessage)
            if envelope.session == self.entry.session and message.op == "close":
                self.over = self._in_order = True

    def _publish(self, publisher: Publisher) -> None:
        self._typed.publish(publisher, self.entry.session)
        while self._ops:
            at_ns, op = now_ns(), self._ops.popleft()
            request = wire.pack(wire.RequestMessage(op))
            publisher.publish(topics.REQUEST, self.entry.session, at_ns, at_ns, request, "page")

    def _update(self) -> None:
        self.board.sound = (self.live.sound.first, self.live.sound.columns)
        state = {**self.live.snapshot(now_ns()), **self._extra(self.live, self.over)}
        if self.over:
            state["ended"] = ending = self.live.ending()
            if self._was_alive and not self._in_order:
                ending["why"] = ending["why"] or "the session's process died"
        self._show(self.board, msgspec.json.encode(state))
