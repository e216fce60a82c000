"""Deliver samples with known event times in real time, for file and synthetic sources."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.types import Payload, Sample

JOIN_NS = 500_000_000
"""A stream that starts late skips samples that are older than this, instead of sending them in a burst."""
_POLL_S = 0.05


def wait_until(when_ns: int, alive: Callable[[], bool]) -> bool:
    """Sleep until `when_ns` or until `alive` is false; returns what `alive` returned last."""
    while (left_ns := when_ns - now_ns()) > 0:
        if not alive():
            return False
        time.sleep(min(left_ns / 1e9, _POLL_S))
    return alive()


class ScheduledSample:
    """A sample to deliver: its event time, its extra delay, and a function that makes its data.

    Without `make` the sample is lost: its time passes and nothing is delivered.
    """

    __slots__ = ("delay_ns", "event_ns", "make")

    def __init__(self, event_ns: int, make: Callable[[], Payload] | None, delay_ns: int = 0) -> None:
        self.event_ns, self.make, self.delay_ns = event_ns, make, delay_ns


def pace(schedule: Iterable[ScheduledSample], alive: Callable[[], bool], *, paced: bool) -> Iterator[Sample]:
    """Each sample at its time; if not `paced`, at once, with the stamps that it would have had."""
    joined = not paced
    for due in schedule:
        if not alive():
            return
        if not joined:
            # read the clock for every sample, because skipping takes time, too
            if due.event_ns < now_ns() - JOIN_NS:
                continue
            joined = True
        if due.make is None:
            if paced and not wait_until(due.event_ns, alive):
                return
            continue
        data = due.make()  # before the wait, so that the work does not make the sample late
        if not paced:
            yield Sample(due.event_ns, due.event_ns, data)
        elif wait_until(due.event_ns + due.delay_ns, alive):
            yield Sample(due.event_ns, now_ns(), data)
        else:
            return
