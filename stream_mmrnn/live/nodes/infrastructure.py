"""The infrastructure processes of a session: the broker, the clock, and the journal of the last messages.

They know nothing about samples or predictions.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import msgspec

from stream_mmrnn.bus import Authenticator, JournalSocket, Publisher, run_broker
from stream_mmrnn.core import topics
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.live.journal import Ask, Journal, Keep, Newest, read_request
from stream_mmrnn.live.nodes.process import Context, Node, Reporter

_JOURNAL_MS = 50
"""The journal reads this often: if each message woke it, it would take a core from the latency-critical processes."""
_JOURNAL_NICE = 5
_ANSWER_NS = 1_000_000_000
"""How long an engine's question waits for the message that it asks about."""
_DENIED = {
    "key_not_allowed": "with a key that is not allowed",
    "no_key": "without a key",
    "wrong_server_key": "with another server's key",
    "unfinished": "that broke off before it had shown a key",
}


class BrokerNode:
    """The bus. With keys it reports refused connections, through itself. Its publisher exists once the bus does."""

    def __init__(self, context: Context) -> None:
        self.context, self.bus = context, context.settings.bus
        self.authenticator: Authenticator | None = None
        if self.bus.keys:
            from stream_mmrnn.bus.keys import KeyFolder

            self.authenticator = KeyFolder(Path(self.bus.keys)).authenticator()
        self._publisher: Publisher | None = None
        self._reporter: Reporter | None = None

    def run(self) -> None:
        run_broker(
            self.context.address,
            self.bus.queue,
            self.context.ready.set,
            self._alive,
            bulk_queue=self.bus.bulk_queue,
            view_queue=self.bus.view_queue,
            authenticator=self.authenticator,
        )

    def _alive(self) -> bool:
        """Polled by one thread of the broker, which also reports."""
        going = not self.context.stop.wait(0.1) and self.context.alive()
        if self.authenticator is not None:
            self._report(self.authenticator)
        if not going and self._publisher is not None:
            self._publisher.close(0)
        return going

    def _report(self, authenticator: Authenticator) -> None:
        if self._reporter is None:
            self._publisher = Publisher(self.context.address, self.bus.queue)
            self._reporter = Reporter(self.context, self._publisher)
            self._reporter.counts = lambda: {
                "admitted": authenticator.admitted,
                "denied": sum(authenticator.refused.values()),
            }
            self._reporter.detail = lambda: {"denied": dict(authenticator.refused)}
            self._reporter.report("ready")
        # a new reason is reported at once, a higher count of a known one with the next status
        self._reporter.report_if_new("ready", _denials(authenticator.refused))
        self._reporter.report_due()


def _denials(refused: dict[str, int]) -> str:
    """One sentence, which changes with the reasons and not with every count."""
    reasons = [words for reason, words in _DENIED.items() if refused.get(reason)]
    return f"refused connections {', '.join(reasons)}" if reasons else ""


class ClockNode:
    """Publishes the time `bus.clock_hz` times a second. Its status is the clock itself."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.publisher = Publisher(context.address, context.settings.bus.queue)

    def run(self) -> None:
        period_ns = int(1e9 / self.context.settings.bus.clock_hz)
        self.context.ready.set()
        due_ns = now_ns()
        while self.context.alive():
            due_ns = max(due_ns + period_ns, now_ns() - period_ns)  # after a stall: no burst of old ticks
            time.sleep(max(due_ns - now_ns(), 0) / 1e9)
            at_ns = now_ns()
            self.publisher.publish(topics.CLOCK, topics.EVERYONE, at_ns, at_ns, b"")
        self.publisher.close()


class JournalNode(Node):
    """What an engine needs to go on after a crash: the last messages of the bus, and checkpoints."""

    def __init__(self, context: Context) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.nice(_JOURNAL_NICE)  # before the sockets' threads start: it wakes often and is not urgent
        super().__init__(context)
        state = self.settings.state
        wanted = [topics.FEATURE, topics.SESSION, topics.PREDICTION, topics.CLOCK]
        self.tap = JournalSocket(context.address, wanted, self.settings.bus.queue)
        self.journal = Journal(state.journal_s, state.journal_mb << 20, complete=not context.restarts)
        self._asked: tuple[bytes, Ask, int] | None = None
        """An engine's question: who, what, and until when it waits."""
        self._garbage = 0
        self.reporter.counts = lambda: {
            "messages": len(self.journal),
            "bytes": self.journal.bytes,
            "checkpoints": self.journal.kept,
        }

    def run(self) -> None:
        while self.context.alive():
            request = self.tap.request(5 if self._asked else _JOURNAL_MS)
            self._read_bus()
            if request is not None:
                self._handle(*request)
            self._answer()
            if len(self.journal) and not self.context.ready.is_set():
                # the clock is subscribed last, so everything else arrives too
                self.reporter.report("ready")
                self.context.ready.set()
            self.reporter.report_due()
        self.tap.close()
        self.publisher.close()

    def _read_bus(self) -> None:
        for frames in self.tap.messages():
            if len(frames) == 3:
                self.journal.add((frames[0], frames[1], frames[2]), now_ns())
            else:
                self._garbage += 1

    def _handle(self, sender: bytes, content: bytes) -> None:
        try:
            message = read_request(content)
        except WireError:
            self._garbage += 1
            return
        if isinstance(message, Keep):
            self.journal.save(message)
        elif isinstance(message, Newest):
            self.tap.answer(sender, msgspec.msgpack.encode(self.journal.newest()))
        else:
            self._asked = (sender, message, now_ns() + _ANSWER_NS)

    def _answer(self) -> None:
        if self._asked is None:
            return
        sender, ask, until_ns = self._asked
        if self.journal.heard(ask.until) or now_ns() > until_ns:
            self.tap.answer(sender, msgspec.msgpack.encode(self.journal.answer(ask)))
            self._asked = None
