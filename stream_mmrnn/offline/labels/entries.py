"""What every format of labels has in common: entries with a place in their file, times as written, text as bytes.

Pure: knows nothing about recordings or about one format.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from datetime import UTC, datetime, tzinfo
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Literal, NamedTuple

from stream_mmrnn.core.errors import FileError

Clock = Literal["session", "wall"]
"""What times count from: the session's start, or 1970."""
MAX_BYTES = 64 * 2**20
MAX_NS = 2**62
MAX_NAME = 1000
"""Characters of a label."""
_CLOCK_TIME = re.compile(r"(\d{1,4}):([0-5]?\d)(?::([0-5]?\d))?([.,]\d{1,12})?")
_BREAKS = re.compile(r"[\t\n\v\f\r\x85\u2028\u2029]+")
_NUMBER = re.compile(r"[+-]?(\d+([.]\d*)?|[.]\d+)([eE][+-]?\d{1,3})?")


class Entry(NamedTuple):
    """One label of a file, as the file has it."""

    where: str
    """`line 3`, `interval 2 of the tier 'gaze'`."""
    tier: str
    begin_ns: int
    """Of the clock that the file uses, as `end_ns`."""
    end_ns: int | None
    """None: until the next label of its tier."""
    name: str


def bytes_of(path: Path) -> bytes:
    """The contents of a file; raises FileError if it cannot be read, is empty, or is too long to be of labels."""
    try:
        if not path.is_file():
            raise FileError(f"{path} is no file; expected one with labels")
        if path.stat().st_size > MAX_BYTES:
            raise FileError(f"{path} has more than {MAX_BYTES >> 20} MiB, which no labels have; is it the right file?")
        content = path.read_bytes()
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror}; expected a file with labels") from e
    if not content.strip(b"\0 \t\r\n\xef\xbb\xbf"):
        raise FileError(f"{path} is empty; expected a file with labels")
    return content


def text_of(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with its mark; raises FileError that names the line that is not."""
    content = bytes_of(path)
    coding = "utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = content.decode(coding)
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        raise FileError(
            f"{path}: line {line} is not in {'UTF-16' if coding == 'utf-16' else 'UTF-8'}; save the file again as UTF-8"
        ) from e
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise FileError(f"{path}: line {line} holds a zero byte; expected text, so save the file again as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """The lines with their numbers, without empty ones."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line


def _is_no_text(c: str) -> bool:
    return unicodedata.category(c) in ("Cc", "Cs") or c in "\ufffe\uffff"


def plain(name: str) -> str:
    """A label from a recording as every format can hold it; "" if nothing remains."""
    return "".join(" " if _is_no_text(c) else c for c in _BREAKS.sub(" ", name))[:MAX_NAME].strip()


def name_of(path: Path, where: str, text: str) -> str:
    """A label as it is kept: one line, without spaces at its ends; "" if there is none.

    Raises:
        FileError: it has characters that are no text, or is too long.

    """
    name = _BREAKS.sub(" ", text).strip()
    if odd := next((c for c in name if _is_no_text(c)), None):
        raise FileError(
            f"{path}: the label of {where} holds the character U+{ord(odd):04X}, which is no text; remove it"
        )
    if len(name) > MAX_NAME:
        raise FileError(
            f"{path}: the label of {where} has {len(name)} characters, at most {MAX_NAME} are a label; shorten it"
        )
    return name


def seconds_ns(path: Path, where: str, what: str, text: str, expected: str = "seconds such as 12.5") -> int:
    """Nanoseconds of a number of seconds; raises FileError if it is none, not finite or too large."""
    try:
        value = Decimal(text) if _NUMBER.fullmatch(text) else Decimal("nan")
        if value.is_finite() and abs(value) < MAX_NS // 10**9:
            return int((value * 10**9).to_integral_value())
    except (InvalidOperation, OverflowError):
        pass
    raise FileError(f"{path}: the {what} of {where} is {text[:40]!r}; expected {expected}")


def time_ns(path: Path, where: str, what: str, text: str, clock: Clock, zone: tzinfo = UTC) -> int:
    """Nanoseconds of a time as people write it: seconds, h:mm:ss.mmm, or of the wall clock an ISO date and time.

    Raises:
        FileError: it is none of them.

    """
    text = text.strip()
    if clock == "wall":
        expected = "a date and time such as 2026-01-31T18:30:00Z, or seconds since 1970"
        if "-" in text[1:] or "T" in text:
            try:
                moment = datetime.fromisoformat(text)
            except ValueError:
                raise FileError(f"{path}: the {what} of {where} is {text[:40]!r}; expected {expected}") from None
            since = (moment if moment.tzinfo else moment.replace(tzinfo=zone)) - datetime(1970, 1, 1, tzinfo=UTC)
            return ((since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds) * 1000
        return seconds_ns(path, where, what, text, expected)
    expected = "seconds such as 12.5, or 0:00:12.5"
    if found := _CLOCK_TIME.fullmatch(text):
        first, second, third, part = found.groups()
        whole = int(first) * 60 + int(second) if third is None else (int(first) * 60 + int(second)) * 60 + int(third)
        return seconds_ns(path, where, what, f"{whole}{(part or '').replace(',', '.')}", expected)
    return seconds_ns(path, where, what, text, expected)


def written_s(ns: int, digits: int) -> str:
    """Seconds as text with so many digits after the point, rounded."""
    unit = 10 ** (9 - digits)
    whole, part = divmod((ns + unit // 2) // unit, 10**digits)
    return f"{whole}.{part:0{digits}d}"
