"""Client: sessions on an engine that `stream-mmrnn serve` runs, for your program.

    from stream_mmrnn import Client

    with Client("tcp://127.0.0.1:7701") as client, client.open("alice") as session:
        for features in source:                      # {"audio": float32 [n], ...}; a missing one is absent
            answer = session.step(features)
            print(answer.tick, answer.heads)

The client reconnects to a server that was restarted: sessions continue from its newest state, and ticks that it has not
seen are sent again. Not thread-safe: use a client in one thread, or in one event loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from stream_mmrnn.bus import Dealer, Keys
from stream_mmrnn.bus.keys import KeyFolder
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import NotRunning, SessionError, TimedOut, WireError
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.client_base import Closing, Figures
from stream_mmrnn.serve.client_group import TIMEOUT_S, Group, opened
from stream_mmrnn.serve.client_requests import Asked, SessionReply, SessionRequest
from stream_mmrnn.serve.client_session import Answer, ClientSession
from stream_mmrnn.serve.client_state import ClientState
from stream_mmrnn.serve.raw_pushes import RawPushes

QUEUE = 4096
"""Messages that may wait in each direction."""
POLL_MS = 100
STARTING = "start one by stream-mmrnn serve, and check that its keys let you in"
"""What to do where no server answers."""


def keys_of(keys: str | Path | Keys | None, server: str) -> Keys | None:
    """The keys of a folder; `server`: the server's public key, where the folder is not the server's own."""
    if keys is None or isinstance(keys, Keys):
        return keys
    return KeyFolder(Path(keys)).keys(server)


class SessionProperties(Figures):
    """What both kinds of session know without a request."""

    def __init__(self, client_state: ClientState, session: ClientSession) -> None:
        super().__init__(session)
        self._client_state, self._session = client_state, session

    @property
    def name(self) -> str:
        return self._session.name

    @property
    def token(self) -> str:
        """Secret: with it the session can be opened from another client, or later."""
        return self._session.token or ""

    @property
    def resumed(self) -> bool:
        """Whether it continues from a saved state."""
        return self._session.opened is not None and self._session.opened.resumed


class TickSender(SessionProperties):
    """The calls without a wait of a session that takes ticks."""

    @property
    def next_tick(self) -> int:
        """Index of the next tick, where none is given."""
        return self._session.next_tick

    def send(
        self,
        features: Mapping[str, Any],
        *,
        tick: int | None = None,
        event_ns: int = 0,
        age_ns: Mapping[str, int] | None = None,
    ) -> int:
        """Send one tick and do not wait; returns its index.

        `features`: float32 [size] by modality; one that is missing or None is absent. `tick`: its index, the next one
        if not given. `event_ns`: its end by your clock, returned with the answer. `age_ns`: by modality, how old the
        newest sample is at the tick's end.

        Raises:
            BadTick: it does not fit the model; nothing was sent.
            Evicted: another client took the session over, or it cannot continue.

        """
        index = self._client_state.put(self._session, features, tick, event_ns, age_ns, now_ns())
        self._post()
        return index


def taken(session: ClientSession) -> Answer | None:
    """The next answer that has arrived; raises the error that a tick got instead."""
    if session.answers:
        answer = session.answers.popleft()
        if isinstance(answer, SessionError):
            raise answer
        return answer
    if session.error is not None:
        raise session.error
    return None


class _Served(SessionProperties, Closing):
    """What both kinds of session of a `Client` have; as a context manager a session is closed at the end."""

    def __init__(self, client: Client, session: ClientSession) -> None:
        super().__init__(client.client_state, session)
        self._client = client

    def _post(self) -> None:
        self._client.post()

    def _ask(self, request: SessionRequest, timeout_s: float) -> SessionReply:
        session, state = self._session, self._client.client_state
        asked = state.ask(session, request)
        try:
            self._client.wait(
                lambda: asked.reply is not None or session.error is not None,
                now_ns() + round(timeout_s * 1e9),
                f"session {session.name!r} got no reply",
            )
        finally:
            state.take_back(session, asked)
            self._client.post()
        return replied(session, asked)

    def flush(self, timeout_s: float = TIMEOUT_S) -> int:
        """Wait until all that was sent is answered and the state is on disk; the index of the next tick, or push."""
        done = self._ask(protocol.Flush(session=self.name), timeout_s)
        return done.next if isinstance(done, protocol.Flushed) else self._session.next_tick

    def close(self, timeout_s: float = TIMEOUT_S) -> None:
        """End the session; the server deletes its state. Does nothing where it is over already."""
        try:
            if self._session.error is None:
                self._ask(protocol.Close(session=self.name, token=self._session.token), timeout_s)
        finally:
            self._client.client_state.sessions.pop(self.name, None)

    def leave(self) -> None:
        """Stop using the session without ending it: its token opens it again, from here or another client."""
        self._client.client_state.sessions.pop(self.name, None)


class ServedSession(_Served, TickSender):
    """One session of a `Client`; as a context manager it is closed at the end."""

    def step(
        self,
        features: Mapping[str, Any],
        *,
        tick: int | None = None,
        event_ns: int = 0,
        age_ns: Mapping[str, int] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> Answer | None:
        """Send one tick and wait for its answer, as `send` and `receive`; answers to earlier ticks are skipped.

        Returns None where the session had this tick already.
        """
        index = self.send(features, tick=tick, event_ns=event_ns, age_ns=age_ns)
        end_ns = now_ns() + round(timeout_s * 1e9)
        while (answer := self._next(end_ns, lambda: index not in self._session.unanswered)) is not None:
            if answer.tick == index:
                return answer
        return None

    def receive(self, timeout_s: float = TIMEOUT_S) -> Answer | None:
        """The next answer; None where every tick has one. Raises TimedOut, or the error that a tick got instead."""
        return self._next(now_ns() + round(timeout_s * 1e9), lambda: not self._session.unanswered)

    def _next(self, end_ns: int, over: Callable[[], bool]) -> Answer | None:
        session = self._session
        self._client.wait(
            lambda: bool(session.answers) or session.error is not None or over(),
            end_ns,
            f"no answer came to {len(session.unanswered)} ticks of session {session.name!r}",
        )
        return taken(session)

    def answers(self, timeout_s: float = TIMEOUT_S) -> Iterator[Answer]:
        """Answers as they arrive, until every tick has one."""
        while (answer := self.receive(timeout_s)) is not None:
            yield answer

    def reset(self, timeout_s: float = TIMEOUT_S) -> None:
        """Start the state anew; tick indices continue."""
        self._ask(protocol.Reset(session=self.name), timeout_s)


class RawServedSession(_Served, RawPushes[list[Answer]]):
    """A session of a `Client` to which samples are pushed: encoders and aligner are the server's."""

    def __init__(self, client: Client, session: ClientSession, timeout_s: float) -> None:
        _Served.__init__(self, client, session)
        RawPushes.__init__(self, session)
        self._timeout_s = timeout_s

    def _push(self, stream: str, data: bytes, at_ns: int | None, vector: bool) -> list[Answer]:
        session = self._session
        number = self._client_state.put_push(session, stream, data, at_ns, vector, now_ns())
        self._post()
        self._client.wait(
            lambda: number not in session.unanswered or session.error is not None,
            now_ns() + round(self._timeout_s * 1e9),
            f"no answer came to push {number} of session {session.name!r}",
        )
        return pushed(session, number)


def pushed(session: ClientSession, number: int) -> list[Answer]:
    """What came of a push; [] where the server had it already. Raises its error, or the session's."""
    found = session.pushed.pop(number, None)
    if isinstance(found, SessionError):
        raise found
    if found is None and session.error is not None:
        raise session.error
    return found or []


def replied(session: ClientSession, asked: Asked) -> SessionReply:
    """The reply to a request; raises its refusal, or the session's error where there is none."""
    reply = asked.reply if asked.reply is not None else session.error
    if isinstance(reply, SessionError):
        raise reply
    assert reply is not None
    return reply


def ready(client_state: ClientState, session: ClientSession) -> None:
    """Check the reply to an `open`; raises its refusal."""
    if session.error is not None:
        del client_state.sessions[session.name]
        raise session.error


class Client:
    """A connection to a server of sessions."""

    def __init__(
        self,
        address: str,
        *,
        keys: str | Path | Keys | None = None,
        server_key: str = "",
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """`address`: tcp://HOST:PORT. `keys`: a folder made by `stream-mmrnn keys new`, where the server asks for keys;
        `server_key`: the server's public key then.

        Raises:
            NotRunning: no server answers there, or it does not accept these keys.
            ProcessError: the address is not valid, or the server has another protocol version.

        """
        self.client_state = ClientState()
        self._address = address
        self._dealer = Dealer(address, QUEUE, protocol.MAX_BYTES, keys_of(keys, server_key))
        self._polled_ns = now_ns()
        self.client_state.send(protocol.Hello())
        try:
            self.wait(lambda: self.client_state.welcome is not None, now_ns() + round(timeout_s * 1e9), "no reply came")
        except TimedOut:
            self.close()
            raise NotRunning(f"no server answers at {address}: {STARTING}") from None
        except BaseException:
            self.close()
            raise

    @property
    def model(self) -> protocol.Welcome:
        """What the server's model takes and predicts."""
        assert self.client_state.welcome is not None
        return self.client_state.welcome

    def open(self, session: str, token: str | None = None, timeout_s: float = TIMEOUT_S) -> ServedSession:
        """Begin a session, or continue one with its token.

        Raises:
            Busy: the server is full; `retry_after_s` says when to ask again.
            DuplicateSession, Evicted, UnknownSession, SessionError: the server refused it.
            TimedOut: the server did not reply. If it opens a new session later, that is closed.

        """
        return ServedSession(self, self._open(session, token, timeout_s, raw=False))

    def open_raw(self, session: str, token: str | None = None, timeout_s: float = TIMEOUT_S) -> RawServedSession:
        """Begin a raw session, to which samples are pushed, or continue one with its token. Raises as `open`.

        `timeout_s` also of its pushes.
        """
        return RawServedSession(self, self._open(session, token, timeout_s, raw=True), timeout_s)

    def group(
        self, names: Sequence[str], tokens: Sequence[str | None] | None = None, timeout_s: float = TIMEOUT_S
    ) -> Group:
        """Begin many sessions that are stepped by blocks, or continue them with their tokens. All are opened, or none
        that is new.

        Raises:
            UsageError: the lists do not fit, or the server knows no groups.
            Busy, DuplicateSession, Evicted, UnknownSession, SessionError: the server refused one of them.
            TimedOut: the server did not reply. If it opens new sessions later, they are closed.

        """
        group = self.client_state.new_group(names, tokens)
        try:
            self.wait(lambda: group.is_open, now_ns() + round(timeout_s * 1e9), "the sessions of a group got no reply")
        except BaseException:
            self.client_state.give_up_group(group)
            self.post()
            raise
        try:
            opened(self.client_state, group)
        finally:
            self.post()
        return Group(self, group)

    def _open(self, session: str, token: str | None, timeout_s: float, raw: bool) -> ClientSession:
        state = self.client_state.new_session(session, raw)
        self.client_state.send(protocol.Open(session=session, token=token, raw=raw))
        try:
            self.wait(
                lambda: state.opened is not None or state.error is not None,
                now_ns() + round(timeout_s * 1e9),
                f"session {session!r} got no reply",
            )
        except BaseException:
            self.client_state.give_up(state, new=token is None)
            self.post()
            raise
        ready(self.client_state, state)
        return state

    def post(self) -> None:
        """Send waiting messages, until the queue is full."""
        out = self.client_state.out
        while out and self._dealer.send(out[0][1]):
            out.popleft()

    def wait(self, over: Callable[[], bool], end_ns: int, late: str) -> None:
        """Receive until `over`; raises TimedOut at `end_ns`."""
        state = self.client_state
        self.post()
        while not over():
            at_ns = now_ns()
            if state.problem is not None:
                raise state.problem
            if at_ns >= end_ns:
                raise TimedOut(f"{late} from {self._address} in time")
            content = self._dealer.receive(min((end_ns - at_ns) // 1_000_000 + 1, POLL_MS))
            at_ns = now_ns()
            if content is not None:
                with contextlib.suppress(WireError):  # not a message of the protocol: ignored
                    state.receive(content, at_ns)
            if at_ns - self._polled_ns > POLL_MS * 1_000_000:
                self._polled_ns = at_ns
                state.poll(at_ns)
            if state.out:
                self.post()

    def close(self) -> None:
        """Disconnect. Open sessions are not closed: their tokens open them again."""
        self._dealer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
