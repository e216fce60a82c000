"""ShardedEngine: one engine over several processes, for when one core is not enough. Same methods as StepEngine.

Each process (shard) has a part of the slots and runs the graph. Features and heads are in shared memory; a pipe carries
the commands. Threads do not help: two processes with one thread step twice as much, one process with two does not.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import msgspec
import numpy as np

from stream_mmrnn.core import config
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import Busy, DuplicateSession, ProcessError, ShardDied, UnknownSession, UsageError
from stream_mmrnn.core.types import Prediction, Tick
from stream_mmrnn.graph.runtime import Array, Graph, Provider
from stream_mmrnn.predict.arena import Arena
from stream_mmrnn.predict.columns import Columns, rounds
from stream_mmrnn.predict.contract import Contract, contract_of
from stream_mmrnn.predict.cpu_batches import Rows, Shapes
from stream_mmrnn.predict.engine import StepEngine, make_rows

_START_TIMEOUT_S = 30.0
_STEP, _READ, _WRITE, _WARM, _STOP = b"s", b"r", b"w", b"p", b"q"


def _layout(contract: Contract, count: int) -> Shapes:
    """The columns of `count` ticks in shared memory, by the graph's names (and `slots`, `fresh`)."""
    spec, wiring = contract.spec, contract.wiring
    modalities = len(spec.modalities)
    f4 = np.dtype(np.float32)
    columns: Shapes = {
        "slots": ((count,), np.dtype(np.int64)),
        "fresh": ((count,), np.dtype(np.bool_)),
        **{wiring.inputs[m.name]: ((count, m.size), f4) for m in spec.modalities},
        **{wiring.heads[h.name]: ((count, h.size), f4) for h in spec.heads},
    }
    for name in (wiring.present, wiring.age):
        if name:
            columns[name] = ((count, modalities), f4)
    return columns


class _Block:
    """Columns of ticks in shared memory."""

    def __init__(self, contract: Contract, count: int, name: str | None = None) -> None:
        layout = _layout(contract, count)
        sizes = {k: -(-int(np.prod(shape)) * dtype.itemsize // 64) * 64 for k, (shape, dtype) in layout.items()}
        self.memory = SharedMemory(name, create=name is None, size=max(sum(sizes.values()), 64))
        self.columns: dict[str, Array] = {}
        at = 0
        for key, (shape, dtype) in layout.items():
            self.columns[key] = np.ndarray(shape, dtype, self.memory.buf, at)
            at += sizes[key]

    def close(self, unlink: bool) -> None:
        self.columns.clear()
        with contextlib.suppress(BufferError):
            self.memory.close()
        if unlink:
            self.memory.unlink()


def _serve(path: Path, slots: int, provider: Provider, batch: int, memory: str, pipe: Connection) -> None:
    """Main function of a shard's process: it knows slots, not sessions."""
    contract, rows = make_rows(Graph(path, provider), slots, batch)
    block = _Block(contract, slots, memory)
    columns, wiring = block.columns, contract.wiring
    inputs = [*wiring.inputs.values(), *(n for n in (wiring.present, wiring.age) if n)]
    pipe.send_bytes(msgspec.msgpack.encode({n: (s, d.str) for n, (s, d) in rows.shapes.items()}))
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, OSError):
            break
        command, rest = message[:1], message[1:]
        if command == _STEP:
            _step(rows, columns, inputs, list(wiring.heads.values()), int.from_bytes(rest, "little"))
            pipe.send_bytes(b"")
        elif command == _WARM:
            rows.prewarm()
        elif command == _READ:
            state = rows.read(int.from_bytes(rest, "little"))
            pipe.send_bytes(msgspec.msgpack.encode({n: a.tobytes() for n, a in state.items()}))
        elif command == _WRITE:
            slot, raw = msgspec.msgpack.decode(rest, type=tuple[int, dict[str, bytes]])
            rows.write(slot, {n: np.frombuffer(raw[n], d).reshape(s) for n, (s, d) in rows.shapes.items()})
            pipe.send_bytes(b"")
        else:
            break
    block.close(unlink=False)


def _step(rows: Rows, columns: dict[str, Array], inputs: Sequence[str], heads: Sequence[str], count: int) -> None:
    for start in range(0, count, rows.batch):
        part = slice(start, min(start + rows.batch, count))
        size = part.stop - start
        bucket = rows.bucket(size)
        for name in inputs:
            bucket.inputs[name][:size] = columns[name][part]
        bucket.run(columns["slots"][part], columns["fresh"][part], size)
        for name in heads:
            columns[name][part] = bucket.outputs[name][:size]


class _Shard:
    """The parent's proxy of one shard process; implements `States` for its arena through the pipe."""

    def __init__(self, path: Path, contract: Contract, slots: int, provider: Provider, batch: int) -> None:
        self.block = _Block(contract, slots)
        self._arguments = (path, slots, provider, batch, self.block.memory.name)
        self.arena = Arena(self, slots)
        self._shapes: Shapes = {}
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(*self._arguments, theirs), name="stream-mmrnn-shard", daemon=True
        )
        self._process.start()
        theirs.close()

    def start_again(self) -> tuple[str, ...]:
        """Replace a process that has died or does not answer; returns the sessions that lost their state.

        Raises:
            ProcessError: the new process does not start.

        """
        self._process.kill()
        self._process.join()
        self._pipe.close()
        self._start()
        self.wait()
        self.arena.fresh[:] = True
        return tuple(self.arena.sessions)

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    def wait(self) -> None:
        """Wait until it has loaded the model; raises ProcessError on timeout or if it died."""
        if not self._pipe.poll(_START_TIMEOUT_S):
            raise ProcessError(f"a shard of the engine did not load its model within {_START_TIMEOUT_S:g} s")
        shapes = msgspec.msgpack.decode(self._answer(), type=dict[str, tuple[tuple[int, ...], str]])
        self._shapes = {name: (shape, np.dtype(kind)) for name, (shape, kind) in shapes.items()}

    def _answer(self) -> bytes:
        try:
            return self._pipe.recv_bytes()
        except (EOFError, OSError) as e:
            raise ProcessError(f"a shard of the engine (process {self.pid}) has died") from e

    def _tell(self, message: bytes) -> None:
        try:
            self._pipe.send_bytes(message)
        except OSError as e:
            raise ProcessError(f"a shard of the engine (process {self.pid}) has died") from e

    def begin(self, count: int) -> None:
        self._tell(_STEP + count.to_bytes(4, "little"))

    def end(self) -> None:
        self._answer()

    def prewarm(self) -> None:
        self._tell(_WARM)

    def read(self, slot: int) -> dict[str, Array]:
        self._tell(_READ + slot.to_bytes(4, "little"))
        raw = msgspec.msgpack.decode(self._answer(), type=dict[str, bytes])
        return {n: np.frombuffer(raw[n], dtype).reshape(shape).copy() for n, (shape, dtype) in self._shapes.items()}

    def write(self, slot: int, state: dict[str, Array]) -> None:
        self._tell(_WRITE + msgspec.msgpack.encode((slot, {n: state[n].tobytes() for n in self._shapes})))
        self._answer()

    @property
    def shapes(self) -> Shapes:
        return self._shapes

    def stop(self) -> None:
        with contextlib.suppress(ProcessError):
            self._tell(_STOP)
        self._process.join(2.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._pipe.close()
        self.block.close(unlink=True)


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
        self._shards = [_Shard(path, contract, share, provider, batch) for _ in range(processes)]
        self._of: dict[str, _Shard] = {}
        try:
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

    def _shard(self, session: str) -> _Shard:
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
    def _mended(self, shard: _Shard) -> Iterator[None]:
        """If the process turns out to be dead, restart it and raise an error that names the lost states."""
        try:
            yield
        except ProcessError as e:
            raise self._mend([shard], e) from e

    @staticmethod
    def _mend(dead: Sequence[_Shard], cause: ProcessError) -> ShardDied:
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

    def _round(self, ticks: Sequence[Tick], shards: Sequence[_Shard]) -> list[Prediction]:
        start_ns = now_ns()
        places: dict[int, list[int]] = {}
        for i, shard in enumerate(shards):
            places.setdefault(id(shard), []).append(i)
        busy = [(shard, places[id(shard)]) for shard in self._shards if id(shard) in places]
        dead: dict[int, tuple[_Shard, ProcessError]] = {}
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

    def _fill(self, shard: _Shard, ticks: Sequence[Tick]) -> None:
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


def create(settings: config.Engine) -> StepEngine | ShardedEngine:
    """The engine for these settings: sharded if `processes` is above 1."""
    path = config.find_model(settings.model)
    if settings.processes > 1:
        return ShardedEngine(path, settings.slots, settings.provider, settings.processes, settings.batch)
    return StepEngine(path, settings.slots, settings.provider, settings.batch)
