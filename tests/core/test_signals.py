"""Two signals to a process of its own: what they do to it depends on what it has begun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

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


SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_requests_a_graceful_shutdown(number: signal.Signals) -> None:
    assert run(True, WAITS, number) == (0, ["ready", "held", "asked", "in order"])


@pytest.mark.parametrize("number", SIGNALS)
def test_where_nothing_has_begun_it_ends_at_once_and_leaves_nothing(number: signal.Signals) -> None:
    assert run(False, WAITS, number) == (0, ["ready", "held", "left nothing"])


def test_a_second_signal_ends_at_once() -> None:
    code, said = run(True, WAITS, signal.SIGTERM, signal.SIGINT)
    assert (code, said) == (130, ["ready", "held", "left nothing"])


def test_ignored_ones_do_nothing_however_they_were_held_back() -> None:
    body = "with held():\n    os.kill(os.getpid(), signal.SIGTERM)\n    ignore()\nprint('still here')"
    code, said = run(False, "ENDING.watch()\n" + body)
    assert (code, said) == (0, ["ready", "held", "still here"])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
def test_what_was_started_to_outlive_the_terminal_goes_on() -> None:
    body = "os.kill(os.getpid(), signal.SIGHUP)\nprint(ENDING.alive())"
    program = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + PROGRAM.format(in_order=True, body=body)
    done = subprocess.run([sys.executable, "-c", program], input="\n", capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "True"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
def test_a_closed_terminal_does_not_end_the_shutdown(tmp_path: Path) -> None:
    """It is written to after it is gone, and the shutdown still comes to its end."""
    import pty

    done = tmp_path / "done"
    body = f"while ENDING.alive(): time.sleep(0.01)\nprint('a summary', flush=True)\nopen({str(done)!r}, 'w').close()"
    program = PROGRAM.format(in_order=True, body=body)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", program])
    os.write(terminal, b"\n")
    said = b""
    while b"held" not in said:
        said += os.read(terminal, 1024)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert done.exists()
