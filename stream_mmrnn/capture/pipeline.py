"""`capture`, the generator from a device's samples to messages; `Pump`, the bounded queue behind a device; and
`reencode`, which makes a recording's features again from its raw samples.

Knows nothing about sockets, files, devices or processes.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

import msgspec

from stream_mmrnn.capture.encoders import Encoder
from stream_mmrnn.core import topics
from stream_mmrnn.core.config import Policy
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.types import Envelope, Sample

LABEL_COMMAND = b"/label "


class Outgoing(msgspec.Struct, frozen=True):
    """A sample on its way to the bus: what a publisher needs to make an envelope of it."""

    topic: str
    sample: Sample
    origin: str


def capture(
    samples: Iterable[Sample],
    modality: str,
    origin: str,
    encoder: Encoder,
    bad: Callable[[WireError], None],
) -> Iterator[Outgoing]:
    """The feature vectors that each sample completes, then the sample as it is, where its modality has such messages;
    undecodable ones go to `bad`.

    Features go first: a prediction waits for them, and nothing waits for a picture or a sound.

    A typed `/label NAME` is no text that a model may see: it goes out as a label, and nothing else. Labels are typed
    into `text` alone, never into `other_text`: one publisher numbers them.
    """
    raw, feature = topics.raw(modality), topics.feature(modality)
    has_raw = raw in topics.TOPICS
    for sample in samples:
        if modality == "text" and isinstance(sample.data, bytes) and sample.data.startswith(LABEL_COMMAND):
            name = sample.data.removeprefix(LABEL_COMMAND).strip()
            yield Outgoing(topics.LABEL, Sample(sample.event_ns, sample.capture_ns, name, sample.device_ns), origin)
            continue
        try:
            vectors = encoder.encode(sample)
        except WireError as e:
            bad(e)
            vectors = []
        for vector in vectors:
            yield Outgoing(feature, vector, encoder.origin)
        if has_raw:
            yield Outgoing(raw, sample, origin)


def reencode(
    envelopes: Iterable[Envelope], encoders: Mapping[str, Encoder], featureless: Collection[str] = ()
) -> Iterator[Envelope]:
    """Replace each recorded feature vector by one made from the raw samples again, in the recorded order.

    A vector keeps its place in the sequence, so the ticks close as they did; only the encoders' work is done again. One
    whose raw sample was lost is left out. The streams of `featureless` were recorded without features: theirs come
    right after the raw message.
    """
    made: dict[str, deque[Sample]] = {m: deque() for m in encoders}
    seq = dict.fromkeys(featureless, 0)
    held: deque[Envelope] = deque()  # from the first vector on whose raw sample is still to come
    for envelope in envelopes:
        modality = topics.TOPICS[envelope.topic].modality
        if modality in encoders and envelope.topic == topics.raw(modality):
            encoder = encoders[modality]
            with contextlib.suppress(WireError):
                vectors = encoder.encode(
                    Sample(envelope.event_ns, envelope.capture_ns, envelope.payload, envelope.device_ns)
                )
                if modality not in seq:
                    made[modality].extend(vectors)
                    vectors = []
                for vector in vectors:
                    held.append(
                        msgspec.structs.replace(
                            envelope,
                            topic=topics.feature(modality),
                            seq=seq[modality],
                            event_ns=vector.event_ns,
                            payload=vector.data,
                            origin=encoder.origin,
                        )
                    )
                    seq[modality] += 1
        else:
            held.append(envelope)
        yield from _made_again(held, made, encoders, seq, envelope.publish_ns - _RAW_WITHIN_NS)
    yield from _made_again(held, made, encoders, seq, _FOREVER)


_RAW_WITHIN_NS = 1_000_000_000
"""A raw sample comes with its features, a little before or after; what has not come by then was lost."""
_FOREVER = 2**63


def _made_again(
    held: deque[Envelope],
    made: Mapping[str, deque[Sample]],
    encoders: Mapping[str, Encoder],
    featureless: Collection[str],
    lost_before_ns: int,
) -> Iterator[Envelope]:
    """What need not be held any longer."""
    while held:
        envelope = held[0]
        modality = topics.TOPICS[envelope.topic].modality
        if modality in encoders and modality not in featureless:
            waiting = made[modality]
            while waiting and waiting[0].event_ns < envelope.event_ns:
                waiting.popleft()
            if waiting and waiting[0].event_ns == envelope.event_ns:
                envelope = msgspec.structs.replace(
                    envelope, payload=waiting.popleft().data, origin=encoders[modality].origin
                )
            elif waiting or envelope.publish_ns < lost_before_ns:
                held.popleft()
                continue
            else:
                return
        held.popleft()
        yield envelope


_YIELD_S = 0.003
"""So long a source leaves the interpreter to who reads: a sample's features and their sending take less."""


class Pump:
    """A bounded queue between a device's thread and its encoder, with a named policy and counts.

    `latest` keeps one sample, `drop_oldest` the newest `length`, `block` makes the source wait. Iterating yields the
    samples and ends when the source does, or raises what the source raised. produced = delivered + dropped + waiting.
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
        """Whether somebody waits in `read`."""
        self._asked = 0
        """How often somebody began to."""
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
        """Add a sample: the device's thread does, and who has one more of the same kind."""
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
                # to make the next sample now would take the interpreter from the reader, who is waited for
                asked = self._asked
                self._changed.wait_for(lambda: self._asked != asked, _YIELD_S)

    def read(self, timeout_s: float) -> Sample | None:
        """The next sample, or None after `timeout_s` or at the end (see `ended`)."""
        with self._changed:
            if not self._queue and not self._ended:
                self._reading = True
                self._asked += 1
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
        return self._ended and not self._queue

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        """Let the source's generator come to its end, so that its device may be closed."""
        self._thread.join(timeout_s)

    def discard(self) -> None:
        """Count what nobody will read any more as dropped."""
        with self._changed:
            self.dropped += len(self._queue)
            self._queue.clear()
            self._changed.notify_all()
