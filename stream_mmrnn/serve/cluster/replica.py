"""Replica: the sessions of an engine's partitions as a function of the log, without NATS, sockets and clocks.

Every frame has a sequence number. An engine that reads the log again from a piece's position makes the same answers,
bit for bit. An answer is kept until its client says that it has it, and is in the piece: so an engine that dies takes
no answer with it. Knows nothing about leases or who is alive.

A session's token is an HMAC of its name and of the number of the frame that opened it, under a key that all engines
have as a file. So every engine makes the same token, whoever began the session, and neither the token nor the key is in
a bucket. An item under the name of a session's owner counts only with a proof that its sender has the token (`frames`).
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections import Counter

import numpy as np

from stream_mmrnn.core import topics
from stream_mmrnn.core.block import Block
from stream_mmrnn.core.errors import (
    BadTick,
    Evicted,
    SessionError,
    UnknownSession,
    WireError,
)
from stream_mmrnn.core.settings import AdmissionSettings, StateSettings
from stream_mmrnn.core.types import FEATURE_BOUND
from stream_mmrnn.predict.protocols import Engine
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.admission import Admission
from stream_mmrnn.serve.cluster.frames import (
    MOST_ROWS,
    NO_PROOF,
    PROOF,
    Columns,
    Control,
    Frame,
    Said,
    proof,
    read_frame,
)
from stream_mmrnn.serve.cluster.outgoing import Entry, Outgoing
from stream_mmrnn.serve.cluster.pieces import Content
from stream_mmrnn.serve.cluster.places import Piece, Place, Places, joined
from stream_mmrnn.serve.cluster.stepped import Stepped
from stream_mmrnn.serve.measure import measure

_NOT_OWNER = "the session belongs to another connection; open it with its token to take it over"
_IDLE_CHECK_NS = 100_000_000


class _Part:
    """Ticks of one client that wait to be stepped together with others."""

    def __init__(self, client: str, block: Block, places: list[Place], received_ns: int) -> None:
        self.client, self.block, self.places, self.received_ns = client, block, places, received_ns


class Replica:
    """`receive` frames of the log, `step`, and `pop` answers; `places` has the sessions and their pieces."""

    def __init__(
        self,
        engine: Engine,
        state: StateSettings,
        admission: AdmissionSettings | None,
        key: bytes,
        queue: int,
        partitions: int,
        me: str = "",
        now_ns: int = 0,
    ) -> None:
        """`key`: the same for all engines of the cluster, and known to them only. `queue`: ticks of a session that may
        wait for an answer, so that as many answers are kept. `me`: the engine's name.
        """
        spec = engine.spec
        self.engine, self.settings = engine, state
        self._key, self._queue = key, queue
        self._sizes = [m.size for m in spec.modalities]
        self._heads = [h.name for h in spec.heads]
        self.welcome = protocol.welcome(spec, queue)
        self.counts: Counter[str] = Counter(dict.fromkeys(("stepped", "opened", "resumed", "busy", "evicted"), 0))
        """`messages`, `stepped` ticks, `refused`; `again`: items that were in a piece already; `kept`: answers that
        were sent again; `left`: sessions for which there was no free slot; `unproven`: items under the name of a
        session's owner, of somebody who does not have its token; `garbage`; `opened`, `resumed`, `closed`, `evicted`,
        `busy`, `taken`; `duplicates`: ticks that a client has sent twice; `skipped`: indices that were left out."""
        admit = None
        if admission is not None:
            admit = Admission(spec.tick_ns, admission.share)
            measure(engine, admit, now_ns)
        self.places = Places(engine, state, admit, admission, partitions, me, self.counts)
        self.position = 0
        """The newest frame that was handled; of pieces that have begun behind it see `position_of`."""
        self._pending: list[_Part] = []
        self._pending_rows = 0
        self._busy: set[int] = set()
        """Handles that have a pending tick."""
        self.out = Outgoing(spec, self.places, self.counts)
        self._idle_checked_ns = 0

    def token(self, session: str, opened: int) -> str:
        """The token of a session that frame `opened` began."""
        return hmac.new(self._key, f"{session} {opened}".encode(), hashlib.sha256).hexdigest()

    # ---- pieces --------------------------------------------------------------------------------------------------

    def position_of(self, piece: Piece) -> int:
        """Every frame up to this one is in the sessions of the piece."""
        return max(piece.after, self.position)

    def adopt(self, piece: Piece, content: Content | None, now_ns: int) -> None:
        """Serve a piece from now on, from the states in `content`. Clients are told again what they have not confirmed.

        Raises SessionError where the states are of another model.
        """
        for place in self.places.adopt(piece, content, self.token, now_ns):
            self.out.send_kept(place, -1)

    def kept_again(self) -> None:
        """Send all answers again that clients have not confirmed: the connection was lost meanwhile."""
        for place in self.places.open():
            self.out.send_kept(place, -1)

    # ---- frames --------------------------------------------------------------------------------------------------

    def receive(self, seq: int, client: str, content: bytes, now_ns: int) -> None:
        """Handle one frame of the log, by whoever wrote it."""
        self.counts["messages"] += 1
        try:
            if not client:
                raise WireError("this is not a client's")
            frame = read_frame(client, content)
            for of, at in frame.with_proofs():
                if of.controls:
                    self.step(now_ns)
                for control in of.controls:
                    self._control(seq, client, control, frame, at, now_ns)
                    at += PROOF
                if of.columns is not None:
                    self._columns(seq, client, of.columns, frame, at, now_ns)
        except WireError:
            self.counts["garbage"] += 1
        self.position = seq

    def _columns(self, seq: int, client: str, columns: Columns, frame: Frame, at: int, now_ns: int) -> None:
        """Let the ticks wait that are to be stepped, and answer the others."""
        block = columns.to_block(self._sizes)
        indices, (before, answered) = block.indices.tolist(), columns.order()
        good = None if (finite := block.finite()).all() else finite.tolist()
        proofs, digest = frame.proofs, frame.digest
        known = self.places.by_name
        rows: list[int] = []
        places: list[Place] = []
        for i, name in enumerate(columns.sessions):
            place = known.get(name)
            if place is None:
                if self.places.serves(name, seq):
                    self.out.refuse(
                        client, UnknownSession(f"session {name[:80]!r} is not open; open it first"), name, indices[i]
                    )
                continue
            piece = place.piece
            if seq <= piece.after:
                continue
            if place.owner != client:
                self.out.refuse(client, self._missing(place), name, indices[i])
                continue
            if not hmac.compare_digest(proof(place.secret, digest), proofs[at + PROOF * i : at + PROOF * (i + 1)]):
                # no answer: the owner would take it for one to its own tick
                self.counts["unproven"] += 1
                continue
            place.confirm(answered[i])
            index = indices[i]
            if index <= place.last:
                self._again(client, place, index)
                continue
            if before[i] != place.last:
                # a tick is missing: the client opens the session again, and sends it
                why = f"tick {index} of session {name!r} follows tick {before[i]}, and its newest one is {place.last}"
                self.out.refuse(client, Evicted(f"{why}; open it with its token"), name, index)
                continue
            if good is not None and not good[i]:
                self.out.refuse(
                    client,
                    BadTick(
                        f"tick {index} of session {name!r} holds a number that is not finite or not below "
                        f"{FEATURE_BOUND:g}; send it without this value"
                    ),
                    name,
                    index,
                )
                continue
            if place.handle in self._busy:
                # its earlier tick, of another frame or (against the rules) of this one, is stepped first
                self._wait(client, block, rows, places, now_ns)
                rows, places = [], []
                self.step(now_ns)
            if place.last >= 0:
                self.counts["skipped"] += index - place.last - 1
            self._busy.add(place.handle)
            place.last, place.active_ns = index, now_ns
            place.unsaved += 1
            if place.unsaved >= self.places.every:
                piece.due = True
            piece.changed = True
            rows.append(i)
            places.append(place)
        self._wait(client, block, rows, places, now_ns)
        if self._pending_rows >= MOST_ROWS:
            self.step(now_ns)

    def _wait(self, client: str, block: Block, rows: list[int], places: list[Place], now_ns: int) -> None:
        if not rows:
            return
        handles = [place.handle for place in places]
        if len(rows) < len(block):
            chosen = np.zeros(len(block), np.bool_)
            chosen[rows] = True
            block = block.take(chosen)
        block = Block(
            np.array(handles, np.int64), block.indices, block.event_ns, block.present, block.age_ns, block.features
        )
        self._pending.append(_Part(client, block, places, now_ns))
        self._pending_rows += len(rows)

    @property
    def ready(self) -> bool:
        """Whether a tick waits to be stepped."""
        return bool(self._pending)

    def step(self, now_ns: int) -> None:
        """Step all ticks that wait, as one block."""
        if not self._pending:
            return
        parts, self._pending, self._pending_rows = self._pending, [], 0
        self._busy.clear()
        block = joined([part.block for part in parts])
        done = self.engine.step_block(block)
        took_ns = done.step_end_ns - done.step_start_ns
        self.places.stepped(len(block), took_ns, now_ns)
        self.counts["stepped"] += len(block)
        heads = [done.heads[name] for name in self._heads]
        begin = 0
        for part in parts:
            end = begin + len(part.block)
            mine = part.block
            stepped = Stepped(
                mine.event_ns,
                mine.present,
                mine.age_ns,
                [values[begin:end] for values in heads],
                max(done.step_start_ns - part.received_ns, 0),
                took_ns,
            )
            begin = end
            for i, (place, index) in enumerate(zip(part.places, mine.indices.tolist(), strict=True)):
                place.keep(index, stepped, i, self._queue)
            names = [place.name for place in part.places]
            for at in range(0, len(names), self.out.most_rows):
                self.out.send(part.client, Entry(stepped.columns(names, mine.indices, at, at + self.out.most_rows), ()))

    def _again(self, client: str, place: Place, index: int) -> None:
        """A tick came that the session has had: its answer is sent again, or it has been confirmed."""
        self.counts["duplicates"] += 1
        if place.handle in self._busy:
            return  # its answer is about to be made
        if (kept := place.kept.get(index)) is not None:
            self.out.send(client, Entry(Stepped.of_rows([place.name], [(index, kept)]), ()))
            self.counts["kept"] += 1
            return
        reply = protocol.Skipped(session=place.name, tick=index, next=place.last + 1)
        self.out.say(client, place.name, -1, index, reply)

    # ---- control messages ----------------------------------------------------------------------------------------

    def _control(self, seq: int, client: str, item: Control, frame: Frame, at: int, now_ns: int) -> None:
        name = item.session
        if not re.match(topics.SESSION_NAME, name):
            self.counts["garbage"] += 1
            return
        if not self.places.serves(name, seq):
            return
        place = self.places.by_name.get(name)
        request, why = _read(item) if item.content else (None, "")
        mine = place is not None and place.owner == client
        opens = isinstance(request, protocol.Open)  # it has the token in it, or needs none
        if mine and place is not None and not opens:
            given = frame.proofs[at : at + PROOF]
            if given == NO_PROOF or not hmac.compare_digest(proof(place.secret, frame.digest), given):
                self.counts["unproven"] += 1
                return
        if not item.content:
            if mine and place is not None:
                place.confirm(item.answered)
                self.out.send_kept(place, item.answered)
            return
        if mine and place is not None and item.number <= place.number:
            self.counts["again"] += 1
            if (reply := place.replies.get(item.number)) is not None and (client, item.number) not in place.promised:
                reply = reply or self._ready(place, place.last >= 0)
                kept = self.out.kept(client, place, item.answered)
                self.out.send(client, Entry(kept, (Said(name, item.number, -1, reply),)))
            return
        if request is None:
            self.counts["garbage"] += 1
            refused = protocol.Refused(error="bad_message", why=why, session=name)
            self.out.say(client, name, item.number, -1, refused)
            return
        try:
            self._request(seq, client, place, request, item, now_ns)
        except SessionError as e:
            self.out.refuse(client, e, name, -1, item.number)

    def _request(
        self, seq: int, client: str, place: Place | None, request: protocol.Request, item: Control, now_ns: int
    ) -> None:
        match request:
            case protocol.Open():
                self._open(seq, client, place, request, item, now_ns)
            case protocol.Flush():
                place = self._owned(client, place, item.session)
                self._promise(client, place, item.number, protocol.Flushed(session=place.name, next=place.last + 1))
            case protocol.Reset():
                place = self._owned(client, place, item.session)
                self.engine.reset(place.name)
                place.active_ns = now_ns
                self._promise(client, place, item.number, protocol.Done(session=place.name))
            case protocol.Close():
                if place is None or place.open or not place.has_token(request.token):
                    place = self._owned(client, place, item.session)
                self.places.close(place)
                self.counts["closed"] += 1
                self._promise(client, place, item.number, protocol.Done(session=place.name))
            case _:
                self.counts["garbage"] += 1

    def _open(
        self, seq: int, client: str, place: Place | None, request: protocol.Open, item: Control, now_ns: int
    ) -> None:
        name = request.session
        if request.raw:
            raise SessionError(
                f"session {name!r}: a cluster does not serve raw sessions; use `serve` without --cluster"
            )
        if place is None and request.token is not None:
            raise UnknownSession(f"no state of session {name!r} is kept (any more); open it without a token")
        resumed = place is not None and (not place.open or place.last >= 0)
        if place is None:
            place = self.places.begin(name, seq, self.token(name, seq), now_ns)
        else:
            self.places.reopen(place, request.token, now_ns)
        if place.owner and place.owner != client:
            self.counts["taken"] += 1
            notice = protocol.EvictedNow(session=name, token="", reason="taken", next=place.last + 1)
            self.out.say(place.owner, name, -1, -1, notice)
        place.piece.changed = True
        place.confirm(item.answered)
        if place.owner != client:
            place.number, place.replies = -1, {}  # numbers are each client's own
        place.owner, place.active_ns = client, now_ns
        place.reply(item.number, b"", promised=False)
        # in one message: after `ready` the client waits for no answer to an earlier tick any more
        kept = self.out.kept(client, place, item.answered)
        self.out.send(client, Entry(kept, (Said(name, item.number, -1, self._ready(place, resumed)),)))

    @staticmethod
    def _ready(place: Place, resumed: bool) -> bytes:
        """The reply to `open`. It is not kept: the token is not to be in a bucket."""
        ready = protocol.Ready(session=place.name, token=place.token, next=place.last + 1, resumed=resumed)
        return protocol.encode(ready)

    def _owned(self, client: str, place: Place | None, session: str) -> Place:
        if place is None:
            raise UnknownSession(f"session {session!r} is not open; open it first")
        if place.owner != client:
            raise self._missing(place)
        return place

    @staticmethod
    def _missing(place: Place) -> SessionError:
        """Why a client may not use a session that is not its own."""
        return UnknownSession(_NOT_OWNER) if place.open else place.evicted_error()

    def _promise(self, client: str, place: Place, number: int, reply: protocol.Reply) -> None:
        """Say it when the states as they are now are saved."""
        content = protocol.encode(reply)
        place.reply(number, content, promised=True)
        place.piece.promise(client, Said(place.name, number, -1, content), place)

    # ---- housekeeping --------------------------------------------------------------------------------------------

    def housekeeping(self, now_ns: int, unix_ns: int) -> None:
        """Evict idle sessions, and forget those that were evicted too long ago. Call it often: it is rate-limited."""
        if now_ns - self._idle_checked_ns < _IDLE_CHECK_NS:
            return
        self._idle_checked_ns = now_ns
        for place, client in self.places.evict_idle(now_ns, unix_ns):
            notice = protocol.EvictedNow(session=place.name, token=place.token, reason="idle", next=place.last + 1)
            place.piece.promise(client, Said(place.name, -1, -1, protocol.encode(notice)), None)


def _read(item: Control) -> tuple[protocol.Request | None, str]:
    """The request in a control message, or why it is none."""
    try:
        request = protocol.read_request(item.content)
    except WireError as e:
        return None, str(e)[:500]
    if (of := getattr(request, "session", item.session)) != item.session:
        return None, f"it is of session {of!r} and came as {item.session!r}"
    return request, ""
