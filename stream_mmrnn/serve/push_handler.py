"""PushHandler: the raw sessions of a host, and what their pushes wait for and are answered.

Knows nothing about who owns a session, or how ticks are stepped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from stream_mmrnn.core.errors import BadTick, SessionError, StreamError, UsageError
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.groups import Served, TickQueues, WaitingTick
from stream_mmrnn.serve.raw_session import PendingPush, RawSession
from stream_mmrnn.serve.session_input import SessionInput
from stream_mmrnn.serve.sessions import Opened, Sessions
from stream_mmrnn.serve.step_reader import StepReader
from stream_mmrnn.serve.turns import Peer

_SAVE_PUSHES = 100
"""The state of a raw session is saved after so many pushes, also where no tick came of them."""
_RAW_AND_NOT = "session {!r} is of the other kind: one is opened for ticks, or raw for samples, and stays that"


class PushHandler:
    def __init__(
        self,
        make_input: Callable[[str], SessionInput] | None,
        sessions: Sessions,
        queues: TickQueues,
        reader: StepReader,
        most: int,
        counts: Counter[str],
        send: Callable[[Peer, protocol.Reply], None],
    ) -> None:
        """`make_input`: of a session, by name; raw sessions are refused without it. `most`: ticks and pushes of a
        session that may wait.
        """
        self._make_input, self._sessions, self._queues, self._reader = make_input, sessions, queues, reader
        self._most, self._counts, self._send = most, counts, send
        self.raw: dict[str, RawSession] = {}
        if make_input is not None:
            sessions.extra_of = lambda session: self.raw[session].snapshot() if session in self.raw else {}
        # the input of a raw session is ahead of the engine by the ticks that wait
        sessions.may_save = lambda session: session not in self.raw or not queues.waits(session)

    def check_kind(self, session: str, raw: bool) -> None:
        """Raises SessionError where a session cannot be opened as raw, or is open as the other kind."""
        if raw and self._make_input is None:
            raise SessionError(
                "a cluster serves no raw sessions; make features with Predictor's encoders, or use serve"
            )
        if session in self._sessions and raw != (session in self.raw):
            raise SessionError(_RAW_AND_NOT.format(session))

    def begin(self, session: str, raw: bool, opened: Opened, now_ns: int) -> None:
        """Make or restore the input of a session that was opened, if it is raw; where that fails, it is closed or
        evicted.
        """
        if session in self.raw or not (raw or RawSession.is_in(opened.extra)):
            return
        try:
            if self._make_input is None or (opened.resumed and not (raw and RawSession.is_in(opened.extra))):
                raise SessionError(_RAW_AND_NOT.format(session))
            made = RawSession(self._make_input(session))
            if opened.resumed:
                made.restore(opened.extra)
        except StreamError:
            if opened.resumed:
                self._sessions.drop(session)  # its state is on disk
            else:
                self._sessions.close(session, opened.token, now_ns=now_ns)
            raise
        self.raw[session] = made

    def push(self, peer: Peer, served: Served, request: protocol.PushSample, now_ns: int) -> None:
        """Take a push of a session. Raises BadTick where it is not raw, or this is not its next push."""
        session = request.session
        raw = self.raw.get(session)
        if raw is None:
            raise BadTick(f"session {session!r} was opened for ticks and takes no samples; open it with raw = true")
        if request.push < raw.next:
            self._counts["skipped"] += 1
            self._send(peer, protocol.Skipped(session=session, tick=request.push, next=raw.next))
            return
        if len(raw.pending) >= self._most or len(served.waiting) >= self._most:
            self._counts["overrun"] += 1
            why = f"{self._most} ticks or pushes of session {session!r} wait already; read their answers first"
            self._send(peer, protocol.Refused(error="overrun", why=why, session=session, tick=request.push))
            return
        push = raw.begin(request, peer)
        try:
            for tick in raw.ticks(request):
                self._queues.put(WaitingTick(served, peer, self._reader.to_step(tick), now_ns, push))
                push.left += 1
        except UsageError as e:
            self._counts["refused"] += 1
            push.error = str(e)
        self._sessions.observe_input(session, now_ns, due=request.push % _SAVE_PUSHES == 0)
        self._send_done(session, raw)

    def _send_done(self, session: str, raw: RawSession) -> None:
        """Answer the pushes that have all their predictions."""
        for push in raw.done():
            predictions = tuple(push.predictions)
            self._send(
                push.peer,
                protocol.Pushed(session=session, push=push.number, predictions=predictions, error=push.error),
            )

    def stepped(self, push: PendingPush, session: str, pred: protocol.Pred | None = None, error: str = "") -> None:
        """One tick of a push is done."""
        push.left -= 1
        push.error = push.error or error
        raw = self.raw.get(session)
        if raw is None:
            return
        if pred is not None:
            push.predictions.append(raw.since_begin(pred))
        self._send_done(session, raw)
