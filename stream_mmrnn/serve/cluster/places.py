"""Places: the sessions of an engine's partitions, open and evicted, and the pieces in which their states are saved.

Knows nothing about frames, clients' messages or NATS.
"""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from stream_mmrnn.core.block import Block, StateBlock
from stream_mmrnn.core.errors import Busy, DuplicateSession, Evicted, SessionError
from stream_mmrnn.core.settings import AdmissionSettings, StateSettings
from stream_mmrnn.predict.protocols import Engine
from stream_mmrnn.serve.admission import Admission
from stream_mmrnn.serve.cluster.frames import Said
from stream_mmrnn.serve.cluster.pieces import Content, SessionRow, content_of, write
from stream_mmrnn.serve.cluster.stepped import Stepped
from stream_mmrnn.serve.cluster.subjects import partition_of
from stream_mmrnn.serve.measure import measure_again

_REPLIES = 8
"""To control messages of a session, that are kept."""
Promised = tuple[str, Said, "Place | None"]
"""A reply to a client that may be said when states are saved, and the session whose newest reply it is."""


class Piece:
    """Partitions whose states are saved together."""

    def __init__(self, name: str, epochs: dict[int, int], after: int, revision: int = 0) -> None:
        self.name, self.epochs = name, epochs
        """`epochs`: by partition, of its lease."""
        self.after = after
        """Frames up to this one are in the states that it began with."""
        self.revision = revision
        """Of its value in the bucket."""
        self.position = after
        """Of that value."""
        self.sessions: dict[str, Place] = {}
        self.saved_s = float("-inf")
        self.saving = self.due = self.changed = False
        """`due`: a session has as many unsaved ticks as it may have; `changed`: something is not in the bucket."""
        self.ours = True
        self.read = False
        """The log is being read for it."""
        self.promised: list[Promised] = []

    def promise(self, client: str, said: Said, place: Place | None) -> None:
        self.promised.append((client, said, place))
        self.changed = True


class Place:
    """A session."""

    __slots__ = (
        "active_ns", "handle", "kept", "last", "left_ns", "name", "number", "open", "opened", "owner", "partition",
        "piece", "promised", "replies", "secret", "state", "token", "unsaved",
    )  # fmt: skip

    def __init__(self, name: str, partition: int, piece: Piece, opened: int, token: str) -> None:
        self.name, self.partition, self.piece, self.opened, self.token = name, partition, piece, opened, token
        self.secret = token.encode()
        self.owner = ""
        """The client that has it; "" where it was evicted."""
        self.open, self.handle = False, -1
        self.state: StateBlock | None = None
        """Of one session; while it is not open."""
        self.last = -1
        self.number = -1
        """Of its owner's newest control message."""
        self.replies: dict[int, bytes] = {}
        """To the newest ones, by number: the client may ask again. b"": the one to `open`."""
        self.promised: set[tuple[str, int]] = set()
        """Client and number of those that wait until the states are saved."""
        self.kept: dict[int, tuple[Stepped, int]] = {}
        """Answers that the owner has not confirmed, by index: a step's, and the row in them."""
        self.unsaved = self.active_ns = self.left_ns = 0

    def keep(self, index: int, stepped: Stepped, row: int, most: int) -> None:
        self.kept[index] = stepped, row
        if len(self.kept) > most:
            del self.kept[next(iter(self.kept))]

    def reply(self, number: int, content: bytes, promised: bool) -> None:
        """The reply to a control message of the owner."""
        self.number = max(self.number, number)
        self.replies[number] = content
        if promised:
            self.promised.add((self.owner, number))
        if len(self.replies) > _REPLIES:
            del self.replies[next(iter(self.replies))]

    def confirm(self, answered: int) -> None:
        """The owner has all answers up to this one."""
        kept = self.kept
        while kept and (first := next(iter(kept))) <= answered:
            del kept[first]

    def has_token(self, token: str | None) -> bool:
        return token is not None and hmac.compare_digest(token.encode("utf-8", "surrogatepass"), self.secret)

    def evicted_error(self) -> Evicted:
        return Evicted(f"session {self.name!r} was evicted, and its state is kept; open it with its token")


class Places:
    """Sessions by name and by piece."""

    def __init__(
        self,
        engine: Engine,
        state: StateSettings,
        admission: Admission | None,
        retry: AdmissionSettings | None,
        partitions: int,
        me: str,
        counts: Counter[str],
    ) -> None:
        self._engine, self._settings, self._admission, self._me = engine, state, admission, me
        self._retry = retry or AdmissionSettings()
        self._counts = counts
        self.partitions = partitions
        self.by_name: dict[str, Place] = {}
        self._pieces: list[Piece | None] = [None] * partitions
        self.every = state.snapshot_every or 1 << 60
        self._idle_ns, self._ttl_ns = round(state.idle_s * 1e9), round(state.ttl_s * 1e9)

    # ---- pieces --------------------------------------------------------------------------------------------------

    def piece_of(self, session: str) -> Piece | None:
        """The piece that a session belongs to, None where it is another engine's."""
        return self._pieces[partition_of(session, self.partitions)]

    def serves(self, session: str, seq: int) -> bool:
        """Whether a frame is to be handled as far as it is of this session."""
        piece = self.piece_of(session)
        return piece is not None and seq > piece.after

    def open(self) -> Iterator[Place]:
        """Open sessions."""
        return (place for place in self.by_name.values() if place.open)

    def content_for(self, piece: Piece, content: Content | None) -> Content:
        """The value with which a piece begins: what is of its partitions in `content`."""
        empty = np.zeros(0, np.int64)
        states = content.block() if content is not None else self._engine.snapshot_block(empty)
        rows = content.sessions if content is not None else ()
        mine = [i for i, row in enumerate(rows) if partition_of(row.session, self.partitions) in piece.epochs]
        sha256 = content.model_sha256 if content is not None else self._engine.spec.sha256
        sessions = tuple(rows[i] for i in mine)
        return content_of(sha256, self._me, piece.epochs, piece.after, sessions, _rows(states, mine))

    def adopt(
        self, piece: Piece, content: Content | None, token: Callable[[str, int], str], now_ns: int
    ) -> list[Place]:
        """Take the sessions of a piece's partitions from the states that `content` has, and return them.

        Raises SessionError where the states are of another model; nothing was changed.
        """
        if content is not None and content.model_sha256 != self._engine.spec.sha256:
            raise SessionError(f"the states of piece {piece.name} are of another model")
        for number in piece.epochs:
            self._pieces[number] = piece
        if content is None:
            return []
        states = content.block()
        opened: list[int] = []
        handles: list[int] = []
        found: list[Place] = []
        for i, row in enumerate(content.sessions):
            number = partition_of(row.session, self.partitions)
            if number not in piece.epochs or row.session in self.by_name:
                continue
            place = Place(row.session, number, piece, row.opened, token(row.session, row.opened))
            place.owner, place.number, place.replies = row.owner, row.number, dict(row.replies)
            place.last, place.left_ns, place.active_ns = row.last, row.left_ns, now_ns
            place.kept = {kept.index: (Stepped.of_kept(kept), 0) for kept in row.kept}
            self.by_name[row.session] = piece.sessions[row.session] = place
            found.append(place)
            if row.owner:
                try:
                    self._admit(row.session, now_ns)
                    place.open, place.handle = True, self._engine.handle(row.session)
                    opened.append(i)
                    handles.append(place.handle)
                    continue
                except Busy:
                    self._counts["left"] += 1  # as if evicted: its client opens it again, and gets the reason
                    place.owner = ""
                    place.kept.clear()
                    piece.changed = True
            place.state = _rows(states, [i])
        if handles:
            self._engine.restore_block(np.array(handles, np.int64), _rows(states, opened))
            self._counts["resumed"] += len(handles)
        return found

    def split(self, piece: Piece, numbers: set[int], name: str, position: int) -> Piece:
        """Some partitions of a piece as one of its own, with all that was promised for the old one's states."""
        part = Piece(name, {n: piece.epochs.pop(n) for n in sorted(numbers)}, position)
        for number in numbers:
            self._pieces[number] = part
        for session in [s for s, place in piece.sessions.items() if place.partition in numbers]:
            place = part.sessions[session] = piece.sessions.pop(session)
            place.piece = part
        part.promised = [of for of in piece.promised if partition_of(of[1].session, self.partitions) in numbers]
        piece.promised = [of for of in piece.promised if partition_of(of[1].session, self.partitions) not in numbers]
        return part

    def drop(self, piece: Piece) -> None:
        """Forget a piece and its sessions: they are another engine's."""
        piece.ours = False
        for number in piece.epochs:
            if self._pieces[number] is piece:
                self._pieces[number] = None
        for name, place in piece.sessions.items():
            del self.by_name[name]
            if place.open:
                self._engine.close(name)

    def to_bytes(self, piece: Piece, position: int) -> bytes:
        """The value of a piece with the sessions as they are now, all frames up to `position` in them."""
        here = [place for place in piece.sessions.values() if place.open]
        left = [place for place in piece.sessions.values() if not place.open]
        states = self._engine.snapshot_block(np.array([place.handle for place in here], np.int64))
        parts = [states, *(place.state for place in left if place.state is not None)]
        states = StateBlock(
            np.concatenate([of.fresh for of in parts]),
            {name: np.concatenate([of.states[name] for of in parts]) for name in states.states},
        )
        rows = []
        for place in (*here, *left):
            place.unsaved = 0
            kept = tuple(of.row(index, i) for index, (of, i) in place.kept.items())
            rows.append(
                SessionRow(
                    place.name, place.opened, place.owner, place.number, place.replies, place.last, place.left_ns, kept
                )
            )
        sha256 = self._engine.spec.sha256
        piece.due = piece.changed = False
        return write(content_of(sha256, self._me, piece.epochs, position, tuple(rows), states))

    # ---- sessions ------------------------------------------------------------------------------------------------

    def begin(self, name: str, seq: int, token: str, now_ns: int) -> Place:
        """A new session in a slot. Raises Busy."""
        piece = self.piece_of(name)
        assert piece is not None
        self._admit(name, now_ns)
        place = Place(name, partition_of(name, self.partitions), piece, seq, token)
        place.open, place.handle = True, self._engine.handle(name)
        self.by_name[name] = piece.sessions[name] = place
        self._counts["opened"] += 1
        return place

    def reopen(self, place: Place, token: str | None, now_ns: int) -> None:
        """Give a session its slot again, where it was evicted.

        Raises:
            DuplicateSession, Evicted: this is not its token.
            Busy: there is no slot.

        """
        if not place.has_token(token):
            if place.open:
                raise DuplicateSession(f"session {place.name!r} is open already; give its token, or take another name")
            raise place.evicted_error()
        if place.open:
            return
        self._admit(place.name, now_ns)
        place.handle = self._engine.handle(place.name)
        assert place.state is not None
        self._engine.restore_block(np.array([place.handle], np.int64), place.state)
        place.open, place.state, place.left_ns = True, None, 0
        self._counts["resumed"] += 1

    def close(self, place: Place) -> None:
        if place.open:
            self._engine.close(place.name)
        del self.by_name[place.name], place.piece.sessions[place.name]
        place.open = False

    def evict_idle(self, now_ns: int, unix_ns: int) -> list[tuple[Place, str]]:
        """Free the slots of sessions without a tick for too long: they, each with its owner until now."""
        found = []
        for place in list(self.by_name.values()):
            if place.open and now_ns - place.active_ns > self._idle_ns:
                found.append((place, place.owner))
                place.state = self._engine.snapshot_block(np.array([place.handle], np.int64))
                self._engine.close(place.name)
                place.open, place.owner, place.left_ns, place.handle = False, "", unix_ns, -1
                place.kept.clear()
                self._counts["evicted"] += 1
            elif not place.open and not place.left_ns:  # it found no slot here: its time to live begins
                place.left_ns = unix_ns
            elif not place.open and place.left_ns and unix_ns - place.left_ns > self._ttl_ns:
                del self.by_name[place.name], place.piece.sessions[place.name]
            else:
                continue
            place.piece.changed = True
        return found

    # ---- admission -----------------------------------------------------------------------------------------------

    def stepped(self, count: int, took_ns: int, now_ns: int) -> None:
        """So many ticks were stepped at once."""
        if self._admission is not None:
            self._admission.add(count, took_ns, now_ns)

    def _admit(self, session: str, now_ns: int) -> None:
        """Take a slot of the engine, or raise Busy with a hint."""
        why, count = "", len(self._engine)
        if count and not self._in_time(count + 1, now_ns):
            why = f"{count} sessions are open, and one more could not be served in time"
        else:
            try:
                self._engine.open(session)
            except Busy as e:
                why = str(e)
        if why:
            self._counts["busy"] += 1
            oldest_ns = min((place.active_ns for place in self.open()), default=now_ns)
            left_s = (oldest_ns + self._idle_ns - now_ns) / 1e9
            after_s = min(max(left_s, self._retry.retry_s), self._retry.retry_max_s)
            raise Busy(f"{why}; ask again in {after_s:.3g} s", after_s)

    def _in_time(self, sessions: int, now_ns: int) -> bool:
        """Whether so many sessions can be served in time, by no old measurement."""
        admission = self._admission
        if admission is None or admission.admits(sessions, now_ns):
            return True
        if not admission.is_stale(now_ns):
            return False
        measure_again(self._engine, admission, now_ns)
        return admission.admits(sessions, now_ns)


def _rows(states: StateBlock, rows: list[int]) -> StateBlock:
    return StateBlock(states.fresh[rows], {name: values[rows] for name, values in states.states.items()})


def joined(blocks: Sequence[Block]) -> Block:
    """The ticks of several blocks as one, in order."""
    if len(blocks) == 1:
        return blocks[0]
    return Block(
        np.concatenate([of.handles for of in blocks]),
        np.concatenate([of.indices for of in blocks]),
        np.concatenate([of.event_ns for of in blocks]),
        np.concatenate([of.present for of in blocks]),
        np.concatenate([of.age_ns for of in blocks]),
        tuple(np.concatenate(vectors) for vectors in zip(*(of.features for of in blocks), strict=True)),
    )
