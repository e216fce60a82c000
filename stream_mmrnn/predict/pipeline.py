"""`predict`, the generator that is the product: messages in, predictions out.

The messages may come from a bus subscriber (live), a recording (replay), a synthetic stream (benchmark) or a list
(test); none of them is a special case here. Knows nothing about sockets, files, devices or processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.errors import SessionError, WireError
from stream_mmrnn.core.types import Envelope, Tick
from stream_mmrnn.predict.align import Aligner, stamps_of
from stream_mmrnn.predict.protocols import Out, Stepper


class NoEngine:
    """A stepper without a model: it returns the ticks unchanged."""

    def __init__(self) -> None:
        self._open: set[str] = set()

    def __contains__(self, session: str) -> bool:
        return session in self._open

    def open(self, session: str) -> None:
        self._open.add(session)

    def reset(self, session: str) -> None:
        """Nothing to do: it has no state."""

    def close(self, session: str) -> None:
        self._open.discard(session)

    def step(self, ticks: Sequence[Tick]) -> Sequence[Tick]:
        return ticks


def predict(
    envelopes: Iterable[Envelope],
    aligner: Aligner,
    engine: Stepper[Out],
    refused: Callable[[str, SessionError], None] | None = None,
    more: Callable[[], bool] | None = None,
    batch: int = 64,
) -> Iterator[Out]:
    """Messages in, predictions out (or whatever `engine` returns for ticks).

    If a session gets no slot, `refused` is called and its messages are counted as outside; without `refused` the error
    is raised. A session message that cannot be decoded is counted in `aligner.malformed`.

    `more` returns whether further messages are available already. While it does, up to `batch` ticks are collected and
    stepped together; the function never waits for a message to fill a batch. Without `more` every tick is stepped
    immediately. The predictions are the same.
    """
    held: list[Tick] = []
    for envelope in envelopes:
        if envelope.topic != topics.SESSION:
            ticks = aligner.push(envelope)
            if more is not None:
                held += ticks
                if held and (len(held) >= batch or not more()):
                    yield from engine.step(held)
                    held = []
            elif ticks:
                yield from engine.step(ticks)
            continue
        if held:
            yield from engine.step(held)
            held = []
        try:
            ticks = on_session_message(envelope, aligner, engine, refused)
        except WireError:
            aligner.malformed += 1
            continue
        if ticks:
            yield from engine.step(ticks)
        if envelope.session not in aligner and envelope.session in engine:
            engine.close(envelope.session)
    if held:
        yield from engine.step(held)


def on_session_message(
    envelope: Envelope,
    aligner: Aligner,
    engine: Stepper[Out],
    refused: Callable[[str, SessionError], None] | None,
) -> list[Tick]:
    """Open, change or close a session; returns the ticks that this closes. Raises WireError if it cannot be decoded."""
    message = wire.unpack(envelope.payload, wire.SessionMessage)
    session = envelope.session
    if message.op == "close":
        return aligner.close(session, message.event_ns, stamps_of(envelope))
    if message.op == "streams":
        aligner.expect(session, message.streams)
        return []
    try:
        if session in engine:
            engine.reset(session)  # opened again: its process was restarted
        else:
            engine.open(session)
    except SessionError as e:
        if refused is None:
            raise
        refused(session, e)
        return []
    aligner.open(session, message.event_ns, message.streams)
    return []
