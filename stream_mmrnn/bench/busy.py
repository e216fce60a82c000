"""Busy neighbours: processes of plain Python that do nothing but work, to see who suffers beside them.

They end with us, however we end.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

_WORK = """
import os
try:
    open("/proc/self/comm", "w").write("mmrnn-busy")  # so that tables name us; Linux alone has it
except OSError:
    pass
parent = os.getppid()
while os.getppid() == parent:
    sum(range(200_000))
"""


@contextlib.contextmanager
def beside(count: int) -> Iterator[None]:
    """`count` busy processes at normal priority."""
    processes = [subprocess.Popen([sys.executable, "-c", _WORK]) for _ in range(count)]  # noqa: S603
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
