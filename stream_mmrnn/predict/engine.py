"""StepEngine: ticks in, predictions out, one run of the graph for all sessions that have a tick.

Ready ticks are stepped immediately, in the order given; the engine never waits to fill a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from stream_mmrnn.core.block import Block, BlockPredictions, Integers, StateBlock
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import BadTick, ModelError, SessionError, StreamError
from stream_mmrnn.core.types import ModelSpec, Prediction, Tick
from stream_mmrnn.graph.runtime import Array, Graph, Provider, reason
from stream_mmrnn.predict.arena import Arena
from stream_mmrnn.predict.block_runner import BlockRunner, predictions_of
from stream_mmrnn.predict.columns import rounds
from stream_mmrnn.predict.contract import Contract, contract_of
from stream_mmrnn.predict.cpu_batches import HostRows, Rows
from stream_mmrnn.predict.device_batches import DeviceRows
from stream_mmrnn.predict.protocols import Engine

BATCH = {"cpu": 64, "cuda": 4096}
"""Default maximum rows of a run. On the CPU a row costs the same in 64 as in 256, and returns sooner."""
BUDGET = 0.25
"""Maximum duration of a run, as a fraction of the tick."""


def check_model(path: Path, provider: Provider) -> ModelSpec:
    """Load and check a model before anything else starts; raises ModelError or ProviderError."""
    return contract_of(Graph(path, provider)).spec


def move(session: str, source: Engine, target: Engine) -> None:
    """Move a session from one engine of a model to another, between two steps; its results stay bit-identical.

    Raises:
        UnknownSession: the source does not have it.
        Busy, DuplicateSession: the target cannot take it.
        SessionError: the engines have different models. After any error the session is still in the source.

    """
    if source.spec.sha256 != target.spec.sha256:
        raise SessionError(f"session {session!r} cannot move to an engine of another model")
    state = source.snapshot(session)
    target.open(session)
    try:
        target.restore(session, state)
    except StreamError:
        target.close(session)
        raise
    source.close(session)


def make_rows(graph: Graph, slots: int, batch: int = 0) -> tuple[Contract, Rows]:
    """The contract and the rows of a model with `slots` sessions; `batch` as for `StepEngine`."""
    contract = contract_of(graph)
    try:
        return contract, _rows_of(graph, contract, slots, batch)
    except StreamError:
        raise
    except Exception as e:  # onnxruntime and numpy raise many types if the file contradicts its contract
        raise ModelError(f"{graph.path} cannot be run as its contract says: {reason(e)}") from e


def _rows_of(graph: Graph, contract: Contract, slots: int, batch: int) -> Rows:
    most = batch or BATCH[graph.provider]
    if graph.provider == "cuda":
        device = DeviceRows(graph, contract, slots, most)
        device.capture()
        return device
    return HostRows(graph, contract, slots, most, round(BUDGET * contract.spec.tick_ns))


class StepEngine:
    """A recurrent model with a fixed number of slots; its state stays on the graph's device.

    On the CPU a session's results are bit-identical in a batch of any size with any other sessions.
    """

    def __init__(self, path: Path, slots: int = 1, provider: Provider = "cpu", batch: int = 0) -> None:
        """`batch`: maximum rows of one run; 0 is the provider's default, or less if a run would take too long.

        Raises:
            ModelError: the file is missing, damaged, or breaks its contract.
            ProviderError: `cuda` was asked for and is not active.

        """
        self.graph = graph = Graph(path, provider)
        contract, self._rows = make_rows(graph, slots, batch)
        self.spec = contract.spec
        self.provider = graph.provider
        self.batch = self._rows.batch
        self.arena = Arena(self._rows, slots)
        self._runner = runner = BlockRunner(self._rows, contract)
        self._columns, self._single = runner.columns, runner.single
        self._row, self._row_heads = runner.row, runner.row_heads
        self._last: Tick | None = None
        """The last single tick: `prewarm` writes it into the first row again."""

    def open(self, session: str) -> None:
        """Give a session a slot; raises Busy or DuplicateSession at once."""
        self.arena.acquire(session)

    def __contains__(self, session: str) -> bool:
        return session in self.arena

    def __len__(self) -> int:
        """How many sessions are open."""
        return len(self.arena)

    def reset(self, session: str) -> None:
        """Start a session from the initial state at its next step."""
        self.arena.reset(session)

    def close(self, session: str) -> None:
        self.arena.release(session)

    def snapshot(self, session: str) -> dict[str, Array]:
        """A copy of the session's state tensors, by name; empty before its first step. Raises UnknownSession."""
        return self.arena.snapshot(session)

    def restore(self, session: str, state: dict[str, Array]) -> None:
        """Continue from a snapshot; raises SessionError if it is not one of this model."""
        self.arena.restore(session, state)

    def handle(self, session: str) -> int:
        """The number by which blocks name an open session, the same until it is closed; raises UnknownSession."""
        return self.arena.slot(session)

    def snapshot_block(self, handles: Integers) -> StateBlock:
        """Copies of the states of these sessions, in their order; raises UnknownSession."""
        return self.arena.snapshot_block(handles)

    def restore_block(self, handles: Integers, states: StateBlock) -> None:
        """Put snapshots back, in the order of `handles`.

        Raises:
            UnknownSession: a handle belongs to no open session.
            SessionError: they are not snapshots of this model. After either error nothing was changed.

        """
        self.arena.restore_block(handles, states)

    def stop(self) -> None:
        """Nothing to do: the graph runs in this process."""

    def prewarm(self) -> None:
        """Run the graph on dummy rows: no state changes, but code and weights are in the CPU caches for the next step.

        The first run loads the caches. The second run, after rewriting the inputs, leaves them as in a hot loop
        (measured: docs/performance.md).
        """
        self._rows.prewarm()
        if self._last is not None:
            self._columns.fill_one(self._last, *self._row)
        self._rows.prewarm()

    def step_block(self, block: Block) -> BlockPredictions:
        """Step one tick of each of the block's sessions, in as few runs as possible.

        Absent features are zeros in the graph's inputs. The results are those of the same ticks in any other blocks or
        alone, bit for bit on the CPU. Whether the features are finite is for the caller to check.

        Raises:
            BadTick: the columns do not fit the model or each other, or a session occurs twice.
            UnknownSession: a handle belongs to no open session. After either error no tick was stepped.

        """
        if problem := block.fits(self._columns.sizes):
            raise BadTick(f"a block of {len(block)} ticks was refused: {problem}")
        self.arena.check(block.handles)
        return self._run(block)

    def step(self, ticks: Sequence[Tick]) -> list[Prediction]:
        """Predictions for the ticks, in their order, in as few runs as possible.

        Raises:
            UnknownSession: a tick of a session that is not open; no tick was stepped.

        """
        if len(ticks) == 1:
            return [self._run_one(ticks[0], self.arena.slot(ticks[0].session))]
        slots = [self.arena.slot(tick.session) for tick in ticks]
        if len(ticks) <= self.batch and len(set(slots)) == len(slots):
            return self._run_all(ticks, slots)
        out: dict[int, Prediction] = {}
        for places in rounds(slots, self.batch):
            if len(places) == 1:
                out[places[0]] = self._run_one(ticks[places[0]], slots[places[0]])
                continue
            some = self._run_all([ticks[i] for i in places], [slots[i] for i in places])
            out |= zip(places, some, strict=True)
        return [out[i] for i in range(len(ticks))]

    def _run_one(self, tick: Tick, slot: int) -> Prediction:
        """Fast path for one tick, the usual case of a live session: no slices, no arrays of length 1."""
        start_ns = now_ns()
        self._columns.fill_one(tick, *self._row)
        self._last = tick
        fresh = self.arena.fresh
        self._single.run_one(slot, fresh.item(slot))
        fresh[slot] = False
        heads = {name: values.copy() for name, values in self._row_heads}
        return Prediction(tick, heads, self.spec.sha256, start_ns, now_ns())

    def _run_all(self, ticks: Sequence[Tick], slots: Sequence[int]) -> list[Prediction]:
        """Step up to `batch` ticks of different sessions."""
        done = self._run(self._columns.block(ticks, slots))
        return predictions_of(ticks, done.heads, done.model, done.step_start_ns, done.step_end_ns)

    def _run(self, block: Block) -> BlockPredictions:
        """Step a block that was checked."""
        start_ns = now_ns()
        heads = {h.name: np.empty((len(block), h.size), np.float32) for h in self.spec.heads}
        self._runner.run(block, self.arena.fresh[block.handles], heads)
        self.arena.fresh[block.handles] = False
        return BlockPredictions(
            block.handles, block.indices, block.event_ns, heads, self.spec.sha256, start_ns, now_ns()
        )
