"""The simulations: one engine's queue, sessions over a day, partitions over engines, a rack that dies. Seeded and pure.

An engine's step of n ticks takes `call + n * tick` and now and then a disturbance; everything else follows from when
ticks are due. Knows nothing about where its figures come from, nor how they are told.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

TICK_S = 0.04
BATCH = 64
"""The most rows of a run on the CPU."""
Floats = npt.NDArray[np.float64]


class Engine(NamedTuple):
    """What a step takes, in seconds."""

    call_s: float
    tick_s: float
    late_s: tuple[float, ...] = (0.0,)
    """By how much later steps ended than that, as measured: a sample of it is drawn for each."""

    def step_s(self, count: int) -> float:
        return -(-count // BATCH) * self.call_s + count * self.tick_s


def queue(engine: Engine, sessions: int, seconds: float, seed: int) -> Floats:
    """Latencies from the due time, one core, an open loop: whatever is due when a step ends is the next step."""
    rng = np.random.default_rng(seed)
    phases = np.sort(rng.uniform(0, TICK_S, sessions))
    due = (np.arange(int(seconds / TICK_S))[:, None] * TICK_S + phases[None, :]).reshape(-1)
    late = np.asarray(engine.late_s)
    done = np.empty_like(due)
    at, served = 0.0, 0
    while served < len(due):
        at = max(at, due[served])
        ready = int(np.searchsorted(due, at, side="right"))
        at += engine.step_s(ready - served) + float(late[rng.integers(len(late))])
        done[served:ready] = at
        served = ready
    return done - due


def most_sessions(engine: Engine, seed: int, share: float = 1.0) -> int:
    """The most sessions whose p99 is within a share of the tick."""
    low, high = 1, max(int(TICK_S / engine.tick_s), 2)
    while low < high:
        middle = (low + high + 1) // 2
        fits = np.percentile(queue(engine, middle, 2.0, seed), 99) <= share * TICK_S
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def day(peak: int, mean_minutes: float, spread: float, swing: float, seed: int) -> dict[str, Any]:
    """Sessions at once over a day, each minute: Poisson about its mean, as in an M(t)/G/infinity queue.

    Arrivals swing by a sine; sessions last lognormally. The mean is the arrivals' rate folded with the share that is
    still there (S. G. Eick, W. A. Massey, W. Whitt: The physics of the M_t/G/inf queue, Operations Research 41, 1993).
    """
    rng = np.random.default_rng(seed)
    minutes = np.arange(2 * 24 * 60)
    rate = 1 + swing * np.sin(2 * np.pi * (minutes / 1440 - 0.375))
    mu = np.log(mean_minutes) - spread**2 / 2
    ages = np.arange(1440) + 0.5
    there = 1 - _normal((np.log(ages) - mu) / spread)
    mean = np.convolve(rate, there)[: len(minutes)][1440:]
    scale = peak / mean.max()
    at_once = rng.poisson(mean * scale)
    return {
        "peak": int(at_once.max()),
        "mean": float(at_once.mean()),
        "lowest": int(at_once.min()),
        "begun_per_s": float(rate[1440:].mean() * scale / 60),
        "begun_per_s_peak": float(rate[1440:].max() * scale / 60),
    }


def _normal(x: Floats) -> Floats:
    from math import erf

    return np.array([0.5 * (1 + erf(v / 2**0.5)) for v in x])


def fullest(sessions: int, partitions: int, engines: int, seed: int) -> float:
    """The fullest engine over the mean, where sessions are hashed to partitions and whole partitions dealt out."""
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(sessions, np.full(partitions, 1 / partitions))
    of = np.bincount(np.arange(partitions) % engines, counts, minlength=engines)
    return float(of.max() / (sessions / engines))


def rack(
    engines: int,
    dead: int,
    each: int,
    load: float,
    tick_s: float,
    every: int,
    found_s: float,
    fetch_s: float,
    seed: int,
) -> Floats:
    """Seconds that each session of the dead engines is without a new answer.

    Survivors notice after `found_s` (and up to a tenth of it later), fetch a state in `fetch_s` each, and step again
    what came since: up to `every` ticks a session, and those that came meanwhile, with what their own `load` leaves
    them. A session goes on when its own are done; sessions are dealt out evenly and taken in any order.
    """
    rng = np.random.default_rng(seed)
    gaps = []
    taken = np.bincount(rng.integers(0, engines - dead, dead * each), minlength=engines - dead)
    for count in taken:
        noticed = found_s * rng.uniform(1.0, 1.1)
        behind = rng.integers(0, every + 1, count) + noticed / TICK_S
        fetched = noticed + fetch_s * np.arange(1, count + 1)
        # one core: a state's ticks are stepped when the state is there and those before are done
        free, done = 0.0, np.empty(count)
        speed = max(1.0 - load, 1e-3)
        for i in range(count):
            begin = max(free, fetched[i])
            waited = (begin - noticed) / TICK_S
            free = done[i] = begin + (behind[i] + waited) * tick_s / speed
        gaps.append(done)
    return np.concatenate(gaps)
