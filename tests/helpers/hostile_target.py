"""A target that crashes, hangs and errs, to see whether the watch sees it: what `tools.hostile` is to real ones."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from random import Random

from stream_mmrnn.core.errors import WireError
from tools.hostile import __main__ as child


class Bad:
    def __init__(self, folder: Path) -> None:
        pass

    def case(self, rng: Random, number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 5:
            time.sleep(1000)
        if number == 7:
            raise RuntimeError("foreign")
        if number == 9:
            raise WireError("ours")

    def close(self) -> dict[str, int]:
        return {}


if __name__ == "__main__":
    child.TARGETS["bad"] = Bad
    child.main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
