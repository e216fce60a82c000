"""Sources that read the bus: the samples of another stream (`from:STREAM`), what programs push (`push`), or what the
camera and the microphone of a browser give (`page`).

Their worker subscribes before the session begins, so that no sample is missed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from stream_mmrnn.bus import Address, Subscriber
from stream_mmrnn.capture.derive import Derivation, derivation_of, heard_topic
from stream_mmrnn.core import processes, topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import SourceError, WireError
from stream_mmrnn.core.sequence import SequenceTracker
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.core.types import Envelope, Sample

if TYPE_CHECKING:
    from stream_mmrnn.capture.resampler import Int16Array, Resampler

_POLL_MS = 50
_LAST_NS = 300_000_000
"""The last samples of a stream that has ended may arrive this long after its status."""
_MAX_SENDERS = 64
_FIRST_STATUS_NS = 600_000_000
"""A status comes twice a second."""


class BusSource(ABC):
    """A source whose samples come over the bus of its own session."""

    def __init__(self, address: Address, session: str, origin: str, wanted: list[str], queue: int) -> None:
        self.origin = origin
        self.info: dict[str, Any] = {}
        self._address, self._session, self._wanted, self._queue = address, session, wanted, queue
        self._subscriber: Subscriber | None = None

    def connect(self, alive: Callable[[], bool], midway: bool = False) -> None:
        """Subscribe, and wait until the bus proves it. `midway`: earlier messages do not count as lost."""
        wanted = [*self._wanted, topics.CLOCK]
        self._subscriber = Subscriber(self._address, wanted, self._queue, midway=midway)
        for envelope in self._subscriber.stream(alive):
            if envelope.topic == topics.CLOCK:
                return

    def open(self) -> None:
        """Check that the source is connected."""
        if self._subscriber is None:
            raise SourceError(f"{self.origin} is not connected to the bus; its worker does that")

    def samples(self, alive: Callable[[], bool], epoch_ns: int) -> Iterator[Sample]:
        """Samples as they come."""
        assert self._subscriber is not None
        while alive() and not self._over():
            envelope = self._subscriber.receive(_POLL_MS)
            # a subscription is a prefix: that to `raw/mic` also gets `raw/mic_2`
            ours = envelope is not None and envelope.topic in self._wanted
            if envelope is not None and ours and envelope.session in (self._session, topics.EVERYONE):
                yield from self._read(envelope)
        yield from self._rest()

    @abstractmethod
    def _read(self, envelope: Envelope) -> list[Sample]:
        """The samples of a message."""

    def _over(self) -> bool:
        """Whether no message comes any more."""
        return False

    def _rest(self) -> list[Sample]:
        """The samples that are still held back at the end."""
        return []

    def close(self) -> None:  # noqa: B027 every source has it
        """Nothing has to be closed: the subscription stays until `disconnect`, so that it can be opened again."""

    def disconnect(self) -> None:
        """End the subscription."""
        if self._subscriber is not None:
            self._subscriber.close()
            self._subscriber = None


class DerivedSource(BusSource):
    """What a derivation makes of the samples of another stream; it ends with that stream."""

    def __init__(self, stream: Stream, parent: Stream, settings: Settings, address: Address) -> None:
        self._topic = heard_topic(parent)
        self._status = topics.STATUS + processes.worker(parent.name).name
        self._derivation: Derivation = derivation_of(stream, settings, now_ns)
        wanted = [self._topic, self._status]
        super().__init__(address, settings.session.name, self._derivation.origin, wanted, settings.bus.queue)
        self.info = {"from": parent.name, "lost": 0, "garbage": 0, **self._counts()}
        self._ended_ns = 0

    def open(self) -> None:
        """As `BusSource.open`."""
        super().open()
        self._derivation.reset()

    def _read(self, envelope: Envelope) -> list[Sample]:
        assert self._subscriber is not None
        if envelope.topic == self._topic:
            self.info["lost"] = self._subscriber.gaps.lost.get(self._topic, 0)
            sample = Sample(envelope.event_ns, envelope.capture_ns, envelope.payload, envelope.device_ns)
            try:
                derived = self._derivation.derive(sample)
            except WireError:
                self.info["garbage"] += 1
                derived = []
            self.info |= self._counts()
            return derived
        try:
            state = wire.unpack(envelope.payload, wire.StatusMessage).state
        except WireError:
            return []
        self._ended_ns = (self._ended_ns or now_ns()) if state == "ended" else 0
        return []

    def _counts(self) -> dict[str, Any]:
        counts: dict[str, Any] = getattr(self._derivation, "info", {})  # a plug-in's may have none
        return counts

    def _over(self) -> bool:
        return self._ended_ns > 0 and now_ns() - self._ended_ns > _LAST_NS

    def _rest(self) -> list[Sample]:
        rest = self._derivation.finish()
        self.info |= self._counts()
        return rest


class PushSource(BusSource):
    """What other programs push by `stream_mmrnn.push` or over the page's WebSocket; several may at once."""

    def __init__(self, stream: Stream, settings: Settings, address: Address) -> None:
        super().__init__(address, settings.session.name, "push", [topics.push(stream.name)], settings.bus.queue)
        self.info = {"senders": 0, "lost": 0, "garbage": 0}
        self._kind, self._max_line = stream.kind, settings.text.max_line_bytes
        self._numbers: SequenceTracker[str] = SequenceTracker(_MAX_SENDERS)
        """By sender: each numbers its own messages."""
        self._resamplers: dict[str, Resampler] = {}

    def _read(self, envelope: Envelope) -> list[Sample]:
        # a sender may have begun before this worker, if that was restarted
        self.info["lost"] += self._numbers.observe(envelope.origin, envelope.seq, envelope.seq)
        self.info["senders"] = len(self._numbers)
        try:
            sample = self._sample(envelope, wire.read_push(envelope.payload))
        except WireError:
            self.info["garbage"] += 1
            return []
        return [sample] if len(sample.data) else []

    def _sample(self, envelope: Envelope, message: wire.PushMessage) -> Sample:
        """The sample of a message. Raises WireError where it is not of the stream's kind."""
        event_ns, data = envelope.event_ns, message.data
        if self._kind == "audio":
            sound, held_s = self._sound(envelope.origin, message)
            return Sample(event_ns - round(held_s * 1e9), now_ns(), sound, envelope.device_ns)
        if self._kind == "signal":
            if len(data) % 4:
                raise WireError(f"pushed numbers are float32, and these are {len(data)} bytes")
            return Sample(event_ns, now_ns(), np.frombuffer(data, "<f4"))
        if self._kind == "text":
            data = data.strip()
            try:
                data.decode()
            except UnicodeDecodeError as e:
                raise WireError(f"a pushed text is UTF-8: {e}") from e
            if len(data) > self._max_line or b"\n" in data:
                raise WireError(f"a pushed text is one line of at most {self._max_line} bytes")
        return Sample(event_ns, now_ns(), data, envelope.device_ns)

    def _sound(self, sender: str, message: wire.PushMessage) -> tuple[Int16Array, float]:
        """Mono sound at 16 kHz, and how many seconds the resampler holds back."""
        if len(message.data) % 2:
            raise WireError(f"pushed sound is int16, and this is {len(message.data)} bytes")
        sound = np.frombuffer(message.data, "<i2")
        if message.rate_hz == topics.AUDIO_RATE_HZ or not len(sound):
            return sound, 0.0
        from stream_mmrnn.capture.resampler import Resampler

        resampler = self._resamplers.get(sender)
        if resampler is None or resampler.rate_hz != message.rate_hz:
            if len(self._resamplers) >= _MAX_SENDERS:
                self._resamplers.clear()
            resampler = self._resamplers[sender] = Resampler(message.rate_hz)
        return resampler.feed(sound), resampler.held_s


class PageSource(PushSource):
    """A browser's camera or microphone, whose samples the page's process forwards; missing while no browser gives it.

    That process stamps the samples with the local clock, and says in its status why there are none.
    """

    _STATUS = topics.STATUS + "dashboard"

    def __init__(self, stream: Stream, settings: Settings, address: Address) -> None:
        super().__init__(stream, settings, address)
        self.origin = "page"
        self._wanted.append(self._STATUS)
        self._name = stream.name
        self._why: str | None = None
        """Why no browser gives it; "" if one does, None while that is unknown."""

    def open(self) -> None:
        """Check that a browser gives it; raises SourceError with the reason why not."""
        super().open()
        assert self._subscriber is not None
        until_ns = now_ns() + _FIRST_STATUS_NS
        # what comes after the message that says that one does is for `samples`
        while self._why != "":
            envelope = self._subscriber.receive(_POLL_MS if self._why is None else 0)
            if envelope is not None and envelope.topic == self._STATUS:
                self._read_status(envelope)
            elif self._why is None and now_ns() > until_ns:
                raise SourceError("the page has not started; its process is looked for again")
            elif self._why and envelope is None:
                raise SourceError(self._why)

    def _read(self, envelope: Envelope) -> list[Sample]:
        if envelope.topic != self._STATUS:
            return super()._read(envelope)
        self._read_status(envelope)
        if self._why:
            raise SourceError(self._why)
        return []

    def _read_status(self, envelope: Envelope) -> None:
        try:
            status = wire.unpack(envelope.payload, wire.StatusMessage)
        except WireError:
            return
        if status.state in ("restarting", "failed"):
            self._why = f"the page's process {status.reason}; a browser that shows the page connects to it again"
            return
        sensors = status.detail.get("sensors")
        about = sensors.get(self._name) if isinstance(sensors, dict) else None
        if isinstance(about, dict):
            self._why = str(about.get("why", ""))
            self.info |= {key: count for key, count in about.items() if isinstance(count, int)}


def create(stream: Stream, table: dict[str, Stream], settings: Settings, address: Address) -> BusSource:
    """The source of a stream that reads the bus, not yet connected."""
    if stream.parent:
        return DerivedSource(stream, table[stream.parent], settings, address)
    return (PageSource if stream.source == "page" else PushSource)(stream, settings, address)
