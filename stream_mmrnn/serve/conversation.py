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

from stream_mmrnn import topics
from stream_mmrnn.errors import (
    BadTick,
    Busy,
    DuplicateSession,
    Evicted,
    ProcessError,
    SessionError,
    UnknownSession,
)
from stream_mmrnn.serve import protocol
from stream_mmrnn.types import FloatArray, Vectors

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


class Track(msgspec.Struct):
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


class Conversation:
    """Messages in, messages out, for any number of sessions over one connection."""

    def __init__(self) -> None:
        self.out: deque[tuple[str, bytes]] = deque()
        """What is to be sent, in order, and the session that it is of; "" where it is of none."""
        self.welcome: protocol.Welcome | None = None
        self.problem: ProcessError | None = None
        """The server speaks, but not with us."""
        self.tracks: dict[str, Track] = {}

    def say(self, request: protocol.Request) -> None:
        self.out.append((getattr(request, "session", ""), protocol.encode(request)))

    def track(self, session: str) -> Track:
        """A session of this connection. Raises SessionError where there is one already, or none can be called so."""
        if not re.match(topics.SESSION_NAME, session):
            raise SessionError(f"a session cannot be called {session[:80]!r}; expected {topics.SESSION_NAME}")
        if session in self.tracks:
            raise DuplicateSession(f"session {session!r} is open over this connection already")
        track = self.tracks[session] = Track(session)
        return track

    def put(
        self,
        track: Track,
        features: Mapping[str, Any],
        tick: int | None,
        event_ns: int,
        age_ns: Mapping[str, int] | None,
        now_ns: int,
    ) -> int:
        """Send one tick; its index. Raises BadTick where it is not of the model, or the session's error."""
        assert self.welcome is not None
        if track.error is not None:
            raise track.error
        if len(track.unanswered) >= KEPT_TICKS:
            raise SessionError(
                f"{KEPT_TICKS} ticks of session {track.name!r} wait for an answer; read answers, and send no faster "
                "than the model's tick"
            )
        index = track.next_tick if tick is None else tick
        content = protocol.encode(
            protocol.Step(
                session=track.name,
                tick=index,
                event_ns=event_ns,
                features=_vectors(self.welcome.modalities, features, index, track.name),
                age_ns=_ages(self.welcome.modalities, features, age_ns),
            )
        )
        track.sent[index] = _Sent(content, now_ns)
        track.unanswered[index] = now_ns
        track.next_tick = max(track.next_tick, index + 1)
        track.to_send.append(index)
        while len(track.sent) > KEPT_TICKS and next(iter(track.sent)) < track.to_send[0]:
            track.sent.popitem(last=False)
        self._pump(track)
        return index

    def _pump(self, track: Track) -> None:
        """Send as many ticks as the server lets wait."""
        assert self.welcome is not None
        while track.to_send and not track.coming_back and len(track.on_the_way) < self.welcome.queue:
            tick = track.to_send.popleft()
            track.on_the_way.add(tick)
            self.out.append((track.name, track.sent[tick].content))

    def _arrived(self, track: Track, tick: int) -> bool:
        """The server has dealt with a tick; whether somebody waits for its answer."""
        track.on_the_way.discard(tick)
        self._pump(track)
        return track.unanswered.pop(tick, None) is not None

    def hear(self, content: bytes, now_ns: int) -> str:
        """One message of the server; the session it is of, or "". Raises WireError where it is none."""
        reply = protocol.read_reply(content)
        if isinstance(reply, protocol.Welcome):
            if reply.version != protocol.VERSION:
                self.problem = ProcessError(f"the server speaks version {reply.version}, not {protocol.VERSION}")
            self.welcome = reply
            return ""
        track = self.tracks.get(reply.session)
        if track is None:
            if isinstance(reply, protocol.Refused) and not reply.session:
                self.problem = ProcessError(f"the server did not take a message: {reply.why}")
            return ""
        match reply:
            case protocol.Pred():
                self._answer(track, reply, now_ns)
            case protocol.Ready():
                self._ready(track, reply, now_ns)
            case protocol.Skipped():
                track.skipped += self._arrived(track, reply.tick)
            case protocol.Done() | protocol.Flushed():
                track.done = reply
            case protocol.BusyNow():
                if not track.coming_back:  # else it is asked again with a later look
                    track.error = Busy(reply.why, reply.retry_s)
            case protocol.EvictedNow():
                self._evicted(track, reply)
            case protocol.Refused():
                self._refused(track, reply)
        return track.name

    def _answer(self, track: Track, reply: protocol.Pred, now_ns: int) -> None:
        if not self._arrived(track, reply.tick):
            return  # it was answered before the server came back
        assert self.welcome is not None
        sent = track.sent.get(reply.tick)
        heads = zip(self.welcome.heads, reply.heads, strict=True)
        names = [m.name for m in self.welcome.modalities]
        track.answers.append(
            Answer(
                track.name,
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

    def _ready(self, track: Track, reply: protocol.Ready, now_ns: int) -> None:
        first = track.opened is None
        track.opened, track.token = reply, reply.token
        if first:
            track.next_tick = reply.next
        elif track.coming_back:
            track.coming_back = False
            self._send_again(track, reply.next, now_ns)

    def _send_again(self, track: Track, following: int, now_ns: int) -> None:
        """What the server has not seen, in order; what it has, and never answered, is nobody's to give any more."""
        for tick in [t for t in track.unanswered if t < following]:
            del track.unanswered[tick]
            track.skipped += 1
        missing = [tick for tick in track.sent if tick >= following]
        if track.next_tick > following and (not missing or missing[0] != following) and track.sent:
            oldest = next(iter(track.sent))
            if oldest > following:
                track.error = Evicted(
                    f"the server has session {track.name!r} as it was at tick {following}, and the ticks from there to "
                    f"{oldest} are not kept here; close it, or open it again and send them"
                )
                return
        for tick in missing:
            if tick in track.unanswered:
                track.unanswered[tick] = now_ns
        track.on_the_way.clear()
        track.to_send = deque(missing)
        self._pump(track)

    def _come_back(self, track: Track) -> None:
        if track.token is None:
            return
        track.coming_back = True
        self.say(protocol.Open(session=track.name, token=track.token))

    def _evicted(self, track: Track, reply: protocol.EvictedNow) -> None:
        if reply.reason == "taken":
            track.error = Evicted(f"session {track.name!r} has been taken over by another client that has its token")
        elif track.unanswered:
            self._come_back(track)
        # else: the next tick asks for it

    def _refused(self, track: Track, reply: protocol.Refused) -> None:
        error = _ERRORS.get(reply.error, SessionError)(reply.why)
        if reply.tick < 0:  # no tick's: an open, flush, reset or close
            track.coming_back = False
            track.error = error
        elif reply.error in ("evicted", "unknown") and track.token is not None and track.error is None:
            if not track.coming_back:
                self._come_back(track)
        elif self._arrived(track, reply.tick):
            track.answers.append(error)

    def late(self, now_ns: int) -> list[str]:
        """Sessions with a tick that nobody has answered for long."""
        return [
            name
            for name, track in self.tracks.items()
            if track.unanswered
            and track.error is None
            and now_ns - track.unanswered[next(iter(track.unanswered))] > ASK_AGAIN_NS
        ]

    def look(self, now_ns: int) -> None:
        """Ask about those; to be called now and then."""
        for name in self.late(now_ns):
            track = self.tracks[name]
            track.unanswered[next(iter(track.unanswered))] = now_ns
            self._come_back(track)


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
