"""Log output of a session: sentences for people, or one JSON object per line for programs.

A `Note` is a sentence (a `str`) with structured fields.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from stream_mmrnn.core.clock import RateLimiter, now_ns
from stream_mmrnn.core.printable import visible
from stream_mmrnn.core.settings import LogSettings

_LEVELS = ("debug", "info", "warning", "error")


class Note(str):
    """One sentence, with its process (`node`), event, level and fields."""

    __slots__ = ("event", "fields", "level", "node", "private")

    node: str
    event: str
    level: str
    private: bool
    fields: dict[str, Any]

    def __new__(
        cls,
        text: str,
        node: str = "",
        event: str = "note",
        level: str = "info",
        *,
        private: bool = False,
        **fields: Any,
    ) -> Note:
        """`private`: show the sentence only in the terminal; it must not be written to log files."""
        note = super().__new__(cls, text)
        note.node, note.event, note.level, note.private, note.fields = node, event, level, private, fields
        return note


class JsonLines:
    """Writes notes as JSON lines: `ts`, `level`, `node`, `event`, `message`, `fields`.

    At most one line per second with the same text; the next one of its cause has the count of dropped ones (`unsaid`).
    """

    def __init__(self, level: str = "info", write: Callable[[str], Any] | None = None) -> None:
        self._least = _LEVELS.index(level)
        self._write = write or _to_stderr
        self._rate_limiter = RateLimiter()
        self._unsaid: dict[tuple[str, str], int] = {}

    def __call__(self, note: str) -> None:
        """Write the note if its level is high enough; a plain string becomes a `Note` without a process."""
        note = note if isinstance(note, Note) else Note(note)
        if _LEVELS.index(note.level) < self._least:
            return
        cause = (note.node, note.event)
        if not self._rate_limiter(f"{note.node}\n{note.event}\n{note}", now_ns()):
            if cause in self._unsaid or len(self._unsaid) < 256:
                self._unsaid[cause] = self._unsaid.get(cause, 0) + 1
            return
        line: dict[str, Any] = {
            "ts": datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "level": note.level,
            "node": note.node,
            "event": note.event,
        }
        if not note.private:
            line["message"] = str(note)
        if unsaid := self._unsaid.pop(cause, 0):
            line["unsaid"] = unsaid
        self._write(json.dumps({**line, "fields": note.fields}, ensure_ascii=False, default=str))


def _to_stderr(line: str) -> None:
    # one write call: other processes write to the same stream
    sys.stderr.write(visible(line) + "\n")
    sys.stderr.flush()


def at_least(level: str, say: Callable[[str], None]) -> Callable[[str], None]:
    """A filter: passes notes of at least `level` to `say`; a plain string counts as info."""
    least = _LEVELS.index(level)

    def chosen(note: str) -> None:
        if _LEVELS.index(getattr(note, "level", "info")) >= least:
            say(note)

    return chosen


def report(settings: LogSettings, node: str, text: str, **fields: Any) -> None:
    """Print the error that ends a process, on standard error."""
    if settings.format == "json":
        JsonLines(settings.level)(Note(text, node, "error", "error", **fields))
    else:
        _to_stderr(f"stream-mmrnn {node}: {text}")
