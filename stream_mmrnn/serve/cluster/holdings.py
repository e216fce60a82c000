"""Holdings: the pieces that an engine serves: it takes partitions over, gives them back, saves their states, and
notices when another engine has them.

The table of leases says whose a partition is, and which piece of the bucket has its states. Whoever takes partitions
over seals that piece first, so that the server refuses every later write of the former owner; then it writes a piece of
its own, names it in the table, and serves. At each moment the piece that the table names has all that was promised to
clients, and the log has the rest. Knows nothing about heartbeats, clients or what is in frames.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any, TypeAlias

from msgspec.structs import replace

from stream_mmrnn.core.clock import RateLimiter, now_ns
from stream_mmrnn.core.errors import SessionError, SnapshotError
from stream_mmrnn.serve.cluster import pieces
from stream_mmrnn.serve.cluster.log_reader import LogReader
from stream_mmrnn.serve.cluster.membership import is_lost, plan
from stream_mmrnn.serve.cluster.nats import FAILURES, Link
from stream_mmrnn.serve.cluster.places import Piece, Promised
from stream_mmrnn.serve.cluster.receipts import WriteRefused
from stream_mmrnn.serve.cluster.replica import Replica
from stream_mmrnn.serve.cluster.subjects import STATE_EVERY_S, Beat, Lease, Table, read_table

MOST = 64
"""Partitions of a piece, at most: an engine's states are written piece by piece."""
_APART_S = 0.005
"""Between the beginnings of two writes, so that no step waits for several."""
_RETRY_S = 0.05
Start: TypeAlias = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]


class Holdings:
    """One engine's."""

    def __init__(
        self,
        link: Link,
        replica: Replica,
        reader: LogReader,
        me: str,
        counts: Counter[str],
        start: Start,
        say: Callable[[str], None],
        wake: Callable[[], None],
        send_answers: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        """`start` runs a task; `wake` is called when replies may be said. `send_answers` is awaited before states are
        written: the server then has the answers of all that is in them. Into `counts` go `taken`, `given_back` and
        `fenced` partitions, `refused` writes, `kept` states, `damaged` ones, and `tables` that were written anew.
        """
        self._link, self._replica, self._reader, self._me = link, replica, reader, me
        self._counts, self._start, self._say, self._wake = counts, start, say, wake
        self._send_answers = send_answers
        self._partitions = replica.places.partitions
        self._refresh_s = min(replica.settings.ttl_s / 4, 600.0)
        self._rate_limiter = RateLimiter()
        self.pieces: dict[str, Piece] = {}
        self.parts: set[int] = set()
        """Partitions that we serve."""
        self._taking: set[int] = set()
        self._giving: set[int] = set()
        self._held: Counter[str] = Counter()
        """Pieces of which parts are being given away: the table still names them for those, so that they must not be
        written without them."""
        self._table: tuple[Table | None, int] | None = None
        self._decided: object = None
        """By what nothing was left to do."""
        self._names = count()
        self._save_s = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether partitions are served, or are on their way."""
        return bool(self.parts or self._taking or self._giving)

    # ---- the table -----------------------------------------------------------------------------------------------

    def look_again(self) -> None:
        """Read the table at the next `share`."""
        self._table = None

    def saw_table(self, raw: bytes, revision: int) -> None:
        """The table was stored."""
        self._know(read_table(raw, self._partitions), revision)

    def _know(self, table: Table | None, revision: int) -> tuple[Table | None, int]:
        """The newest table that is known: what is watched may come before the reply to an earlier request."""
        if self._table is None or revision >= self._table[1]:
            self._table = table, revision
        return self._table

    async def read_table(self) -> tuple[Table, int]:
        """The table as it is stored; where it cannot be read, it is written anew. Raises WriteRefused."""
        table, revision = self._know(*await self._link.table(self._partitions))
        if table is None:
            # every owner has a piece with the epochs of its leases, so that it loses nothing
            table = await self._table_of_pieces()
            if table.leases:
                revision = await self._link.replace_table(table, revision)
                self._know(table, revision)
                self._counts["tables"] += 1
                if self._rate_limiter("table", now_ns()):
                    self._say("the cluster's table of leases could not be read; it was written anew")
        return table, revision

    async def _table_of_pieces(self) -> Table:
        newest: dict[int, tuple[int, int, Lease]] = {}
        for name in await self._link.piece_names():
            raw, _ = await self._link.piece(name)
            try:
                content = pieces.read(raw)
            except SnapshotError:
                continue
            engine = "" if pieces.is_sealed(raw) else content.engine
            for number, epoch in content.epochs.items():
                found = epoch, content.position, Lease(engine, epoch, name)
                if number < self._partitions and (number not in newest or found[:2] > newest[number][:2]):
                    newest[number] = found
        return Table({number: lease for number, (_, _, lease) in sorted(newest.items())})

    async def share(self, alive: dict[str, Beat]) -> None:
        """Take and give back partitions as the table and the live engines ask for, and notice lost ones."""
        known = self._table
        try:
            if known is None or known[0] is None:
                table, revision = await self.read_table()
            else:
                table, revision = known[0], known[1]
            await self._share_by(table, revision, alive)
        except WriteRefused:
            self._table = None  # another engine was faster: read it again

    async def _share_by(self, table: Table, revision: int, alive: dict[str, Beat]) -> None:
        decided = (
            revision,
            tuple((name, beat.leaving) for name, beat in alive.items()),
            frozenset(self.parts),
            frozenset(self._taking),
            frozenset(self._giving),
        )
        if decided == self._decided:
            return
        for piece in list(self.pieces.values()):
            if self._held[piece.name]:
                continue  # we are about to write the table
            if any(is_lost(table, number, self._me, epoch) for number, epoch in piece.epochs.items()):
                self.lose(piece)
        ours = self.parts | self._giving  # what is being given back is ours until the table says otherwise
        take, give, release = plan(table, self._me, alive, ours, self._taking, self._giving, self._partitions)
        if take or release:
            cleared = {number: replace(table.leases[number], engine="") for number in release}
            table = Table({**table.leases, **take, **cleared})
            self._know(table, await self._link.replace_table(table, revision))
        if take:
            self._taking |= take.keys()
            self._start(self._acquire(take))
        if give:
            self._giving |= set(give)
            self._start(self._give_back(set(give)))
        if not (take or release or give):
            self._decided = decided

    async def _change_table(self, change: Callable[[Table], dict[int, Lease]]) -> Table:
        """Write leases that `change` makes of the newest table. Raises one of FAILURES."""
        while True:
            try:
                table, revision = await self.read_table()
                changed = change(table)
                if not changed:
                    return table
                table = Table({**table.leases, **changed})
                self._know(table, await self._link.replace_table(table, revision))
                return table
            except WriteRefused:
                continue

    # ---- taking over ---------------------------------------------------------------------------------------------

    async def _acquire(self, take: dict[int, Lease]) -> None:
        """Serve partitions whose leases are ours."""
        new: list[tuple[Piece, pieces.Content | None]] = []
        try:
            by_piece: dict[str, list[int]] = {}
            for number, lease in sorted(take.items()):
                by_piece.setdefault(lease.at, []).append(number)
            for at, numbers in by_piece.items():
                content = await self._seal(at)
                for begin in range(0, len(numbers), MOST):
                    some = numbers[begin : begin + MOST]
                    piece = Piece(
                        f"{self._me}-{next(self._names)}",
                        {number: take[number].epoch for number in some},
                        content.position if content is not None else 0,
                    )
                    mine = self._replica.places.content_for(piece, content)
                    piece.revision = await self._link.save_piece(piece.name, pieces.write(mine), 0)
                    new.append((piece, mine))
            at_of = {number: piece.name for piece, _ in new for number in piece.epochs}

            def named(table: Table) -> dict[int, Lease]:
                ours = (n for n, lease in take.items() if not is_lost(table, n, self._me, lease.epoch))
                return {n: replace(table.leases[n], at=at_of[n]) for n in ours}

            table = await self._change_table(named)
            for piece, content in new:
                for number in [n for n, epoch in piece.epochs.items() if is_lost(table, n, self._me, epoch)]:
                    del piece.epochs[number]
                self._serve(piece, content)
            await self._read_all()
            self._start(self._remove_unnamed(table, set(by_piece)))
        except FAILURES as e:
            self._say(f"{len(take)} partitions could not be taken ({e or type(e).__name__}); it is tried again")
        finally:
            self._taking -= take.keys()

    async def _seal(self, name: str) -> pieces.Content | None:
        """The states of a piece, which nobody changes any more; None where there are none."""
        while name:
            raw, revision = await self._link.piece(name)
            if not raw:
                return None
            if not pieces.is_sealed(raw):
                try:
                    await self._link.save_piece(name, pieces.sealed(raw), revision)
                except WriteRefused:
                    continue
            try:
                return pieces.read(raw)
            except SnapshotError as e:
                self._damaged(e)
                return None
        return None

    def _damaged(self, error: Exception) -> None:
        self._counts["damaged"] += 1
        if self._rate_limiter("damaged", now_ns()):
            self._say(f"states in the bucket count as none: {error}")

    def _serve(self, piece: Piece, content: pieces.Content | None) -> None:
        if not piece.epochs:
            return
        try:
            self._replica.adopt(piece, content, now_ns())
        except SessionError as e:
            self._damaged(e)
            self._replica.adopt(piece, None, now_ns())
        self.pieces[piece.name] = piece
        self.parts |= piece.epochs.keys()
        self._counts["taken"] += len(piece.epochs)

    async def _read_all(self) -> None:
        """Let the reader read for all our pieces, from where the one that is farthest behind is."""
        replica = self._replica
        replica.step(now_ns())
        for piece in self.pieces.values():
            # each has its own place; what it has handled is passed on to it again, and left out
            piece.after = max(piece.after, replica.position) if piece.read else piece.after
            piece.read = True
        after = min((piece.after for piece in self.pieces.values()), default=0)
        replica.position = after
        self._reader.change(self._link.names.log_of(self.parts, self._partitions), after)
        self._wake()
        with contextlib.suppress(*FAILURES):  # tried again: it is silent
            await self._reader.begin()

    async def _remove_unnamed(self, table: Table, names: set[str]) -> None:
        """Remove pieces that no lease names any more."""
        for name in names - {"", *(lease.at for lease in table.leases.values())}:
            with contextlib.suppress(*FAILURES):
                await self._link.remove_piece(name)

    # ---- giving back and losing ----------------------------------------------------------------------------------

    def lose(self, piece: Piece) -> None:
        """Another engine has partitions of this piece: drop it without writing."""
        if self.pieces.pop(piece.name, None) is None:
            return
        self._replica.step(now_ns())
        self._replica.places.drop(piece)
        self.parts -= piece.epochs.keys()
        self._giving -= piece.epochs.keys()
        self._counts["fenced"] += len(piece.epochs)
        self._decided = None

    async def _give_back(self, numbers: set[int]) -> None:
        """Stop to serve partitions, save their states as pieces of their own, and name those in the table."""
        replica = self._replica
        given: list[tuple[Piece, bytes, list[Promised]]] = []
        old: dict[int, Piece] = {}
        """By partition, the piece that it was in."""
        try:
            replica.step(now_ns())
            for piece in list(self.pieces.values()):
                some = numbers & piece.epochs.keys()
                if not some:
                    continue
                while piece.saving:
                    await asyncio.sleep(0.001)
                if not piece.ours:
                    continue
                replica.step(now_ns())
                part = replica.places.split(piece, some, f"{self._me}-{next(self._names)}", replica.position_of(piece))
                given.append((part, replica.places.to_bytes(part, part.after), part.promised))
                replica.places.drop(part)
                self.parts -= some
                old |= dict.fromkeys(some, piece)
                self._held[piece.name] += 1
                if not piece.epochs:
                    del self.pieces[piece.name]
            await self._send_answers()
            for part, raw, _ in given:
                await self._until_done(lambda part=part, raw=raw: self._link.save_piece(part.name, raw, 0))  # type: ignore[misc]
            at_of = {number: part for part, _, _ in given for number in part.epochs}

            def back(table: Table) -> dict[int, Lease]:
                ours = (n for n, part in at_of.items() if not is_lost(table, n, self._me, part.epochs[n]))
                return {n: Lease("", at_of[n].epochs[n], at_of[n].name) for n in ours}

            table = await self._until_done(lambda: self._change_table(back))
            for number, piece in old.items():
                if number in table.leases and table.leases[number].at == piece.name:
                    self.lose(piece)  # another engine has taken that over, and seals it: it must not change
            for piece in set(old.values()):
                self._held[piece.name] -= 1
            self._counts["given_back"] += len(at_of)
            for _, _, promised in given:
                replica.out.released(promised)
            self._wake()
            self._start(self._remove_unnamed(table, {piece.name for piece in old.values()}))
        finally:
            self._giving -= numbers
            self._decided = None

    @staticmethod
    async def _until_done(write: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        while True:
            try:
                return await write()
            except WriteRefused:
                return None  # it was stored, and only its receipt was lost: the name is ours alone
            except FAILURES:
                await asyncio.sleep(_RETRY_S)

    # ---- saving --------------------------------------------------------------------------------------------------

    def save_due(self, at_s: float) -> None:
        """Begin to write the states of a piece for which it is time, of one at most. Call it often."""
        if at_s - self._save_s < _APART_S:
            return
        for piece in sorted(self.pieces.values(), key=lambda of: of.saved_s):
            if piece.saving or self._held[piece.name]:
                continue
            since_s = at_s - piece.saved_s
            moved = piece.changed or self._replica.position_of(piece) > piece.position
            if piece.due or piece.promised or (moved and since_s > STATE_EVERY_S) or since_s > self._refresh_s:
                self._save_s = piece.saved_s = at_s
                self._begin_save(piece)
                return

    def _begin_save(self, piece: Piece) -> None:
        self._replica.step(now_ns())
        position = self._replica.position_of(piece)
        raw = self._replica.places.to_bytes(piece, position)
        promised, piece.promised = piece.promised, []
        piece.saving = True
        self._start(self._save(piece, raw, position, promised))

    async def _save(self, piece: Piece, raw: bytes, position: int, promised: list[Promised]) -> None:
        try:
            await self._send_answers()
            while piece.ours:
                try:
                    piece.revision = await self._link.save_piece(piece.name, raw, piece.revision)
                except WriteRefused:
                    stored = await self._stored(piece)
                    if stored is None:
                        await asyncio.sleep(_RETRY_S)
                        continue
                    if stored != raw:
                        self._counts["refused"] += 1
                        self.lose(piece)
                        return
                    # its receipt was lost
                except FAILURES:
                    await asyncio.sleep(_RETRY_S)
                    continue
                piece.position = position
                self._counts["kept"] += 1
                self._replica.out.released(promised)
                self._wake()
                return
        finally:
            piece.saving = False

    async def _stored(self, piece: Piece) -> bytes | None:
        """What is stored as this piece, and take its revision; None where the server does not say."""
        try:
            stored, piece.revision = await self._link.piece(piece.name)
        except FAILURES:
            return None
        return stored  # b"": whoever has its partitions has removed it
