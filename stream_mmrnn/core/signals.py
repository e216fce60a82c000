"""SIGINT and SIGTERM of a command as a flag: the first signal asks for an orderly end, the second ends the process.

It imports nothing slow: it is active before anything else is imported.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held() -> Iterator[None]:
    """Block both signals until the block is left; a process that starts in it starts with both blocked."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows does not send them to single processes
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore() -> None:
    """From now on neither signal has an effect on this process, also one that was blocked before."""
    for number in _NUMBERS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _NUMBERS)


class StopFlag:
    """Whether this process was asked to stop: the first SIGINT or SIGTERM asks, a second one ends the process.

    Call it, or `alive`, to ask. `unwinding()` makes the simple kind: the second signal raises SystemExit(130), which
    Call it, or `alive`, to ask. `unwinding()` makes the simple kind: its second signal raises SystemExit(130), which
    be finished, the first signal ends the process, too, with exit code 0; `at_once` removes what would be left behind,
    and must be safe at any moment.
    """

    def __init__(self) -> None:
        self.asked = False
        self.in_order: Callable[[], bool] = lambda: False
        self.at_once: Callable[[], None] = lambda: None
        self._unwind = False

    @classmethod
    def unwinding(cls) -> StopFlag:
        """A flag that watches both signals from now on, and whose second signal raises SystemExit(130)."""
        flag = cls()
        flag._unwind, flag.in_order = True, lambda: True
        flag.watch()
        return flag

    def watch(self) -> None:
        """Handle both signals; call it in the main thread."""
        for number in _NUMBERS:
            signal.signal(number, self._on_signal)

    def alive(self) -> bool:
        """True until a signal came."""
        return not self.asked

    __call__ = alive

    def _on_signal(self, *_: Any) -> None:
        first, self.asked = not self.asked, True
        if first and self.in_order():
            return
        if self._unwind:
            raise SystemExit(130)
        ignore()  # no further signal may interrupt this
        try:
            self.at_once()
        finally:
            os._exit(0 if first else 130)


ENDING = StopFlag()
"""The flag of this process for `live`, `record` and `serve`, from its first moment on."""
