"""Replica: the sessions of an engine's partitions as a function of their log; pure of NATS, sockets and clocks.

Every message has its number in the log. What is said in answer to message n is named after n, so that an engine which
reads the log again says the same under the same name; and a snapshot knows the last number that is in it, so that
nothing is stepped twice. Knows nothing about leases or who is alive.
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
from stream_mmrnn.serve.cluster.subjects import CLIENT
from stream_mmrnn.serve.session_host import Host
from stream_mmrnn.serve.sessions import Sessions

_SEQ, _OPENED, _OWNER = "seq", "opened", "owner"
_LATE_TICKS = 65_536
"""Ticks of one session that may wait: a log that is read again holds more than a client sends ahead."""
_SAVED_AT_ONCE = 64


class Said(msgspec.Struct, frozen=True):
    """One thing that is said to a client."""

    partition: int
    session: str
    client: str
    name: str
    """The same for the same answer, whoever gives it."""
    content: bytes
    after_kept: bool
    """It promises that the state is kept: not to be said before it is."""


class Kept(msgspec.Struct, frozen=True):
    """A state to be kept, when everything that was said before is stored."""

    partition: int
    session: str
    raw: bytes | None
    """As `snapshots` writes it; None: the session is over, and nothing of it is to be kept."""
    seq: int
    """The newest message that is in it."""


class InMemoryStateStore:
    """Stands for the folder of states: what is kept elsewhere, and what is to be kept there."""

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
        return 0  # the bucket has a time to live


class _Place(msgspec.Struct):
    """Where a session stands in the log."""

    partition: int
    opened: int
    """The message that opened it: its token is made of that."""
    owner: str
    """The client that it is served for."""
    handled: int
    """The newest that is in its state."""
    made: int = 0
    """The newest that is in a snapshot; 0: there is none."""
    kept: int = 0
    """The newest that is in a snapshot which is kept."""
    waiting: deque[tuple[int, int]] = msgspec.field(default_factory=deque)
    """Ticks that wait to be stepped, each with its number."""


class Replica:
    """Messages of the log in, in the order of each session; what is to be said and kept out."""

    def __init__(
        self, engine: Engine, state: config.State, admission: config.Admission | None, secret: bytes, queue: int
    ) -> None:
        """`secret`: the cluster's, of which sessions' tokens are made: an engine that reads the log again makes the
        same. `queue`: ticks of a session that its client may leave unanswered.
        """
        self._store = InMemoryStateStore()
        self._secret = secret
        self._heard = ("", 0)
        """Whose message is being heard, and its number."""
        self.sessions = Sessions(
            engine, self._store, state, admission=admission, make_token=lambda: self.token(*self._heard)
        )
        self.host = Host(self.sessions, _LATE_TICKS, queue)
        self._places: dict[str, _Place] = {}
        self._said: list[Said] = []
        self._to_keep: list[Kept] = []
        self.counts: Counter[str] = Counter()
        """`again`: messages that were in a snapshot already; `left`: sessions that there was no room for."""

    def token(self, session: str, opened: int) -> str:
        """The token of a session that message `opened` began."""
        return hmac.new(self._secret, f"{session} {opened}".encode(), hashlib.sha256).hexdigest()

    @property
    def ready(self) -> bool:
        """Whether a tick waits to be stepped."""
        return self.host.ready

    # ---- partitions ----------------------------------------------------------------------------------------------

    def adopt(self, partition: int, raw: bytes, now_ns: int) -> str:
        """Go on with a session from its snapshot; its name. An evicted one waits for its token.

        Raises:
            SnapshotError: these are not the bytes of one of ours.

        """
        snapshot = from_bytes(raw)
        name = snapshot.session
        try:
            seq, opened = (int(snapshot.extra[of]) for of in (_SEQ, _OPENED))
            owner = str(snapshot.extra[_OWNER])
        except (KeyError, ValueError) as e:
            raise SnapshotError(f"the snapshot of session {name!r} does not say where in the log it stands") from e
        self._places[name] = _Place(partition, opened, owner, seq, seq, seq)
        self._store.found[name] = snapshot
        if owner:
            try:
                self.sessions.adopt(snapshot, self.token(name, opened), now_ns=now_ns)
                self.host.own(name, owner.encode())
            except SessionError:
                self.counts["left"] += 1  # as if evicted: its client comes back with its token, and is told why not
        return name

    @staticmethod
    def seq_of(raw: bytes) -> int:
        """The newest message that is in a snapshot; -1 where it is none of ours."""
        try:
            return int(from_bytes(raw).extra.get(_SEQ, -1))
        except (SnapshotError, ValueError):
            return -1

    def drop(self, partition: int) -> int:
        """Forget all of a partition: it is another engine's. How many sessions were open."""
        dropped = 0
        for name in self._of(partition):
            del self._places[name]
            self._store.found.pop(name, None)
            self._store.made.pop(name, None)
            self.host.disown(name)
            dropped += self.sessions.drop(name)
        self._said = [said for said in self._said if said.partition != partition]
        self._to_keep = [kept for kept in self._to_keep if kept.partition != partition]
        return dropped

    def _of(self, partition: int) -> list[str]:
        return [name for name, place in self._places.items() if place.partition == partition]

    def waits(self, partition: int) -> bool:
        """Whether a tick of the partition waits to be stepped."""
        return any(self._places[name].waiting for name in self._of(partition))

    def save_all(self, partition: int, now_ns: int) -> None:
        """Make states of all its sessions that have changed since their newest."""
        for name in self._of(partition):
            if name in self.sessions:
                self.sessions.flush(name, now_ns=now_ns)
        self._make_states()

    def save_silent(self, silent_ns: int, now_ns: int) -> None:
        """And of those that have said nothing for so long: the log is not kept for ever."""
        for name in self.sessions.silent(now_ns, silent_ns):
            if not self._places[name].waiting:
                self.sessions.flush(name, now_ns=now_ns)
        self._make_states()

    def low(self, partition: int, read: int) -> int:
        """Every message up to this number is in what is kept, or nobody's; `read`: the newest that was read."""
        low = read
        for name in self._of(partition):
            place = self._places[name]
            # one that is evicted stays as it was made, whatever is said to it
            if place.kept < (place.handled if name in self.sessions else place.made) or place.waiting:
                low = min(low, place.kept or place.opened - 1)
        return low

    def kept(self, done: Kept) -> None:
        """What was to be kept is kept."""
        place = self._places.get(done.session)
        if place is not None and done.raw is not None:
            place.kept = max(place.kept, done.seq)

    # ---- what comes ----------------------------------------------------------------------------------------------

    def receive(self, partition: int, session: str, seq: int, client: str, content: bytes, now_ns: int) -> None:
        """One message of the log, and which client's it is."""
        if not CLIENT.fullmatch(client) or not re.match(topics.SESSION_NAME, session):
            self.host.counts["garbage"] += 1  # nobody that could be answered
            return
        place = self._places.get(session)
        if place is not None and seq <= max(place.handled, place.waiting[-1][1] if place.waiting else 0):
            self.counts["again"] += 1
            return
        self._heard = session, seq
        try:
            request = protocol.read_request(content)
            if getattr(request, "session", session) != session:
                raise WireError(f"it is of session {getattr(request, 'session', '')!r} and came as {session!r}")
        except WireError as e:
            self.host.counts["garbage"] += 1
            refused = protocol.Refused(error="bad_message", why=str(e)[:500], session=session)
            self._send(partition, seq, client, refused)
            if place is not None:
                self._handled(place, seq)
            return
        self.host.handle(client.encode(), request, now_ns)
        if isinstance(request, protocol.Step) and not self.host.out:
            assert place is not None  # or it had been refused
            place.waiting.append((request.tick, seq))
            return
        self._collect(partition)
        place = self._places.get(session)
        if place is None and session in self.sessions:
            place = self._places[session] = _Place(partition, seq, client, seq)
        if place is not None:
            place.owner = self.host.owner(session).decode()
            self._handled(place, seq)
        self._make_states()

    def _handled(self, place: _Place, seq: int) -> None:
        if not place.waiting:
            place.handled = max(place.handled, seq)

    def step(self, now_ns: int) -> None:
        """The oldest tick of each session that has one."""
        self.host.step(now_ns)
        self._collect(-1)

    def look_after(self, now_ns: int) -> None:
        """States that are due, sessions that are idle."""
        self.sessions.save(now_ns, _SAVED_AT_ONCE)
        self.host.evict_idle(now_ns)
        self._collect(-1)
        self._make_states()

    def _collect(self, partition: int) -> None:
        """Name what the host says after the messages that it answers; `partition`: of the one that is being heard."""
        out, self.host.out = self.host.out, []
        for peer, reply in out:
            client = peer.decode()
            session = getattr(reply, "session", self._heard[0])
            place = self._places.get(session)
            tick = getattr(reply, "tick", -1)
            if place is not None and place.waiting and place.waiting[0][0] == tick:
                seq = place.waiting.popleft()[1]
                place.handled = max(place.handled, seq)
                self._send(place.partition, seq, client, reply)
            elif isinstance(reply, protocol.EvictedNow) and reply.reason != "taken" and place is not None:
                self._send(place.partition, place.handled, client, reply)
            else:
                self._send(place.partition if place is not None else partition, self._heard[1], client, reply)

    def _send(self, partition: int, seq: int, client: str, reply: protocol.Reply) -> None:
        name = f"{seq}.evicted" if isinstance(reply, protocol.EvictedNow) else str(seq)
        after_kept = isinstance(reply, protocol.Flushed | protocol.Done)
        session = getattr(reply, "session", "") or self._heard[0]
        self._said.append(Said(partition, session, client, name, protocol.encode(reply), after_kept))

    def _make_states(self) -> None:
        """Of what was saved just now: nothing has been stepped since, so that `handled` is what is in it."""
        made, self._store.made = self._store.made, {}
        for name, snapshot in made.items():
            place = self._places[name]
            if snapshot is None:
                del self._places[name]
                self._to_keep.append(Kept(place.partition, name, None, place.handled))
                continue
            owner = place.owner if name in self.sessions else ""  # it is evicted
            extra = {**snapshot.extra, _SEQ: str(place.handled), _OPENED: str(place.opened), _OWNER: owner}
            snapshot = msgspec.structs.replace(snapshot, extra=extra)
            self._store.found[name] = snapshot
            place.made = place.handled
            self._to_keep.append(Kept(place.partition, name, to_bytes(snapshot), place.handled))

    def pop(self) -> tuple[list[Said], list[Kept]]:
        """What is to be said and what is to be kept since the last time, each in order."""
        said, self._said = self._said, []
        kept, self._to_keep = self._to_keep, []
        return said, kept
