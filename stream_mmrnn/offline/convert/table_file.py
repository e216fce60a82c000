"""Read the signals of a table (CSV or Parquet) with pyarrow: times in nanoseconds, and the numbers of each row.

Nothing is filled in, sorted or guessed: what is not clear is an error of one sentence. Knows nothing about recordings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from stream_mmrnn.core.durations import NANOSECONDS, spoken
from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.extras import need
from stream_mmrnn.core.topics import STREAM_NAME
from stream_mmrnn.core.types import FEATURE_BOUND
from stream_mmrnn.offline.convert.table_times import TimeOptions, Times, first_line, no_number, times_ns_of

SUFFIXES = (".csv", ".parquet")
HUGE_STEPS = 10_000
"""A gap of more usual steps than this is probably a wrong time: it must be allowed."""
_MAX_STREAMS = 256
_MAX_COLUMNS = 4096
_MAX_BLOCK = 2**30


class TableOptions(TimeOptions, frozen=True, kw_only=True):
    """How a table is read."""

    streams: dict[str, tuple[str, ...]] = msgspec.field(default_factory=dict)
    """Columns by stream; without any, all columns of numbers are the stream `signal`."""
    by: str = ""
    """A column whose values are the names of streams: each has the rows with its name."""
    max_gap_ns: int = 0
    """The longest gap to accept; 0: HUGE_STEPS usual steps."""


class TableStream(msgspec.Struct, frozen=True, eq=False):
    """A signal of a table."""

    name: str
    columns: tuple[str, ...]
    times_ns: Times
    """[rows], strictly ascending, since 1970."""
    values: npt.NDArray[np.float32]
    """[rows, columns]; NaN where a value is missing."""

    @property
    def whole(self) -> npt.NDArray[np.bool_]:
        """[rows]: whether no value is missing."""
        return np.logical_not(np.asarray(np.isnan(self.values).any(axis=1), np.bool_))

    @property
    def step_ns(self) -> int:
        """The usual time from row to row: the median; 0 for fewer than two rows."""
        return int(np.median(np.diff(self.times_ns))) if len(self.times_ns) > 1 else 0


class TableContent(msgspec.Struct, frozen=True):
    """The signals of a table, and the columns that are in none, with the reason."""

    streams: list[TableStream]
    left_out: dict[str, str]


def read(path: Path, options: TableOptions) -> TableContent:
    """The signals of a table.

    Raises:
        UsageError: pyarrow is not installed, or an option is wrong or does not fit the table.
        FileError: the file is missing or is no table, or a row's time or value cannot be used.

    """
    need("CSV and Parquet", "export", "pyarrow")
    table = _load(path, options.time)
    _check_columns(path, table, options)
    if not table.num_rows:
        raise FileError(f"{path} has no rows; expected a header and a row for each time")
    times_ns = times_ns_of(path, table.column(options.time), options) + options.covers_ns
    columns, left_out = _columns(table, options)
    numbers = np.stack([_numbers(path, table, name) for name in columns], axis=1)
    streams = []
    for name, rows, chosen in _split(path, table, options, columns):
        _check_order(path, times_ns[rows], rows, options)
        streams.append(TableStream(name, chosen, times_ns[rows], numbers[rows][:, [columns.index(c) for c in chosen]]))
    for stream in streams:
        _check_gaps(path, stream, options)
    return TableContent(streams, left_out)


def _load(path: Path, time: str) -> Any:
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    try:
        with path.open("rb") as file:  # opened here, because pyarrow takes only paths in UTF-8
            if path.suffix.lower() == ".parquet":
                return pyarrow.parquet.read_table(file, use_threads=False)
            # one block, because the types of the columns are inferred from the first one
            block = min(max(path.stat().st_size + 1, 1 << 16), _MAX_BLOCK)
            return pyarrow.csv.read_csv(
                file,
                read_options=pyarrow.csv.ReadOptions(block_size=block, use_threads=False),
                convert_options=pyarrow.csv.ConvertOptions(column_types={time: pa.string()}),
            )
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror or first_line(e)}; expected a table") from e
    except (pa.ArrowException, ValueError, KeyError) as e:
        kind = "Parquet" if path.suffix.lower() == ".parquet" else "CSV"
        raise FileError(f"{path} is no {kind} table that pyarrow can read: {first_line(e)}") from e


def _check_columns(path: Path, table: Any, options: TableOptions) -> None:
    try:
        names = [str(name) for name in table.column_names]
    except UnicodeDecodeError as e:
        raise FileError(f"{path} is no table that pyarrow can read: the name of a column is no UTF-8") from e
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise FileError(f"{path} has two columns {twice!r}; give each another name")
    chosen = [name for columns in options.streams.values() for name in columns]
    for name in (options.time, *([options.by] if options.by else []), *chosen):
        if name not in names:
            raise UsageError(f"{path} has no column {name!r}; it has {', '.join(map(repr, names[:50]))}")
    if options.by and options.streams:
        raise UsageError("--by makes a stream of each value of its column; use it without --stream")
    for stream in options.streams:
        _check_name(stream, "a stream")
    for name in chosen:
        if name in (options.time, options.by):
            raise UsageError(f"the column {name!r} is the time; a stream takes other columns")
        if why := no_number(table.column(name)):
            raise UsageError(f"the column {name!r} {why}; a signal needs numbers")


def _check_name(name: str, what: str) -> None:
    if not re.match(STREAM_NAME, name):
        raise UsageError(f"{what} is named {name[:64]!r}: expected 1 to 32 letters, digits, `_` or `-`")


def _columns(table: Any, options: TableOptions) -> tuple[list[str], dict[str, str]]:
    """The columns that are used, and why the others are not."""
    rest = [name for name in table.column_names if name not in (options.time, options.by)]
    if options.streams:
        used = {name: None for columns in options.streams.values() for name in columns}
        return list(used), {name: "is in no stream" for name in rest if name not in used}
    left_out = {name: why for name in rest if (why := no_number(table.column(name)))}
    columns = [name for name in rest if name not in left_out]
    if not columns:
        found = ", ".join(f"{name!r} {why}" for name, why in left_out.items()) or "there is only the time"
        raise UsageError(f"the table has no column of numbers: {found[:300]}")
    if len(columns) > _MAX_COLUMNS:
        raise UsageError(f"the table has {len(columns)} columns of numbers, at most {_MAX_COLUMNS} are a stream")
    return columns, left_out


def _numbers(path: Path, table: Any, name: str) -> npt.NDArray[np.float32]:
    import pyarrow as pa

    values = np.asarray(table.column(name).cast(pa.float64(), safe=False).to_numpy(), np.float64)
    wrong = np.flatnonzero(np.abs(values) >= FEATURE_BOUND)  # NaN is not larger: it is missing
    if len(wrong):
        raise FileError(
            f"{path} holds {values[wrong[0]]:g} in row {wrong[0] + 1}, column {name!r}; expected numbers below "
            f"{FEATURE_BOUND:g}"
        )
    return values.astype(np.float32)


def _split(
    path: Path, table: Any, options: TableOptions, columns: list[str]
) -> Iterator[tuple[str, npt.NDArray[np.intp], tuple[str, ...]]]:
    """Of each stream: its name, its rows and its columns."""
    everything = np.arange(table.num_rows)
    if not options.by:
        for name, chosen in (options.streams or {"signal": tuple(columns)}).items():
            yield name, everything, chosen
        return
    values = table.column(options.by).to_pylist()
    if None in values:
        raise FileError(
            f"{path} has no value in row {values.index(None) + 1}, column {options.by!r}; expected the name of a "
            "stream in each row"
        )
    keys = [str(value) for value in values]
    names = list(dict.fromkeys(keys))
    if len(names) > _MAX_STREAMS:
        raise UsageError(f"the column {options.by!r} has {len(names)} values; at most {_MAX_STREAMS} can be streams")
    array = np.array(keys)
    for name in names:
        _check_name(name, f"a value of {options.by!r}, which would be a stream,")
        yield name, np.flatnonzero(array == name), tuple(columns)


def _when(at_ns: int) -> str:
    return str(np.datetime64(at_ns, "ns")).removesuffix("000000").removesuffix(".000") + "Z"


def _check_order(
    path: Path, times_ns: Times, rows: Sequence[int] | npt.NDArray[np.intp], options: TableOptions
) -> None:
    steps = np.diff(times_ns)
    if not len(wrong := np.flatnonzero(steps <= 0)):
        return
    at = int(wrong[0])
    one, other = rows[at] + 1, rows[at + 1] + 1
    if steps[at] == 0:
        raise FileError(
            f"{path} has two rows of one time, {_when(int(times_ns[at]) - options.covers_ns)}: rows {one} and {other}; "
            "if they are of different things, name the column that says so with --by"
        )
    raise FileError(
        f"{path}: row {other} is at {_when(int(times_ns[at + 1]) - options.covers_ns)}, before row {one}; sort the "
        f"table by {options.time!r}, or name the column that says of which series a row is with --by"
    )


def _check_gaps(path: Path, stream: TableStream, options: TableOptions) -> None:
    steps = np.diff(stream.times_ns)
    if not len(steps):
        return
    at = int(steps.argmax())
    most_ns = options.max_gap_ns or HUGE_STEPS * stream.step_ns
    if steps[at] > most_ns:
        gap = spoken(float(steps[at]) / 1e9)
        usual = "" if options.max_gap_ns else f", more than {HUGE_STEPS:,} times the usual step of "
        usual = f"{usual}{spoken(stream.step_ns / 1e9)}" if usual else f", more than {spoken(most_ns / 1e9)}"
        raise FileError(
            f"{path} has a gap of {gap} after {_when(int(stream.times_ns[at]) - options.covers_ns)}{usual}; if its "
            f"times are right, allow it with --max-gap {-(-int(steps[at]) // NANOSECONDS['s'])}s"
        )
