"""What every process of a session has: what it is given at its birth, how it says how it is, how it is run and ended.

Knows nothing about what a process does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from stream_mmrnn.bus import Address, Publisher, Subscriber
from stream_mmrnn.core import config, log, signals, topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import StreamError
from stream_mmrnn.core.types import Envelope

_STATUS_PERIOD_NS = 500_000_000
_CALM_MS = 4
"""So long after a message its prediction is out, and the next one is still to come."""
VIEWERS = ("dashboard", "tracer", "foxglove", "lsl")
"""Who only looks: what such a one loses, nobody else does."""
_LOW_PRIORITY = ("recorder", "journal", *VIEWERS)
"""What may come later: files and pages, and what is for a bad day."""


class Context:
    """What a process is given at its birth. Picklable: it crosses to a fresh interpreter."""

    def __init__(
        self,
        name: str,
        settings: config.Settings,
        address: Address,
        ready: Event,
        stop: Event,
        epoch: Synchronized[int],
        restarts: int = 0,
    ) -> None:
        self.name, self.settings, self.address = name, settings, address
        self.ready, self.stop, self.epoch, self.restarts = ready, stop, epoch, restarts
        self.note = ""
        """What is to be said of the process that runs this node."""
        self.stdin: Any = None
        """The terminal's input on its way to the text worker: `detach()` gives the file descriptor."""

    def alive(self) -> bool:
        """False once this process shall end: it was told, or nobody is left who could tell it."""
        parent = multiprocessing.parent_process()
        return not self.stop.is_set() and (parent is None or parent.is_alive())


class Reporter:
    """Publishes a node's status twice a second and at once when its state changes."""

    def __init__(self, context: Context, publisher: Publisher, modality: str = "") -> None:
        self._publisher, self._name, self._modality = publisher, context.name, modality
        self._next_ns = 0
        self._state: Any = "starting"
        self._reason = ""
        self.counts: Callable[[], dict[str, int]] = dict
        self.detail: Callable[[], dict[str, Any]] = dict

    def report(self, state: str, reason: str = "") -> None:
        self._state, self._reason = state, reason
        self._send()

    def report_if_new(self, state: str, reason: str) -> None:
        """Say it where it was not the last thing said."""
        if (state, reason) != (self._state, self._reason):
            self.report(state, reason)

    def wait_ms(self, most_ms: int) -> int:
        """How long to wait for a message at most: a status that is due goes out in the calm after one."""
        return min(most_ms, _CALM_MS) if now_ns() >= self._next_ns else most_ms

    def report_due(self, housekeeping: bool = True) -> None:
        """Say it again where it is time; not in the middle of messages, unless they leave no calm."""
        late_ns = now_ns() - self._next_ns
        if late_ns >= (0 if housekeeping else _STATUS_PERIOD_NS):
            self._send()

    def _send(self) -> None:
        at_ns = now_ns()
        self._next_ns = at_ns + _STATUS_PERIOD_NS
        message = wire.StatusMessage(
            self._name, self._state, os.getpid(), self._modality, self._reason, self.counts(), self.detail()
        )
        self._publisher.publish(
            topics.STATUS + self._name, topics.EVERYONE, at_ns, at_ns, wire.pack(message), self._name
        )


def hear_clock(context: Context, subscriber: Subscriber) -> Envelope | None:
    """Wait for the first clock message: the proof that the bus reaches us."""
    for envelope in subscriber.stream(context.alive):
        if envelope.topic == topics.CLOCK:
            return envelope
    return None


def prioritise(priority: str) -> str:
    """Give this process the priority that is asked for; why it could not be, or ""."""
    try:
        if priority == "nice":
            os.nice(-10)
        elif priority == "fifo":
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    except (OSError, AttributeError) as e:
        return f"supervisor.priority {priority!r} was not given ({e}); the session runs as any other program"
    return ""


def sharpen_sleep() -> None:
    """Have this thread, and those that it starts, woken when they asked to be; Linux alone needs and has it."""
    with contextlib.suppress(OSError):
        # else the kernel may end every sleep 50 us late, to save wake-ups
        Path("/proc/self/timerslack_ns").write_text("1")


def run(target: Callable[..., None], context: Context, *args: Any) -> None:
    """What a new process executes: signals, then the node; an error ends it with one sentence and exit code 1."""
    with contextlib.suppress(OSError):  # so that `ps` and `top` name us; Linux alone has it
        Path("/proc/self/comm").write_text(f"mmrnn-{context.name}"[:15])
    sharpen_sleep()
    if context.name not in _LOW_PRIORITY:
        context.note = prioritise(context.settings.supervisor.priority)
    signals.ignore()  # they are for the supervisor, who tells us
    try:
        target(context, *args)
    except StreamError as e:
        log.report(context.settings.log, context.name, str(e))
        raise SystemExit(e.exit_code) from None
    except Exception as e:
        if context.settings.log.format == "text":
            raise  # as Python shows it, with all its lines
        log.report(context.settings.log, context.name, f"{type(e).__name__}: {e}", traceback=traceback.format_exc())
        raise SystemExit(1) from None
