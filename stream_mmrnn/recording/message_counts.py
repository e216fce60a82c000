"""MessageCounts: what became of each message, as the recording itself states it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_type_hints

import msgspec

LOST, SLOW, REFUSED, UNWRITABLE, CLOSING = "lost", "disk_slow", "disk_refused", "unwritable", "closing"
"""Why a message is not in the file: the bus did not bring it; the disk was slower than the stream, or took nothing (it
is full); no file can hold it; the session ended before the disk had it."""
MISSING = "missing"
"""It was in the file once, or should have been: a repair did not find it."""


class MessageCounts(msgspec.Struct, frozen=True):
    """For each stream produced = recorded + waiting + the sum of what was dropped."""

    produced: dict[str, int]
    """By topic: those that came, and those whose numbers say that they should have."""
    recorded: dict[str, int]
    waiting: dict[str, int]
    dropped: dict[str, dict[str, int]]
    """By topic and reason."""

    def by_reason(self, reason: str) -> dict[str, int]:
        """By topic."""
        return {topic: reasons[reason] for topic, reasons in self.dropped.items() if reason in reasons}

    @property
    def lost(self) -> int:
        """All that is not in the file and will not be."""
        return sum(n for reasons in self.dropped.values() for n in reasons.values())

    def as_metadata(self) -> dict[str, str]:
        return {name: msgspec.json.encode(table).decode() for name, table in msgspec.structs.asdict(self).items()}

    @property
    def off(self) -> dict[str, int]:
        """By topic, by how many messages the sum above does not hold: empty where it does."""
        sums = {
            topic: self.produced.get(topic, 0)
            - self.recorded.get(topic, 0)
            - self.waiting.get(topic, 0)
            - sum(self.dropped.get(topic, {}).values())
            for topic in self.produced | self.recorded | self.waiting | self.dropped
        }
        return {topic: n for topic, n in sums.items() if n}

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> MessageCounts:
        """What a file says; what it does not say (an older release wrote it, or it is damaged) is empty."""

        def table(name: str) -> Any:
            try:
                return msgspec.json.decode(metadata.get(name, "{}"), type=hints[name])
            except (msgspec.MsgspecError, ValueError, RecursionError):
                return {}

        hints = get_type_hints(cls)
        return cls(**{name: table(name) for name in cls.__struct_fields__})
