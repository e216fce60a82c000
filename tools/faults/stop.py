"""SIGTERM, SIGINT and SIGHUP at seeded moments of start-up, run and shutdown, to the process and to its whole group."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from stream_mmrnn.core.errors import StreamError
from stream_mmrnn.recording.mcap_file import Recording
from tools.faults.commands import Command, command, wait_for
from tools.faults.promise import Figure, Say

TITLE = "Stop"
NOT_PROMISED = (
    (
        "A signal before the first line of this program (Python itself is not up yet) ends the process as the system "
        "does it, with the signal's exit code; nothing was begun, and nothing is left."
    ),
    "A second signal ends at once: a file that was being written ends where it is, and `verify` says so.",
)
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_BOUND_S = 2.0
_HANGS_S = 15.0
_VERBS = {
    "live": ("live", "--source", "synthetic", "--record", "FOLDER/a.mcap"),
    "record": ("record", "FOLDER/a.mcap", "--source", "synthetic"),
}


class End(NamedTuple):
    """How a command ended after its last signal."""

    what: str
    took_s: float
    stood_s: float
    """For how long this program, which does nothing, was not let run meanwhile: what the machine itself took."""
    code: int
    early: bool
    """The signal came before the program's first line."""
    processes: int
    files: int
    recording: str
    """`none`, `finished` or `unfinished`."""


def _end(running: Command, path: Path, what: str, early: bool = False) -> End:
    began_s = looked_s = time.monotonic()
    stood_s = 0.0
    while (code := running.process.poll()) is None and looked_s - began_s < _HANGS_S:
        time.sleep(0.005)
        stood_s = max(stood_s, time.monotonic() - looked_s)
        looked_s = time.monotonic()
    took_s = looked_s - began_s
    code = 255 if code is None else code
    processes, files = running.left_behind()
    state = "none"
    if path.exists():
        state = "unfinished"
        try:
            recording = Recording(path)
            for _ in recording.batches():
                pass
            if recording.end and not recording.damage:
                state = "finished"
        except StreamError:
            pass
    return End(what, took_s, stood_s, code, early, len(processes), len(files), state)


class _Draw:
    """Which verb, which signal and to whom, each in turn; the moments by seed."""

    def __init__(self, seed: int) -> None:
        self._number = 0
        self.rng = random.Random(seed)

    def __call__(self) -> tuple[str, signal.Signals, bool]:
        n = self._number
        self._number += 1
        return ("live", "record")[n % 2], _SIGNALS[n // 2 % len(_SIGNALS)], bool(n // 4 % 2)


def _name(verb: str, number: signal.Signals, group: bool, when: str) -> str:
    return f"{number.name} to {'the group of ' if group else ''}{verb} {when}"


def _signalled(draw: _Draw, when: str, moment_s: float, *more: object) -> End:
    """One signal `moment_s` after the start, or after the file was begun where `when` says so."""
    verb, number, group = draw()
    with command(*_VERBS[verb], *more) as (running, folder):
        path = folder / "a.mcap"
        if when == "start":
            time.sleep(max(running.began_s + moment_s - time.monotonic(), 0))
        else:
            wait_for(lambda: path.exists() or running.process.poll() is not None)
            time.sleep(moment_s)
        early = not running.watched and running.process.poll() is None
        running.send(number, group)
        return _end(running, path, _name(verb, number, group, f"{moment_s:.3f} s after {when}"), early)


def _twice(draw: _Draw, when: str, moment_s: float, gap_s: float) -> End:
    """A second signal `gap_s` after the first."""
    verb, number, group = draw()
    with command(*_VERBS[verb]) as (running, folder):
        path = folder / "a.mcap"
        if when == "start":
            wait_for(lambda: running.watched)
        else:
            wait_for(path.exists)
        time.sleep(moment_s)
        running.send(number, group)
        time.sleep(gap_s)
        running.send(number, group)
        return _end(running, path, _name(verb, number, group, f"{gap_s:.3f} s after the first"))


def run(quick: bool, say: Say) -> Iterator[Figure]:
    draw = _Draw(5)
    with command(*_VERBS["live"]) as (running, folder):
        wait_for(lambda: running.watched)
        first_line_s = time.monotonic() - running.began_s
        wait_for(lambda: (folder / "a.mcap").exists())
        up_s = time.monotonic() - running.began_s + 0.4
    say(f"the first line after {first_line_s * 1000:.0f} ms, the session up after some {up_s:.2f} s")

    starts = sorted(draw.rng.uniform(0, up_s) for _ in range(2 if quick else 28))
    runs = [draw.rng.uniform(0.5, 1.5) for _ in range(1 if quick else 6)]
    ends = [draw.rng.uniform(0.6, 1.8) for _ in range(1 if quick else 8)]
    single: list[End] = []
    for moment_s in starts:
        single.append(_signalled(draw, "start", moment_s))
    for moment_s in runs:
        single.append(_signalled(draw, "the file was begun", moment_s))
    for moment_s in ends:
        single.append(_signalled(draw, "the file was begun, of a session of 0.5 s", moment_s, "--duration", 0.5))
    double = [
        _twice(draw, when, draw.rng.uniform(0, most_s), draw.rng.uniform(0, 0.3))
        for when, most_s in (("the file", 1.0),) * (1 if quick else 6) + (("start", up_s),) * (0 if quick else 2)
    ]
    for end in (*single, *double):
        broken = end in single and (end.took_s > _BOUND_S or end.code or end.recording == "unfinished")
        if broken or end.processes or end.files:
            say(f"{end}")
    after = [e for e in single if not e.early]
    count = (
        f"{len(single)} signals from 0 s on: {len(starts)} at the start, {len(runs)} in the run, {len(ends)} at its end"
    )
    yield Figure(
        "stop_slowest_s", f"{count}; the longest until the command was gone", max(e.took_s for e in single), "s",
        _BOUND_S, timed=True,
    )  # fmt: skip
    yield Figure(
        "stop_late_count", "of them, how many took more than 2 s", sum(e.took_s > _BOUND_S for e in single), "commands",
        0, "==", timed=True,
    )  # fmt: skip
    yield Figure(
        "stop_exit_code_count",
        f"exit codes other than 0, of the {len(after)} that came after the program's first line",
        sum(e.code != 0 for e in after), "commands", 0, "==",
    )  # fmt: skip
    yield Figure(
        "stop_unfinished_count",
        f"recordings without their end, of {sum(e.recording != 'none' for e in single)} that were begun",
        sum(e.recording == "unfinished" for e in single), "files", 0, "==",
    )  # fmt: skip
    yield Figure(
        "stop_orphans_count", "processes left 1 s after the last signal", sum(e.processes for e in (*single, *double)),
        "processes", 0, "==",
    )  # fmt: skip
    yield Figure(
        "stop_left_files_count", "sockets and folders left in the temporary folder, one signal or two",
        sum(e.files for e in (*single, *double)), "files", 0, "==",
    )  # fmt: skip
    yield Figure(
        "stop_second_signal_s", f"{len(double)} commands with a second signal up to 0.3 s after the first: the longest "
        "from it to their end", max(e.took_s for e in double), "s", 0.5, timed=True,
    )  # fmt: skip
    yield Figure(
        "stop_first_line_ms", "from the start of the process until it takes signals", first_line_s * 1000, "ms", 100,
        timed=True,
    )  # fmt: skip
