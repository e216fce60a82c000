"""The child's side: `python -m tools.hostile TARGET FIRST COUNT FOLDER` feeds the cases and writes down the outcome."""

from __future__ import annotations

import json
import mmap
import resource
import sys
import traceback
from pathlib import Path
from random import Random

from stream_mmrnn.core.errors import StreamError
from tools.hostile.targets import TARGETS

MEMORY_BYTES = 8 * 2**30
"""Of address space, so that a bomb is an error and not the machine's end."""


def main(name: str, first: int, count: int, folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    target = TARGETS[name](folder)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    crashes: list[str] = []
    refused = 0
    with (folder / "progress").open("r+b") as file, mmap.mmap(file.fileno(), 8) as progress:
        for number in range(first, count):
            progress[:8] = number.to_bytes(8, "little")
            try:
                target.case(Random(f"{name}{number}"), number)
            except StreamError:
                refused += 1
            except Exception as e:
                where = traceback.extract_tb(e.__traceback__)[-1]
                crashes.append(
                    f"{number}: {type(e).__name__}: {str(e)[:200]} ({Path(where.filename).name}:{where.lineno})"
                )
        counts = target.close()
    peak_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024
    outcome = {"refused": refused, "crashes": crashes, "peak_mb": peak_mb, "counts": counts}
    (folder / "outcome").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
