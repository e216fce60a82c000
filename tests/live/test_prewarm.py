from __future__ import annotations

import subprocess
import sys

import pytest

from stream_mmrnn.live.prewarm import LEAD_NS, Prewarmer

pytestmark = pytest.mark.process

PERIOD_NS = 40_000_000


def test_it_runs_once_a_little_before_the_next_step_is_expected() -> None:
    ran: list[int] = []
    slept: list[float] = []
    prewarmer = Prewarmer(lambda: ran.append(1), PERIOD_NS, sleep=slept.append)
    assert prewarmer.wait_ms(0, 100) == 100
    assert not prewarmer.run_if_due(0)
    prewarmer.stepped(1_000_000_000)
    due_ns = 1_000_000_000 + PERIOD_NS - LEAD_NS
    assert prewarmer.wait_ms(1_000_000_000, 100) == 39
    assert not prewarmer.run_if_due(due_ns - 1_000_001)
    assert prewarmer.wait_ms(due_ns - 500_000, 100) == 0
    # what is nearer than a socket can wait is slept for
    assert prewarmer.run_if_due(due_ns - 500_000)
    assert slept == [0.0005]
    assert not prewarmer.run_if_due(due_ns)
    assert (len(ran), prewarmer.runs) == (1, 1)
    prewarmer.stepped(2_000_000_000)
    assert prewarmer.run_if_due(2_000_000_000 + PERIOD_NS - LEAD_NS)
    assert slept == [0.0005]


def test_a_step_that_came_sooner_moves_the_expectation_on() -> None:
    prewarmer = Prewarmer(lambda: None, PERIOD_NS)
    prewarmer.stepped(0)
    prewarmer.stepped(30_000_000)
    assert not prewarmer.run_if_due(PERIOD_NS)
    assert prewarmer.run_if_due(30_000_000 + PERIOD_NS - LEAD_NS)


def test_what_has_ended_is_not_warmed_for() -> None:
    ran: list[int] = []
    prewarmer = Prewarmer(lambda: ran.append(1), PERIOD_NS)
    prewarmer.stepped(0)
    assert not prewarmer.run_if_due(10 * PERIOD_NS)
    assert prewarmer.wait_ms(10 * PERIOD_NS, 100) == 100
    assert not ran


def test_a_priority_is_given_or_the_reason_is_said() -> None:
    """In a process of its own: what is asked for is had, or one sentence says why not."""
    code = (
        "import os, sys\n"
        "from stream_mmrnn.live.nodes import prioritise\n"
        "assert prioritise('normal') == ''\n"
        "nice, said = os.nice(0), prioritise('nice')\n"
        "assert said == '' and os.nice(0) == max(nice - 10, -20) or \"'nice' was not given\" in said\n"
        "said = prioritise('fifo')\n"
        "assert said == '' and os.sched_getscheduler(0) == os.SCHED_FIFO or \"'fifo' was not given\" in said\n"
    )
    if sys.platform != "linux":
        pytest.skip("other systems have other priorities")
    subprocess.run([sys.executable, "-c", code], check=True)
