"""Labels as a table of text (.csv, .tsv): a header, then a label in each row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from datetime import tzinfo
from pathlib import Path

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import FileError
from stream_mmrnn.offline.labels.entries import Clock, Entry, name_of, seconds_ns, text_of, time_ns, written_s

COLUMNS = {
    "begin": ("begin_s", "begin", "start_s", "start", "start_time", "onset", "seconds", "time"),
    "end": ("end_s", "end", "stop_s", "stop", "end_time", "offset"),
    "duration": ("duration_s", "duration", "dur"),
    "label": ("label", "value", "text", "annotation"),
    "tier": ("tier",),
}
"""By what a column holds, its names; the first is what we write."""
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_EXPECTED = "expected a header with begin_s and label, and if wanted end_s or duration_s, and tier"


def read(path: Path, clock: Clock, zone: tzinfo) -> Iterator[Entry]:
    """The labels of a table; raises FileError that names the first line that is wrong."""
    text = text_of(path)
    start = len(text) - len(text.lstrip("\n"))
    delimiter, header = _header(path, text[start:].split("\n", 1)[0], start + 1)
    columns = _columns(path, header, start + 1)
    rows = csv.reader(io.StringIO(text[start:]), delimiter=delimiter, strict=True)
    next(rows)
    while True:
        line = start + rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as e:
            raise FileError(f"{path}: line {line} is no row of a table: {e}; is a quotation mark missing?") from e
        if any(cell.strip() for cell in row):
            yield _entry(path, f"line {line}", row, header, columns, (clock, zone, delimiter))


def _header(path: Path, line: str, number: int) -> tuple[str, list[str]]:
    """The delimiter, and the names of the columns."""
    best: list[str] = []
    for delimiter in _DELIMITERS:
        try:
            names = [name.strip().lower() for name in next(csv.reader([line], delimiter=delimiter, strict=True))]
        except (csv.Error, StopIteration):
            continue
        if {*names} & {*COLUMNS["begin"]} and {*names} & {*COLUMNS["label"]}:
            return delimiter, names
        best = max(best, names, key=len)
    raise FileError(
        f"{path}: line {number} has the columns {', '.join(map(repr, best[:20]))[:300]}; {_EXPECTED}, separated by "
        f"{', '.join(_DELIMITERS.values())}"
    )


def _columns(path: Path, header: Sequence[str], line: int) -> dict[str, int]:
    """By what a column holds, its number."""
    found: dict[str, int] = {}
    for what, names in COLUMNS.items():
        places = [i for i, name in enumerate(header) if name in names]
        if len(places) > 1:
            both = " and ".join(repr(header[i]) for i in places[:2])
            raise FileError(f"{path}: line {line} names {both}, which are both the {what}; leave one of them out")
        if places:
            found[what] = places[0]
    if "end" in found and "duration" in found:
        raise FileError(f"{path}: line {line} has both an end and a duration; leave one of them out")
    return found


def _entry(
    path: Path,
    where: str,
    row: Sequence[str],
    header: Sequence[str],
    columns: dict[str, int],
    how: tuple[Clock, tzinfo, str],
) -> Entry:
    clock, zone, delimiter = how
    if len(row) != len(header):
        raise FileError(
            f"{path}: {where} has {len(row)} fields, the header has {len(header)}; expected {', '.join(header)[:200]}, "
            f"separated by {_DELIMITERS[delimiter]}, so put text that holds one in quotation marks"
        )

    def cell(what: str) -> str:
        text = row[columns[what]].strip() if what in columns else ""
        is_number = what in ("begin", "end", "duration")
        # where commas do not separate, they are the decimal mark of many countries
        return text.replace(",", ".") if is_number and delimiter != "," and text.count(",") == 1 else text

    name = name_of(path, where, cell("label"))
    if not name:
        raise FileError(f"{path}: {where} has no label; expected a name, or none where no label is true")
    begin_ns = time_ns(path, where, "begin", cell("begin"), clock, zone)
    end_ns = time_ns(path, where, "end", cell("end"), clock, zone) if cell("end") else None
    if cell("duration"):
        end_ns = begin_ns + seconds_ns(path, where, "duration", cell("duration"))
    return Entry(where, cell("tier") or topics.LABEL, begin_ns, end_ns, name)


def write(path: Path, entries: Sequence[Entry]) -> None:
    """Write labels as a table."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        writer.writerow(["tier", "begin_s", "end_s", "label"])
        for e in entries:
            end = "" if e.end_ns is None else written_s(e.end_ns, 9)
            writer.writerow([e.tier, written_s(e.begin_ns, 9), end, e.name])
