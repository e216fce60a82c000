from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from tools.faults.determinism import _Sum
from tools.faults.soak import _grown
from tools.soak.run import hour_slope, least, look, medians, step_slope

pytestmark = pytest.mark.process


def test_a_steady_growth_is_seen_under_what_comes_and_goes() -> None:
    rng = np.random.default_rng(0)
    held = [(t / 2, 20.0 + t / 2 * 0.01 + 5.0 * (rng.random() < 0.3)) for t in range(120)]
    # 0.01 MB a second of the wall at 20 times real time
    assert hour_slope(least(held), 20.0) == pytest.approx(0.01 * 3600 / 20, rel=0.15)
    flat = [(t / 2, 20.0 + 5.0 * (rng.random() < 0.3)) for t in range(120)]
    assert hour_slope(least(flat), 20.0) == pytest.approx(0.0, abs=0.01)


def test_a_step_is_no_leak_and_a_leak_is_no_step() -> None:
    step = [(t / 2, 20.0 + 5.0 * (t > 70)) for t in range(120)]
    assert step_slope(step, 20.0) == 0.0
    assert hour_slope(least(step), 20.0) > 1.0
    leak = [(t / 2, 20.0 + t / 2 * 0.01 + 5.0 * (t > 70)) for t in range(120)]
    assert step_slope(leak, 20.0) == pytest.approx(0.01 * 3600 / 20, rel=0.15)


def test_medians_of_parts() -> None:
    points = [(float(t), 1.0 + t / 100) for t in range(100)] + [(50.0, 1000.0)]
    found = medians(points, 100.0, 10)
    assert len(found) == 10
    assert hour_slope(found, 1.0) == pytest.approx(36.0, rel=0.05)


TAKER = """
import os, sys, threading
print("here", flush=True)
input()
held = [open(os.devnull) for _ in range(5)]
taken = os.urandom(1 << 23)
threading.Thread(target=threading.Event().wait, daemon=True).start()
print("taken", flush=True)
input()
"""


def test_a_process_is_seen_to_take_files_threads_and_memory() -> None:
    with subprocess.Popen([sys.executable, "-c", TAKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        child.stdout.readline()
        before = look(child.pid, 0.0)
        child.stdin.write(b"\n")
        child.stdin.flush()
        child.stdout.readline()
        after = look(child.pid, 1.0)
        child.kill()
    assert (after.fds - before.fds, after.threads - before.threads) == (5, 1)
    assert after.uss_mb - before.uss_mb > 7.5
    assert look(child.pid, 2.0) == (2.0, 0.0, 0, 0)
    assert _grown([before.fds] * 4 + [after.fds] * 4) == 5
    assert _grown([3, 5, 3, 5, 3, 5, 3, 5]) == 0


def test_a_bit_of_a_prediction_changes_its_sum() -> None:
    def of(value: float, present: bool = True, index: int = 1) -> str:
        found = _Sum()
        found.add(index, 2, {"a": present}, {"a": 3}, {"h": np.array([value], np.float32).tobytes()})
        return found.hexdigest()

    same = of(0.1)
    assert of(0.1) == same
    assert len({same, of(float(np.nextafter(np.float32(0.1), np.float32(1)))), of(0.1, False), of(0.1, True, 2)}) == 4
