"""One process of a sharded engine, and its proxy in the parent.

Features and heads are in shared memory; a pipe carries the commands. The process knows slots, not sessions.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import msgspec
import numpy as np

from stream_mmrnn.core import signals
from stream_mmrnn.core.errors import ProcessError
from stream_mmrnn.graph.runtime import Array, Graph, Provider
from stream_mmrnn.predict.arena import Arena
from stream_mmrnn.predict.contract import Contract
from stream_mmrnn.predict.cpu_batches import Rows, Shapes
from stream_mmrnn.predict.engine import make_rows

_START_TIMEOUT_S = _ANSWER_TIMEOUT_S = 30.0
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


class SharedColumns:
    """Columns of ticks in shared memory."""

    def __init__(self, contract: Contract, count: int, name: str | None = None) -> None:
        layout = _layout(contract, count)
        sizes = {k: -(-int(np.prod(shape)) * dtype.itemsize // 64) * 64 for k, (shape, dtype) in layout.items()}
        size = max(sum(sizes.values()), 64)
        self.columns: dict[str, Array] = {}
        self.memory = SharedMemory(name, create=name is None, size=size)
        if name is None:
            self._reserve(size)
        at = 0
        for key, (shape, dtype) in layout.items():
            self.columns[key] = np.ndarray(shape, dtype, self.memory.buf, at)
            at += sizes[key]

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
        with contextlib.suppress(BufferError):
            self.memory.close()
        if unlink:
            self.memory.unlink()


def _serve(path: Path, slots: int, provider: Provider, batch: int, memory: str, pipe: Connection) -> None:
    """Main function of a shard's process: it knows slots, not sessions."""
    signals.ignore()  # the parent gets them, and tells this process
    contract, rows = make_rows(Graph(path, provider), slots, batch)
    block = SharedColumns(contract, slots, memory)
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


class Shard:
    """The parent's proxy of one shard process; implements `States` for its arena through the pipe."""

    def __init__(self, path: Path, contract: Contract, slots: int, provider: Provider, batch: int) -> None:
        signals.start_resource_tracker()
        self.block = SharedColumns(contract, slots)
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
