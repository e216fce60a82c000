"""What this machine could do at best: bytes a second from memory, and float32 operations a second, on one thread.

A step cannot be faster than its weights can be read or its products made, whichever is longer. Measured in a process
of its own, because a BLAS reads its number of threads once, when it is loaded. Knows nothing about models.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from stream_mmrnn.core.errors import ProcessError

_FAR_LARGER_THAN_CACHE_BYTES = 512 * 2**20
_SIDE = 1024
_BEST_OF = 5


class Roofline(NamedTuple):
    """One thread's best."""

    read_bytes_per_s: float
    copy_bytes_per_s: float
    """Bytes read and bytes written, together."""
    flops_per_s: float
    """float32, a multiplication and an addition counted as two."""

    def floor_ns(self, weight_bytes: float, flops: float) -> float:
        """The time below which no step on this machine can be whose weights come from memory."""
        return 1e9 * max(weight_bytes / self.read_bytes_per_s, flops / self.flops_per_s)


def _best_s(call: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_BEST_OF):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best


def read_again_bytes_per_s(size_bytes: int) -> float:
    """How fast one thread reads an array of this size again and again: a small one comes out of a cache."""
    array = np.ones(max(size_bytes // 4, 1), np.float32)
    times = max(1, 2**24 // array.nbytes)  # a small array: so often that the clock's grain does not matter

    def read() -> None:
        for _ in range(times):
            array.max()

    read()
    return times * array.nbytes / _best_s(read)


def _measure() -> Roofline:
    source = np.ones(_FAR_LARGER_THAN_CACHE_BYTES // 8, np.float32)
    target = np.zeros_like(source)
    copy_s = _best_s(lambda: np.copyto(target, source))
    a = np.ones((_SIDE, _SIDE), np.float32)
    out = np.empty_like(a)
    flops_s = _best_s(lambda: np.matmul(a, a, out=out))
    return Roofline(
        read_again_bytes_per_s(_FAR_LARGER_THAN_CACHE_BYTES), 2 * source.nbytes / copy_s, 2 * _SIDE**3 / flops_s
    )


@cache
def roofline() -> Roofline:
    """Measured once a process; takes about a second."""
    one_thread = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "VECLIB_MAXIMUM")}
    done = subprocess.run(  # noqa: S603 our own module
        [sys.executable, "-m", __name__], capture_output=True, text=True, env={**os.environ, **one_thread}
    )
    try:
        return Roofline(**json.loads(done.stdout))
    except (ValueError, TypeError) as e:
        last = done.stderr.strip().rpartition("\n")[2]
        raise ProcessError(f"the machine's bandwidth could not be measured: {last or 'no figures came back'}") from e


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure()._asdict()))
