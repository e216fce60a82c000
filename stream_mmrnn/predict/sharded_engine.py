"""ShardedEngine: one engine over several processes, for when one core is not enough. Same methods as StepEngine.

Each process (shard) has a part of the slots and runs the graph. Blocks and heads are in shared memory; a pipe carries
the commands. Threads do not help: two processes with one thread step twice as much, one process with two does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np

from stream_mmrnn.core import config
from stream_mmrnn.core.block import Block, BlockPredictions, Flags, Integers, StateBlock
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import BadTick, ProcessError, ShardDied, UsageError
from stream_mmrnn.core.settings import EngineSettings
from stream_mmrnn.core.types import Prediction, Tick
from stream_mmrnn.graph.runtime import Array, Graph, Provider
from stream_mmrnn.predict.arena import SlotTable, check_states
from stream_mmrnn.predict.block_runner import predictions_of
from stream_mmrnn.predict.columns import rounds
from stream_mmrnn.predict.contract import contract_of
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.shard import Shard

_Rows: TypeAlias = Flags | Integers | slice
_Part: TypeAlias = tuple[Shard, _Rows, Callable[[], None]]
"""A process, its rows of a step, and what begins its part of the step."""


class ShardedEngine:
    """`slots` sessions over `processes` processes; a session stays in its process."""

    def __init__(self, path: Path, slots: int, provider: Provider = "cpu", processes: int = 2, batch: int = 0) -> None:
        """Raises ModelError or ProviderError if the model cannot be served, ProcessError if a shard dies."""
        contract = contract_of(Graph(path))
        self.spec, self.provider = contract.spec, provider
        self._sizes = tuple(m.size for m in self.spec.modalities)
        share = -(-slots // processes)
        self.slots = slots
        self._shards: list[Shard] = []
        self._handles = SlotTable(slots)
        self._shard_of = np.zeros(slots, np.int64)
        """By handle: the index of the process that has the session."""
        self._slot_of = np.zeros(slots, np.int64)
        """By handle: the session's slot there."""
        try:
            for _ in range(processes):
                self._shards.append(Shard(path, contract, share, provider, batch))
            for shard in self._shards:
                shard.wait()
        except ProcessError:
            self.stop()
            raise

    def __contains__(self, session: str) -> bool:
        return session in self._handles

    def __len__(self) -> int:
        return len(self._handles)

    @property
    def pids(self) -> list[int]:
        return [shard.pid for shard in self._shards]

    def open(self, session: str) -> None:
        """Give a session a slot in the process with the fewest sessions; raises Busy or DuplicateSession at once."""
        handle = self._handles.acquire(session)
        index = min(range(len(self._shards)), key=lambda i: len(self._shards[i].arena))
        self._shard_of[handle], self._slot_of[handle] = index, self._shards[index].arena.acquire(session)

    def handle(self, session: str) -> int:
        """The number by which blocks name an open session, the same until it is closed; raises UnknownSession."""
        return self._handles.slot(session)

    def shard(self, session: str) -> int:
        """The index of the process that has a session."""
        return int(self._shard_of[self.handle(session)])

    def _shard(self, session: str) -> Shard:
        return self._shards[self.shard(session)]

    def move(self, session: str, shard: int) -> None:
        """Move a session to another process; its handle stays, and its results stay bit-identical.

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
        slot = there.arena.acquire(session)
        try:
            there.arena.restore(session, state)
        except ProcessError as e:
            there.arena.release(session)
            raise self._mend([(there, e)]) from e
        here.arena.release(session)
        handle = self.handle(session)
        self._shard_of[handle], self._slot_of[handle] = shard, slot

    @contextlib.contextmanager
    def _mended(self, shard: Shard) -> Iterator[None]:
        """If the process turns out to be dead, restart it and raise an error that names the lost states."""
        try:
            yield
        except ProcessError as e:
            raise self._mend([(shard, e)]) from e

    @staticmethod
    def _mend(dead: Sequence[tuple[Shard, ProcessError]]) -> ShardDied:
        """Restart dead processes; returns the error to raise. Raises ProcessError if a restart fails."""
        lost = tuple(session for shard, _ in dead for session in shard.start_again())
        names = ", ".join(map(repr, lost[:5])) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        error = ShardDied(
            f"{dead[0][1]}; it was started again, and the state of {len(lost)} sessions is lost ({names or 'none'}): "
            "restore their snapshots, or let them begin anew"
        )
        error.sessions = lost
        return error

    def reset(self, session: str) -> None:
        self._shard(session).arena.reset(session)

    def close(self, session: str) -> None:
        self._shard(session).arena.release(session)
        self._handles.release(session)

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

    def snapshot_block(self, handles: Integers) -> StateBlock:
        """Copies of the states of these sessions, in their order; raises UnknownSession or ShardDied."""
        self._handles.check(handles)
        count = len(handles)
        shapes = self._shards[0].shapes
        states = {name: np.empty((count, *shape), dtype) for name, (shape, dtype) in shapes.items()}
        block = StateBlock(np.zeros(count, np.bool_), states)
        for shard, rows in self._rows_of(handles):
            with self._mended(shard):
                part = shard.arena.snapshot_block(self._slot_of[handles[rows]])
            block.fresh[rows] = part.fresh
            for name, values in part.states.items():
                states[name][rows] = values
        return block

    def restore_block(self, handles: Integers, states: StateBlock) -> None:
        """Put snapshots back, in the order of `handles`.

        Raises:
            UnknownSession: a handle belongs to no open session.
            SessionError: they are not snapshots of this model. After either error nothing was changed.
            ShardDied: a process has died; the error names the sessions that lost their state.

        """
        self._handles.check(handles)
        check_states(states, len(handles), self._shards[0].shapes)
        for shard, rows in self._rows_of(handles):
            part = StateBlock(states.fresh[rows], {name: values[rows] for name, values in states.states.items()})
            with self._mended(shard):
                shard.arena.restore_block(self._slot_of[handles[rows]], part)

    def _rows_of(self, handles: Integers) -> Iterator[tuple[Shard, Flags]]:
        """The processes that have some of these sessions, and which ones [N]."""
        places = self._shard_of[handles]
        for i, shard in enumerate(self._shards):
            rows = places == i
            if rows.any():
                yield shard, rows

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
        handles = [self.handle(tick.session) for tick in ticks]
        out: dict[int, Prediction] = {}
        for places in rounds(handles, max(len(ticks), 1)):
            some, here = [ticks[i] for i in places], np.array([handles[i] for i in places])
            shards, slots = self._shard_of[here].tolist(), self._slot_of[here].tolist()
            rows_of: dict[int, list[int]] = {}
            for row, shard in enumerate(shards):
                rows_of.setdefault(shard, []).append(row)
            parts: list[_Part] = []
            for shard, rows in rows_of.items():
                mine, theirs = [some[row] for row in rows], [slots[row] for row in rows]
                begin = partial(self._shards[shard].begin_ticks, mine, theirs)
                parts.append((self._shards[shard], np.array(rows) if len(rows_of) > 1 else slice(None), begin))
            start_ns = now_ns()
            heads, stepped, dead = self._run(len(some), parts)
            made = predictions_of(some, heads, self.spec.sha256, start_ns, now_ns())
            if not dead and len(made) == len(ticks):
                return made
            out |= {i: p for i, p, good in zip(places, made, stepped.tolist(), strict=True) if good}
            if dead:
                error = self._mend(dead)
                error.predictions = tuple(out[i] for i in sorted(out))
                raise error from dead[0][1]
        return [out[i] for i in range(len(ticks))]

    def step_block(self, block: Block) -> BlockPredictions:
        """Step one tick of each of the block's sessions; the processes work in parallel.

        Raises:
            BadTick: the columns do not fit the model or each other, or a session occurs twice.
            UnknownSession: a handle belongs to no open session. After either error no tick was stepped.
            ShardDied: a process has died and was replaced. The error holds the block of the other processes'
                predictions, and the sessions that lost their state.

        """
        if problem := block.fits(self._sizes):
            raise BadTick(f"a block of {len(block)} ticks was refused: {problem}")
        self._handles.check(block.handles)
        start_ns = now_ns()
        parts: list[_Part] = []
        for shard, rows in self._rows_of(block.handles):
            part = block.take(rows)
            part = msgspec.structs.replace(part, handles=self._slot_of[part.handles])
            parts.append((shard, rows, partial(shard.begin, part)))
        heads, stepped, dead = self._run(len(block), parts)
        done = BlockPredictions(
            block.handles, block.indices, block.event_ns, heads, self.spec.sha256, start_ns, now_ns()
        )
        if dead:
            error = self._mend(dead)
            error.block = done.take(stepped)
            raise error from dead[0][1]
        return done

    def _run(
        self, count: int, parts: Sequence[_Part]
    ) -> tuple[dict[str, Array], Flags, list[tuple[Shard, ProcessError]]]:
        """Begin all parts, then wait for all.

        Returns the heads by name [count, size], which rows were stepped, and the processes that have died.
        """
        dead: list[tuple[Shard, ProcessError]] = []
        stepping: list[tuple[Shard, _Rows]] = []
        for shard, rows, begin in parts:
            try:
                begin()
            except ProcessError as e:
                dead.append((shard, e))
            else:
                stepping.append((shard, rows))
        heads = {h.name: np.empty((count, h.size), np.float32) for h in self.spec.heads}
        stepped = np.zeros(count, np.bool_)
        for shard, rows in stepping:
            try:
                for name, values in shard.end().items():
                    heads[name][rows] = values
            except ProcessError as e:
                dead.append((shard, e))
            else:
                stepped[rows] = True
        return heads, stepped, dead

    def stop(self) -> None:
        """Stop the processes and free their shared memory."""
        for shard in self._shards:
            shard.stop()
        self._shards = []
        self._handles = SlotTable(self.slots)


def create(settings: EngineSettings) -> StepEngine | ShardedEngine:
    """The engine for these settings: sharded if `processes` is above 1."""
    path = config.find_model(settings.model)
    if settings.processes > 1:
        return ShardedEngine(path, settings.slots, settings.provider, settings.processes, settings.batch)
    return StepEngine(path, settings.slots, settings.provider, settings.batch)
