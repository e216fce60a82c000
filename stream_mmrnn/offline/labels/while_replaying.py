"""ReplayLabels: the labels of a recording, as a person changes them who looks at its replay.

Each change is written beside the recording at once. Labels of other tiers are kept. Knows nothing about pages.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import FileError
from stream_mmrnn.recording import label_file
from stream_mmrnn.recording.label_file import NOTHING, Change
from stream_mmrnn.recording.mcap_file import Recording

_SOURCE = "replay"
_SAME_NS = 20_000_000
"""A label within so long of another one takes its place: the same moment for a person."""
_MOST_UNDONE = 1000
MAX_LABEL_BYTES = 200


class ReplayLabels:
    """Labels of the tier of typed ones, by time."""

    def __init__(self, recording: Recording, changes: Iterable[Change]) -> None:
        """`changes`: the recording's labels of this tier, those beside it included."""
        self._path, self._metadata = recording.path, recording.metadata
        self.changes = sorted(changes)
        """From each time on (ns, of the recording), this label is true."""
        self._before: list[list[Change]] = []

    @property
    def names(self) -> list[str]:
        """All labels that were ever given, by name."""
        return sorted({name for _, name in self.changes if name not in NOTHING})

    def mark(self, at_ns: int, name: str) -> str:
        """Let a label be true from a time on, until the next one; `none` ends one. Why it was not written, or ""."""
        name = name.strip()
        if not name or len(name.encode("utf-8", "replace")) > MAX_LABEL_BYTES:
            return f"a label has 1 to {MAX_LABEL_BYTES} bytes"
        begin = bisect_left(self.changes, at_ns - _SAME_NS, key=_at)
        end = bisect_right(self.changes, at_ns + _SAME_NS, key=_at)
        return self._change([*self.changes[:begin], (at_ns, name), *self.changes[end:]])

    def undo(self) -> str:
        """Take the newest change of this replay back. Why it was not, or ""."""
        if not self._before:
            return "nothing was labelled in this replay"
        changes = self._before.pop()
        why = self._change(changes)
        self._before.pop() if not why else self._before.append(changes)
        return why

    def _change(self, changes: list[Change]) -> str:
        try:
            beside = label_file.read(self._path, self._metadata)
            sources = [of for of in (beside.sources if beside is not None else ()) if of != _SOURCE]
            tiers = {**(beside.tiers if beside is not None else {}), topics.LABEL: changes}
            made = label_file.made_for(self._metadata, [*sources, _SOURCE], tiers)
            label_file.write(self._path, made, force=True)
        except FileError as e:
            return str(e)
        self._before = [*self._before[-_MOST_UNDONE:], self.changes]
        self.changes = changes
        return ""


def _at(change: Change) -> int:
    return change[0]
