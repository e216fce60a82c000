"""One process of a sharded engine, and its proxy in the parent.

Blocks of ticks and heads are in shared memory; a pipe carries the commands. The process knows slots, not sessions.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from stream_mmrnn.core import signals
from stream_mmrnn.core.block import Block, Flags, Integers
from stream_mmrnn.core.errors import ProcessError
from stream_mmrnn.core.types import Tick
from stream_mmrnn.graph.runtime import Array, Graph, Provider
from stream_mmrnn.predict.arena import Arena
from stream_mmrnn.predict.block_runner import BlockRunner
from stream_mmrnn.predict.columns import Columns
from stream_mmrnn.predict.contract import Contract
from stream_mmrnn.predict.cpu_batches import Shapes
from stream_mmrnn.predict.engine import make_rows

_START_TIMEOUT_S = _ANSWER_TIMEOUT_S = 30.0
_STEP, _READ, _WRITE, _WARM, _STOP = b"s", b"r", b"w", b"p", b"q"


def _layout(contract: Contract, count: int) -> Shapes:
    """The columns of a block of `count` ticks in shared memory, and its heads; features and heads by position."""
    spec = contract.spec
    modalities = len(spec.modalities)
    f4 = np.dtype(np.float32)
    return {
        "slots": ((count,), np.dtype(np.int64)),
        "age_ns": ((count, modalities), np.dtype(np.int64)),
        "fresh": ((count,), np.dtype(np.bool_)),
        "present": ((count, modalities), np.dtype(np.bool_)),
        **{f"features {i}": ((count, m.size), f4) for i, m in enumerate(spec.modalities)},
        **{f"head {i}": ((count, h.size), f4) for i, h in enumerate(spec.heads)},
    }


class SharedColumns:
    """A block of ticks in shared memory: raw columns, without absent rows."""

    def __init__(self, contract: Contract, count: int, name: str | None = None) -> None:
        layout = _layout(contract, count)
        sizes = {k: -(-int(np.prod(shape)) * dtype.itemsize // 64) * 64 for k, (shape, dtype) in layout.items()}
        size = max(sum(sizes.values()), 64)
        self.columns: dict[str, Array] = {}
        self.heads: dict[str, Array] = {}
        self._features: list[Array] = []
        self.memory = SharedMemory(name, create=name is None, size=size)
        if name is None:
            self._reserve(size)
        at = 0
        for key, (shape, dtype) in layout.items():
            self.columns[key] = np.ndarray(shape, dtype, self.memory.buf, at)
            at += sizes[key]
        self.heads = {h.name: self.columns[f"head {i}"] for i, h in enumerate(contract.spec.heads)}
        self._features = [self.columns[f"features {i}"] for i in range(len(contract.spec.modalities))]
        self._columns = Columns(contract.spec.modalities, 0, self._features)

    def put(self, block: Block, fresh: Flags) -> bytes:
        """Write a block whose handles are slots; returns what `get` needs to know."""
        for place, vectors in zip(self._features, block.features, strict=True):
            _as(place, vectors.dtype)[: len(vectors)] = vectors
        return self._put_table(block, fresh)

    def put_ticks(self, ticks: Sequence[Tick], slots: Sequence[int], fresh: Flags) -> bytes:
        """The same for a tick of each of `slots`: their vectors are copied once."""
        return self._put_table(self._columns.block(ticks, slots), fresh)

    def _put_table(self, block: Block, fresh: Flags) -> bytes:
        columns, count = self.columns, len(block)
        columns["slots"][:count] = block.handles
        columns["age_ns"][:count] = block.age_ns
        columns["fresh"][:count] = fresh
        columns["present"][:count] = block.present
        return count.to_bytes(4, "little") + bytes(v.dtype.itemsize for v in block.features)

    def get(self, raw: bytes) -> tuple[Block, Flags]:
        """The block that `put` has written, as views; it has no times."""
        columns, count = self.columns, int.from_bytes(raw[:4], "little")
        present = columns["present"][:count]
        features = tuple(
            _as(place, np.dtype(f"f{size}"))[: np.count_nonzero(here)]
            for place, size, here in zip(self._features, raw[4:], present.T, strict=True)
        )
        slots = columns["slots"][:count]
        return Block(slots, slots, slots, present, columns["age_ns"][:count], features), columns["fresh"][:count]

    def _reserve(self, size: int) -> None:
        """Take the memory now: a write to what is not there kills the process. Raises ProcessError."""
        if not hasattr(os, "posix_fallocate"):
            return
        try:
            os.posix_fallocate(self.memory._fd, 0, size)  # type: ignore[attr-defined]
        except OSError as e:
            self.close(unlink=True)
            raise ProcessError(
                f"{size / 1e6:.1f} MB of shared memory for an engine of several processes cannot be taken: "
                f"{e.strerror}; free some space in /dev/shm, or set fewer slots"
            ) from e

    def close(self, unlink: bool) -> None:
        self.columns.clear()
        self.heads.clear()
        self._features.clear()
        with contextlib.suppress(BufferError):
            self.memory.close()
        if unlink:
            self.memory.unlink()


def _as(place: Array, dtype: np.dtype[Any]) -> Array:
    """The memory of float32 rows as rows of float32 or float16."""
    return place.reshape(-1).view(dtype)[: place.size].reshape(place.shape)


def _serve(path: Path, slots: int, provider: Provider, batch: int, memory: str, pipe: Connection) -> None:
    """Main function of a shard's process: it knows slots, not sessions."""
    signals.ignore()  # the parent gets them, and tells this process
    contract, rows = make_rows(Graph(path, provider), slots, batch)
    runner = BlockRunner(rows, contract)
    shared = SharedColumns(contract, slots, memory)
    pipe.send_bytes(msgspec.msgpack.encode({n: (s, d.str) for n, (s, d) in rows.shapes.items()}))
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, OSError):
            break
        command, rest = message[:1], message[1:]
        if command == _STEP:
            runner.run(*shared.get(rest), shared.heads)
            pipe.send_bytes(b"")
        elif command == _WARM:
            rows.prewarm()
        elif command == _READ:
            pipe.send_bytes(b"".join(a.tobytes() for a in rows.read(np.frombuffer(rest, np.int64)).values()))
        elif command == _WRITE:
            count = int.from_bytes(rest[:4], "little")
            places = np.frombuffer(rest, np.int64, count, 4)
            rows.write(places, _states(rest, 4 + places.nbytes, rows.shapes, count))
            pipe.send_bytes(b"")
        else:
            break
    shared.close(unlink=False)


def _states(raw: bytes, at: int, shapes: Shapes, count: int) -> dict[str, Array]:
    """The states of `count` slots, one after another in `raw` from `at` on, as views."""
    states = {}
    for name, (shape, dtype) in shapes.items():
        states[name] = np.frombuffer(raw, dtype, count * math.prod(shape), at).reshape(count, *shape)
        at += states[name].nbytes
    return states


class Shard:
    """The parent's proxy of one shard process; implements `States` for its arena through the pipe."""

    def __init__(self, path: Path, contract: Contract, slots: int, provider: Provider, batch: int) -> None:
        signals.start_resource_tracker()
        self.shared = SharedColumns(contract, slots)
        self._arguments = (path, slots, provider, batch, self.shared.memory.name)
        self.arena = Arena(self, slots)
        self._shapes: Shapes = {}
        self._stepping = 0
        """How many ticks the step has that was begun."""
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(*self._arguments, theirs), name="stream-mmrnn-shard", daemon=True
        )
        with signals.held():
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
            if not self._pipe.poll(_ANSWER_TIMEOUT_S):
                raise ProcessError(
                    f"a shard of the engine (process {self.pid}) did not answer within {_ANSWER_TIMEOUT_S:g} s"
                )
            return self._pipe.recv_bytes()
        except (EOFError, OSError) as e:
            raise ProcessError(f"a shard of the engine (process {self.pid}) has died") from e

    def _tell(self, message: bytes) -> None:
        try:
            self._pipe.send_bytes(message)
        except OSError as e:
            raise ProcessError(f"a shard of the engine (process {self.pid}) has died") from e

    def begin(self, block: Block) -> None:
        """Start a step of a block whose handles are slots of this shard."""
        self._begin(self.shared.put(block, self.arena.fresh[block.handles]), block.handles)

    def begin_ticks(self, ticks: Sequence[Tick], slots: list[int]) -> None:
        """Start a step of one tick of each of these slots."""
        self._begin(self.shared.put_ticks(ticks, slots, self.arena.fresh[slots]), slots)

    def _begin(self, message: bytes, slots: Integers | list[int]) -> None:
        self.arena.fresh[slots] = False
        self._stepping = len(slots)
        self._tell(_STEP + message)

    def end(self) -> dict[str, Array]:
        """Wait for the step; the heads, as views that hold until the next one."""
        self._answer()
        return {name: values[: self._stepping] for name, values in self.shared.heads.items()}

    def prewarm(self) -> None:
        self._tell(_WARM)

    def read(self, slots: Array) -> dict[str, Array]:
        self._tell(_READ + slots.astype(np.int64).tobytes())
        raw = self._answer()
        return {name: rows.copy() for name, rows in _states(raw, 0, self._shapes, len(slots)).items()}

    def write(self, slots: Array, states: Mapping[str, Array]) -> None:
        columns = (slots.astype(np.int64), *(states[name] for name in self._shapes))
        self._tell(_WRITE + len(slots).to_bytes(4, "little") + b"".join(a.tobytes() for a in columns))
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
        self.shared.close(unlink=True)
