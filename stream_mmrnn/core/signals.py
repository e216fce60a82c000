"""SIGINT, SIGTERM and SIGHUP as a flag: the first signal requests a graceful shutdown, the second ends the process.

SIGHUP means that the terminal was closed; a process that was started to outlive it (`nohup`) goes on. Python handles a
signal only between two of its instructions, so a thread ends the process where the main thread never comes back, as
from a step of a model with an endless loop. This module imports no slow modules, because it must be active before they
are imported.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

_HANGUP: int | None = getattr(signal, "SIGHUP", None)  # Windows has none
_NUMBERS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM, *(() if _HANGUP is None else (_HANGUP,)))

_STUCK_S, _TWICE_S = 5.0, 0.3
"""How long the main thread may take to react to a signal; and how much later another one counts as the second."""
_REACTED = b"\0"


@contextmanager
def held() -> Iterator[None]:
    """Block these signals inside the `with` block; a process started in it inherits the blocked signals."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows does not send signals to single processes
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_resource_tracker() -> None:
    """Start multiprocessing's process that frees shared resources: of itself it outlives SIGINT and SIGTERM only."""
    from multiprocessing import resource_tracker

    with held():
        resource_tracker.ensure_running()


def ignore() -> None:
    """Ignore these signals from now on, including pending blocked ones."""
    for number in _NUMBERS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _NUMBERS)


class StopFlag:
    """Whether this process may go on: the first signal requests a stop, the second ends the process.

    Call it, or `alive`: True until a signal arrived. With `unwinding()`, the second signal raises SystemExit(130), so
    that `finally` blocks run. Otherwise it calls `at_once` for cleanup, which must be safe at any moment, and exits
    with 130. While `in_order()` is False (nothing to shut down yet), the first signal does the same with exit code 0.

    If the main thread does not react, the second signal ends the process all the same. So does the first after some
    seconds, with exit code 1, unless the flag is `unwinding()`: a long operation may come before work is saved.
    """

    def __init__(self) -> None:
        self.asked = False
        self.in_order: Callable[[], bool] = lambda: False
        self.at_once: Callable[[], None] = lambda: None
        self._unwind = False

    @classmethod
    def unwinding(cls) -> StopFlag:
        """A flag that handles the signals from now on; the second signal raises SystemExit(130)."""
        flag = cls()
        flag._unwind, flag.in_order = True, lambda: True
        flag.watch()
        return flag

    def watch(self) -> None:
        """Handle the signals; call it in the main thread."""
        _monitor.follow(self)
        for number in _NUMBERS:
            if number != _HANGUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def alive(self) -> bool:
        """True until a signal arrived."""
        return not self.asked

    __call__ = alive

    def end(self, code: int) -> None:
        """Clean up and end the process; the main thread need not be able to."""
        try:
            self.at_once()
        finally:
            os._exit(code)

    @property
    def may_take_long(self) -> bool:
        return self._unwind

    def handles(self, number: int) -> bool:
        """Whether a signal comes here."""
        return signal.getsignal(number) == self._on_signal

    def _on_signal(self, number: int, _: Any) -> None:
        _monitor.reacted()
        if number == _HANGUP:
            _let_go_of_terminal()
        first, self.asked = not self.asked, True
        if first and self.in_order():
            return
        if self._unwind:
            raise SystemExit(130)
        ignore()  # no further signal may interrupt the cleanup
        self.end(0 if first else 130)


class _Monitor:
    """Ends the process when the main thread does not react to its signals.

    Python's own handler in C writes the number of each signal to a pipe, whatever the main thread does, and ours writes
    a zero after it.
    """

    def __init__(self) -> None:
        self._flag = StopFlag()
        self._read = self._write = -1

    def follow(self, flag: StopFlag) -> None:
        self._flag = flag
        if sys.platform == "win32":
            return
        if self._write < 0:
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            with held():  # it must not take signals that the main thread holds
                threading.Thread(target=self._run, name="signals", daemon=True).start()
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)

    def reacted(self) -> None:
        if self._write >= 0:
            with suppress(BlockingIOError):
                os.write(self._write, _REACTED)

    def _run(self) -> None:
        since_s: float | None = None  # when a signal came that the main thread has not reacted to
        was_asked = False
        while True:
            flag = self._flag
            waits = since_s is not None and not flag.may_take_long
            left_s = max((since_s or 0.0) + _STUCK_S - time.monotonic(), 0) if waits else None
            if not select.select([self._read], [], [], left_s)[0]:
                if was_asked or not flag.asked:
                    self._end_stuck(flag, was_asked)
                since_s = None  # it reacted before the number of the signal was in the pipe
                continue
            number, flag = os.read(self._read, 1), self._flag
            if number == _REACTED:
                since_s = None
            elif not flag.handles(number[0]):
                pass
            elif since_s is None:
                since_s, was_asked = time.monotonic(), flag.asked
            elif time.monotonic() - since_s > _TWICE_S:
                self._end_stuck(flag, True)

    @staticmethod
    def _end_stuck(flag: StopFlag, twice: bool) -> None:
        why = "a step of the model, or another operation, does not end; stopped without it"
        with suppress(OSError):
            os.write(2, f"error: {why}\n".encode())
        flag.end(130 if twice else 1)


_monitor = _Monitor()


def _let_go_of_terminal() -> None:
    """Point the standard streams whose terminal is gone to nothing: a failed write would end the shutdown."""
    with suppress(OSError):
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            poll = select.poll()
            poll.register(descriptor, 0)
            if any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0)):
                os.dup2(nothing, descriptor)
        os.close(nothing)


ENDING = StopFlag()
"""The flag of this process for `live`, `record` and `serve`."""
