"""What the tests of whole sessions share: run the command, watch it, kill what it is made of, read what it recorded."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stream_mmrnn.core import wire
from stream_mmrnn.core.errors import StreamError
from stream_mmrnn.recording.mcap_file import Recording

COMMAND = [sys.executable, "-m", "stream_mmrnn"]


def run(*args: object, timeout: float = 60) -> tuple[int, dict[str, Any], str]:
    """Exit code, the JSON document, stderr."""
    done = subprocess.run([*COMMAND, *map(str, args), "--json"], capture_output=True, text=True, timeout=timeout)
    lines = done.stdout.splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


def verify(path: Path, predictions: int) -> None:
    code, result, err = run("replay", path, "--verify")
    assert (code, result["identical"], result["predictions"]) == (0, True, predictions), (result, err)


def check_summary(summary: dict[str, Any]) -> None:
    assert summary["balanced"], summary["streams"]
    for stream in summary["streams"].values():
        assert stream["produced"] == stream["delivered"] + sum(stream["dropped"].values())
        capture = stream["capture"]
        assert capture["produced"] == capture["delivered"] + sum(capture["dropped"].values())
    assert set(summary["latency_ms"]) >= {"wait", "transport", "step", "total"}
    assert {"p50", "p99"} <= set(summary["latency_ms"]["total"])


def ticks_of(path: Path) -> list[wire.PredictionMessage]:
    """What each step was given, which its prediction carries."""
    return list(Recording(path).predictions())


class Running:
    """A live session as a process of its own, watched from outside."""

    def __init__(
        self,
        *args: object,
        stdin: int | None = None,
        env: dict[str, str] | None = None,
        verb: tuple[str, ...] = ("live",),
    ) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, *verb, *map(str, args), "--json"],
            stdin=stdin,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(self.process.stderr)

    def children(self, name: str) -> list[int]:
        """Processes of the session by the name of their node, found by what they hold in their command line."""
        found = []
        for pid in descendants(self.process.pid):
            try:
                comm = Path(f"/proc/{pid}/comm").read_text().strip()
            except OSError:
                continue
            if comm == f"mmrnn-{name}"[:15]:
                found.append(pid)
        return found

    def wait_for(self, what: Callable[[], Any], seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if got := what():
                return got
            time.sleep(0.02)
        raise AssertionError(f"it did not happen in {seconds} s: {self.lines}")

    def end(self, number: int = signal.SIGINT) -> tuple[int, dict[str, Any], float]:
        began = time.monotonic()
        self.process.send_signal(number)
        return (*self.finish(), time.monotonic() - began)

    def finish(self) -> tuple[int, dict[str, Any]]:
        assert self.process.stdout is not None
        out = self.process.stdout.read()
        code = self.process.wait(60)
        self.close()
        return code, json.loads(out.splitlines()[-1]) if out else {}

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(5)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


TAKE_TERMINAL = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
)


def in_terminal(command: list[str], env: dict[str, str] | None = None) -> tuple[subprocess.Popen[bytes], int]:
    """A program in a terminal of its own, and the terminal's other end: closing it closes the terminal."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TAKE_TERMINAL, *command],
        stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    return process, ours


def descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    out, queue = [], [pid]
    while queue:
        for child in children.get(queue.pop(), []):
            out.append(child)
            queue.append(child)
    return out


def recording_grows(path: Path, beyond: int) -> bool:
    return path.exists() and path.stat().st_size > beyond


def recorded(path: Path, topic: str) -> list[Any]:
    """The messages of a topic in a recording that may have just begun."""
    try:
        return list(Recording(path).envelopes({topic}))
    except StreamError:
        return []
