"""SIGINT and SIGTERM as a flag: the first signal requests a graceful shutdown, the second ends the process.

It imports no slow modules, because it must be active before they are imported.
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
    """Block both signals inside the `with` block; a process started in it inherits the blocked signals."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows does not send signals to single processes
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NUMBERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ignore() -> None:
    """Ignore both signals from now on, including pending blocked ones."""
    for number in _NUMBERS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _NUMBERS)


class StopFlag:
    """Whether this process may go on: the first SIGINT or SIGTERM requests a stop, the second ends the process.

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
        """A flag that handles both signals from now on; the second signal raises SystemExit(130)."""
        flag = cls()
        flag._unwind, flag.in_order = True, lambda: True
        flag.watch()
        return flag

    def watch(self) -> None:
        """Handle both signals; call it in the main thread."""
        for number in _NUMBERS:
            signal.signal(number, self._on_signal)

    def alive(self) -> bool:
        """True until a signal arrived."""
        return not self.asked

    __call__ = alive

    def _on_signal(self, *_: Any) -> None:
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


ENDING = StopFlag()
"""The flag of this process for `live`, `record` and `serve`."""
