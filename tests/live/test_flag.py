"""The flags between the supervisor and its processes."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
import time

import pytest

from stream_mmrnn.live.nodes import Flag


def test_it_stays_set_for_everybody() -> None:
    flag = Flag(multiprocessing.get_context("spawn"))
    assert not flag.is_set()
    assert not flag.wait(0.01)
    flag.set()
    flag.set()
    assert flag.is_set()
    assert flag.wait(0)
    assert flag.wait()


def _wait(flag: Flag) -> None:
    flag.wait(60)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_process_that_was_killed_while_it_waited_holds_up_nobody() -> None:
    context = multiprocessing.get_context("spawn")
    flag = Flag(context)
    process = context.Process(target=_wait, args=(flag,))
    process.start()
    time.sleep(2)  # it waits by now; if not, the test proves less and still holds
    process.kill()
    process.join(10)
    assert process.exitcode == -signal.SIGKILL
    setter = threading.Thread(target=flag.set, daemon=True)
    setter.start()
    setter.join(10)
    assert not setter.is_alive()
    assert flag.is_set()
