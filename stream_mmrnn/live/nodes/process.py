"""What every process of a session has: its context, its status reports, its base class, and how it is run and ended."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import os
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from multiprocessing.context import BaseContext
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

from stream_mmrnn.bus import Address, Publisher, Subscriber
from stream_mmrnn.core import log, processes, signals, topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import StreamError
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.types import Envelope

HEARD = "session_seq"
"""In the engine's status: the number of the newest `session` message of its session that it has dealt with."""
_STATUS_PERIOD_NS = 500_000_000
_QUIET_MS = 4
"""This long after a message its prediction is out, and the next message has not come yet."""


class Flag:
    """Is set by one process and seen by another, once and for all.

    Unlike `multiprocessing.Event`: its `set` waits until each process that waits has woken up, so where one was killed
    while it waited, the other would stand still for ever, and outlive its session.
    """

    def __init__(self, context: BaseContext) -> None:
        self._set = context.Semaphore(0)

    def set(self) -> None:
        """Set it; never waits."""
        self._set.release()

    def is_set(self) -> bool:
        return self.wait(0)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it is set, at most so long; whether it is."""
        if not self._set.acquire(True, timeout_s):
            return False
        self._set.release()
        return True


class Context:
    """What a process is started with. Picklable: it crosses to a fresh interpreter."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        address: Address,
        ready: Flag,
        stop: Flag,
        epoch: Synchronized[int],
        restarts: int = 0,
        stream: str = "",
        late: bool = False,
    ) -> None:
        self.name, self.settings, self.address = name, settings, address
        self.ready, self.stop, self.epoch, self.restarts = ready, stop, epoch, restarts
        self.stream = stream
        """Of a worker: the stream that it captures."""
        self.late = late
        """Of a recorder: whether it was started in the middle of the session."""
        self.note = ""
        """A warning about this process that its first status carries."""
        self.stdin: Any = None
        """The terminal's input for the text worker: `detach()` gives the file descriptor."""

    def alive(self) -> bool:
        """False once this process must end: it was told to, or the supervisor is gone."""
        parent = multiprocessing.parent_process()
        return not self.stop.is_set() and (parent is None or parent.is_alive())


class Reporter:
    """Publishes a node's status twice a second, and at once when its state changes."""

    def __init__(self, context: Context, publisher: Publisher) -> None:
        self._publisher, self._name, self._modality = publisher, context.name, context.stream
        self._next_ns = 0
        self._state: Any = "starting"
        self._reason = ""
        self.counts: Callable[[], dict[str, int]] = dict
        self.detail: Callable[[], dict[str, Any]] = dict

    def report(self, state: str, reason: str = "") -> None:
        self._state, self._reason = state, reason
        self._send()

    def report_if_new(self, state: str, reason: str) -> None:
        """Report unless this was the last report."""
        if (state, reason) != (self._state, self._reason):
            self.report(state, reason)

    def repeat(self) -> None:
        """Repeat the status at once, with its newest counts."""
        self._send()

    def wait_ms(self, most_ms: int) -> int:
        """How long to wait for a message at most: a due status goes out in the pause after a message."""
        return min(most_ms, _QUIET_MS) if now_ns() >= self._next_ns else most_ms

    def report_due(self, between_messages: bool = True) -> None:
        """Repeat the status when it is due. Between two messages that follow closely, only if it is long overdue."""
        late_ns = now_ns() - self._next_ns
        if late_ns >= (0 if between_messages else _STATUS_PERIOD_NS):
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


class Node(ABC):
    """A process of a session: it joins a generator to the bus, reports its status, and ends when told.

    The order in which nodes start, and what happens when one dies, is the supervisor's.
    """

    def __init__(self, context: Context, queue: int | None = None) -> None:
        """`queue`: of the publisher, in messages; `bus.queue` unless given."""
        self.context, self.settings = context, context.settings
        self.publisher = Publisher(context.address, self.settings.bus.queue if queue is None else queue)
        self.reporter = Reporter(context, self.publisher)

    @abstractmethod
    def run(self) -> None:
        """Work until the context says that this process must end, then close the sockets."""

    def subscribe(self, wanted: list[str]) -> Subscriber:
        """A subscriber that loses nothing up to `bus.queue` messages."""
        return Subscriber(self.context.address, wanted, self.settings.bus.queue)


def wait_for_clock(context: Context, subscriber: Subscriber) -> Envelope | None:
    """Wait for the first clock message: the proof that the bus reaches this process."""
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
    """Make sleeps of this thread, and of those that it starts, end on time; only Linux needs and has it."""
    with contextlib.suppress(OSError):
        # else the kernel may end every sleep 50 us late, to save wake-ups
        Path("/proc/self/timerslack_ns").write_text("1")


def _resolve(target: str | Callable[..., Any]) -> Callable[..., Any]:
    if not isinstance(target, str):
        return target
    module, _, name = target.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def create(context: Context) -> Any:
    """The node that the table names for this context; its `run` works until it is told to end."""
    spec = processes.worker(context.stream) if context.stream else processes.by_name(context.name)
    return _resolve(spec.target)(context)


def run(target: str | Callable[..., Any], context: Context, *args: Any) -> None:
    """What a new process executes: `target` is a class with `run`, as `module:class` or itself, or a function.

    An error ends the process with one sentence and exit code 1.
    """
    with contextlib.suppress(OSError):  # the name in `ps` and `top`; only Linux has it
        Path("/proc/self/comm").write_text(f"mmrnn-{context.name}"[:15])
    sharpen_sleep()
    if not processes.in_background(context.name):
        context.note = prioritise(context.settings.supervisor.priority)
    signals.ignore()  # the supervisor gets them, and tells this process
    try:
        node = _resolve(target)(context, *args)
        if node is not None:
            node.run()
    except StreamError as e:
        log.report(context.settings.log, context.name, str(e))
        raise SystemExit(e.exit_code) from None
    except Exception as e:
        if context.settings.log.format == "text":
            raise  # Python prints the whole traceback
        log.report(context.settings.log, context.name, f"{type(e).__name__}: {e}", traceback=traceback.format_exc())
        raise SystemExit(1) from None
