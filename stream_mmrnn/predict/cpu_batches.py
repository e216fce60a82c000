"""Rows on the CPU: runs of a graph over any rows of an arena of states, in a few fixed batch sizes (buckets).

The arena is an array: a run copies its rows out and back, or works in place if the rows are the first ones in order.
A bucket is used only if its results are bit-identical to those of the largest one, so a session's results never depend
on the other sessions of its batch. `device_batches` does the same for GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter_ns
from typing import Any, Protocol, TypeAlias

import numpy as np

from stream_mmrnn.core.errors import ModelError
from stream_mmrnn.graph.runtime import Array, Binding, Graph, reason
from stream_mmrnn.predict.contract import Contract

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192, 16384)
"""Bucket sizes. Above 1 they are even: integer kernels process rows in pairs, and an odd row gets other bits."""
_LEAST = 8
"""Minimum size of the largest bucket: engines of any size then compute the same bits for one row."""


Shapes: TypeAlias = dict[str, tuple[tuple[int, ...], np.dtype[Any]]]


class Bucket(Protocol):
    """A run of up to `size` rows: write the first rows of `inputs`, call `run`, read the first rows of `outputs`.

    Both are keyed by the graph's names; shapes are [size, ...].
    """

    size: int
    inputs: dict[str, Array]
    outputs: dict[str, Array]

    def run(self, slots: Array, fresh: Array, count: int) -> None:
        """Step the first `count` of `slots` (int64); those with `fresh` (bool) start from the initial state."""

    def run_one(self, slot: int, fresh: bool) -> None:
        """The same for one slot, in the first row."""


class States(Protocol):
    """Access to the states of slots: the part of `Rows` that an arena uses."""

    def read(self, slots: Array) -> dict[str, Array]:
        """Copies of the states of N slots, by name [N, ...]."""

    def write(self, slots: Array, states: Mapping[str, Array]) -> None:
        """Put the states of N slots back."""

    @property
    def shapes(self) -> Shapes:
        """Shape (without the slot axis) and dtype of each state."""


class Rows(States, Protocol):
    """The states of all slots, and buckets that step them: the part that an engine uses."""

    batch: int
    """Maximum rows of a run."""

    def bucket(self, count: int) -> Bucket:
        """The smallest bucket for `count` rows, 1 to `batch`."""

    def prewarm(self) -> None:
        """Run the graph once on dummy rows, so that code and weights are in the CPU caches."""


def sizes_for(batch: int) -> list[int]:
    """Bucket sizes for up to `batch` rows; the last is the smallest that holds them all."""
    last = next((s for s in SIZES if s >= batch), SIZES[-1])
    return [s for s in SIZES if s <= last]


def row_inputs(graph: Graph, contract: Contract) -> dict[str, tuple[int, ...]]:
    """Row shapes of the graph's inputs with one row per session; without states, constants and time axes."""
    spec, wiring = contract.spec, contract.wiring
    count = len(spec.modalities)
    shapes: dict[str, tuple[int, ...]] = {wiring.inputs[m.name]: (m.size,) for m in spec.modalities}
    for name, shape in ((wiring.present, (count,)), (wiring.age, (count,)), (wiring.active, ()), (wiring.reset, ())):
        if name:
            shapes[name] = shape
    return shapes


def with_time_axis(arrays: Mapping[str, Array], contract: Contract) -> dict[str, Array]:
    """The arrays as the graph takes them: those it declares as [rows, 1, size] get the time axis, as views."""
    return {n: a[:, None] if n in contract.wiring.timed else a for n, a in arrays.items()}


def _any_state(rng: np.random.Generator, like: Array) -> Array:
    """Random states to compare runs with. Integers are 0 or 1: the graph may use them as indices."""
    if like.dtype.kind == "f":
        return rng.standard_normal(like.shape).astype(like.dtype)
    return rng.integers(0, 2, like.shape).astype(like.dtype)


class HostRows:
    """The arena is a numpy array in host memory."""

    def __init__(self, graph: Graph, contract: Contract, slots: int, batch: int, budget_ns: int) -> None:
        """Buckets whose run takes longer than `budget_ns` are not used, except the smallest.

        Raises:
            ModelError: the graph cannot be run in batches.

        """
        self.graph, self.contract = graph, contract
        spec, wiring = contract.spec, contract.wiring
        wanted = sizes_for(max(min(batch, slots), 1))
        tried = sizes_for(max(wanted[-1], _LEAST))
        largest = tried[-1]
        self.arena: dict[str, Array] = {
            s.name: graph.zeros(wiring.states[s.name].input, (max(slots, largest), *s.shape)) for s in spec.states
        }
        self.inputs = {n: graph.zeros(n, (largest, *shape)) for n, shape in row_inputs(graph, contract).items()}
        self.outputs = {wiring.heads[h.name]: np.zeros((largest, h.size), np.float32) for h in spec.heads}
        self.constants = {n: graph.zeros(n, tuple(k or 1 for k in graph.inputs[n].shape)) for n in wiring.constants}
        for name, value in wiring.constants.items():
            self.constants[name][...] = value
        self.work: dict[str, Array] = {
            s.name: graph.zeros(wiring.states[s.name].input, (largest, *s.shape))
            for s in spec.states
            if not wiring.states[s.name].batch_axis
        }
        self.in_place = len(self.work) == len(spec.states)
        self.iota = np.arange(largest, dtype=np.int64)
        self.buckets = [HostBucket(self, size) for size in tried]
        self._choose(wanted[-1], budget_ns)

    def _choose(self, most: int, budget_ns: int) -> None:
        """Keep the needed buckets that are bit-identical to the largest one and within the budget."""
        try:
            cost_ns, same = self._probe()
        except ModelError:
            raise
        except Exception as e:  # onnxruntime raises a dozen types of its own
            raise ModelError(f"{self.graph.path} cannot be run in batches: {reason(e)}") from e
        if most == 1:
            same.add(1)  # with one row there is no other row to compare with
        good = [b for b in self.buckets if b.size in same]
        needed = next(b.size for b in good if b.size >= most)
        kept = [b for b in good if b.size <= needed]
        self.buckets = [b for b in kept if cost_ns[b.size] <= budget_ns] or kept[:1]
        self.batch = min(self.buckets[-1].size, most)
        self.cost_ns = {b.size: cost_ns[b.size] for b in self.buckets}

    def _probe(self) -> tuple[dict[int, int], set[int]]:
        """Run every bucket on the same rows: returns costs by size, and the sizes bit-identical to the largest."""
        rng = np.random.default_rng(0)
        for name, array in self.inputs.items():
            array[...] = name == self.contract.wiring.active if array.dtype == np.bool_ else rng.random(array.shape)
        if self.contract.wiring.present:
            self.inputs[self.contract.wiring.present].round(out=self.inputs[self.contract.wiring.present])
        state = {name: _any_state(rng, array) for name, array in self.arena.items()}
        reference: list[bytes] = []
        cost_ns: dict[int, int] = {}
        same: set[int] = set()
        for bucket in reversed(self.buckets):
            for _ in range(2):  # the first run of a size also allocates its memory
                bucket.load(state)
                began = perf_counter_ns()
                bucket.binding.run()
                cost_ns[bucket.size] = perf_counter_ns() - began
            reference = reference or bucket.result_bytes(self.buckets[-1].size)
            if bucket.result_bytes(bucket.size) == reference[: bucket.size]:
                same.add(bucket.size)
        for array in (*self.inputs.values(), *self.outputs.values(), *self.work.values()):
            array[...] = 0
        return cost_ns, same

    def bucket(self, count: int) -> HostBucket:
        for bucket in self.buckets:
            if bucket.size >= count:
                return bucket
        raise AssertionError(f"a run of {count} rows was asked for, {self.batch} are the most")

    def prewarm(self) -> None:
        self.buckets[0].binding.run()  # works on copies outside the arena: no session's state changes

    def read(self, slots: Array) -> dict[str, Array]:
        return {name: np.take(array, slots, 0) for name, array in self.arena.items()}

    def write(self, slots: Array, states: Mapping[str, Array]) -> None:
        for name, array in self.arena.items():
            array[slots] = states[name]

    @property
    def shapes(self) -> Shapes:
        return {name: (array.shape[1:], array.dtype) for name, array in self.arena.items()}


class HostBucket:
    """A binding to the first `size` rows of the shared arrays, and one to the first rows of the arena itself."""

    def __init__(self, rows: HostRows, size: int) -> None:
        self.size = size
        self.inputs = {n: a[:size] for n, a in rows.inputs.items()}
        self.outputs = {n: a[:size] for n, a in rows.outputs.items()}
        self._rows = rows
        wiring, graph = rows.contract.wiring, rows.graph
        self._active = self.inputs.get(wiring.active)
        self._reset = self.inputs.get(wiring.reset)
        self._pairs: list[tuple[Array, Array]] = []
        """(arena, work rows) of each state, both with the slot as first axis."""
        bound = {}
        for name, wires in wiring.states.items():
            if wires.batch_axis:
                shape = rows.arena[name].shape[1:]
                array = graph.zeros(wires.input, (*shape[: wires.batch_axis], size, *shape[wires.batch_axis :]))
            else:
                array = rows.work[name][:size]
            bound[wires.input] = (wires.output, array)
            self._pairs.append((rows.arena[name], np.moveaxis(array, wires.batch_axis, 0)))
        self._single = [(arena, work[0, ...]) for arena, work in self._pairs]  # `...`: a view of a scalar, too
        self._whole_alone = rows.in_place and (size == 1 or self._active is not None)
        self._alone = False
        """Whether the active mask is cleared already for all rows but the first."""
        self._bound_inputs = with_time_axis(self.inputs, rows.contract) | rows.constants
        self._bound_outputs = with_time_axis(self.outputs, rows.contract)
        self.binding = Binding(graph, self._bound_inputs, self._bound_outputs, bound)
        self._on_arena: Binding | None = None

    def load(self, state: dict[str, Array]) -> None:
        """Copy states into the work rows."""
        for value, (_, work) in zip(state.values(), self._pairs, strict=True):
            work[...] = value[: self.size]

    def result_bytes(self, count: int) -> list[bytes]:
        """The outputs and new states of each row, as bytes."""
        arrays = (*self.outputs.values(), *(work for _, work in self._pairs))
        return [b"".join(a[i].tobytes() for a in arrays) for i in range(count)]

    def run(self, slots: Array, fresh: Array, count: int) -> None:
        self._alone = False
        if self._active is not None:
            self._active[:count] = True
            self._active[count:] = False
        if self._reset is not None:
            self._reset[:count] = fresh[:count]
        if (
            self._rows.in_place
            and self._reset is not None
            and (count == self.size or self._active is not None)
            and (slots[:count] == self._rows.iota[:count]).all()
        ):
            self._first_rows().run()
            return
        for arena, work in self._pairs:
            if work.flags.c_contiguous:
                np.take(arena, slots[:count], 0, work[:count], "clip")  # "clip" writes into `out` without a buffer
            else:
                work[:count] = arena[slots[:count]]
        if self._reset is None:
            for _, work in self._pairs:
                work[:count][fresh[:count]] = 0
        self.binding.run()
        for arena, work in self._pairs:
            arena[slots[:count]] = work[:count]

    def run_one(self, slot: int, fresh: bool) -> None:
        if self._active is not None:
            self._active[0] = True
            if not self._alone:
                self._active[1:] = False
        self._alone = True
        if self._reset is not None:
            self._reset[0] = fresh
            if slot == 0 and self._whole_alone:
                self._first_rows().run()
                return
        for arena, row in self._single:
            row[...] = 0 if fresh and self._reset is None else arena[slot]
        self.binding.run()
        for arena, row in self._single:
            arena[slot] = row

    def _first_rows(self) -> Binding:
        if self._on_arena is None:
            wiring = self._rows.contract.wiring
            state = {w.input: (w.output, self._rows.arena[name][: self.size]) for name, w in wiring.states.items()}
            self._on_arena = Binding(self._rows.graph, self._bound_inputs, self._bound_outputs, state)
        return self._on_arena
