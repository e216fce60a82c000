"""The baseline: the same step in torch, captured once as a CUDA graph and replayed, with the same arena and masks.

torch's own fused GRU cell, states gathered and written back by slot, inputs and outputs in page-locked memory: what one
would write by hand today. It looks like our rows, so it is compared and timed by the same code. Needs torch; knows
nothing about ONNX.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

from stream_mmrnn.bench import models
from stream_mmrnn.graph.runtime import Array
from stream_mmrnn.predict.cpu_batches import sizes_for

_WARM_RUNS = 3
"""Before a capture: libraries and memory are made in the first runs, and may not be in a capture."""


def missing() -> str:
    """Why there is no baseline here; "" where there is one."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    return "" if torch.cuda.is_available() else f"torch {torch.__version__} sees no CUDA device"


class TorchTensor:
    """A state of all slots, on the device."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def read(self) -> Array:
        array: Array = self.value.cpu().numpy().copy()
        return array


class TorchRows:
    """Rows of the two layers of `models.gru_step(hidden)`; one extra row takes the unused rows of a batch."""

    def __init__(self, hidden: int, slots: int, batch: int, device: str = "cuda") -> None:
        import torch

        torch.set_float32_matmul_precision("highest")  # as ours: no TF32
        self.device, self.scratch = device, slots
        self.weights = {n: torch.from_numpy(w).to(device) for n, w in models.weights(hidden).items()}
        self.zero = torch.zeros((), device=device)
        self.arena = {name: TorchTensor(torch.zeros(slots + 1, hidden, device=device)) for name in models.state_names()}
        self._sizes = sizes_for(max(min(batch, slots), 1))
        self.batch = min(self._sizes[-1], batch)
        self._buckets: dict[int, TorchBucket] = {}

    def bucket(self, count: int) -> TorchBucket:
        size = next(s for s in self._sizes if s >= count)
        if size not in self._buckets:
            self._buckets[size] = TorchBucket(self, size)
        return self._buckets[size]


class TorchBucket:
    """`size` rows with memory of their own; on CUDA their run is captured here and replayed later."""

    def __init__(self, rows: TorchRows, size: int) -> None:
        import torch

        self.size, self._rows = size, rows
        self._cuda = rows.device == "cuda"
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            f"input.{models.MODALITY}": ((size, models.INPUT), torch.float32),
            "present": ((size, 1), torch.float32),
            "age": ((size, 1), torch.float32),
            "active": ((size,), torch.bool),
            "reset": ((size,), torch.bool),
            "slots": ((size,), torch.int64),
        }
        self._here = {n: self._host(shape, kind) for n, (shape, kind) in shapes.items()}
        self._there = {n: tensor.to(rows.device) for n, tensor in self._here.items()}
        self._said = torch.zeros(size, models.CLASSES, device=rows.device)
        self._said_here = self._host((size, models.CLASSES), torch.float32)
        self.inputs: dict[str, Array] = {n: t.numpy() for n, t in self._here.items()}
        self.outputs: dict[str, Array] = {f"head.{models.HEAD}": self._said_here.numpy()}
        self._graph: Any = None
        if self._cuda:
            self._capture()

    def _host(self, shape: tuple[int, ...], kind: Any) -> Any:
        import torch

        tensor = torch.zeros(shape, dtype=kind)
        return tensor.pin_memory() if self._cuda else tensor

    def _capture(self) -> None:
        """On the unused row, so that no session state changes."""
        import torch

        self._there["slots"].fill_(self._rows.scratch)
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARM_RUNS):
                self._compute()
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._compute()

    def _compute(self) -> None:
        import torch
        from torch.nn.functional import linear

        w, given = self._rows.weights, self._there
        active, reset, slots = given["active"].unsqueeze(1), given["reset"].unsqueeze(1), given["slots"]
        about = torch.cat((given["present"], given["age"]), 1)
        x = given[f"input.{models.MODALITY}"] * given["present"] + linear(about, w["about.weight"], w["about.bias"])
        for layer, tensor in enumerate(self._rows.arena.values()):
            held = tensor.value.index_select(0, slots)
            new = torch.gru_cell(
                x,
                torch.where(reset, self._rows.zero, held),
                w[f"{layer}.input.weight"],
                w[f"{layer}.state.weight"],
                w[f"{layer}.input.bias"],
                w[f"{layer}.state.bias"],
            )
            tensor.value.index_copy_(0, slots, torch.where(active, new, held))
            x = new
        self._said.copy_(torch.softmax(linear(x, w["head.weight"], w["head.bias"]), 1))

    def run(self, slots: Array, fresh: Array, count: int) -> None:
        self.inputs["slots"][:count] = slots[:count]
        self.inputs["slots"][count:] = self._rows.scratch
        self.inputs["active"][:count] = True
        self.inputs["active"][count:] = False
        self.inputs["reset"][:count] = fresh[:count]
        for name, tensor in self._there.items():
            tensor.copy_(self._here[name], non_blocking=True)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._compute()
        self._said_here.copy_(self._said, non_blocking=True)
        if self._cuda:
            import torch

            torch.cuda.current_stream().synchronize()

    def run_one(self, slot: int, fresh: bool) -> None:
        self.run(np.array([slot]), np.array([fresh]), 1)
