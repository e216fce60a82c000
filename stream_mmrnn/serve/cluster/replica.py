"""Replica: the sessions of an engine's partitions as a function of their log, without NATS, sockets and clocks.

Every message has a sequence number in the log. The answer to message n is named after n: an engine that reads the log
again gives the same answer under the same name. A snapshot says which message is the newest in it, so that none is
stepped twice. Knows nothing about leases or who is alive.

A session's token is an HMAC of its name and of the number of the message that opened it, under a key that all engines
have as a file. So every engine makes the same token, whoever began the session, and neither the token nor the key is in
a bucket: a snapshot has the token's hash only. A message under the name of a session's owner counts only with a proof
that its sender has the token (`subjects`).
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections import Counter, deque

import msgspec

from stream_mmrnn.core import config, topics
from stream_mmrnn.core.errors import SessionError, SnapshotError, WireError
from stream_mmrnn.predict.protocols import Engine
from stream_mmrnn.predict.snapshots import Snapshot, from_bytes, to_bytes
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.cluster.subjects import CLIENT, proof
from stream_mmrnn.serve.saved_states import bound, same_token
from stream_mmrnn.serve.session_host import Host
from stream_mmrnn.serve.sessions import Sessions

_SEQ, _OPENED, _OWNER = "seq", "opened", "owner"
_LATE_TICKS = 65_536
"""Ticks of one session that may wait: a log that is read again holds more than a client sends ahead."""
_SAVED_AT_ONCE = 64


class OutgoingAnswer(msgspec.Struct, frozen=True):
    """An answer to a client."""

    partition: int
    session: str
    client: str
    name: str
    """The same for the same answer, whichever engine gives it."""
    content: bytes
    after_saved: bool
    """It confirms that the state is saved: send it after that."""
    after_stored: bool = False
    """It says which ticks have been seen, and a client waits for no answer to them any more: send it when all earlier
    answers of its session are stored."""


class SavedState(msgspec.Struct, frozen=True):
    """A state to save, after all earlier answers are stored."""

    partition: int
    session: str
    raw: bytes | None
    """Bytes of `snapshots`; None: the session is closed, delete its state."""
    seq: int
    """The newest sequence number that is in it."""


class InMemoryStateStore:
    """A `Store` in memory: the cluster's bucket has the states, and gets those in `made`."""

    def __init__(self) -> None:
        self.found: dict[str, Snapshot] = {}
        self.made: dict[str, Snapshot | None] = {}

    def save(self, snapshot: Snapshot, unix_ns: int) -> None:
        self.found[snapshot.session] = self.made[snapshot.session] = snapshot

    def load(self, session: str, unix_ns: int) -> Snapshot | None:
        return self.found.get(session)

    def holds(self, session: str, unix_ns: int) -> bool:
        return session in self.found

    def forget(self, session: str) -> None:
        self.found.pop(session, None)
        self.made[session] = None

    def sweep(self, unix_ns: int) -> int:
        return 0  # the bucket has a TTL


class _Place(msgspec.Struct):
    """A session's position in the log."""

    partition: int
    opened: int
    """The message that opened it; its token is derived from that."""
    token: str
    owner: str
    """The client that owns it."""
    handled: int
    """The newest message that is in its state."""
    made: int = 0
    """The newest message that is in a snapshot; 0 for none."""
    saved: int = 0
    """The newest message that is in a saved snapshot."""
    waiting: deque[tuple[int, int]] = msgspec.field(default_factory=deque)
    """Ticks that wait to be stepped, each with its sequence number."""


class Replica:
    """`receive` messages of the log, `step`, and `pop` answers and states."""

    def __init__(
        self,
        engine: Engine,
        state: config.StateSettings,
        admission: config.AdmissionSettings | None,
        key: bytes,
        queue: int,
    ) -> None:
        """`key`: the same for all engines of the cluster, and known to them only. `queue`: ticks of a session that may
        wait for an answer.
        """
        self._store = InMemoryStateStore()
        self._key = key
        self._current = ("", 0)
        """Session and sequence number of the message that is being handled."""
        self.sessions = Sessions(
            engine, self._store, state, admission=admission, make_token=lambda: self.token(*self._current)
        )
        self.host = Host(self.sessions, _LATE_TICKS, queue)
        self._places: dict[str, _Place] = {}
        self._answers: list[OutgoingAnswer] = []
        self._states: list[SavedState] = []
        self.counts: Counter[str] = Counter()
        """`again`: messages that were in a snapshot already; `left`: sessions for which there was no free slot;
        `unproven`: messages under the name of a session's owner, of somebody who does not have its token."""

    def token(self, session: str, opened: int) -> str:
        """The token of a session that message `opened` began."""
        return hmac.new(self._key, f"{session} {opened}".encode(), hashlib.sha256).hexdigest()

    @property
    def ready(self) -> bool:
        """Whether a tick waits to be stepped."""
        return self.host.ready

    # ---- partitions ----------------------------------------------------------------------------------------------

    def adopt(self, partition: int, session: str, raw: bytes, now_ns: int) -> None:
        """Continue a session from its snapshot. An evicted one waits for its token.

        Raises:
            SnapshotError: this is not a snapshot of this session in a cluster.

        """
        snapshot = _snapshot_of(session, raw)
        seq, opened, owner = _position(snapshot)
        token = self.token(session, opened)
        self._places[session] = _Place(partition, opened, token, owner, seq, seq, seq)
        self._store.found[session] = bound(snapshot, token)
        if owner:
            try:
                self.sessions.adopt(snapshot, token, now_ns=now_ns)
                self.host.own(session, owner.encode())
            except SessionError:
                self.counts["left"] += 1  # as if evicted: its client opens it again, and gets the reason

    @staticmethod
    def seq_of(session: str, raw: bytes) -> int:
        """The newest message that is in a snapshot; -1 where it is not a snapshot of this session in a cluster."""
        try:
            return _position(_snapshot_of(session, raw))[0]
        except SnapshotError:
            return -1

    def drop(self, partition: int) -> int:
        """Forget a partition, which another engine has now; returns how many sessions were open."""
        dropped = 0
        for name in self._of(partition):
            del self._places[name]
            self._store.found.pop(name, None)
            self._store.made.pop(name, None)
            self.host.disown(name)
            dropped += self.sessions.drop(name)
        self._answers = [answer for answer in self._answers if answer.partition != partition]
        self._states = [state for state in self._states if state.partition != partition]
        return dropped

    def _of(self, partition: int) -> list[str]:
        return [name for name, place in self._places.items() if place.partition == partition]

    def partition_of(self, session: str) -> int:
        """The partition of a session that is here. Raises KeyError where it is not."""
        return self._places[session].partition

    def waits(self, partition: int) -> bool:
        """Whether a tick of the partition waits to be stepped."""
        return any(self._places[name].waiting for name in self._of(partition))

    def save_all(self, partition: int, now_ns: int) -> None:
        """Save all sessions of a partition that have changed since their last snapshot."""
        for name in self._of(partition):
            if name in self.sessions:
                # a refused message leaves the state unchanged, and is to be known as handled
                place = self._places[name]
                self.sessions.flush(name, now_ns=now_ns, unchanged=place.handled > place.made)
        self._make_states()

    def save_idle(self, idle_ns: int, now_ns: int) -> None:
        """Save sessions without a tick for so long: the log is kept for a limited time."""
        for name in self.sessions.idle_for(idle_ns, now_ns):
            if not self._places[name].waiting:
                self.sessions.flush(name, now_ns=now_ns)
        self._make_states()

    def low(self, partition: int, read: int) -> int:
        """The low watermark: every message up to it is in a saved state. `read`: the newest that was read."""
        low = read
        for name in self._of(partition):
            place = self._places[name]
            # an evicted session does not change any more
            if place.saved < (place.handled if name in self.sessions else place.made) or place.waiting:
                low = min(low, place.saved or place.opened - 1)
        return low

    def on_saved(self, done: SavedState) -> None:
        """A state has been saved."""
        place = self._places.get(done.session)
        if place is not None and done.raw is not None:
            place.saved = max(place.saved, done.seq)

    # ---- messages ------------------------------------------------------------------------------------------------

    def receive(self, partition: int, session: str, seq: int, name: str, content: bytes, now_ns: int) -> None:
        """Handle one message of the log; `name`: its ID, by which its sender calls itself CLIENT."""
        client, *rest = name.split(" ")
        if not CLIENT.fullmatch(client) or len(rest) != 2 or not re.match(topics.SESSION_NAME, session):
            self.host.counts["garbage"] += 1  # there is no client to answer
            return
        number, given = rest
        place = self._places.get(session)
        if place is not None and seq <= max(place.handled, place.waiting[-1][1] if place.waiting else 0):
            self.counts["again"] += 1
            return
        self._current = session, seq
        request, why = self._read(session, content)
        if (
            place is not None
            and place.owner == client
            and not isinstance(request, protocol.Open)  # has the token in it, or needs none
            and not same_token(given, proof(place.token, client, number, session, content))
        ):
            # no answer: the owner would take it for one to its own message
            self.counts["unproven"] += 1
            return
        if request is None:
            self.host.counts["garbage"] += 1
            refused = protocol.Refused(error="bad_message", why=why, session=session)
            self._send(partition, seq, client, refused)
            if place is not None:
                self._handled(place, seq)
            return
        self.host.handle(client.encode(), request, now_ns)
        if isinstance(request, protocol.Step) and not self.host.out:
            assert place is not None  # or it had been refused
            place.waiting.append((request.tick, seq))
            return
        self._collect(partition, stepped=not isinstance(request, protocol.Step))
        place = self._places.get(session)
        if place is None and session in self.sessions:
            place = self._places[session] = _Place(partition, seq, self.token(session, seq), client, seq)
        if place is not None:
            place.owner = self.host.owner(session).decode()
            self._handled(place, seq)
        self._make_states()

    @staticmethod
    def _read(session: str, content: bytes) -> tuple[protocol.Request | None, str]:
        """The request in a message, or why it is none."""
        try:
            request = protocol.read_request(content)
        except WireError as e:
            return None, str(e)[:500]
        if (of := getattr(request, "session", session)) != session:
            return None, f"it is of session {of!r} and came as {session!r}"
        return request, ""

    def _handled(self, place: _Place, seq: int) -> None:
        if not place.waiting:
            place.handled = max(place.handled, seq)

    def step(self, now_ns: int) -> None:
        """Step the oldest tick of each session that has one."""
        self.host.step(now_ns)
        self._collect(-1)

    def housekeeping(self, now_ns: int) -> None:
        """Save states that are due, and evict idle sessions."""
        self.sessions.save(now_ns, _SAVED_AT_ONCE)
        self.host.evict_idle(now_ns)
        self._collect(-1)
        self._make_states()

    def _collect(self, partition: int, stepped: bool = True) -> None:
        """Name the host's replies after the messages that they answer; `partition`: of the message being handled.

        `stepped`: ticks that waited may be among them. A tick that is refused at once is not the one that waits, though
        it has the same number: it may be somebody else's.
        """
        out, self.host.out = self.host.out, []
        for peer, reply in out:
            client = peer.decode()
            session = getattr(reply, "session", self._current[0])
            place = self._places.get(session)
            tick = getattr(reply, "tick", -1)
            if stepped and place is not None and place.waiting and place.waiting[0][0] == tick:
                seq = place.waiting.popleft()[1]
                place.handled = max(place.handled, seq)
                self._send(place.partition, seq, client, reply)
            elif isinstance(reply, protocol.EvictedNow) and reply.reason != "taken" and place is not None:
                self._send(place.partition, place.handled, client, reply)
            else:
                self._send(place.partition if place is not None else partition, self._current[1], client, reply)

    def _send(self, partition: int, seq: int, client: str, reply: protocol.Reply) -> None:
        name = f"{seq}.evicted" if isinstance(reply, protocol.EvictedNow) else str(seq)
        after_saved = isinstance(reply, protocol.Flushed | protocol.Done)
        session = getattr(reply, "session", "") or self._current[0]
        after_stored = isinstance(reply, protocol.Ready | protocol.Skipped)
        content = protocol.encode(reply)
        self._answers.append(OutgoingAnswer(partition, session, client, name, content, after_saved, after_stored))

    def _make_states(self) -> None:
        """Turn new snapshots into states to save. No tick was stepped since, so `handled` is in them."""
        made, self._store.made = self._store.made, {}
        for name, snapshot in made.items():
            place = self._places[name]
            if snapshot is None:
                del self._places[name]
                self._states.append(SavedState(place.partition, name, None, place.handled))
                continue
            owner = place.owner if name in self.sessions else ""  # it is evicted
            extra = {**snapshot.extra, _SEQ: str(place.handled), _OPENED: str(place.opened), _OWNER: owner}
            snapshot = msgspec.structs.replace(snapshot, extra=extra)
            self._store.found[name] = snapshot
            place.made = place.handled
            self._states.append(SavedState(place.partition, name, to_bytes(snapshot), place.handled))

    def pop(self) -> tuple[list[OutgoingAnswer], list[SavedState]]:
        """New answers and states since the last call, each in order."""
        answers, self._answers = self._answers, []
        states, self._states = self._states, []
        return answers, states


def _snapshot_of(session: str, raw: bytes) -> Snapshot:
    """The snapshot in these bytes. Raises SnapshotError where it is none, or another session's."""
    snapshot = from_bytes(raw)
    if snapshot.session != session:
        raise SnapshotError(f"the snapshot of session {session!r} is of {snapshot.session[:80]!r}")
    return snapshot


def _position(snapshot: Snapshot) -> tuple[int, int, str]:
    """Of the session in the log: its newest message, the one that opened it, its owner. Raises SnapshotError."""
    seq, opened, owner = (str(snapshot.extra.get(of, "-")) for of in (_SEQ, _OPENED, _OWNER))
    if not all(re.fullmatch(r"[0-9]{1,18}", of) for of in (seq, opened)) or not (not owner or CLIENT.fullmatch(owner)):
        raise SnapshotError(f"the snapshot of session {snapshot.session!r} has no position in the log")
    return int(seq), int(opened), owner
