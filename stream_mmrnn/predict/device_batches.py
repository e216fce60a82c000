"""DeviceRows: runs over rows of an arena in the device's memory; the graph itself gathers and scatters the rows.

Buckets have fixed shapes and addresses, which CUDA graphs need. A bucket's inputs lie beside each other in page-locked
memory of the host: what is filled in crosses in one copy, and the outputs in one back (`runtime.DeviceBinding`). It
also runs on the CPU, where tests compare it with `HostRows`. Use it only from the thread that made it: with CUDA
graphs, steps from another thread were seen to go wrong (H100, onnxruntime 1.31).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np

from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.graph import gather_scatter as onnx_rows
from stream_mmrnn.graph.runtime import Array, DeviceBinding, DeviceTensor, Graph
from stream_mmrnn.predict.contract import Contract
from stream_mmrnn.predict.cpu_batches import Shapes, row_inputs, sizes_for


class DeviceRows:
    """The arena is in the device's memory; one extra row takes the writes of dummy rows."""

    def __init__(
        self,
        graph: Graph,
        contract: Contract,
        slots: int,
        batch: int,
        *,
        cuda_graphs: bool = True,
        scatter: onnx_rows.Scatter | None = None,
    ) -> None:
        """`graph`: the original file; it is loaded again with its states in an arena. `scatter`: None selects the best
        kind for the device.
        """
        wiring = contract.wiring
        carried = {
            wiring.states[s.name].input: onnx_rows.Carried(
                wiring.states[s.name].output, s.shape, wiring.states[s.name].batch_axis
            )
            for s in contract.spec.states
        }
        self.contract, self.scratch = contract, slots
        cuda_graphs = cuda_graphs and graph.provider == "cuda"
        data = onnx_rows.with_arena(
            graph.data, carried, scatter or ("elements" if graph.provider == "cuda" else "rows")
        )
        self.graph = Graph(graph.path, graph.provider, data=data, cuda_graph=cuda_graphs)
        self.arena = {
            s.name: DeviceTensor(self.graph, onnx_rows.arena_name(wiring.states[s.name].input), (slots + 1, *s.shape))
            for s in contract.spec.states
        }
        self._sizes = sizes_for(max(min(batch, slots), 1))
        self.batch = min(self._sizes[-1], max(batch, 1))
        self._cuda_graphs = cuda_graphs
        self._buckets: dict[int, DeviceBucket] = {}
        self._thread = threading.get_ident()

    def _of_size(self, size: int) -> DeviceBucket:
        if threading.get_ident() != self._thread:
            raise UsageError(
                f"an engine on {self.graph.provider} belongs to the thread that made it, and another one asks for a "
                "step: make the engine in the thread that steps it"
            )
        if size not in self._buckets:
            bucket = DeviceBucket(self, size, 1 + self._sizes.index(size) if self._cuda_graphs else -1)
            # CUDA graph capture runs the graph more than once: on dummy rows, so that no state changes
            bucket.run_dummy()
            self._buckets[size] = bucket
        return self._buckets[size]

    def capture(self) -> None:
        """Create every bucket now (CUDA graph capture is slow), not at the first run of its size."""
        for size in self._sizes:
            self._of_size(size)

    def bucket(self, count: int) -> DeviceBucket:
        """The smallest bucket for `count` rows; raises UsageError in another thread than the one that made it."""
        return self._of_size(next(s for s in self._sizes if s >= count))

    def prewarm(self) -> None:
        self._of_size(self._sizes[0]).run_dummy()

    def read(self, slots: Array) -> dict[str, Array]:
        return {name: np.take(tensor.read(), slots, 0) for name, tensor in self.arena.items()}

    def write(self, slots: Array, states: Mapping[str, Array]) -> None:
        for name, tensor in self.arena.items():
            array = tensor.read()
            array[slots] = states[name]
            tensor.write(array)

    @property
    def shapes(self) -> Shapes:
        wiring, spec = self.contract.wiring, self.contract.spec
        names = {s.name: onnx_rows.arena_name(wiring.states[s.name].input) for s in spec.states}
        return {s.name: (s.shape, self.graph.inputs[names[s.name]].dtype) for s in spec.states}


class DeviceBucket:
    """`size` rows with their own device memory: fixed shapes and addresses, as CUDA graphs need."""

    def __init__(self, rows: DeviceRows, size: int, graph_id: int) -> None:
        self.size = size
        self._rows = rows
        contract, graph = rows.contract, rows.graph
        wiring = contract.wiring
        steps: dict[str, tuple[int, ...]] = dict.fromkeys(wiring.timed, (1,))
        shapes = {n: (size, *steps.get(n, ()), *shape) for n, shape in row_inputs(graph, contract).items()}
        shapes[onnx_rows.SLOTS] = (size,)
        shapes |= {n: tuple(k or 1 for k in graph.inputs[n].shape) for n in wiring.constants}
        held = {}
        for name, wires in wiring.states.items():
            held[onnx_rows.arena_name(wires.input)] = (onnx_rows.stored_name(wires.input), rows.arena[name])
        outputs = {n: (size, *steps.get(n, ()), h.size) for h in contract.spec.heads for n in (wiring.heads[h.name],)}
        self._binding = DeviceBinding(graph, shapes, outputs, held, graph_id)
        self.inputs, self.outputs = (
            {n: a[:, 0] if n in wiring.timed else a for n, a in arrays.items()}
            for arrays in (self._binding.inputs, self._binding.outputs)
        )
        self.pinned = self._binding.pinned
        for name, value in wiring.constants.items():
            self.inputs[name][...] = value
        self._slots = self.inputs[onnx_rows.SLOTS]
        self._active = self.inputs.get(wiring.active)
        self._reset = self.inputs.get(wiring.reset)

    def run_dummy(self) -> None:
        """Run on dummy rows only: no session's state changes."""
        self._slots[...] = self._rows.scratch
        if self._active is not None:
            self._active[...] = False
        self._binding.run()

    def run(self, slots: Array, fresh: Array, count: int) -> None:
        self._slots[:count] = slots[:count]
        self._slots[count:] = self._rows.scratch
        if self._active is not None:
            self._active[:count] = True
            self._active[count:] = False
        if self._reset is not None:
            self._reset[:count] = fresh[:count]
        elif fresh[:count].any():
            new = slots[:count][fresh[:count]]
            shapes = self._rows.shapes.items()
            self._rows.write(new, {name: np.zeros((len(new), *shape), dtype) for name, (shape, dtype) in shapes})
        self._binding.run()

    def run_one(self, slot: int, fresh: bool) -> None:
        self.run(np.array([slot], np.int64), np.array([fresh]), 1)
