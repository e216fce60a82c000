"""Give samples with known event times at the pace of the clock: what file and synthetic streams share.

Knows nothing about where the samples come from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.types import Payload, Sample

JOIN_NS = 500_000_000
"""A stream that starts late leaves out what is older than this: it joins in, it does not burst."""
_LOOK_S = 0.05


def wait_until(when_ns: int, alive: Callable[[], bool]) -> bool:
    """Sleep until `when_ns`, looking at `alive` all the while; what `alive` said last."""
    while (left_ns := when_ns - now_ns()) > 0:
        if not alive():
            return False
        time.sleep(min(left_ns / 1e9, _LOOK_S))
    return alive()


class ScheduledSample:
    """One sample to come: when it was, how much later it is delivered, and how to make its data.

    Without `make` it is lost on its way: time passes, and nothing comes.
    """

    __slots__ = ("delay_ns", "event_ns", "make")

    def __init__(self, event_ns: int, make: Callable[[], Payload] | None, delay_ns: int = 0) -> None:
        self.event_ns, self.make, self.delay_ns = event_ns, make, delay_ns


def pace(schedule: Iterable[ScheduledSample], alive: Callable[[], bool], *, paced: bool) -> Iterator[Sample]:
    """Each reading as a sample when its time has come; where not `paced`, at once and stamped as if in time."""
    joined = not paced
    for due in schedule:
        if not alive():
            return
        if not joined:
            # asked anew for every sample: passing over the beginning takes time, too
            if due.event_ns < now_ns() - JOIN_NS:
                continue
            joined = True
        if due.make is None:
            if paced and not wait_until(due.event_ns, alive):
                return
            continue
        data = due.make()  # before the wait, so that the work makes nothing late
        if not paced:
            yield Sample(due.event_ns, due.event_ns, data)
        elif wait_until(due.event_ns + due.delay_ns, alive):
            yield Sample(due.event_ns, now_ns(), data)
        else:
            return
