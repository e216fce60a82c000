"""Outgoing: what an engine says to clients, packed into messages, and the answers that are kept until confirmed.

Knows nothing about the log.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from stream_mmrnn.core.errors import BadTick, Busy, DuplicateSession, Evicted, SessionError, UnknownSession
from stream_mmrnn.core.types import ModelSpec
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.cluster.frames import MOST_ROWS, Answers, PredColumns, Said, write_answers
from stream_mmrnn.serve.cluster.places import Place, Places
from stream_mmrnn.serve.cluster.stepped import Stepped

_MOST_BYTES = 384 << 10
"""Of a message to a client, unless one session alone has more to say."""


class Entry(NamedTuple):
    """Answers of one message: predictions, and what is said after them."""

    preds: PredColumns | None
    said: tuple[Said, ...]

    @property
    def size(self) -> int:
        rows = 0 if self.preds is None else sum(map(len, self.preds.heads)) + 64 * len(self.preds.sessions)
        return rows + sum(len(said.content) + 64 for said in self.said)


class Outgoing:
    """Answers by client, in order."""

    def __init__(self, spec: ModelSpec, places: Places, counts: Counter[str]) -> None:
        """Counts `kept` (answers that were sent again) and `refused`."""
        self._places, self._counts = places, counts
        self.engines = 1
        """How many engines there are, which clients are told."""
        row_bytes = sum(4 * h.size for h in spec.heads) + 16 * len(spec.modalities) + 128
        self.most_rows = max(min(MOST_ROWS, _MOST_BYTES // row_bytes), 1)
        """Answers in one message to a client."""
        self._out: dict[str, list[Entry]] = {}

    def kept(self, client: str, place: Place, after: int) -> PredColumns | None:
        """Answers to ticks after this one that have not been confirmed: the last ones, and the others are sent."""
        rows = [(index, kept) for index, kept in place.kept.items() if index > after]
        self._counts["kept"] += len(rows)
        some = [rows[at : at + self.most_rows] for at in range(0, len(rows), self.most_rows)]
        found = [Stepped.of_rows([place.name] * len(part), part) for part in some]
        for columns in found[:-1]:
            self.send(client, Entry(columns, ()))
        return found[-1] if found else None

    def send_kept(self, place: Place, after: int) -> None:
        if place.owner and (kept := self.kept(place.owner, place, after)) is not None:
            self.send(place.owner, Entry(kept, ()))

    def send(self, client: str, entry: Entry) -> None:
        self._out.setdefault(client, []).append(entry)

    def say(self, client: str, session: str, number: int, tick: int, reply: protocol.Reply) -> None:
        self.send(client, Entry(None, (Said(session, number, tick, protocol.encode(reply)),)))

    def refuse(self, client: str, error: SessionError, session: str, tick: int, number: int = -1) -> None:
        self._counts["refused"] += 1
        reply = _refusal(error, session, tick)
        if isinstance(reply, protocol.BusyNow):
            # an engine that is no owner any more, and does not know it, must not say that it has no room
            piece = self._places.piece_of(session)
            if piece is not None:
                piece.promise(client, Said(session, number, tick, protocol.encode(reply)), None)
            return
        self.say(client, session, number, tick, reply)

    def released(self, promised: Iterable[tuple[str, Said, Place | None]]) -> None:
        """These replies may be said: the states are saved."""
        for client, said, place in promised:
            if place is not None:
                place.promised.discard((client, said.number))
            self.send(client, Entry(None, (said,)))

    def pop(self) -> list[tuple[str, bytes]]:
        """New answers since the last call: client and content."""
        out, self._out = self._out, {}
        found = []
        for client, entries in out.items():
            preds, said, size = list[PredColumns](), list[Said](), 0
            for entry in entries:
                if size + entry.size > _MOST_BYTES and size:
                    found.append((client, write_answers(Answers(self.engines, tuple(preds), tuple(said)))))
                    preds, said, size = [], [], 0
                if entry.preds is not None:
                    preds.append(entry.preds)
                said += entry.said
                size += entry.size
            found.append((client, write_answers(Answers(self.engines, tuple(preds), tuple(said)))))
        return found


def _refusal(error: SessionError, session: str, tick: int) -> protocol.BusyNow | protocol.Refused:
    if isinstance(error, Busy):
        return protocol.BusyNow(session=session, why=str(error), retry_s=error.retry_after_s)
    kinds = {UnknownSession: "unknown", DuplicateSession: "duplicate", Evicted: "evicted", BadTick: "bad_tick"}
    name = kinds.get(type(error), "failed")
    return protocol.Refused(error=name, why=str(error), session=session, tick=tick)  # type: ignore[arg-type]
