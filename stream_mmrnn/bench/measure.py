"""The harness: contenders in turn, hot or paced, each call in a histogram, ratios pair by pair.

Whatever slows the machine down slows all contenders, because they take turns; so ratios hold where times do not.
`paced` is an open loop: a call's intended time is fixed beforehand and its latency counts from there, whatever the
calls before it did (no coordinated omission). Knows nothing about what is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Literal, TypeAlias

import numpy as np

from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.latency import Histogram

Contenders: TypeAlias = Mapping[str, Callable[[], object]]
Sampler: TypeAlias = Callable[[int], list[int]]
"""Makes so many calls, here or in another process, and gives the nanoseconds of each."""
Arrivals: TypeAlias = Literal["constant", "poisson"] | Sequence[float]
"""When calls are due: evenly, at random with the same mean rate, or at these seconds from the beginning."""

_BEFORE_NS = 1_000_000


class Timing:
    """What was measured of one contender."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.latency = Histogram()
        """Paced: from the intended time to the call's end. Hot: as `service`, for there is nothing to wait for."""
        self.service = Histogram()
        """From the call's begin to its end."""
        self.rounds: list[float] = []
        """Median latency of each round, in nanoseconds."""
        self.service_rounds: list[float] = []
        """Median service time of each round, in nanoseconds."""

    def add_round(self, latencies_ns: Sequence[int], services_ns: Sequence[int]) -> None:
        for value_ns in latencies_ns:
            self.latency.add(value_ns)
        for value_ns in services_ns:
            self.service.add(value_ns)
        self.rounds.append(statistics.median(latencies_ns))
        self.service_rounds.append(statistics.median(services_ns))

    def row(self) -> dict[str, dict[str, float]]:
        """Milliseconds, for a document."""
        return {"latency_ms": self.latency.row(), "service_ms": self.service.row()}


def ratios(timings: Mapping[str, Timing], baseline: str, *, service: bool = False) -> dict[str, float]:
    """Each contender's time over the baseline's: the median, over the rounds, of the ratio within a round."""

    def medians(timing: Timing) -> list[float]:
        return timing.service_rounds if service else timing.rounds

    base = medians(timings[baseline])
    return {
        name: statistics.median(a / b for a, b in zip(medians(timing), base, strict=True))
        for name, timing in timings.items()
    }


def sampled(call: Callable[[], object]) -> Sampler:
    """A contender of this process as `turns` wants it."""

    def sample(calls: int) -> list[int]:
        took_ns = [0] * calls
        for i in range(calls):
            began_ns = time.perf_counter_ns()
            call()
            took_ns[i] = time.perf_counter_ns() - began_ns
        return took_ns

    return sample


def turns(samplers: Mapping[str, Sampler], rounds: int, calls: int) -> dict[str, Timing]:
    """Hot: `calls` calls of A, then of B, of C, and again, `rounds` times, after a round that is thrown away."""
    timings = {name: Timing(name) for name in samplers}
    for number in range(rounds + 1):
        for name, sample in samplers.items():
            took_ns = sample(calls)
            if number:
                timings[name].add_round(took_ns, took_ns)
    return timings


def interleaved(contenders: Contenders, rounds: int, calls: int) -> dict[str, Timing]:
    """`turns` of contenders that are all in this process."""
    return turns({name: sampled(call) for name, call in contenders.items()}, rounds, calls)


def due_times(arrivals: Arrivals, rate_hz: float, duration_s: float, seed: int = 0) -> list[float]:
    """Intended times in seconds from the beginning, in order, all before `duration_s`."""
    if arrivals == "constant":
        return [i / rate_hz for i in range(int(duration_s * rate_hz))]
    if arrivals == "poisson":
        rng = np.random.default_rng(seed)
        gaps = rng.exponential(1 / rate_hz, int(2 * duration_s * rate_hz) + 20)
        return [float(t) for t in np.cumsum(gaps) if t < duration_s]
    if isinstance(arrivals, str):
        raise UsageError(f"there are no arrivals {arrivals!r}; use constant, poisson or a list of seconds")
    return sorted(float(t) for t in arrivals if 0 <= t < duration_s)


def sleep_until(due_ns: int, clock_ns: Callable[[], int] = time.perf_counter_ns) -> None:
    """Return at `due_ns` or a little later; never busy."""
    while (left_ns := due_ns - clock_ns()) > 0:
        time.sleep(left_ns / 1e9)


def _stretch(call: Callable[[], object], hook: Callable[[], object] | None, due: Sequence[int], timing: Timing) -> None:
    """One contender's calls of one stretch; `due` is in nanoseconds of `time.perf_counter_ns`."""
    latencies_ns, services_ns = [0] * len(due), [0] * len(due)
    for i, due_ns in enumerate(due):
        if hook is not None and time.perf_counter_ns() < due_ns - _BEFORE_NS // 2:
            sleep_until(due_ns - _BEFORE_NS)
            hook()
        sleep_until(due_ns)
        began_ns = time.perf_counter_ns()
        call()
        ended_ns = time.perf_counter_ns()
        latencies_ns[i], services_ns[i] = ended_ns - due_ns, ended_ns - began_ns
    timing.add_round(latencies_ns, services_ns)


def paced(
    contenders: Contenders,
    rate_hz: float,
    duration_s: float,
    *,
    before: Mapping[str, Callable[[], object]] | None = None,
    arrivals: Arrivals = "constant",
    seed: int = 0,
    stretch_s: float = 1.0,
    alive: Callable[[], bool] = lambda: True,
) -> dict[str, Timing]:
    """Paced: each contender is called at `rate_hz` for `duration_s`, in stretches of `stretch_s` taken in turn.

    All contenders get the same arrivals. `before` names what is called about 1 ms ahead of a contender's deadlines
    (to warm it); it is left out where the contender is late already. A stretch begins when the one before it has
    ended, so that no contender pays for another's backlog. Between deadlines the process sleeps: what a busy wait would
    measure is another program.
    """
    timings = {name: Timing(name) for name in contenders}
    lead_ns = 20_000_000
    for number, group in groupby(due_times(arrivals, rate_hz, duration_s, seed), lambda t: int(t // stretch_s)):
        offsets_ns = [int((t - number * stretch_s) * 1e9) for t in group]
        for name, call in contenders.items():
            if not alive():
                return timings
            start_ns = time.perf_counter_ns() + lead_ns
            hook = (before or {}).get(name)
            _stretch(call, hook, [start_ns + o for o in offsets_ns], timings[name])
    return timings
