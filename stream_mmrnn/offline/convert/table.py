"""Convert a table (CSV or Parquet) to a recording of signals.

Rows are processed like live samples, with clock messages between. Knows nothing about the layout of tables
(`table_file`) or of recordings.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from stream_mmrnn.capture.encoders.signal import SignalEncoder
from stream_mmrnn.core import topics
from stream_mmrnn.core.durations import NANOSECONDS
from stream_mmrnn.core.errors import FileError
from stream_mmrnn.core.settings import StreamSettings
from stream_mmrnn.core.types import Envelope, Sample
from stream_mmrnn.core.wire import encodable
from stream_mmrnn.offline.convert.imported import (
    CONFIRM_NS,
    FIRST_NS,
    JUMP_NS,
    TAIL_NS,
    Messages,
    described,
    without_devices,
    write,
)
from stream_mmrnn.offline.convert.table_file import TableOptions, TableStream, read

_CLOCK_NS = 10_000_000

Row = tuple[int, int, Sample]
"""Event time, number of the stream, and the sample."""


def convert(
    path: Path,
    out: Path,
    options: TableOptions,
    session: str = "imported",
    progress: Callable[[float], None] = lambda _: None,
) -> dict[str, Any]:
    """Convert a table to a recording; `progress` is called with the share that is done.

    A row with a missing value gives no sample of the stream that the value is in.

    Raises:
        FileError: `path` is no table or has rows that cannot be used, or `out` exists already or cannot be written.
        UsageError: an option is wrong or does not fit the table.

    """
    table = read(path, options)
    used = [s for s in table.streams if s.whole.any()]
    if not used:
        raise FileError(f"{path} has no row without a missing value; choose fewer columns with --stream")
    begin_ns, end_ns = (int(f(s.times_ns[s.whole][i] for s in used)) for f, i in ((min, 0), (max, -1)))
    # whole weeks, so that days and weeks stay on the grid of ticks
    shift_ns = max(-(-(FIRST_NS - begin_ns) // NANOSECONDS["w"]), 0) * NANOSECONDS["w"]
    span_ns = begin_ns + shift_ns, end_ns + shift_ns
    source = f"table:{encodable(path.name)}"
    settings = without_devices(session, {s.name: StreamSettings(source=source, kind="signal") for s in used})
    counts = write(
        out,
        settings,
        _messages(used, session, span_ns, shift_ns),
        span_ns,
        {
            "imported_from": encodable(path.name),
            "imported_shift_ns": str(shift_ns),
            "columns": msgspec.json.encode({s.name: s.columns for s in used}).decode(),
            "step_ns": str(min((s.step_ns for s in used if s.step_ns), default=0)),
        },
        -shift_ns,
        progress,
    )
    return {
        **described(out, path, settings, span_ns),
        "messages": counts,
        "shift_s": shift_ns // NANOSECONDS["s"],
        "left_out": table.left_out,
        "streams": [_about(s) for s in table.streams],
    }


def _about(stream: TableStream) -> dict[str, Any]:
    steps = np.diff(stream.times_ns)
    return {
        "name": stream.name,
        "columns": list(stream.columns),
        "rows": len(stream.times_ns),
        "samples": int(stream.whole.sum()),
        "missing": {c: n for c, n in zip(stream.columns, np.isnan(stream.values).sum(0).tolist(), strict=True) if n},
        "step_s": stream.step_ns / 1e9,
        "gaps": int((steps > 1.5 * stream.step_ns).sum()),
        "longest_gap_s": float(steps.max()) / 1e9 if len(steps) else 0.0,
    }


def _rows(number: int, stream: TableStream, shift_ns: int) -> Iterator[Row]:
    whole = stream.whole
    for at_ns, values in zip((stream.times_ns[whole] + shift_ns).tolist(), stream.values[whole], strict=True):
        yield at_ns, number, Sample(at_ns, at_ns, values)


def _messages(used: list[TableStream], session: str, span_ns: tuple[int, int], shift_ns: int) -> Iterator[Envelope]:
    """The messages that the bus would have carried, in order."""
    made, names = Messages(session), [s.name for s in used]
    begin_ns, end_ns = span_ns
    yield made.session("open", begin_ns - 1, names)
    clock_ns = begin_ns - 1
    for at_ns, number, sample in heapq.merge(*(_rows(i, s, shift_ns) for i, s in enumerate(used))):
        if at_ns - clock_ns > TAIL_NS + CONFIRM_NS:
            yield made.clock(clock_ns := clock_ns + TAIL_NS)  # what came before is complete
            if at_ns - clock_ns > JUMP_NS:
                yield made.clock(at_ns - CONFIRM_NS)
        if at_ns - clock_ns >= _CLOCK_NS or clock_ns < begin_ns:
            yield made.clock(clock_ns := at_ns)
        (vector,) = SignalEncoder().encode(sample)
        yield made.of(topics.FEATURE + names[number], vector, at_ns, SignalEncoder.origin)
    yield made.clock(end_ns + TAIL_NS)
    yield made.session("close", end_ns + TAIL_NS, names)
