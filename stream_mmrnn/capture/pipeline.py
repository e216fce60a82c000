"""`capture`, the generator from a device's samples to messages; `Pump`, the bounded queue behind a device; and
`reencode`, which computes a recording's features again from its raw samples.

Knows nothing about sockets, files, devices or processes.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import MappingProxyType

import msgspec

from stream_mmrnn.capture.derive import DerivedEncoder
from stream_mmrnn.capture.encoders import Encoder
from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.settings import Policy
from stream_mmrnn.core.streams import Stream
from stream_mmrnn.core.types import Envelope, Sample

LABEL_COMMAND = b"/label "


class Outgoing(msgspec.Struct, frozen=True):
    """A sample to publish: what a publisher needs to make an envelope."""

    topic: str
    sample: Sample
    origin: str


def capture(
    samples: Iterable[Sample],
    stream: Stream,
    origin: str,
    encoders: Mapping[str, Encoder],
    bad: Callable[[WireError], None],
    labels: bool = False,
) -> Iterator[Outgoing]:
    """The feature vectors that each sample completes, encoder by encoder, then the sample itself if `stream.raw`.

    `encoders` are those of the stream by the name of their features. `bad` is called with the error of each sample
    that cannot be decoded. Features go first, because predictions wait for them.

    With `labels`, a text line `/label NAME` becomes a label and is never seen by a model. One stream of a session has
    them, so that one publisher numbers them.
    """
    raw = topics.raw(stream.name)
    by_topic = [(topics.FEATURE + name, encoder) for name, encoder in encoders.items()]
    for sample in samples:
        if labels and isinstance(sample.data, bytes) and sample.data.startswith(LABEL_COMMAND):
            name = sample.data.removeprefix(LABEL_COMMAND).strip()
            yield Outgoing(topics.LABEL, Sample(sample.event_ns, sample.capture_ns, name, sample.device_ns), origin)
            continue
        for feature, encoder in by_topic:
            try:
                vectors = encoder.encode(sample)
            except WireError as e:
                bad(e)
                vectors = []
            for vector in vectors:
                yield Outgoing(feature, vector, encoder.origin)
        if stream.raw:
            yield Outgoing(raw, sample, origin)


def reencode(
    envelopes: Iterable[Envelope],
    encoders: Mapping[str, Encoder],
    featureless: Collection[str] = (),
    read: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Envelope]:
    """Replace each recorded feature vector by one that is computed again from the raw samples.

    `encoders`: by the name of their features (`audio`, `audio.prosody`). A vector keeps its place in the sequence, so
    each tick closes at the same message as before. Vectors whose raw sample was lost are left out. The features named
    in `featureless` were not recorded: their vectors follow the raw message. `read`: by the name of features, the topic
    that they are made of, where that is not the raw topic of their stream.
    """
    by_raw: dict[str, list[str]] = {}
    for name in encoders:
        by_raw.setdefault(read.get(name, topics.raw(name.partition(".")[0])), []).append(name)
    made: dict[str, deque[Sample]] = {topics.FEATURE + name: deque() for name in encoders if name not in featureless}
    origins = {topics.FEATURE + name: encoder.origin for name, encoder in encoders.items()}
    seq = dict.fromkeys(featureless, 0)
    held: deque[Envelope] = deque()  # all messages from the first vector on whose raw sample has not come yet
    for envelope in envelopes:
        names = by_raw.get(envelope.topic)
        if names is None or envelope.topic.startswith(topics.FEATURE):
            held.append(envelope)
        if names is not None:
            sample = Sample(envelope.event_ns, envelope.capture_ns, envelope.payload, envelope.device_ns)
            for name in names:
                feature = topics.FEATURE + name
                with contextlib.suppress(WireError):
                    vectors = encoders[name].encode(sample)
                    if name not in seq:
                        made[feature].extend(vectors)
                        vectors = []
                    for vector in vectors:
                        held.append(
                            msgspec.structs.replace(
                                envelope,
                                topic=feature,
                                seq=seq[name],
                                event_ns=vector.event_ns,
                                payload=vector.data,
                                origin=origins[feature],
                            )
                        )
                        seq[name] += 1
        yield from _release(held, made, origins, envelope.publish_ns - _RAW_WITHIN_NS)
    for name, encoder in encoders.items():
        if isinstance(encoder, DerivedEncoder) and name not in featureless:
            made[topics.FEATURE + name].extend(encoder.finish())
    yield from _release(held, made, origins, _FOREVER)


_RAW_WITHIN_NS = 1_000_000_000
"""A raw sample is published shortly before or after its features; after this time it is lost."""
_FOREVER = 2**63


def _release(
    held: deque[Envelope],
    made: Mapping[str, deque[Sample]],
    origins: Mapping[str, str],
    lost_before_ns: int,
) -> Iterator[Envelope]:
    """Yield the held messages whose new features are known, or known to be lost."""
    while held:
        envelope = held[0]
        waiting = made.get(envelope.topic)
        if waiting is not None:
            while waiting and waiting[0].event_ns < envelope.event_ns:
                waiting.popleft()
            if waiting and waiting[0].event_ns == envelope.event_ns:
                envelope = msgspec.structs.replace(
                    envelope, payload=waiting.popleft().data, origin=origins[envelope.topic]
                )
            elif waiting or envelope.publish_ns < lost_before_ns:
                held.popleft()
                continue
            else:
                return
        held.popleft()
        yield envelope


_YIELD_S = 0.003
"""How long a source thread leaves the GIL to the reader after a sample: enough to encode and publish it."""


class Pump:
    """A bounded queue between a device's thread and its encoder, with a named policy and counts.

    `latest` keeps one sample, `drop_oldest` the newest `length`, `block` makes the source wait. `read` raises what the
    source raised. Always: produced = delivered + dropped + waiting.
    """

    def __init__(self, samples: Iterator[Sample], policy: Policy, length: int, alive: Callable[[], bool]) -> None:
        self._samples = samples
        self._block = policy == "block"
        self._length = 1 if policy == "latest" else length
        self._alive = alive
        self._queue: deque[Sample] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._ended = False
        self._reading = False
        """Whether a reader waits in `read`."""
        self._reads = 0
        """Number of reads that had to wait."""
        self.produced = self.delivered = self.dropped = 0
        self._thread = threading.Thread(target=self._fill, name="pump", daemon=True)

    def _fill(self) -> None:
        try:
            for sample in self._samples:
                self.put(sample)
                if not self._alive():
                    break
        except BaseException as e:
            self._error = e
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def put(self, sample: Sample) -> None:
        """Add a sample; called by the source's thread, and by others that have samples for the same stream."""
        with self._changed:
            self.produced += 1
            if len(self._queue) >= self._length:
                if self._block:
                    while len(self._queue) >= self._length and self._alive():
                        self._changed.wait(0.1)
                else:
                    self._queue.popleft()
                    self.dropped += 1
            self._queue.append(sample)
            self._changed.notify_all()
            if self._reading:
                # producing the next sample now would take the GIL from the reader, on which a prediction waits
                reads = self._reads
                self._changed.wait_for(lambda: self._reads != reads, _YIELD_S)

    def read(self, timeout_s: float) -> Sample | None:
        """The next sample, or None after `timeout_s` or at the end (see `ended`)."""
        with self._changed:
            if not self._queue and not self._ended:
                self._reading = True
                self._reads += 1
                self._changed.notify_all()
                self._changed.wait(timeout_s)
                self._reading = False
            if self._queue:
                self.delivered += 1
                sample = self._queue.popleft()
                self._changed.notify_all()
                return sample
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            return None

    @property
    def ended(self) -> bool:
        """Whether `read` has nothing more to give, and no error to raise."""
        return self._ended and not self._queue and self._error is None

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_s: float) -> bool:
        """Wait until the source's generator has ended; whether it has, so that its device can be closed."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def discard(self) -> None:
        """Drop the samples that are still waiting, and count them."""
        with self._changed:
            self.dropped += len(self._queue)
            self._queue.clear()
            self._changed.notify_all()
