"""Feed a target in a process of its own, and see what becomes of it: native crashes and hangs cost one case each.

Knows nothing about targets but their names.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tools.faults.promise import Say

MODULE = "tools.hostile"
"""What the child executes."""
HANG_S = 30.0
"""A case that takes longer is a hang. The machine may stand still for a while: a second look follows."""


class Outcome(NamedTuple):
    """What became of the cases of one target."""

    cases: int
    refused: int
    crashes: list[str]
    """Exceptions that are none of ours, as `case: sentence`."""
    native: list[int]
    """Cases that ended the process."""
    hangs: list[int]
    lines: int
    """Printed by the target."""
    seconds: float
    peak_mb: float
    counts: dict[str, int]
    """What the target counted itself."""


def run(target: str, count: int, say: Say) -> Outcome:
    """`count` cases of a target, from case 0 on; the same every time."""
    began, at = time.monotonic(), 0
    total = Outcome(0, 0, [], [], [], 0, 0.0, 0.0, {})
    while at < count:
        part, at = _part(target, at, count)
        merged = {k: total.counts.get(k, 0) + part.counts.get(k, 0) for k in {*total.counts, *part.counts}}
        total = Outcome(
            total.cases + part.cases,
            total.refused + part.refused,
            total.crashes + part.crashes,
            total.native + part.native,
            total.hangs + part.hangs,
            total.lines + part.lines,
            time.monotonic() - began,
            max(total.peak_mb, part.peak_mb),
            merged,
        )
        if len(total.native) + len(total.hangs) > 20:
            break
    for crash in total.crashes[:3]:
        say(f"{target} {crash}")
    for kind, cases in (("ended the process", total.native), ("did not end", total.hangs)):
        if cases:
            say(f"{target}: case {', '.join(map(str, cases[:8]))} {kind}")
    return total


def _part(target: str, first: int, count: int) -> tuple[Outcome, int]:
    """From `first` until the end or the first case that takes the process with it; and where to go on."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as name:
        folder = Path(name)
        progress, output, said = folder / "progress", folder / "output", folder / "outcome"
        progress.write_bytes(first.to_bytes(8, "little"))
        command = [sys.executable, "-m", MODULE, target, str(first), str(count), str(folder)]
        with output.open("wb") as out, progress.open("r+b") as file, mmap.mmap(file.fileno(), 8) as seen:
            child = subprocess.Popen(command, env=_environment(), stdout=out, stderr=out, stdin=subprocess.DEVNULL)
            hung = _wait(child, seen)
            at = int.from_bytes(seen[:8], "little")
        lines = output.read_bytes().splitlines()
        if child.returncode == 0:
            found = json.loads(said.read_text())
            return Outcome(count - first, native=[], hangs=[], lines=len(lines), seconds=0.0, **found), count
        sys.stderr.write("\n".join(line.decode("utf-8", "replace") for line in lines[-30:]) + "\n")
        bad = [at]
        return Outcome(
            at - first + 1, 0, [], [] if hung else bad, bad if hung else [], len(lines), 0.0, 0.0, {}
        ), at + 1


def _environment() -> dict[str, str]:
    """Ours, with our search path: a child finds the modules that we find."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def _wait(child: subprocess.Popen[bytes], seen: mmap.mmap) -> bool:
    """Until it has ended; True where one case did not end and it was killed."""
    last, since, looks = -1, time.monotonic(), 0
    while child.poll() is None:
        time.sleep(0.02)
        at = int.from_bytes(seen[:8], "little")
        if at != last:
            last, since, looks = at, time.monotonic(), 0
        elif time.monotonic() - since > HANG_S:
            looks += 1
            since = time.monotonic()
            if looks == 2:
                with contextlib.suppress(OSError):
                    os.kill(child.pid, 9)
                child.wait()
                return True
    return False
