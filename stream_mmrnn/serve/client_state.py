"""State of a client: its sessions, and the logic between received and sent messages, without sockets and clocks.

The newest ticks of each session are kept, so that they can be sent again to a server that was restarted with an older
state. Every tick gets one answer; duplicates are dropped. Knows nothing about transports or waiting calls.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from stream_mmrnn.core import topics
from stream_mmrnn.core.errors import (
    BadTick,
    Busy,
    DuplicateSession,
    Evicted,
    ProcessError,
    SessionError,
    UsageError,
)
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.client_errors import ERRORS
from stream_mmrnn.serve.client_groups import ASK_AGAIN_NS, KEPT_TICKS, ClientGroup
from stream_mmrnn.serve.client_requests import Asked, SessionReply, SessionRequest
from stream_mmrnn.serve.client_session import Answer, ClientSession, Sent, ages, vectors


class ClientState:
    """Any number of sessions over one connection: `receive` replies, send what is in `out`."""

    def __init__(self) -> None:
        self.out: deque[tuple[str, bytes]] = deque()
        """Messages to send, in order, each with its session ("" for none)."""
        self.welcome: protocol.Welcome | None = None
        self.problem: ProcessError | None = None
        """Why this client cannot talk to the server."""
        self.sessions: dict[str, ClientSession] = {}
        self._groups: dict[int, ClientGroup] = {}
        self._group_of: dict[str, ClientGroup] = {}
        self._given_up: Counter[str] = Counter()
        """Of new sessions, how many `open` have had no reply, and nobody waits for one."""
        self._groups_given_up: dict[int, ClientGroup] = {}
        self._numbers = itertools.count()
        """Of groups."""
        self._older = False
        """Whether a server of an older version was asked for."""

    def send(self, request: protocol.Request) -> None:
        self.out.append((getattr(request, "session", ""), protocol.encode(request)))

    def new_session(self, name: str, raw: bool = False) -> ClientSession:
        """Add a session. Raises SessionError where its name is not valid, DuplicateSession where it is here already."""
        self._check_name(name)
        session = self.sessions[name] = ClientSession(name, raw=raw)
        return session

    def new_group(self, names: Sequence[str], tokens: Sequence[str | None] | None) -> ClientGroup:
        """Add a group, and ask to open it. Raises as `new_session`, and UsageError where the lists do not fit, or the
        server knows no groups.
        """
        assert self.welcome is not None
        if self.welcome.version < 2:
            raise UsageError("this server knows no groups; open sessions one by one, or use a newer release there")
        if not 0 < len(names) <= protocol.MAX_ROWS or (tokens is not None and len(tokens) != len(names)):
            raise UsageError(f"a group has 1 to {protocol.MAX_ROWS} sessions, and a token or None for each")
        if len(set(names)) != len(names):
            raise UsageError("the names of a group's sessions must differ")
        for name in names:
            self._check_name(name)
        group = ClientGroup(
            next(self._numbers), names, tokens or [None] * len(names), self.welcome, self._send_of_group
        )
        self._groups[group.number] = group
        self._group_of |= dict.fromkeys(names, group)
        group.open()
        return group

    def leave_group(self, group: ClientGroup) -> None:
        """Forget a group and its sessions."""
        if self._groups.pop(group.number, None) is not None:
            for name in group.names:
                del self._group_of[name]

    def give_up(self, session: ClientSession, new: bool) -> None:
        """Forget a session for whose `open` nobody waits any more. Where it is `new`, the server is to close it."""
        if self.sessions.get(session.name) is session:
            del self.sessions[session.name]
        if not new:
            del self._given_up[session.name]  # whose reply comes cannot be told any more: nothing is closed
        elif session.opened is None:
            self._given_up[session.name] += 1
        else:
            self.send(protocol.Close(session=session.name, token=session.token))

    def give_up_group(self, group: ClientGroup) -> None:
        """Forget a group for whose sessions nobody waits any more; the server is to close those that are new."""
        self.leave_group(group)
        self.close_new(group, range(len(group.names)))
        if not group.is_open:
            self._groups_given_up[group.number] = group

    def close_new(self, group: ClientGroup, rows: Iterable[int]) -> None:
        """Ask the server to close sessions that this group has begun."""
        for row in rows:
            if group.is_new(row):
                self.send(protocol.Close(session=group.names[row], token=group.tokens[row]))

    def _send_of_group(self, content: protocol.Request | bytes) -> None:
        if isinstance(content, bytes):
            self.out.append(("", content))
        else:
            self.send(content)

    def _check_name(self, name: str) -> None:
        if not re.match(topics.SESSION_NAME, name):
            raise SessionError(f"a session cannot be called {name[:80]!r}; expected {topics.SESSION_NAME}")
        if name in self.sessions or name in self._group_of:
            raise DuplicateSession(f"session {name!r} is open over this connection already")

    def put(
        self,
        session: ClientSession,
        features: Mapping[str, Any],
        tick: int | None,
        event_ns: int,
        age_ns: Mapping[str, int] | None,
        now_ns: int,
    ) -> int:
        """Queue one tick; returns its index. Raises BadTick where it does not fit the model, or the session's error."""
        assert self.welcome is not None
        self._check_room(session)
        index = session.next_tick if tick is None else tick
        content = protocol.encode(
            protocol.Step(
                session=session.name,
                tick=index,
                event_ns=event_ns,
                features=vectors(self.welcome.modalities, features, index, session.name),
                age_ns=ages(self.welcome.modalities, features, age_ns),
            )
        )
        self._queue(session, index, content, now_ns)
        return index

    def put_push(
        self, session: ClientSession, stream: str, data: bytes, at_ns: int | None, vector: bool, now_ns: int
    ) -> int:
        """Queue one push of a raw session; returns its number. Raises the session's error."""
        self._check_room(session)
        index = session.next_tick
        push = protocol.PushSample(
            session=session.name, push=index, stream=stream, data=data, at_ns=at_ns, vector=vector
        )
        content = protocol.encode(push)
        if len(content) > protocol.MAX_BYTES:
            raise UsageError(f"a push has at most {protocol.MAX_BYTES} bytes; send sound in shorter pieces")
        self._queue(session, index, content, now_ns)
        return index

    @staticmethod
    def _check_room(session: ClientSession) -> None:
        if session.error is not None:
            raise session.error
        if len(session.unanswered) >= KEPT_TICKS:
            raise SessionError(
                f"{KEPT_TICKS} ticks of session {session.name!r} wait for an answer; read answers, and send "
                "no faster than the model's tick"
            )

    def _queue(self, session: ClientSession, index: int, content: bytes, now_ns: int) -> None:
        session.sent[index] = Sent(content, now_ns)
        session.unanswered[index] = now_ns
        session.next_tick = max(session.next_tick, index + 1)
        session.to_send.append(index)
        if len(session.sent) > KEPT_TICKS:
            waits = next(of for of in session.to_send if not isinstance(of, Asked))
            while len(session.sent) > KEPT_TICKS and next(iter(session.sent)) < waits:
                session.sent.popitem(last=False)
        self._pump(session)

    def ask(self, session: ClientSession, request: SessionRequest) -> Asked:
        """Queue a request, after the ticks before it; `take_back` it at the end. Raises the session's error."""
        if session.error is not None:
            raise session.error
        asked = Asked(request, session.next_tick)
        if session.reopening and isinstance(request, protocol.Close):
            # a server without room for the session can close it; ticks that it has not seen are given up
            session.to_send.clear()
            session.sent.clear()
            session.unanswered.clear()
            self._send_asked(session, asked)
        else:
            session.to_send.append(asked)
            self._pump(session)
        return asked

    def _send_asked(self, session: ClientSession, asked: Asked) -> None:
        session.outstanding.add(asked)
        self.send(asked.request)

    def take_back(self, session: ClientSession, asked: Asked) -> None:
        """Nobody waits for a request any more: it is not sent, if it was not yet, and its reply is skipped."""
        if asked in session.to_send:
            session.to_send.remove(asked)
            if isinstance(asked.request, protocol.Close):
                self.send(asked.request)  # the session ends here: what waits before it is not sent any more
        session.outstanding.give_up(asked)

    def _pump(self, session: ClientSession) -> None:
        """Send as many ticks as the server's queue takes, and the requests after them."""
        assert self.welcome is not None
        while session.to_send and not session.reopening:
            of = session.to_send[0]
            if isinstance(of, Asked):
                self._send_asked(session, of)
            elif len(session.on_the_way) < self.welcome.queue:
                session.on_the_way.add(of)
                self.out.append((session.name, session.sent[of].content))
            else:
                return
            session.to_send.popleft()

    def _arrived(self, session: ClientSession, tick: int) -> bool:
        """The server is done with a tick; returns whether it had no answer yet."""
        session.on_the_way.discard(tick)
        self._pump(session)
        return session.unanswered.pop(tick, None) is not None

    def receive(self, content: bytes, now_ns: int) -> str:
        """Handle one message of the server; returns its session, or "". Raises WireError where it is not valid."""
        reply = protocol.read_reply(content)
        if isinstance(reply, protocol.Welcome):
            if not protocol.OLDEST <= reply.version <= protocol.VERSION:
                newest = protocol.VERSION
                self.problem = ProcessError(f"the server has protocol version {reply.version}, not up to {newest}")
            self.welcome = reply
            return ""
        if isinstance(reply, protocol.Alive):
            return ""
        if isinstance(reply, protocol.Grouped | protocol.Preds):
            group = self._groups.get(reply.group)
            if group is not None:
                group.receive(reply, now_ns)
            elif (group := self._groups_given_up.get(reply.group)) is not None and isinstance(reply, protocol.Grouped):
                group.receive(reply, now_ns)
                self.close_new(group, range(reply.first, reply.first + len(reply.tokens)))
                if group.is_open:
                    del self._groups_given_up[group.number]
            return group_key(reply.group)
        if reply.session in self._given_up and reply.session not in self.sessions:
            self._was_given_up(reply)
        if (group := self._group_of.get(reply.session)) is not None:
            group.receive_of_session(reply)
            return group_key(group.number)
        session = self.sessions.get(reply.session)
        if session is None:
            if isinstance(reply, protocol.Refused) and not reply.session:
                if self.welcome is None and not self._older:  # it may know version 1 only
                    self._older = True
                    self.send(protocol.Hello(version=protocol.OLDEST))
                else:
                    self.problem = ProcessError(f"the server did not take a message: {reply.why}")
            return ""
        match reply:
            case protocol.Pred():
                self._answer(session, reply, now_ns)
            case protocol.Pushed():
                self._pushed(session, reply, now_ns)
            case protocol.Ready():
                self._ready(session, reply, now_ns)
            case protocol.Skipped():
                session.skipped += self._arrived(session, reply.tick)
            case protocol.Done() | protocol.Flushed():
                self._replied(session, reply)
            case protocol.BusyNow():
                if not session.reopening:  # else a later `poll` asks again
                    session.error = Busy(reply.why, reply.retry_s)
            case protocol.EvictedNow():
                self._evicted(session, reply)
            case protocol.Refused():
                self._refused(session, reply)
        return session.name

    def _was_given_up(self, reply: protocol.Reply) -> None:
        """Close a new session whose `open` was given up."""
        if isinstance(reply, protocol.Ready | protocol.BusyNow | protocol.Refused):
            self._given_up -= Counter([reply.session])
            if isinstance(reply, protocol.Ready) and not reply.resumed:
                self.send(protocol.Close(session=reply.session, token=reply.token))

    def _answer(self, session: ClientSession, reply: protocol.Pred, now_ns: int) -> None:
        if not self._arrived(session, reply.tick):
            return  # it was answered before the server was restarted
        session.answers.append(self._to_answer(session, reply, reply.tick, now_ns))

    def _pushed(self, session: ClientSession, reply: protocol.Pushed, now_ns: int) -> None:
        if not self._arrived(session, reply.push):
            return
        if reply.error:
            session.pushed[reply.push] = BadTick(reply.error)
        else:
            session.pushed[reply.push] = [
                self._to_answer(session, pred, reply.push, now_ns) for pred in reply.predictions
            ]

    def _to_answer(self, session: ClientSession, reply: protocol.Pred, index: int, now_ns: int) -> Answer:
        """`index`: of the tick or push that it answers."""
        assert self.welcome is not None
        sent = session.sent.get(index)
        heads = zip(self.welcome.heads, reply.heads, strict=True)
        names = [m.name for m in self.welcome.modalities]
        return Answer(
            session.name,
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

    @staticmethod
    def _replied(session: ClientSession, reply: SessionReply) -> None:
        asked = session.outstanding.reply(reply)
        if asked is not None and isinstance(asked.request, protocol.Reset):
            # no server has an older state any more; ticks after the reset may be needed
            needed = session.unanswered.keys() | set(session.to_send)
            for tick in [tick for tick in session.sent if tick < asked.before and tick not in needed]:
                del session.sent[tick]

    def _ready(self, session: ClientSession, reply: protocol.Ready, now_ns: int) -> None:
        first = session.opened is None
        session.opened, session.token = reply, reply.token
        if first:
            session.next_tick, session.begin_ns = reply.next, reply.at_ns
            del self._given_up[session.name]  # a reply to an earlier `open` is as good as one to the newest
        elif session.reopening:
            session.reopening = False
            self._send_again(session, reply.next, now_ns)

    def _send_again(self, session: ClientSession, following: int, now_ns: int) -> None:
        """Send again what the server has not seen, in order. What it has, without an answer, is counted as skipped."""
        for tick in [t for t in session.unanswered if t < following]:
            del session.unanswered[tick]
            session.skipped += 1
        missing = [tick for tick in session.sent if tick >= following]
        if session.next_tick > following and (not missing or missing[0] != following) and session.sent:
            oldest = next(iter(session.sent))
            if oldest > following:
                session.error = Evicted(
                    f"the server has session {session.name!r} as it was at tick {following}, and the "
                    f"ticks from there to {oldest} are not kept here; close it, or open it again and send them"
                )
                return
        for tick in missing:
            if tick in session.unanswered:
                session.unanswered[tick] = now_ns
        session.on_the_way.clear()
        session.outstanding.reopened()
        waiting = [of for of in session.to_send if isinstance(of, Asked) or of >= following]
        queued = set(waiting)
        session.to_send = deque([*(tick for tick in missing if tick not in queued), *waiting])
        self._pump(session)

    def _reopen(self, session: ClientSession) -> None:
        if session.token is None:
            return
        session.reopening = True
        self.send(protocol.Open(session=session.name, token=session.token, raw=session.raw))

    def _evicted(self, session: ClientSession, reply: protocol.EvictedNow) -> None:
        if reply.reason == "taken":
            session.error = Evicted(
                f"session {session.name!r} has been taken over by another client that has its token"
            )
        elif session.unanswered:
            self._reopen(session)
        # else: the next tick is refused, and opens it again

    def _refused(self, session: ClientSession, reply: protocol.Refused) -> None:
        error = ERRORS.get(reply.error, SessionError)(reply.why)
        if reply.tick < 0:  # the reply to an open, flush, reset or close
            if reply.error != "duplicate" and session.outstanding.refuse(reply.error, error):
                return  # while a session is opened again requests wait: this one was sent before the `open`
            if session.reopening or session.opened is None:  # else to an earlier `open`, which was given up
                session.reopening = False
                session.error = error
        elif reply.error in ("evicted", "unknown") and session.token is not None and session.error is None:
            if not session.reopening:
                self._reopen(session)
        elif self._arrived(session, reply.tick):
            if session.raw:
                session.pushed[reply.tick] = error
            else:
                session.answers.append(error)

    def late(self, now_ns: int) -> list[str]:
        """Sessions with a tick that has had no answer for `ASK_AGAIN_NS`."""
        return [
            name
            for name, session in self.sessions.items()
            if session.unanswered
            and session.error is None
            and now_ns - session.unanswered[next(iter(session.unanswered))] > ASK_AGAIN_NS
        ]

    def poll(self, now_ns: int) -> None:
        """Open late sessions again; call it every 100 ms or so."""
        for name in self.late(now_ns):
            session = self.sessions[name]
            session.unanswered[next(iter(session.unanswered))] = now_ns
            self._reopen(session)
        for group in self._groups.values():
            group.poll(now_ns)


def group_key(number: int) -> str:
    """By which a group is named where messages are of one session: no session is called so."""
    return f"group {number}"
