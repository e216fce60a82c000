"""How long a step takes, how many sessions a GPU holds at 25 Hz, how long the engine takes to be ready.

A step is inputs to the device, the run, outputs back; contenders take turns (`bench.measure`), so that a clock that
falls slows all of them. A round of sessions is one tick of each, in runs of at most the engine's batch, copies into and
out of the runs included; it must be done before the next tick, in 99 of 100 rounds. Knows nothing about tables.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from stream_mmrnn.bench import measure, models
from stream_mmrnn.core.errors import ProcessError
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.graph.runtime import Provider
from stream_mmrnn.predict.engine import StepEngine
from tools.gpu_check.checks import Candidate, block_of, noise, step, ticks_of

TICK_NS = models.TICK_NS
_ROUNDS = 5
_LEAST_CALLS, _MOST_CALLS = 10, 500
_FINE = 0.05
"""The search ends when it knows the number of sessions to this share."""
_ROOT = Path(__file__).parent.parent.parent

_COLD = """
import json, sys, time
began = time.perf_counter()
if sys.argv[2] == "cuda":
    from tools.gpu_check.device import load_libraries
    load_libraries()
loaded = time.perf_counter()
from pathlib import Path
import numpy
from stream_mmrnn.predict.engine import StepEngine
imported = time.perf_counter()
engine = StepEngine(Path(sys.argv[1]), int(sys.argv[3]), sys.argv[2])
made = time.perf_counter()
from tools.gpu_check.checks import ticks_of
ticks = ticks_of(["one"], 0, numpy.zeros((1, 256), numpy.float32))
engine.open("one")
before = time.perf_counter()
engine.step(ticks)
first = time.perf_counter() - before
print(json.dumps({
    "libraries_s": loaded - began, "import_s": imported - loaded, "engine_s": made - imported, "first_step_s": first,
}))
"""


def steps(contenders: Mapping[str, Candidate], batch: int, seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of a step of `batch` rows, by contender; about `seconds` of measuring for each."""
    rng = np.random.default_rng(4)
    slots, fresh, feed = rng.permutation(batch), np.zeros(batch, np.bool_), noise(rng, batch)
    calls: dict[str, Callable[[], object]] = {}
    slowest_ns = 1
    for name, rows in contenders.items():
        bucket = rows.bucket(batch)
        for key, array in feed.items():
            bucket.inputs[key][:batch] = array
        calls[name] = lambda bucket=bucket: bucket.run(slots, fresh, batch)
        calls[name]()
        began_ns = time.perf_counter_ns()
        calls[name]()
        slowest_ns = max(slowest_ns, time.perf_counter_ns() - began_ns)
    each = int(np.clip(seconds * 1e9 / _ROUNDS / slowest_ns, _LEAST_CALLS, _MOST_CALLS))
    return {name: t.service.row() for name, t in measure.interleaved(calls, _ROUNDS, each).items()}


def _p99_ns(once: Callable[[], object], rounds: int) -> int:
    """Of so many rounds, after two; of fewer where it is plain that they are too slow."""
    once()
    once()
    gc.collect()
    seen = Histogram()
    for k in range(rounds):
        began_ns = time.perf_counter_ns()
        once()
        seen.add(time.perf_counter_ns() - began_ns)
        if k == rounds // 10 and seen.percentile(50) > TICK_NS:
            break
    return seen.percentile(99)


def most_sessions(
    round_of: Callable[[int], Callable[[], object]], first: int, most: int, rounds: int
) -> dict[str, Any]:
    """The largest number whose rounds end before the next tick: doubled until it does not, then halved between."""
    seen: dict[int, int] = {}

    def fits(count: int) -> bool:
        seen[count] = _p99_ns(round_of(count), rounds)
        return seen[count] < TICK_NS

    good, bad, count = 0, 0, min(first, most)
    while not bad and good < most:
        if fits(count):
            good, count = count, min(2 * count, most)
        else:
            bad = count
    while bad and bad - good > max(1, int(_FINE * good)) and bad > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return {
        "sessions": good,
        "p99_ms": round(seen[good] / 1e6, 3) if good else None,
        "limit_of_search": good == most,
        "rounds": rounds,
    }


def sessions_of_rows(rows: Candidate, first: int, most: int, rounds: int) -> dict[str, Any]:
    """The rows alone: copies of whole blocks in and out, and the runs."""
    rng = np.random.default_rng(5)
    feed, slots, fresh = noise(rng, most), rng.permutation(most), np.zeros(most, np.bool_)

    def round_of(count: int) -> Callable[[], object]:
        part = {name: array[:count] for name, array in feed.items()}
        return lambda: step(rows, slots[:count], fresh[:count], part)

    return {"batch": rows.batch, **most_sessions(round_of, first, most, rounds)}


def sessions_of_engine(path: Path, provider: Provider, first: int, most: int, rounds: int) -> dict[str, Any]:
    """Through `StepEngine.step`: a Tick object of each session in, a Prediction object of each out."""
    engine = StepEngine(path, most, provider)
    names = [f"session {i}" for i in range(most)]
    for name in names:
        engine.open(name)
    features = noise(np.random.default_rng(6), most)[f"input.{models.MODALITY}"]
    ticks = ticks_of(names, 1, features)

    def round_of(count: int) -> Callable[[], object]:
        part = ticks[:count]
        return lambda: engine.step(part)

    return {"batch": engine.batch, **most_sessions(round_of, first, most, rounds)}


def sessions_of_blocks(path: Path, provider: Provider, first: int, most: int, rounds: int) -> dict[str, Any]:
    """Through `StepEngine.step_block`: columns of all sessions in, matrices of heads out."""
    engine = StepEngine(path, most, provider)
    for i in range(most):
        engine.open(f"session {i}")
    whole = block_of(np.random.default_rng(6).permutation(most), 1, noise(np.random.default_rng(6), most))

    def round_of(count: int) -> Callable[[], object]:
        part = whole.take(np.arange(most) < count)
        return lambda: engine.step_block(part)

    return {"batch": engine.batch, **most_sessions(round_of, first, most, rounds)}


def cold_start(path: Path, provider: Provider, slots: int) -> dict[str, Any]:
    """Seconds until the engine is there and of its first step, in a fresh process.

    Raises:
        ProcessError: it did not get that far.

    """
    paths = [str(_ROOT), *(str(Path(entry or ".").resolve()) for entry in sys.path)]
    ran = subprocess.run(
        [sys.executable, "-c", _COLD, str(path), provider, str(slots)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode != 0:
        last = (ran.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ProcessError(f"the engine did not start in a process of its own: {last}")
    said = json.loads(ran.stdout.splitlines()[-1])
    return {"slots": slots, **{name: round(seconds, 4) for name, seconds in said.items()}}
