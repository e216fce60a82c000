"""Conversation: what a client knows of its sessions, between bytes in and bytes out; pure of sockets and clocks.

A tick is kept until newer ones take its place, so that a server that comes back with an older state is given again what
it has not seen; every tick is answered once, whoever answers it. Knows nothing about transports or who waits for what.
"""

from __future__ import annotations

import re
from collections import OrderedDict, deque
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import (
    BadTick,
    Busy,
    DuplicateSession,
    Evicted,
    ProcessError,
    SessionError,
    UnknownSession,
)
from stream_mmrnn.core.types import FloatArray, Vectors
from stream_mmrnn.serve import protocol

KEPT_TICKS = 256
"""Of each session: more than a server steps between two snapshots."""
ASK_AGAIN_NS = 1_000_000_000
"""A tick that is not answered for so long is asked about: a server that came back has never had it."""
_ERRORS: dict[str, type[SessionError]] = {
    "unknown": UnknownSession,
    "duplicate": DuplicateSession,
    "evicted": Evicted,
    "bad_tick": BadTick,
}


class Answer(msgspec.Struct, frozen=True):
    """What came of one tick."""

    session: str
    tick: int
    event_ns: int
    """As it was given."""
    heads: Vectors
    """By head, each float32 [size]."""
    present: dict[str, bool]
    """By modality: what was used."""
    age_ns: dict[str, int]
    waited_ns: int
    """In the server, for its step."""
    step_ns: int
    round_trip_ns: int
    """From `send` to its being read here; where it was sent again, since it was first sent."""
    model: str
    """sha256 of the model file."""


class _Sent(msgspec.Struct, gc=False):
    content: bytes
    at_ns: int


class ClientSession(msgspec.Struct):
    """A session as this end sees it."""

    name: str
    token: str | None = None
    next_tick: int = 0
    """Of `send`, where it is not given."""
    sent: OrderedDict[int, _Sent] = msgspec.field(default_factory=OrderedDict)
    """Ticks that may have to be sent again, and those that are not answered."""
    unanswered: OrderedDict[int, int] = msgspec.field(default_factory=OrderedDict)
    """And since when, or since when it was last asked."""
    answers: deque[Answer | SessionError] = msgspec.field(default_factory=deque)
    opened: protocol.Ready | None = None
    done: protocol.Done | protocol.Flushed | None = None
    error: SessionError | None = None
    """Why the newest `open`, `flush`, `reset` or `close` failed, or why the session is over here."""
    to_send: deque[int] = msgspec.field(default_factory=deque)
    """Ticks that wait until the server has room for them."""
    on_the_way: set[int] = msgspec.field(default_factory=set)
    coming_back: bool = False
    skipped: int = 0
    """Ticks that the server had seen already and whose answers are lost with it."""


class ClientState:
    """Messages in, messages out, for any number of sessions over one connection."""

    def __init__(self) -> None:
        self.out: deque[tuple[str, bytes]] = deque()
        """What is to be sent, in order, and the session that it is of; "" where it is of none."""
        self.welcome: protocol.Welcome | None = None
        self.problem: ProcessError | None = None
        """The server speaks, but not with us."""
        self.client_sessions: dict[str, ClientSession] = {}

    def send(self, request: protocol.Request) -> None:
        self.out.append((getattr(request, "session", ""), protocol.encode(request)))

    def client_session(self, session: str) -> ClientSession:
        """A session of this connection. Raises SessionError where there is one already, or none can be called so."""
        if not re.match(topics.SESSION_NAME, session):
            raise SessionError(f"a session cannot be called {session[:80]!r}; expected {topics.SESSION_NAME}")
        if session in self.client_sessions:
            raise DuplicateSession(f"session {session!r} is open over this connection already")
        client_session = self.client_sessions[session] = ClientSession(session)
        return client_session

    def put(
        self,
        client_session: ClientSession,
        features: Mapping[str, Any],
        tick: int | None,
        event_ns: int,
        age_ns: Mapping[str, int] | None,
        now_ns: int,
    ) -> int:
        """Send one tick; its index. Raises BadTick where it is not of the model, or the session's error."""
        assert self.welcome is not None
        if client_session.error is not None:
            raise client_session.error
        if len(client_session.unanswered) >= KEPT_TICKS:
            raise SessionError(
                f"{KEPT_TICKS} ticks of session {client_session.name!r} wait for an answer; read answers, and send "
                "no faster than the model's tick"
            )
        index = client_session.next_tick if tick is None else tick
        content = protocol.encode(
            protocol.Step(
                session=client_session.name,
                tick=index,
                event_ns=event_ns,
                features=_vectors(self.welcome.modalities, features, index, client_session.name),
                age_ns=_ages(self.welcome.modalities, features, age_ns),
            )
        )
        client_session.sent[index] = _Sent(content, now_ns)
        client_session.unanswered[index] = now_ns
        client_session.next_tick = max(client_session.next_tick, index + 1)
        client_session.to_send.append(index)
        while len(client_session.sent) > KEPT_TICKS and next(iter(client_session.sent)) < client_session.to_send[0]:
            client_session.sent.popitem(last=False)
        self._pump(client_session)
        return index

    def _pump(self, client_session: ClientSession) -> None:
        """Send as many ticks as the server lets wait."""
        assert self.welcome is not None
        while (
            client_session.to_send
            and not client_session.coming_back
            and len(client_session.on_the_way) < self.welcome.queue
        ):
            tick = client_session.to_send.popleft()
            client_session.on_the_way.add(tick)
            self.out.append((client_session.name, client_session.sent[tick].content))

    def _arrived(self, client_session: ClientSession, tick: int) -> bool:
        """The server has dealt with a tick; whether somebody waits for its answer."""
        client_session.on_the_way.discard(tick)
        self._pump(client_session)
        return client_session.unanswered.pop(tick, None) is not None

    def receive(self, content: bytes, now_ns: int) -> str:
        """One message of the server; the session it is of, or "". Raises WireError where it is none."""
        reply = protocol.read_reply(content)
        if isinstance(reply, protocol.Welcome):
            if reply.version != protocol.VERSION:
                self.problem = ProcessError(f"the server speaks version {reply.version}, not {protocol.VERSION}")
            self.welcome = reply
            return ""
        client_session = self.client_sessions.get(reply.session)
        if client_session is None:
            if isinstance(reply, protocol.Refused) and not reply.session:
                self.problem = ProcessError(f"the server did not take a message: {reply.why}")
            return ""
        match reply:
            case protocol.Pred():
                self._answer(client_session, reply, now_ns)
            case protocol.Ready():
                self._ready(client_session, reply, now_ns)
            case protocol.Skipped():
                client_session.skipped += self._arrived(client_session, reply.tick)
            case protocol.Done() | protocol.Flushed():
                client_session.done = reply
            case protocol.BusyNow():
                if not client_session.coming_back:  # else it is asked again with a later look
                    client_session.error = Busy(reply.why, reply.retry_s)
            case protocol.EvictedNow():
                self._evicted(client_session, reply)
            case protocol.Refused():
                self._refused(client_session, reply)
        return client_session.name

    def _answer(self, client_session: ClientSession, reply: protocol.Pred, now_ns: int) -> None:
        if not self._arrived(client_session, reply.tick):
            return  # it was answered before the server came back
        assert self.welcome is not None
        sent = client_session.sent.get(reply.tick)
        heads = zip(self.welcome.heads, reply.heads, strict=True)
        names = [m.name for m in self.welcome.modalities]
        client_session.answers.append(
            Answer(
                client_session.name,
                reply.tick,
                reply.event_ns,
                {head.name: np.frombuffer(raw, "<f4") for head, raw in heads},
                dict(zip(names, reply.present, strict=True)),
                dict(zip(names, reply.age_ns, strict=True)),
                reply.waited_ns,
                reply.step_ns,
                now_ns - sent.at_ns if sent is not None else 0,
                reply.model,
            )
        )

    def _ready(self, client_session: ClientSession, reply: protocol.Ready, now_ns: int) -> None:
        first = client_session.opened is None
        client_session.opened, client_session.token = reply, reply.token
        if first:
            client_session.next_tick = reply.next
        elif client_session.coming_back:
            client_session.coming_back = False
            self._send_again(client_session, reply.next, now_ns)

    def _send_again(self, client_session: ClientSession, following: int, now_ns: int) -> None:
        """What the server has not seen, in order; what it has, and never answered, is nobody's to give any more."""
        for tick in [t for t in client_session.unanswered if t < following]:
            del client_session.unanswered[tick]
            client_session.skipped += 1
        missing = [tick for tick in client_session.sent if tick >= following]
        if client_session.next_tick > following and (not missing or missing[0] != following) and client_session.sent:
            oldest = next(iter(client_session.sent))
            if oldest > following:
                client_session.error = Evicted(
                    f"the server has session {client_session.name!r} as it was at tick {following}, and the "
                    f"ticks from there to {oldest} are not kept here; close it, or open it again and send them"
                )
                return
        for tick in missing:
            if tick in client_session.unanswered:
                client_session.unanswered[tick] = now_ns
        client_session.on_the_way.clear()
        client_session.to_send = deque(missing)
        self._pump(client_session)

    def _come_back(self, client_session: ClientSession) -> None:
        if client_session.token is None:
            return
        client_session.coming_back = True
        self.send(protocol.Open(session=client_session.name, token=client_session.token))

    def _evicted(self, client_session: ClientSession, reply: protocol.EvictedNow) -> None:
        if reply.reason == "taken":
            client_session.error = Evicted(
                f"session {client_session.name!r} has been taken over by another client that has its token"
            )
        elif client_session.unanswered:
            self._come_back(client_session)
        # else: the next tick asks for it

    def _refused(self, client_session: ClientSession, reply: protocol.Refused) -> None:
        error = _ERRORS.get(reply.error, SessionError)(reply.why)
        if reply.tick < 0:  # no tick's: an open, flush, reset or close
            client_session.coming_back = False
            client_session.error = error
        elif (
            reply.error in ("evicted", "unknown") and client_session.token is not None and client_session.error is None
        ):
            if not client_session.coming_back:
                self._come_back(client_session)
        elif self._arrived(client_session, reply.tick):
            client_session.answers.append(error)

    def late(self, now_ns: int) -> list[str]:
        """Sessions with a tick that nobody has answered for long."""
        return [
            name
            for name, client_session in self.client_sessions.items()
            if client_session.unanswered
            and client_session.error is None
            and now_ns - client_session.unanswered[next(iter(client_session.unanswered))] > ASK_AGAIN_NS
        ]

    def poll(self, now_ns: int) -> None:
        """Ask about those; to be called now and then."""
        for name in self.late(now_ns):
            client_session = self.client_sessions[name]
            client_session.unanswered[next(iter(client_session.unanswered))] = now_ns
            self._come_back(client_session)


def _vectors(
    modalities: tuple[protocol.Modality, ...], features: Mapping[str, Any], tick: int, session: str
) -> tuple[bytes | None, ...]:
    if unknown := set(features) - {m.name for m in modalities}:
        known = ", ".join(m.name for m in modalities)
        raise BadTick(f"the model of session {session!r} has no {sorted(unknown)[0]!r}; it takes {known}")
    found: list[bytes | None] = []
    for m in modalities:
        value = features.get(m.name)
        if value is None:
            found.append(None)
            continue
        vector: FloatArray = np.ascontiguousarray(value, "<f4")
        if vector.shape != (m.size,):
            raise BadTick(
                f"tick {tick} of session {session!r}: expected {m.size} numbers as {m.name}, got {list(vector.shape)}"
            )
        found.append(vector.tobytes())
    return tuple(found)


def _ages(
    modalities: tuple[protocol.Modality, ...], features: Mapping[str, Any], age_ns: Mapping[str, int] | None
) -> tuple[int, ...]:
    if age_ns is None:
        return ()
    return tuple(age_ns.get(m.name, 0 if features.get(m.name) is not None else -1) for m in modalities)
