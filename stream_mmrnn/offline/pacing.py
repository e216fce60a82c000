"""Deliver a recording's messages at the rate at which they were published, or a multiple of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import msgspec

from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.types import Envelope


def pace(envelopes: Iterable[Envelope], speed: float, alive: Callable[[], bool] = lambda: True) -> Iterator[Envelope]:
    """The same messages at `speed` times the rate at which they were published."""
    start_ns = first_ns = None
    for envelope in envelopes:
        if start_ns is None or first_ns is None:
            start_ns, first_ns = now_ns(), envelope.publish_ns
        due_ns = start_ns + int((envelope.publish_ns - first_ns) / speed)
        while (left_ns := due_ns - now_ns()) > 0 and alive():
            time.sleep(min(left_ns / 1e9, 0.1))
        if not alive():
            return
        yield msgspec.structs.replace(envelope, received_ns=now_ns())
