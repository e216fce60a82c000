"""Client: sessions of an engine that `stream-mmrnn serve` runs, from a program of yours.

    from stream_mmrnn import Client

    with Client("tcp://127.0.0.1:7701") as client, client.open("alice") as session:
        for features in source:                      # {"audio": float32 [n], ...}; a missing one is absent
            answer = session.step(features)
            print(answer.tick, answer.heads)

A server that dies and comes back is met again: sessions go on from its newest state, and ticks that it has not seen are
sent again. One thread, or one event loop, uses a client.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from stream_mmrnn.bus import Dealer, Keys
from stream_mmrnn.bus.keys import Folder
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import NotRunning, SessionError, TimedOut, WireError
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.client_state import Answer, ClientSession, ClientState

QUEUE = 4096
"""Messages that may wait each way."""
LOOK_MS = 100
TIMEOUT_S = 5.0
STARTING = "start one by stream-mmrnn serve, and see that its keys let you in"
"""What to do where nobody answers."""


def keys_of(keys: str | Path | Keys | None, server: str) -> Keys | None:
    """Those of a folder; `server`: the public key of the server, where the folder is not the server's own."""
    if keys is None or isinstance(keys, Keys):
        return keys
    return Folder(Path(keys)).keys(server)


class AnySession:
    """What both kinds of session know without asking."""

    def __init__(self, client_state: ClientState, client_session: ClientSession) -> None:
        self._client_state, self._client_session = client_state, client_session

    @property
    def name(self) -> str:
        return self._client_session.name

    @property
    def token(self) -> str:
        """Secret: with it the session can be opened from elsewhere, or later."""
        return self._client_session.token or ""

    @property
    def next_tick(self) -> int:
        """What the next tick will be called, unless it is given."""
        return self._client_session.next_tick

    @property
    def resumed(self) -> bool:
        """Whether it began with a state."""
        return self._client_session.opened is not None and self._client_session.opened.resumed

    @property
    def skipped(self) -> int:
        """Ticks that the server had seen already, whose answers went with it or that were sent twice."""
        return self._client_session.skipped

    @property
    def waiting(self) -> int:
        """Ticks that have no answer yet."""
        return len(self._client_session.unanswered)

    @property
    def unread(self) -> int:
        """Answers that have come and were not read yet."""
        return len(self._client_session.answers)

    def send(
        self,
        features: Mapping[str, Any],
        *,
        tick: int | None = None,
        event_ns: int = 0,
        age_ns: Mapping[str, int] | None = None,
    ) -> int:
        """Send one tick and do not wait; its index.

        `features`: float32 [size] by modality; one that is missing or None is absent. `tick`: its index, the next one
        if not given. `event_ns`: its end, by a clock of yours; it comes back with the answer. `age_ns`: by modality,
        how old the newest sample is at the tick's end.

        Raises:
            BadTick: it is not of this model; nothing was sent.
            Evicted: the session has been taken over, or cannot go on.

        """
        index = self._client_state.put(self._client_session, features, tick, event_ns, age_ns, now_ns())
        self._post()
        return index

    def _post(self) -> None:
        """Hand what is to be said to the transport."""


def taken(client_session: ClientSession) -> Answer | None:
    """The next answer that waits; raises what was said instead of one."""
    if client_session.answers:
        said = client_session.answers.popleft()
        if isinstance(said, SessionError):
            raise said
        return said
    if client_session.error is not None:
        raise client_session.error
    return None


class Session(AnySession):
    """One session of a `Client`; as a context manager it is closed at the end."""

    def __init__(self, client: Client, client_session: ClientSession) -> None:
        super().__init__(client.client_state, client_session)
        self._client = client

    def _post(self) -> None:
        self._client.post()

    def step(
        self,
        features: Mapping[str, Any],
        *,
        tick: int | None = None,
        event_ns: int = 0,
        age_ns: Mapping[str, int] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> Answer | None:
        """Send one tick and wait for its answer, as `send` and `receive`; answers to earlier ticks are passed over.

        None where the session had seen this tick already.
        """
        index = self.send(features, tick=tick, event_ns=event_ns, age_ns=age_ns)
        end_ns = now_ns() + round(timeout_s * 1e9)
        while (answer := self._next(end_ns, lambda: index not in self._client_session.unanswered)) is not None:
            if answer.tick == index:
                return answer
        return None

    def receive(self, timeout_s: float = TIMEOUT_S) -> Answer | None:
        """The next answer; None where no tick waits for one. Raises TimedOut, or the error that a tick got instead."""
        return self._next(now_ns() + round(timeout_s * 1e9), lambda: not self._client_session.unanswered)

    def _next(self, end_ns: int, over: Callable[[], bool]) -> Answer | None:
        client_session = self._client_session
        self._client.wait(
            lambda: bool(client_session.answers) or client_session.error is not None or over(),
            end_ns,
            f"no answer came to {len(client_session.unanswered)} ticks of session {client_session.name!r}",
        )
        return taken(client_session)

    def answers(self, timeout_s: float = TIMEOUT_S) -> Iterator[Answer]:
        """Answers as they come, while ticks wait for one."""
        while (answer := self.receive(timeout_s)) is not None:
            yield answer

    def _ask(self, request: protocol.Request, timeout_s: float) -> protocol.Done | protocol.Flushed:
        client_session = self._client_session
        if client_session.error is not None:
            raise client_session.error
        client_session.done = None
        self._client.client_state.send(request)
        self._client.wait(
            lambda: client_session.done is not None or client_session.error is not None,
            now_ns() + round(timeout_s * 1e9),
            f"session {client_session.name!r} had no reply",
        )
        return done(client_session)

    def flush(self, timeout_s: float = TIMEOUT_S) -> int:
        """Until every tick sent before is answered and the state is on the server's disk; the tick after those."""
        done = self._ask(protocol.Flush(session=self.name), timeout_s)
        return done.next if isinstance(done, protocol.Flushed) else self.next_tick

    def reset(self, timeout_s: float = TIMEOUT_S) -> None:
        """Start the state anew; ticks count on."""
        self._ask(protocol.Reset(session=self.name), timeout_s)
        self._client_session.sent.clear()

    def close(self, timeout_s: float = TIMEOUT_S) -> None:
        """The session is over, and nothing of it is kept. Where it is over already, this does nothing."""
        try:
            if self._client_session.error is None:
                self._ask(protocol.Close(session=self.name, token=self._client_session.token), timeout_s)
        finally:
            self._client.client_state.client_sessions.pop(self.name, None)

    def leave(self) -> None:
        """Let the session be, to be opened again with its token, from here or elsewhere."""
        self._client.client_state.client_sessions.pop(self.name, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            with contextlib.suppress(Exception):  # the first error is the one to be seen
                self.close(1.0)


def done(client_session: ClientSession) -> protocol.Done | protocol.Flushed:
    if client_session.error is not None:
        error, client_session.error = client_session.error, None
        raise error
    assert client_session.done is not None
    return client_session.done


def ready(client_state: ClientState, client_session: ClientSession) -> None:
    """An `open` has been answered; raises its refusal."""
    if client_session.error is not None:
        del client_state.client_sessions[client_session.name]
        raise client_session.error


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
            NotRunning: nobody answers there, or not to these keys.
            ProcessError: it is no address, or another version answers.

        """
        self.client_state = ClientState()
        self._address = address
        self._dealer = Dealer(address, QUEUE, protocol.MAX_BYTES, keys_of(keys, server_key))
        self._looked_ns = now_ns()
        self.client_state.send(protocol.Hello())
        try:
            self.wait(
                lambda: self.client_state.welcome is not None, now_ns() + round(timeout_s * 1e9), "it said nothing"
            )
        except TimedOut:
            self.close()
            raise NotRunning(f"no server answers at {address}: {STARTING}") from None
        except BaseException:
            self.close()
            raise

    @property
    def model(self) -> protocol.Welcome:
        """What the server's model takes and says."""
        assert self.client_state.welcome is not None
        return self.client_state.welcome

    def open(self, session: str, token: str | None = None, timeout_s: float = TIMEOUT_S) -> Session:
        """Begin a session, or go on with one by its token.

        Raises:
            Busy: there is no room for one more; `retry_after_s` says when to ask again.
            DuplicateSession, Evicted, UnknownSession, SessionError: as the server says.
            TimedOut: it says nothing.

        """
        client_session = self.client_state.client_session(session)
        self.client_state.send(protocol.Open(session=session, token=token))
        try:
            self.wait(
                lambda: client_session.opened is not None or client_session.error is not None,
                now_ns() + round(timeout_s * 1e9),
                f"session {session!r} had no reply",
            )
        except TimedOut:
            del self.client_state.client_sessions[session]
            raise
        ready(self.client_state, client_session)
        return Session(self, client_session)

    def post(self) -> None:
        """Send what is to be said, as far as the queue takes it."""
        out = self.client_state.out
        while out and self._dealer.send(out[0][1]):
            out.popleft()

    def wait(self, over: Callable[[], bool], end_ns: int, late: str) -> None:
        """Listen until `over`; raises TimedOut at `end_ns`."""
        talk = self.client_state
        self.post()
        while not over():
            at_ns = now_ns()
            if talk.problem is not None:
                raise talk.problem
            if at_ns >= end_ns:
                raise TimedOut(f"{late} from {self._address} in time")
            content = self._dealer.receive(min((end_ns - at_ns) // 1_000_000 + 1, LOOK_MS))
            at_ns = now_ns()
            if content is not None:
                with contextlib.suppress(WireError):  # nothing of ours: as if it had not come
                    talk.receive(content, at_ns)
            if at_ns - self._looked_ns > LOOK_MS * 1_000_000:
                self._looked_ns = at_ns
                talk.poll(at_ns)
            if talk.out:
                self.post()

    def close(self) -> None:
        """Sessions that are open are not closed: their tokens bring them back."""
        self._dealer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
