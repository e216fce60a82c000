"""Export: a trained predictor -> a one-step ONNX graph with its contract, and the gate it must pass.

Nothing is written unless torch sequence, torch step and ONNX step agree, in outputs and states, for several splits of
the sequence, batch sizes and random masks. The graph has plain operations only, no recurrent operator.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from stream_mmrnn.core.errors import ModelError
from stream_mmrnn.core.types import HeadSpec, ModalitySpec
from stream_mmrnn.graph.runtime import Graph
from stream_mmrnn.predict.contract import METADATA_KEY, read_contract, write_contract
from stream_mmrnn.training.predictor import PredictorNetwork, StepModule
from stream_mmrnn.training.quantise import in_blocks, in_columns

TOLERANCE = 1e-5
_FORBIDDEN = {"GRU", "LSTM", "RNN", "Loop", "Scan"}
_GATE_TICKS = 24


def contract(
    predictor: PredictorNetwork, origins: dict[str, str]
) -> tuple[tuple[ModalitySpec, ...], tuple[HeadSpec, ...]]:
    """The modalities and heads of a predictor, as the contract in the model file states them."""
    recipe = predictor.recipe
    modalities = tuple(
        ModalitySpec(name, m.size, origins.get(name, m.encoder), m.reduction, m.stack)
        for name, m in recipe.modalities.items()
    )
    heads = tuple(
        HeadSpec(
            h.name, h.kind, h.size, h.labels, h.horizons_s, h.unit, float(predictor.heads.threshold(h.name).double())
        )
        for h in recipe.heads
    )
    return modalities, heads


class _Flat(nn.Module):
    """The step with flat lists of inputs and outputs, in the order of `names`."""

    def __init__(self, predictor: PredictorNetwork) -> None:
        super().__init__()
        self.step = StepModule(predictor)
        self.modalities = list(predictor.recipe.modalities)
        self.states = list(predictor.states)
        self.heads = [h.name for h in predictor.recipe.heads]
        inputs = [f"input.{m}" for m in self.modalities]
        self.inputs = [*inputs, "present", "age", "active", "reset", *(f"state.{s}" for s in self.states)]
        self.outputs = [*(f"head.{h}" for h in self.heads), *(f"next.{s}" for s in self.states)]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(self.modalities)
        features = dict(zip(self.modalities, tensors[:count], strict=True))
        present, age, active, reset = tensors[count : count + 4]
        state = dict(zip(self.states, tensors[count + 4 :], strict=True))
        outputs, following = self.step(features, present, age, active, reset, state)
        return (*(outputs[h] for h in self.heads), *(following[s] for s in self.states))


def example(predictor: PredictorNetwork, batch: int, generator: torch.Generator) -> list[Tensor]:
    """Random inputs of the flat step, on the scale of the training data, with masks, ages, active and reset rows."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    count = len(predictor.recipe.modalities)
    present = (torch.rand((batch, count), generator=generator) < 0.7).float()
    features = [
        predictor.typical(name, noise(batch, m.size)) * present[:, i : i + 1]
        for i, (name, m) in enumerate(predictor.recipe.modalities.items())
    ]
    age = torch.rand((batch, count), generator=generator) * 10
    active = torch.rand(batch, generator=generator) < 0.7
    reset = torch.rand(batch, generator=generator) < 0.2
    states = [torch.tanh(noise(batch, *shape)) for shape in predictor.states.values()]
    return [*features, present, age, active, reset, *states]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Steps of a few rows are too small to share: on a busy machine the gate took
    ten times as long with two threads.
    """
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(count)


@_one_thread()
def graph_of(predictor: PredictorNetwork) -> onnx.ModelProto:
    """The step as ONNX with a dynamic batch, still without the contract."""
    flat = _Flat(predictor).eval()
    inputs = tuple(example(predictor, 2, torch.Generator().manual_seed(0)))
    batch = torch.export.Dim("batch", min=1, max=2**20)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it logs missing libraries that are not needed
    with torch.no_grad(), warnings.catch_warnings():
        # these warnings are about the exporter's own internals, not about the model
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            flat,
            inputs,
            dynamo=True,
            verbose=False,
            input_names=flat.inputs,
            output_names=flat.outputs,
            dynamic_shapes=(tuple({0: batch} for _ in inputs),),
            opset_version=20,
        )
    assert program is not None
    model = program.model_proto
    _clean(model)
    kinds = {n.op_type for n in model.graph.node}
    if kinds & _FORBIDDEN:
        raise ModelError(
            f"the exported step holds {', '.join(sorted(kinds & _FORBIDDEN))}; it must be plain operations"
        )
    return model


def _clean(model: onnx.ModelProto) -> None:
    """Remove the exporter's metadata: stack traces with paths of this machine, and notes."""
    model.producer_name, model.producer_version, model.doc_string = "stream_mmrnn", "", ""
    del model.metadata_props[:]
    graph = model.graph
    graph.doc_string = ""
    del graph.metadata_props[:]
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.doc_string = ""
        del value.metadata_props[:]
    for function in model.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        for node in function.node:
            node.doc_string = ""
            del node.metadata_props[:]


def with_contract(model: onnx.ModelProto, predictor: PredictorNetwork, origins: dict[str, str]) -> onnx.ModelProto:
    recipe = predictor.recipe
    modalities, heads = contract(predictor, origins)
    onnx.helper.set_model_props(model, {METADATA_KEY: write_contract(recipe.name, recipe.tick_ns, modalities, heads)})
    return model


def export(predictor: PredictorNetwork, path: Path, origins: dict[str, str], int8: bool = False) -> dict[str, float]:
    """Write the step to `path` if it passes the gate; returns the largest differences.

    `int8` also writes two files with 8-bit weights, whose outputs are close but not within the gate's tolerance:
    `step.int8.onnx`, the fastest for one session, and `step.int8_batch.onnx` for many (see `quantise`).

    Raises:
        ModelError: the three do not agree; nothing is written.

    """
    predictor = copy.deepcopy(predictor).cpu().float().eval()
    model = with_contract(graph_of(predictor), predictor, origins)
    with tempfile.TemporaryDirectory() as folder:
        candidate = Path(folder) / "step.onnx"
        onnx.save(model, str(candidate))
        differences = gate(predictor, candidate)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(candidate.read_bytes())
    for kind, quantise in (("int8", in_blocks), ("int8_batch", in_columns)) if int8 else ():
        small = path.with_name(f"{path.stem}.{kind}.onnx")
        onnx.save(quantise(model), str(small))
        read_contract(Graph(small))
    return differences


@_one_thread()
def gate(predictor: PredictorNetwork, path: Path) -> dict[str, float]:
    """Compare torch sequence, torch step and ONNX step on random sessions; raises ModelError where they disagree.

    A difference is |a - b| / (1 + |b|): absolute for small values, relative for large ones.
    """
    graph = Graph(path)
    read_contract(graph)
    worst = {"step": 0.0, "onnx": 0.0, "state": 0.0}
    generator = torch.Generator().manual_seed(1)
    _any_slot(predictor, graph, generator)
    for batch in (1, 3, 16):
        for cut in (1, 5, _GATE_TICKS):
            _compare(predictor, graph, batch, cut, generator, worst)
    for what, difference in worst.items():
        if not difference <= TOLERANCE:
            raise ModelError(
                f"the export was refused: {what} differs from the torch sequence by {difference:.2e}, "
                f"more than {TOLERANCE:g}; the step does not compute what was trained"
            )
    return worst


def _any_slot(predictor: PredictorNetwork, graph: Graph, generator: torch.Generator) -> None:
    """The same row must give the same bits in every slot: a session's results must not depend on its slot."""
    flat = _Flat(predictor)
    for _ in range(8):
        row = example(predictor, 1, generator)
        feed = {n: _as(graph, n, np.repeat(x.numpy(), 5, 0)) for n, x in zip(flat.inputs, row, strict=True)}
        for name, out in zip(flat.outputs, graph.session.run(flat.outputs, feed), strict=True):
            if any(out[i].tobytes() != out[0].tobytes() for i in range(1, 5)):
                raise ModelError(
                    f"the export was refused: {name} differs from slot to slot; use widths that are multiples of 8"
                )


def _compare(
    predictor: PredictorNetwork, graph: Graph, batch: int, cut: int, generator: torch.Generator, worst: dict[str, float]
) -> None:
    flat = _Flat(predictor).eval()
    modalities, heads, states = flat.modalities, flat.heads, flat.states
    count = len(modalities)
    ticks = [example(predictor, batch, generator) for _ in range(_GATE_TICKS)]
    features = {m: torch.stack([t[i] for t in ticks], 1) for i, m in enumerate(modalities)}
    present, age, _, reset = (torch.stack([t[count + i] for t in ticks], 1) for i in range(4))
    with torch.no_grad():
        chunks: dict[str, list[Tensor]] = {h: [] for h in heads}
        state = predictor.initial(batch)
        for begin in range(0, _GATE_TICKS, cut):
            part = slice(begin, begin + cut)
            raw, state = predictor(
                {m: x[:, part] for m, x in features.items()}, present[:, part], age[:, part], state, reset[:, part]
            )
            for h, x in predictor.heads.activate(raw).items():
                chunks[h].append(x)
        sequence = {h: torch.cat(x, 1) for h, x in chunks.items()}
        stepped = predictor.initial(batch)
        served = {s: x.numpy().copy() for s, x in predictor.initial(batch).items()}
        all_active = torch.ones(batch, dtype=torch.bool)
        for t, tick in enumerate(ticks):
            inputs = [*tick[: count + 2], all_active, reset[:, t]]
            outputs = flat(*inputs, *(stepped[s] for s in states))
            stepped = dict(zip(states, outputs[len(heads) :], strict=True))
            feed: dict[str, Any] = {n: _as(graph, n, x.numpy()) for n, x in zip(flat.inputs, inputs, strict=False)}
            feed |= {f"state.{s}": x for s, x in served.items()}
            results = dict(zip(flat.outputs, graph.session.run(flat.outputs, feed), strict=True))
            # an inactive row must keep its state bit for bit
            idle = {**feed, "active": np.zeros_like(feed["active"]), "reset": np.ones_like(feed["reset"])}
            kept = graph.session.run([f"next.{s}" for s in states], idle)
            for s, x in zip(states, kept, strict=True):
                if x.tobytes() != served[s].tobytes():
                    raise ModelError(f"the export was refused: an inactive row does not keep its state {s!r}")
            served = {s: results[f"next.{s}"] for s in states}
            for i, h in enumerate(heads):
                _note(worst, "step", outputs[i], sequence[h][:, t])
                _note(worst, "onnx", torch.from_numpy(results[f"head.{h}"]), sequence[h][:, t])
    for s in states:
        _note(worst, "state", torch.from_numpy(served[s]), state[s])
        _note(worst, "state", stepped[s], state[s])


def _as(graph: Graph, name: str, array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(array.astype(graph.inputs[name].dtype))


def _note(worst: dict[str, float], what: str, one: Tensor, other: Tensor) -> None:
    difference = ((one - other).abs() / (1 + other.abs())).max().item() if one.numel() else 0.0
    worst[what] = max(worst[what], difference) if np.isfinite(difference) else float("inf")
