"""MessageCounts: how many messages were recorded, are waiting or were dropped, as written in a recording."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_type_hints

import msgspec

LOST, SLOW, REFUSED, UNWRITABLE, CLOSING = "lost", "disk_slow", "disk_refused", "unwritable", "closing"
"""Why a message is not in the file: lost on the bus; the disk was too slow; the disk refused writes (it is full); the
message cannot be encoded; the session ended before it was written."""
MISSING = "missing"
"""A repair did not find a message that the sequence numbers say should be there."""


class MessageCounts(msgspec.Struct, frozen=True):
    """For each topic: produced = recorded + waiting + sum of dropped."""

    produced: dict[str, int]
    """By topic: received messages, and those missing by their sequence numbers."""
    recorded: dict[str, int]
    waiting: dict[str, int]
    dropped: dict[str, dict[str, int]]
    """By topic and reason."""

    def by_reason(self, reason: str) -> dict[str, int]:
        """Messages dropped for one reason, by topic."""
        return {topic: reasons[reason] for topic, reasons in self.dropped.items() if reason in reasons}

    @property
    def lost(self) -> int:
        """Total of dropped messages."""
        return sum(n for reasons in self.dropped.values() for n in reasons.values())

    def as_metadata(self) -> dict[str, str]:
        return {name: msgspec.json.encode(table).decode() for name, table in msgspec.structs.asdict(self).items()}

    @property
    def off(self) -> dict[str, int]:
        """By topic, the difference by which the sum above does not hold; empty if it holds."""
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
        """Read the counts from a file's metadata; missing or damaged tables are empty (older releases had none)."""

        def table(name: str) -> Any:
            try:
                return msgspec.json.decode(metadata.get(name, "{}"), type=hints[name])
            except (msgspec.MsgspecError, ValueError, RecursionError):
                return {}

        hints = get_type_hints(cls)
        return cls(**{name: table(name) for name in cls.__struct_fields__})
