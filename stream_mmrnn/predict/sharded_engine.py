"""ShardedEngine: one engine over several processes, for when one core is not enough. Same methods as StepEngine.

Each process (shard) has a part of the slots and runs the graph. Features and heads are in shared memory; a pipe carries
the commands. Threads do not help: two processes with one thread step twice as much, one process with two does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from stream_mmrnn.core import config
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import Busy, DuplicateSession, ProcessError, ShardDied, UnknownSession, UsageError
from stream_mmrnn.core.types import Prediction, Tick
from stream_mmrnn.graph.runtime import Array, Graph, Provider
from stream_mmrnn.predict.columns import Columns, rounds
from stream_mmrnn.predict.contract import contract_of
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.shard import Shard


class ShardedEngine:
    """`slots` sessions over `processes` processes; a session stays in its process."""

    def __init__(self, path: Path, slots: int, provider: Provider = "cpu", processes: int = 2, batch: int = 0) -> None:
        """Raises ModelError or ProviderError if the model cannot be served, ProcessError if a shard dies."""
        contract = contract_of(Graph(path))
        self.spec, self.provider = contract.spec, provider
        self._wiring = contract.wiring
        self._columns = Columns([m.name for m in self.spec.modalities], slots)
        share = -(-slots // processes)
        self.slots = slots
        self._shards: list[Shard] = []
        self._of: dict[str, Shard] = {}
        try:
            for _ in range(processes):
                self._shards.append(Shard(path, contract, share, provider, batch))
            for shard in self._shards:
                shard.wait()
        except ProcessError:
            self.stop()
            raise

    def __contains__(self, session: str) -> bool:
        return session in self._of

    def __len__(self) -> int:
        return len(self._of)

    @property
    def pids(self) -> list[int]:
        return [shard.pid for shard in self._shards]

    def open(self, session: str) -> None:
        """Give a session a slot in the process with the fewest sessions; raises Busy or DuplicateSession at once."""
        if session in self._of:
            raise DuplicateSession(f"session {session!r} is open already; close it, or take another name")
        if len(self._of) >= self.slots:
            raise Busy(f"all {self.slots} slots are taken; close a session, or raise engine.slots")
        shard = min(self._shards, key=lambda s: len(s.arena))
        shard.arena.acquire(session)
        self._of[session] = shard

    def _shard(self, session: str) -> Shard:
        try:
            return self._of[session]
        except KeyError:
            raise UnknownSession(f"session {session!r} is not open; open it first") from None

    def shard(self, session: str) -> int:
        """The index of the process that has a session."""
        return self._shards.index(self._shard(session))

    def move(self, session: str, shard: int) -> None:
        """Move a session to another process; its results stay bit-identical.

        Raises:
            UnknownSession: it is not open.
            UsageError: there is no such process.
            Busy: the process has no free slot; the session stays where it is.
            ShardDied: one of the two has died; the error names the sessions that lost their state.

        """
        if not 0 <= shard < len(self._shards):
            raise UsageError(f"there is no process {shard} of this engine; it has 0 to {len(self._shards) - 1}")
        here, there = self._shard(session), self._shards[shard]
        if here is there:
            return
        with self._mended(here):
            state = here.arena.snapshot(session)
        there.arena.acquire(session)
        try:
            there.arena.restore(session, state)
        except ProcessError as e:
            there.arena.release(session)
            raise self._mend([there], e) from e
        here.arena.release(session)
        self._of[session] = there

    @contextlib.contextmanager
    def _mended(self, shard: Shard) -> Iterator[None]:
        """If the process turns out to be dead, restart it and raise an error that names the lost states."""
        try:
            yield
        except ProcessError as e:
            raise self._mend([shard], e) from e

    @staticmethod
    def _mend(dead: Sequence[Shard], cause: ProcessError) -> ShardDied:
        """Restart dead processes; returns the error to raise. Raises ProcessError if a restart fails."""
        lost = tuple(session for shard in dead for session in shard.start_again())
        names = ", ".join(map(repr, lost[:5])) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        error = ShardDied(
            f"{cause}; it was started again, and the state of {len(lost)} sessions is lost ({names or 'none'}): "
            "restore their snapshots, or let them begin anew"
        )
        error.sessions = lost
        return error

    def reset(self, session: str) -> None:
        self._shard(session).arena.reset(session)

    def close(self, session: str) -> None:
        self._shard(session).arena.release(session)
        del self._of[session]

    def snapshot(self, session: str) -> dict[str, Array]:
        """A copy of the session's state tensors, by name; empty before its first step. Raises ShardDied."""
        shard = self._shard(session)
        with self._mended(shard):
            return shard.arena.snapshot(session)

    def restore(self, session: str, state: dict[str, Array]) -> None:
        """Put a snapshot back; raises SessionError if it is not one of this model, or ShardDied."""
        shard = self._shard(session)
        with self._mended(shard):
            shard.arena.restore(session, state)

    def prewarm(self) -> None:
        for shard in self._shards:
            with contextlib.suppress(ProcessError):  # the next step will raise it
                shard.prewarm()

    def step(self, ticks: Sequence[Tick]) -> list[Prediction]:
        """Predictions for the ticks, in their order; the processes work in parallel.

        Raises:
            UnknownSession: a tick of a session that is not open; no tick was stepped.
            ShardDied: a process has died and was replaced. The error holds the predictions of the other processes, and
                the sessions that lost their state.

        """
        shards = [self._shard(tick.session) for tick in ticks]
        out: list[Prediction] = []
        for start, end in rounds([tick.session for tick in ticks], len(ticks)):
            try:
                out += self._round(ticks[start:end], shards[start:end])
            except ShardDied as e:
                e.predictions = (*out, *e.predictions)
                raise
        return out

    def _round(self, ticks: Sequence[Tick], shards: Sequence[Shard]) -> list[Prediction]:
        start_ns = now_ns()
        places: dict[int, list[int]] = {}
        for i, shard in enumerate(shards):
            places.setdefault(id(shard), []).append(i)
        busy = [(shard, places[id(shard)]) for shard in self._shards if id(shard) in places]
        dead: dict[int, tuple[Shard, ProcessError]] = {}
        for shard, mine in busy:
            self._fill(shard, [ticks[i] for i in mine])
            try:
                shard.begin(len(mine))
            except ProcessError as e:
                dead[id(shard)] = shard, e
        heads: list[dict[str, Array] | None] = [None] * len(ticks)
        for shard, mine in busy:
            try:
                if id(shard) not in dead:
                    shard.end()
            except ProcessError as e:
                dead[id(shard)] = shard, e
            if id(shard) in dead:
                continue
            outputs = {n: shard.block.columns[output][: len(mine)].copy() for n, output in self._wiring.heads.items()}
            for row, i in enumerate(mine):
                heads[i] = {name: rows[row] for name, rows in outputs.items()}
        end_ns = now_ns()
        sha256 = self.spec.sha256
        made = [
            Prediction(tick, outputs, sha256, start_ns, end_ns)
            for tick, outputs in zip(ticks, heads, strict=True)
            if outputs is not None
        ]
        if dead:
            found = list(dead.values())
            error = self._mend([shard for shard, _ in found], found[0][1])
            error.predictions = tuple(made)
            raise error from found[0][1]
        return made

    def _fill(self, shard: Shard, ticks: Sequence[Tick]) -> None:
        columns, wiring, count = shard.block.columns, self._wiring, len(ticks)
        slots = [shard.arena.slot(tick.session) for tick in ticks]
        columns["slots"][:count] = slots
        columns["fresh"][:count] = shard.arena.fresh[slots]
        shard.arena.fresh[slots] = False
        self._columns.fill(
            ticks,
            [columns[wiring.inputs[m.name]] for m in self.spec.modalities],
            columns[wiring.present] if wiring.present else None,
            columns[wiring.age] if wiring.age else None,
        )

    def stop(self) -> None:
        """Stop the processes and free their shared memory."""
        for shard in self._shards:
            shard.stop()
        self._shards = []
        self._of.clear()


def create(settings: config.EngineSettings) -> StepEngine | ShardedEngine:
    """The engine for these settings: sharded if `processes` is above 1."""
    path = config.find_model(settings.model)
    if settings.processes > 1:
        return ShardedEngine(path, settings.slots, settings.provider, settings.processes, settings.batch)
    return StepEngine(path, settings.slots, settings.provider, settings.batch)
