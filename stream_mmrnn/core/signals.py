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


class Ending:
    """Whether this process was asked to end; the first signal asks, a second one ends it at once.

    As long as `in_order` says that nothing has begun that must be brought to an end, the first one ends it at once,
    too, with exit code 0. A process that is ended by its second signal has exit code 130.
    """

    def __init__(self) -> None:
        self.asked = False
        self.in_order: Callable[[], bool] = lambda: False
        self.at_once: Callable[[], None] = lambda: None
        """Leaves nothing behind, whatever is going on: it is called in the middle of anything."""

    def watch(self) -> None:
        """Take both signals; from the main thread."""
        for number in _NUMBERS:
            signal.signal(number, self._come)

    def alive(self) -> bool:
        """True until a signal came."""
        return not self.asked

    def _come(self, *_: Any) -> None:
        first, self.asked = not self.asked, True
        if first and self.in_order():
            return
        ignore()  # nothing may come between
        try:
            self.at_once()
        finally:
            os._exit(0 if first else 130)


ENDING = Ending()
"""This process's own: signals are sent to a process, not to one of its parts."""
