"""Pictures and sound of a session for its page, read from the bus only while a browser shows it."""

from __future__ import annotations

from collections.abc import Iterator

from stream_mmrnn.bus import Address, Subscriber
from stream_mmrnn.core.types import Envelope


class RawStreams:
    """Pictures and sound for the page: subscribed only while a browser is connected."""

    def __init__(self, address: Address, queue: int, wanted: list[str]) -> None:
        self.wanted = wanted
        self._address, self._queue = address, queue
        self._subscriber: Subscriber | None = None
        self._before: dict[str, dict[str, int]] = {}

    def read(self, connected: bool) -> Iterator[Envelope]:
        """The messages that have come, without waiting; none while no browser is connected."""
        if not connected or not self.wanted:
            self.close()
            return
        if self._subscriber is None:
            self._subscriber = Subscriber(self._address, self.wanted, self._queue, "drop_oldest", midway=True)
        for _ in range(self._queue):
            envelope = self._subscriber.receive(0)
            if envelope is None:
                return
            yield envelope

    def tally(self) -> dict[str, dict[str, int]]:
        """As `Subscriber.tally`, over all connections."""
        found = {topic: dict(counts) for topic, counts in self._before.items()}
        for topic, counts in (self._subscriber.tally() if self._subscriber else {}).items():
            before = found.setdefault(topic, {})
            for name, count in counts.items():
                before[name] = before.get(name, 0) + count
        return found

    def close(self) -> None:
        if self._subscriber is None:
            return
        while self._subscriber.receive(0) is not None:
            pass  # count what waits as delivered
        self._before = self.tally()
        self._subscriber.close()
        self._subscriber = None
