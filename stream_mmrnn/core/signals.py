"""SIGINT, SIGTERM and SIGHUP as a flag: the first signal requests a graceful shutdown, the second ends the process.

SIGHUP means that the terminal was closed; a process that was started to outlive it (`nohup`) goes on. This module
imports no slow modules, because it must be active before they are imported.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_HANGUP: int | None = getattr(signal, "SIGHUP", None)  # Windows has none
_NUMBERS: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM, *(() if _HANGUP is None else (_HANGUP,)))


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
        for number in _NUMBERS:
            if number != _HANGUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def alive(self) -> bool:
        """True until a signal arrived."""
        return not self.asked

    __call__ = alive

    def _on_signal(self, number: int, _: Any) -> None:
        if number == _HANGUP:
            _let_go_of_terminal()
        first, self.asked = not self.asked, True
        if first and self.in_order():
            return
        if self._unwind:
            raise SystemExit(130)
        ignore()  # no further signal may interrupt the cleanup
        try:
            self.at_once()
        finally:
            os._exit(0 if first else 130)


def _let_go_of_terminal() -> None:
    """Point the standard streams whose terminal is gone to nothing: writing to them would fail, and end the shutdown."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        poll = select.poll()
        poll.register(descriptor, 0)
        if any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0)):
            os.dup2(nothing, descriptor)
    os.close(nothing)


ENDING = StopFlag()
"""The flag of this process for `live`, `record` and `serve`."""
