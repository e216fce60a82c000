"""AsyncClient: `client.Client` for an event loop, over ZeroMQ or another `Transport`.

Knows nothing about what a transport connects to.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from stream_mmrnn.bus import AsyncDealer, Keys
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import NotRunning, TimedOut, WireError
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.client import (
    POLL_MS,
    QUEUE,
    STARTING,
    SessionProperties,
    TickSender,
    keys_of,
    pushed,
    ready,
    replied,
    taken,
)
from stream_mmrnn.serve.client_base import AsyncClosing
from stream_mmrnn.serve.client_group import TIMEOUT_S, AsyncGroup, opened
from stream_mmrnn.serve.client_requests import SessionReply, SessionRequest
from stream_mmrnn.serve.client_session import Answer, ClientSession
from stream_mmrnn.serve.client_state import ClientState, group_key
from stream_mmrnn.serve.raw_pushes import RawPushes


class _AsyncServed(SessionProperties, AsyncClosing):
    """What both kinds of session of an `AsyncClient` have."""

    def __init__(self, client: AsyncClient, session: ClientSession) -> None:
        super().__init__(client.client_state, session)
        self._client = client

    def _post(self) -> None:
        self._client.post()

    async def _ask(self, request: SessionRequest, timeout_s: float) -> SessionReply:
        session, state = self._session, self._client.client_state
        asked = state.ask(session, request)
        self._client.post()
        try:
            await self._client.wait(
                session.name,
                lambda: asked.reply is not None or session.error is not None,
                timeout_s,
                f"session {session.name!r} got no reply",
            )
        finally:
            state.take_back(session, asked)
            self._client.post_last()
        return replied(session, asked)

    async def flush(self, timeout_s: float = TIMEOUT_S) -> int:
        """As `ServedSession.flush`."""
        done = await self._ask(protocol.Flush(session=self.name), timeout_s)
        return done.next if isinstance(done, protocol.Flushed) else self._session.next_tick

    async def close(self, timeout_s: float = TIMEOUT_S) -> None:
        """As `ServedSession.close`."""
        try:
            if self._session.error is None:
                await self._ask(protocol.Close(session=self.name, token=self._session.token), timeout_s)
        finally:
            await self.leave()

    async def leave(self) -> None:
        """As `ServedSession.leave`."""
        await self._client.end(self.name)


class AsyncServedSession(_AsyncServed, TickSender):
    """One session of an `AsyncClient`; as an async context manager it is closed at the end."""

    async def step(
        self,
        features: Mapping[str, Any],
        *,
        tick: int | None = None,
        event_ns: int = 0,
        age_ns: Mapping[str, int] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> Answer | None:
        """As `ServedSession.step`."""
        index = self.send(features, tick=tick, event_ns=event_ns, age_ns=age_ns)
        while (answer := await self._next(timeout_s, lambda: index not in self._session.unanswered)) is not None:
            if answer.tick == index:
                return answer
        return None

    async def receive(self, timeout_s: float = TIMEOUT_S) -> Answer | None:
        """As `ServedSession.receive`."""
        return await self._next(timeout_s, lambda: not self._session.unanswered)

    async def _next(self, timeout_s: float, over: Callable[[], bool]) -> Answer | None:
        session = self._session
        await self._client.wait(
            session.name,
            lambda: bool(session.answers) or session.error is not None or over(),
            timeout_s,
            f"no answer came to {len(session.unanswered)} ticks of session {session.name!r}",
        )
        return taken(session)

    async def answers(self, timeout_s: float = TIMEOUT_S) -> AsyncIterator[Answer]:
        """Answers as they arrive, until every tick has one."""
        while (answer := await self.receive(timeout_s)) is not None:
            yield answer

    async def reset(self, timeout_s: float = TIMEOUT_S) -> None:
        """As `ServedSession.reset`."""
        await self._ask(protocol.Reset(session=self.name), timeout_s)


class AsyncRawServedSession(_AsyncServed, RawPushes[Awaitable[list[Answer]]]):
    """A session of an `AsyncClient` to which samples are pushed, in the order of the calls."""

    def __init__(self, client: AsyncClient, session: ClientSession, timeout_s: float) -> None:
        _AsyncServed.__init__(self, client, session)
        RawPushes.__init__(self, session)
        self._timeout_s = timeout_s

    def _push(self, stream: str, data: bytes, at_ns: int | None, vector: bool) -> Awaitable[list[Answer]]:
        # sent now, not when it is awaited: the order of the calls is that of the samples
        number = self._client_state.put_push(self._session, stream, data, at_ns, vector, now_ns())
        self._post()
        return self._answered(number)

    async def _answered(self, number: int) -> list[Answer]:
        session = self._session
        await self._client.wait(
            session.name,
            lambda: number not in session.unanswered or session.error is not None,
            self._timeout_s,
            f"no answer came to push {number} of session {session.name!r}",
        )
        return pushed(session, number)


def _wake(waits: asyncio.Future[None]) -> None:
    if not waits.done():
        waits.set_result(None)


async def end_tasks(*tasks: asyncio.Task[Any]) -> None:
    """Cancel tasks until they have ended: Python 3.11 loses a cancellation that comes when a `wait_for` is done."""
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=0.1)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # marks it as read: it was reported to the caller already


Receive = Callable[[bytes], None]


class Transport(Protocol):
    """Connects an `AsyncClient` to a server. It is made with a function, which it calls with each message."""

    def post(self, session: str, content: bytes, token: str | None = None) -> None:
        """Queue one message; order is kept. `session`: which session it belongs to, "" for none; `token`: its token."""

    async def again(self, session: str) -> None:
        """An answer is late: check whether it was missed."""

    async def end(self, session: str) -> None:
        """Free what it holds for the session: no more messages of it are sent."""

    async def close(self) -> None: ...


class _ZmqTransport:
    """A connection to one server over ZeroMQ."""

    def __init__(self, address: str, keys: Keys | None, receive: Receive) -> None:
        self._dealer = AsyncDealer(address, QUEUE, protocol.MAX_BYTES, receive, keys)

    def post(self, session: str, content: bytes, token: str | None = None) -> None:
        self._dealer.send(content)

    async def again(self, session: str) -> None:
        pass  # what has arrived is read already

    async def end(self, session: str) -> None:
        pass  # it holds nothing for a session

    async def close(self) -> None:
        self._dealer.close()


class AsyncClient:
    """`Client` for an event loop: `async with AsyncClient(address) as client`."""

    starting = STARTING
    """What to do where no server answers."""

    def __init__(
        self,
        address: str,
        *,
        keys: str | Path | Keys | None = None,
        server_key: str = "",
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """As for `Client`; the connection is made by `async with`."""
        self.client_state = ClientState()
        self._address, self._timeout_s = address, timeout_s
        self._keys = keys_of(keys, server_key)
        self._transport: Transport | None = None
        self._polling: asyncio.Task[None] | None = None
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        """Futures of waiting calls, by session; "": of `hello`."""

    @property
    def model(self) -> protocol.Welcome:
        """What the server's model takes and predicts."""
        assert self.client_state.welcome is not None
        return self.client_state.welcome

    def post(self) -> None:
        """Send waiting messages."""
        assert self._transport is not None
        out = self.client_state.out
        while out:
            session, content = out.popleft()
            of = self.client_state.sessions.get(session)
            self._transport.post(session, content, of.token if of is not None else None)

    def post_last(self) -> None:
        """As `post`, when a call has failed: perhaps because the client is closed."""
        if self._transport is not None:
            self.post()

    async def end(self, session: str) -> None:
        """Forget a session."""
        self.client_state.sessions.pop(session, None)
        if self._transport is not None:
            await self._transport.end(session)

    async def _connect(self, receive: Receive) -> Transport:
        return _ZmqTransport(self._address, self._keys, receive)

    def _receive(self, content: bytes) -> None:
        with contextlib.suppress(WireError):  # not a message of the protocol: ignored
            session = self.client_state.receive(content, now_ns())
            # a problem of the server concerns every session
            for name in (session,) if self.client_state.problem is None else list(self._waiting):
                for waits in self._waiting.get(name, ()):
                    _wake(waits)
            if self.client_state.out:
                self.post()

    async def _poll(self, transport: Transport) -> None:
        while True:
            await asyncio.sleep(POLL_MS / 1000)
            for session in self.client_state.late(now_ns()):
                await transport.again(session)
            self._open_late()
            self.post()

    def _open_late(self) -> None:
        """Open sessions again whose answers are late."""
        self.client_state.poll(now_ns())

    async def wait(self, session: str, over: Callable[[], bool], timeout_s: float, late: str) -> None:
        """Wait until `over`, checked after each message of the session; raises TimedOut."""
        end_ns = now_ns() + round(timeout_s * 1e9)
        while not over():
            if self.client_state.problem is not None:
                raise self.client_state.problem
            left_s = (end_ns - now_ns()) / 1e9
            if left_s <= 0:
                raise TimedOut(f"{late} from {self._address} in time")
            loop = asyncio.get_running_loop()
            waits = loop.create_future()
            self._waiting.setdefault(session, set()).add(waits)
            timer = loop.call_later(left_s, _wake, waits)
            try:
                await waits
            finally:
                timer.cancel()
                self._waiting[session].discard(waits)
                if not self._waiting[session]:
                    del self._waiting[session]

    async def open(self, session: str, token: str | None = None, timeout_s: float = TIMEOUT_S) -> AsyncServedSession:
        """As `Client.open`."""
        return AsyncServedSession(self, await self._open(session, token, timeout_s, raw=False))

    async def open_raw(
        self, session: str, token: str | None = None, timeout_s: float = TIMEOUT_S
    ) -> AsyncRawServedSession:
        """As `Client.open_raw`."""
        return AsyncRawServedSession(self, await self._open(session, token, timeout_s, raw=True), timeout_s)

    async def group(
        self, names: Sequence[str], tokens: Sequence[str | None] | None = None, timeout_s: float = TIMEOUT_S
    ) -> AsyncGroup:
        """As `Client.group`."""
        group = self.client_state.new_group(names, tokens)
        self.post()
        late = "the sessions of a group got no reply"
        try:
            await self.wait(group_key(group.number), lambda: group.is_open, timeout_s, late)
        except BaseException:
            self.client_state.give_up_group(group)
            self.post_last()
            raise
        try:
            opened(self.client_state, group)
        finally:
            self.post()
        return AsyncGroup(self, group)

    async def _open(self, session: str, token: str | None, timeout_s: float, raw: bool) -> ClientSession:
        state = self.client_state.new_session(session, raw)
        self.client_state.send(protocol.Open(session=session, token=token, raw=raw))
        self.post()
        try:
            await self.wait(
                session,
                lambda: state.opened is not None or state.error is not None,
                timeout_s,
                f"session {session!r} got no reply",
            )
        except BaseException:
            self.client_state.give_up(state, new=token is None)
            self.post_last()
            raise
        ready(self.client_state, state)
        return state

    async def __aenter__(self) -> Self:
        transport = self._transport = await self._connect(self._receive)
        self._polling = asyncio.create_task(self._poll(transport))
        self.client_state.send(protocol.Hello())
        self.post()
        try:
            await self.wait("", lambda: self.client_state.welcome is not None, self._timeout_s, "no reply came")
        except TimedOut:
            await self.__aexit__()
            raise NotRunning(f"no server answers at {self._address}: {self.starting}") from None
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Disconnect. Open sessions are not closed: their tokens open them again."""
        if self._polling is not None:
            await end_tasks(self._polling)
        transport, self._transport = self._transport, None
        if transport is not None:
            await transport.close()
