"""What a session reports while it runs: a sentence for a person, or one JSON object per line for programs.

A `Note` is the sentence and also has its parts, so that a printer of sentences need not know them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from stream_mmrnn.core import config
from stream_mmrnn.core.clock import RateLimiter, now_ns

_LEVELS = ("debug", "info", "warning", "error")


class Note(str):
    """One sentence for a person, and for programs: which process, what happened, how bad, and the figures."""

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
        """`private`: the sentence is for who sits there, and no file that keeps lines may have it."""
        note = super().__new__(cls, text)
        note.node, note.event, note.level, note.private, note.fields = node, event, level, private, fields
        return note


class JsonLines:
    """Writes notes as JSON lines: `ts`, `level`, `node`, `event`, `message`, `fields`.

    Of the same cause at most one line a second; the next one says how many were left out, as `unsaid`.
    """

    def __init__(self, level: str = "info", write: Callable[[str], Any] | None = None) -> None:
        self._least = _LEVELS.index(level)
        self._write = write or _to_stderr
        self._rate_limiter = RateLimiter()
        self._unsaid: dict[tuple[str, str], int] = {}

    def __call__(self, note: str) -> None:
        """Write it if its level is high enough; a plain string becomes a `Note` without a process."""
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
    # in one piece: other processes write there, too
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def at_least(level: str, say: Callable[[str], None]) -> Callable[[str], None]:
    """`say` of what is as bad as `level`; what is no `Note` counts as info."""
    least = _LEVELS.index(level)

    def chosen(note: str) -> None:
        if _LEVELS.index(getattr(note, "level", "info")) >= least:
            say(note)

    return chosen


def report(settings: config.Log, node: str, text: str, **fields: Any) -> None:
    """The last words of a process, on its standard error."""
    if settings.format == "json":
        JsonLines(settings.level)(Note(text, node, "error", "error", **fields))
    else:
        _to_stderr(f"stream-mmrnn {node}: {text}")
