"""A subscriber of predictions in its own process: it measures when a prediction can be read.

It does nothing else, so what it stamps is the way, not its own work. Knows nothing about who predicts.
"""

from __future__ import annotations

import contextlib
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from stream_mmrnn.bus import Address, Subscriber
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import ProcessError, WireError
from stream_mmrnn.core.latency import stages
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.live import nodes
from stream_mmrnn.live.managed_process import process_context

STAGES = ("capture", "encode", "transport", "queue", "step", "emit", "deliver")
"""The way of a sample that closes a tick: those of `latency`, and `deliver`, from the prediction sent to it read."""


class Seen(NamedTuple):
    """One prediction as the reader had it."""

    event_ns: int
    """When the sample ended that closed the tick."""
    by: str
    """That sample's topic."""
    wait_ns: int
    """From the tick's end to that sample's: the streams' phase, not work."""
    took: dict[str, int]
    """`STAGES` -> nanoseconds; one after the other from `event_ns` on."""
    total_ns: int
    """From `event_ns` until it was read."""

    @property
    def owed_ns(self) -> int:
        """From the event that was waited for until it was read: of a tick that the clock closed, from its end.

        The sample that should have closed it was lost or late; to count from the clock would forget that.
        """
        return self.total_ns if self.by.startswith(topics.FEATURE) else self.wait_ns + self.total_ns


def _read(context: nodes.Context, channel: Connection) -> None:
    """The process: listens until told to stop, then hands over all that it saw."""
    subscriber = Subscriber(context.address, [topics.PREDICTION], context.settings.bus.queue)
    context.ready.set()
    seen: list[tuple[Any, ...]] = []
    before = 0
    while context.alive():
        envelope = subscriber.receive(50)
        if envelope is None:
            continue
        # it connects before there is a broker: what is sent until its subscription is known was not lost on the way
        before = before if seen else envelope.seq
        with contextlib.suppress(WireError):
            p = wire.unpack(envelope.payload, wire.PredictionMessage)
            read_ns = now_ns()
            took = stages(p.event_ns, p.closed, p.step_start_ns, p.step_end_ns, envelope.publish_ns)
            took["deliver"] = read_ns - envelope.publish_ns
            ways = {name: took[name] for name in STAGES}
            seen.append((p.closed.event_ns, p.closed.by, took["wait"], ways, read_ns - p.closed.event_ns))
    with contextlib.suppress(OSError):
        channel.send((seen, before, subscriber.gaps.lost.get(topics.PREDICTION, 0) - before))
    subscriber.close()


class Reader:
    """Listens from its making until `finish`."""

    def __init__(self, settings: Settings, address: Address) -> None:
        new: Any = process_context()
        self._channel, theirs = new.Pipe(duplex=False)
        self._context = nodes.Context("reader", settings, address, nodes.Flag(new), nodes.Flag(new), new.Value("q", 0))
        self._process = new.Process(target=nodes.run, args=(_read, self._context, theirs), daemon=True)
        self._process.start()
        theirs.close()
        if not self._context.ready.wait(settings.supervisor.start_timeout_s):
            raise ProcessError("the bench's reader of predictions did not start; run the bench again")
        self.before = self.lost = 0
        """Predictions that were sent before it was heard of; and those that it never had, by their numbers."""

    def finish(self) -> list[Seen]:
        """Every prediction that it read, in order."""
        self._context.stop.set()
        try:
            if not self._channel.poll(20.0):
                raise EOFError
            seen, self.before, self.lost = self._channel.recv()
        except EOFError:
            raise ProcessError("the bench's reader of predictions died; run the bench again") from None
        self._process.join(5)
        self._channel.close()
        return [Seen(*values) for values in seen]
