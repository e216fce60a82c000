"""The times of a table's rows, from what the column holds: times, text or numbers. Parsed by pyarrow, never guessed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.durations import NANOSECONDS
from stream_mmrnn.core.errors import FileError, UsageError

MAX_NS = 2**62

Times = npt.NDArray[np.int64]


class TimeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How the times of a table are read."""

    time: str
    """The column with the time of each row."""
    unit: str = ""
    """Of a time column of numbers, which count from 1970: one of `durations.NANOSECONDS`."""
    timezone: str = "UTC"
    """Of times without a zone of their own."""
    time_format: str = ""
    """Pattern of times that are not ISO 8601, as of strptime."""
    covers_ns: int = 0
    """How long a row covers from its time on: its event time is the end."""


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def no_number(column: Any) -> str:
    """Why a column holds no numbers; "" if it does."""
    import pyarrow.types as types

    kind = column.type
    if types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind):
        return ""
    if types.is_null(kind):
        return "is empty"
    example = next((value for value in column.slice(0, 1000).to_pylist() if value is not None), None)
    return f"holds no numbers (for example {str(example)[:40]!r})"


def times_ns_of(path: Path, column: Any, options: TimeOptions) -> Times:
    """The time of each row in nanoseconds since 1970.

    Raises:
        UsageError: an option is wrong, missing or does not fit the column.
        FileError: a row has no time, or one that cannot be used.

    """
    import pyarrow as pa
    import pyarrow.types as types

    if column.null_count:
        row = next(i for i, value in enumerate(column) if not value.is_valid) + 1
        raise FileError(f"{path} has no time in row {row}; every row needs one in the column {options.time!r}")
    kind = column.type
    if types.is_dictionary(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        column = column.cast(pa.string())
    if types.is_date(kind):
        column = column.cast(pa.timestamp("ms"))
    if options.time_format and types.is_integer(kind):
        column = column.cast(pa.string())
    is_text = types.is_string(column.type)
    if options.unit and options.time_format:
        raise UsageError("--unit is for numbers and --time-format for text; use one of them")
    if (options.unit or options.time_format) and types.is_timestamp(column.type):
        raise UsageError(f"the column {options.time!r} holds times already; leave --unit and --time-format out")
    if options.unit:
        times = _counted(path, column, options)
    elif is_text:
        times = _parsed(path, column, options)
    elif types.is_timestamp(column.type):
        times = column
    elif not no_number(column):
        raise UsageError(_unit_missing(options.time))
    else:
        raise UsageError(f"the column {options.time!r} is {kind}, which is no time; expected times, text or numbers")
    return _since_1970(path, times, options)


def _unit_missing(name: str) -> str:
    return f"the column {name!r} holds numbers: say what they count from 1970 by --unit s, ms, us or ns"


def _counted(path: Path, column: Any, options: TimeOptions) -> Any:
    """Times from numbers of a unit."""
    import pyarrow as pa

    if options.unit not in NANOSECONDS:
        raise UsageError(f"--unit is {options.unit!r}; use one of {', '.join(NANOSECONDS)}")
    size = NANOSECONDS[options.unit]
    try:
        counts = np.asarray(_cast(path, column, pa.int64(), options, "a whole number").to_numpy(), np.int64)
        most = MAX_NS // size
        wrong = (counts > most) | (counts < -most)
        times = np.where(wrong, 0, counts) * size
    except FileError:
        if size == 1:
            raise
        numbers = np.asarray(_cast(path, column, pa.float64(), options, "a number").to_numpy(), np.float64)
        wrong = ~(np.abs(numbers) * size <= MAX_NS)
        floor = np.floor(np.where(wrong, 0, numbers))  # apart, because their product has no room for nanoseconds
        fraction = np.where(wrong, 0, numbers) - floor
        times = floor.astype(np.int64) * size + np.rint(fraction * size).astype(np.int64)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise FileError(
            f"{path}: {str(column[row])[:40]!r} {options.unit} in row {row + 1} is no time from 1824 to 2116; "
            "is --unit right?"
        )
    return pa.chunked_array([pa.array(times, pa.timestamp("ns", "UTC"))])


def _parsed(path: Path, column: Any, options: TimeOptions) -> Any:
    """Times from text."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if options.time_format:
        wanted = f"a time like {options.time_format!r}, the --time-format"

        def by_format(part: Any) -> Any:
            return pc.strptime(part, format=options.time_format, unit="ns")

        return _tried(path, column, by_format, options, wanted)
    first = str(column[0])
    if re.fullmatch(r"[+-]?\d{5,}(\.\d*)?|[+-]?\d+\.\d*|\d{1,3}", first):
        raise UsageError(_unit_missing(options.time))
    zoned = re.search(r"\d(Z|[+-]\d\d:?(\d\d)?)$", first) is not None and ":" in first
    wanted = (
        f"an ISO time such as 2026-01-31T18:30:00{'Z, as in row 1' if zoned else ''}; give the pattern of all times by "
        "--time-format, such as %d.%m.%Y"
    )
    return _cast(path, column, pa.timestamp("ns", "UTC" if zoned else None), options, wanted)


def _cast(path: Path, column: Any, kind: Any, options: TimeOptions, wanted: str) -> Any:
    return _tried(path, column, lambda part: part.cast(kind), options, wanted)


def _tried(path: Path, column: Any, convert: Callable[[Any], Any], options: TimeOptions, wanted: str) -> Any:
    """The converted column; raises FileError that names the first row that cannot be converted."""
    import pyarrow as pa

    try:
        return convert(column)
    except (pa.ArrowException, ValueError):
        pass
    good, bad = 0, len(column)  # the first `good` rows can be converted, the first `bad` cannot
    while bad - good > 1:
        middle = (good + bad) // 2
        try:
            convert(column.slice(0, middle))
            good = middle
        except (pa.ArrowException, ValueError):
            bad = middle
    raise FileError(f"{path}: {str(column[good])[:40]!r} in row {bad}, column {options.time!r}, is not {wanted}")


def _since_1970(path: Path, times: Any, options: TimeOptions) -> Times:
    """Nanoseconds since 1970, UTC; times without a zone are in `options.timezone`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    try:
        if times.type.tz is None:
            times = pc.assume_timezone(times, options.timezone)
        elif options.timezone != "UTC":
            raise UsageError(f"the times of {options.time!r} have a zone; leave --timezone out")
        found: Times = np.asarray(times.cast(pa.timestamp("ns", "UTC")).cast(pa.int64()).to_numpy(), np.int64)
    except pa.ArrowException as e:
        why = first_line(e)
        if "ocate" in why:
            raise UsageError(f"--timezone {options.timezone!r} is not known; use a name such as Europe/Berlin") from e
        why = re.sub(r"(\.0+)?( is ambiguous\.| is in a gap).*", "", why)
        raise FileError(f"{path} has a time that cannot be used: {why}; give times in UTC, or with their zone") from e
    if len(found) and (found.max() >= MAX_NS - options.covers_ns or found.min() <= -MAX_NS):
        raise FileError(f"{path} has times outside of the years 1824 to 2116, which fit into 64 bits of nanoseconds")
    return found
