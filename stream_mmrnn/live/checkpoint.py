"""Checkpoints of an engine's process, and resuming from one without a missing or different prediction.

A checkpoint is everything between two messages of the bus: the aligner's state, each session's recurrent state, counts
and sequence numbers, and the place in the bus's order. The journal, another process, keeps it. After a kill some ticks
are stepped and published again; readers drop them by session and tick (`core.dedup`).
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import msgspec

from stream_mmrnn.bus import Gaps, GapsState, JournalClient, Numbers, Publisher, Subscriber
from stream_mmrnn.core import wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import ProcessError, SessionError, StreamError, WireError
from stream_mmrnn.core.types import Envelope, Mark
from stream_mmrnn.live import journal
from stream_mmrnn.predict.align import Aligner, AlignerState
from stream_mmrnn.predict.protocols import Engine
from stream_mmrnn.predict.snapshots import Snapshot, from_bytes, to_bytes

_ANSWER_MS = 3000


class Checkpoint(msgspec.Struct, frozen=True):
    """An engine's process between two messages."""

    model_sha256: str
    sessions: dict[str, bytes]
    """Each one's recurrent state, as `snapshots` writes it."""
    aligner: AlignerState
    gaps: GapsState
    numbers: Numbers
    """The publisher's."""
    counts: dict[str, int]


_encode = msgspec.msgpack.Encoder().encode
_read_checkpoint = msgspec.msgpack.Decoder(Checkpoint).decode
_read_answer = msgspec.msgpack.Decoder(journal.JournalAnswer).decode


class _Beginning(msgspec.Struct, frozen=True):
    """What a recording that began in the middle of a session holds of it."""

    model_sha256: str
    state: bytes
    aligner: AlignerState


_read_beginning = msgspec.msgpack.Decoder(_Beginning).decode


class Newest(NamedTuple):
    """The newest checkpoint, for a recording of one session that begins there."""

    mark: Mark
    """The last message that it has seen."""
    closed: int
    """The last tick that was stepped."""
    next_end_ns: int
    """When the tick after it ends, in event time."""
    expected: tuple[str, ...]
    content: bytes
    """For `begin`."""


def newest(caller: JournalClient, session: str, timeout_ms: int) -> Newest | None:
    """Ask the journal; None if it has none of this session, or does not answer."""
    reply = caller.ask(_encode(journal.Newest()), timeout_ms)
    try:
        answer = _read_answer(reply) if reply is not None else None
        if answer is None or answer.mark is None:
            return None
        whole = _read_checkpoint(answer.content)
    except (msgspec.MsgspecError, RecursionError):
        return None
    about = whole.aligner.sessions.get(session)
    if about is None or session not in whole.sessions:
        return None
    aligner = msgspec.structs.replace(whole.aligner, sessions={session: about})
    content = _encode(_Beginning(whole.model_sha256, whole.sessions[session], aligner))
    return Newest(answer.mark, about.closed, about.end_ns, tuple(about.expected), content)


def begin(content: bytes, engine: Engine, aligner: Aligner) -> bool:
    """Put aligner and engine where a recording begins; False if that is of another model, which begins anew.

    Raises:
        WireError: it cannot be read.
        SessionError: it does not fit the model.

    """
    try:
        start = _read_beginning(content)
    except (msgspec.MsgspecError, RecursionError) as e:
        raise WireError(f"the state at the recording's beginning cannot be read: {e}") from e
    if start.model_sha256 != engine.spec.sha256:
        return False
    if len(start.aligner.sessions) != 1:
        raise WireError("the state at the recording's beginning is not of one session")
    [session] = start.aligner.sessions
    state = from_bytes(start.state).state
    if session not in engine:
        engine.open(session)
    engine.restore(session, state)
    aligner.restore(start.aligner)
    return True


def mark(envelope: Envelope) -> Mark:
    """Which message of the bus it is."""
    return Mark(envelope.topic, envelope.session, envelope.seq, envelope.publish_ns)


class Checkpoints:
    """Hands a checkpoint to the journal every so many ticks; brings back the newest one and what came after it."""

    def __init__(
        self,
        caller: JournalClient,
        every: int,
        engine: Engine,
        aligner: Aligner,
        subscriber: Subscriber,
        publisher: Publisher,
        counts: dict[str, int],
    ) -> None:
        self._caller, self._every = caller, every
        self._engine, self._aligner = engine, aligner
        self._subscriber, self._publisher, self._counts = subscriber, publisher, counts
        self._sent: Mark | None = None
        self._group = -1
        self._due = self._just_stepped = False
        self.skipped = 0
        """Checkpoints that were not made because the journal had not taken the one before."""

    def stepped(self, sent: Envelope, index: int) -> None:
        """Tick `index` has been stepped and `sent` is the last message about it."""
        self._sent = mark(sent)
        group = index // self._every
        self._due = self._due or self._group not in (-1, group)
        self._group = group
        self._just_stepped = True

    def keep_if_due(self, envelope: Envelope) -> None:
        """Call it when `envelope` and all that it led to are dealt with, and the next message is not begun.

        Only right after a step is it sure that no tick waits for others to be stepped with it.
        """
        just_stepped, self._just_stepped = self._just_stepped, False
        if not self._due or not just_stepped or self._subscriber.ahead:
            return
        self._due = False
        made = journal.Keep(mark(envelope), self._sent, _encode(self._make()))
        if not self._caller.send(_encode(made)):
            self.skipped += 1

    def _make(self) -> Checkpoint:
        aligner, sha256 = self._aligner.snapshot(), self._engine.spec.sha256
        return Checkpoint(
            sha256,
            {
                name: to_bytes(Snapshot(name, sha256, session.closed, self._engine.snapshot(name)))
                for name, session in aligner.sessions.items()
            },
            aligner,
            self._subscriber.gaps.snapshot(),
            self._publisher.numbers(),
            self._counts,
        )

    def resume(self, heard: Envelope) -> list[Envelope]:
        """Go on where the process before this one was; the messages from there until `heard`, which came by the bus.

        Raises:
            StreamError: there is nothing to go on from, and why; engine and aligner are as they were.

        """
        reply = self._caller.ask(_encode(journal.Ask(mark(heard))), _ANSWER_MS)
        if reply is None:
            raise ProcessError("the journal does not answer")
        try:
            answer = _read_answer(reply)
            checkpoint = _read_checkpoint(answer.content) if answer.content else None
        except (msgspec.MsgspecError, RecursionError) as e:
            raise WireError(f"the journal's answer cannot be read: {e}") from e
        if answer.refused:
            raise SessionError(answer.refused)
        messages = []
        for frames in answer.messages:
            # what is no message was none for the process before this one either
            with contextlib.suppress(WireError):
                messages.append(wire.decode(frames, now_ns()))
        self._subscriber.gaps = Gaps()
        if checkpoint is not None:
            self._restore(checkpoint)
        return messages

    def _restore(self, checkpoint: Checkpoint) -> None:
        engine = self._engine
        if checkpoint.model_sha256 != engine.spec.sha256:
            raise SessionError("the model's file is another than before")
        before = self._aligner.snapshot()
        self._aligner.restore(checkpoint.aligner)
        try:
            for name, raw in checkpoint.sessions.items():
                engine.open(name)
                engine.restore(name, from_bytes(raw).state)
        except StreamError:
            for name in checkpoint.sessions:
                if name in engine:
                    engine.close(name)
            self._aligner.restore(before)
            raise
        self._subscriber.gaps.restore(checkpoint.gaps)
        self._publisher.restore(checkpoint.numbers)
        self._counts.update(checkpoint.counts)
