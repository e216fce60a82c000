"""Two signals to a process of its own: what they do to it depends on what it has begun."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

PROGRAM = """
import os, signal, sys, time
from stream_mmrnn.core.signals import ENDING, held, ignore
ENDING.in_order = lambda: {in_order}
ENDING.at_once = lambda: print("left nothing", flush=True)
ENDING.watch()
with held():
    print("ready", flush=True)
    sys.stdin.readline()  # a signal was sent
    print("held", flush=True)
{body}
"""
WAITS = "while ENDING.alive(): time.sleep(0.01)\nprint('asked', flush=True)\nsys.stdin.readline()\nprint('in order')"


def run(in_order: bool, body: str, *numbers: signal.Signals) -> tuple[int, list[str]]:
    """Exit code and what was printed; each signal is sent when the program has said that it waits for one."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(in_order=in_order, body=body)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert program.stdin
    assert program.stdout
    said = [program.stdout.readline().strip()]
    for i, number in enumerate(numbers):
        if i:
            said += [line.strip() for line in iter(program.stdout.readline, "asked\n")]
        program.send_signal(number)
        if not i:
            program.stdin.write("\n")
            program.stdin.flush()
    out, _ = program.communicate("\n", timeout=60)
    return program.returncode, said + out.splitlines()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_requests_a_graceful_shutdown(number: signal.Signals) -> None:
    assert run(True, WAITS, number) == (0, ["ready", "held", "asked", "in order"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_where_nothing_has_begun_it_ends_at_once_and_leaves_nothing(number: signal.Signals) -> None:
    assert run(False, WAITS, number) == (0, ["ready", "held", "left nothing"])


def test_a_second_signal_ends_at_once() -> None:
    code, said = run(True, WAITS, signal.SIGTERM, signal.SIGINT)
    assert (code, said) == (130, ["ready", "held", "left nothing"])


def test_ignored_ones_do_nothing_however_they_were_held_back() -> None:
    body = "with held():\n    os.kill(os.getpid(), signal.SIGTERM)\n    ignore()\nprint('still here')"
    code, said = run(False, "ENDING.watch()\n" + body)
    assert (code, said) == (0, ["ready", "held", "still here"])
