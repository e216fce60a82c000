"""Two signals to a process of its own: what they do to it depends on what it has begun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import in_terminal

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
    done = tmp_path / "done"
    body = f"while ENDING.alive(): time.sleep(0.01)\nprint('a summary', flush=True)\nopen({str(done)!r}, 'w').close()"
    process, terminal = in_terminal([sys.executable, "-c", PROGRAM.format(in_order=True, body=body)])
    os.write(terminal, b"\n")
    said = b""
    while b"held\r\n" not in said:
        said += os.read(terminal, 1024)
    os.close(terminal)
    assert process.wait(30) == 0
    assert done.exists()


# does not return to Python, as a model's step with an endless loop
STUCK = "import hashlib\nprint('stuck', flush=True)\nhashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
LONG = "stream_mmrnn.core.signals._STUCK_S = 1e9"
SHORT = "stream_mmrnn.core.signals._STUCK_S = 0.2"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no signals to single processes")
@pytest.mark.parametrize(
    ("before", "signals", "code"),
    [(SHORT, 1, 1), (LONG, 2, 130), (f"{SHORT}\nENDING.unwinding()", 2, 130)],
    ids=["once, after a while", "twice, at once", "unwinding, twice"],
)
def test_a_signal_ends_what_never_comes_back_to_python(before: str, signals: int, code: int) -> None:
    body = f"import stream_mmrnn.core.signals\n{before}\n{STUCK}"
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(in_order=True, body=body)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert program.stdin
    assert program.stdout
    program.stdin.write("\n")
    program.stdin.flush()
    assert [program.stdout.readline() for _ in range(3)] == ["ready\n", "held\n", "stuck\n"]
    try:
        for _ in range(signals):
            time.sleep(0.5)
            program.send_signal(signal.SIGINT)
        out, err = program.communicate(timeout=30)
    finally:
        program.kill()
    assert program.returncode == code
    assert err == "error: a step of the model, or another operation, does not end; stopped without it\n"
    assert out == ("" if "unwinding" in before else "left nothing\n")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no signals to single processes")
def test_a_slow_shutdown_is_not_taken_for_a_stuck_one() -> None:
    """It reacted to the signal: then it may take as long as it needs."""
    body = f"import stream_mmrnn.core.signals\n{SHORT}\nwhile ENDING.alive(): time.sleep(0.01)\n"
    body += (
        "import hashlib\nprint('asked', flush=True)\nhashlib.pbkdf2_hmac('sha256', b'', b'', 10**6)\nprint('in order')"
    )
    assert run(True, body, signal.SIGTERM) == (0, ["ready", "held", "asked", "in order"])
