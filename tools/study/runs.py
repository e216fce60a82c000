"""Making a run's result, and keeping it: one small JSON file a result, named by what the result depends on.

A kept file says its own sum, so that a damaged one is seen and made again. Knows nothing about the plan or about text.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from stream_mmrnn.core.errors import StreamError
from stream_mmrnn.core.types import FloatArray
from stream_mmrnn.training import metrics, tasks
from stream_mmrnn.training import recipe as recipes
from stream_mmrnn.training.data import Task, Ticks
from stream_mmrnn.training.recipe import Recipe

from .plan import CELLS, Run

_FIGURES = ("ticks", "primary", "accuracy", "balanced_accuracy", "auc", "r2", "mse", "log_loss", "calibration_error")


class Result(msgspec.Struct, kw_only=True):
    """What is kept of a run."""

    key: str
    part: str
    group: str
    name: str
    seed: int
    cpu_s: float
    """Of the processor, all of it: reading the data, training, measuring."""
    figures: dict[str, Any] = {}
    """By head, or what a measurement measured."""
    alone: dict[str, dict[str, float]] = {}
    """By the modalities present: each head's primary figure."""
    weights: int = 0
    epochs: int = 0
    best_epoch: int = 0
    ticks: int = 0
    """Trained on, all epochs together."""
    ticks_per_s: float = 0.0
    """Of the processor, making of the sequences included."""
    diverged: str = ""
    """Its loss became no number: what was said then."""
    versions: dict[str, str] = {}


def keep(result: Result, folder: Path) -> None:
    """Write it beside and rename, so that a kept file is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    body = json.dumps(metrics.clean(msgspec.to_builtins(result)), sort_keys=True)
    text = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "result": json.loads(body)}, indent=1)
    path = folder / f"{result.key}.json"
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)


def kept(key: str, folder: Path) -> Result | None:
    """The result of that key; None where it is not there or damaged."""
    try:
        held = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        body = json.dumps(held["result"], sort_keys=True)
        result = msgspec.convert(held["result"], Result)
        good = hashlib.sha256(body.encode()).hexdigest() == held["sha256"] and result.key == key
    except (OSError, ValueError, KeyError, TypeError, msgspec.ValidationError):
        return None
    return result if good else None


# ---- one run -----------------------------------------------------------------------------------------------------


def make(run: Run, data: Sequence[Path]) -> Result:
    """Train or measure, with one thread.

    Raises:
        StreamError: the data is not what it should be.

    """
    import torch

    torch.set_num_threads(1)
    began = time.process_time()
    result = Result(key=run.key, part=run.part, group=run.group, name=run.name, seed=run.seed, cpu_s=0.0)
    {"train": _train, "bench": _bench, "gradient": _gradient, "step": _step}[run.kind](run, data, result)
    result.cpu_s = round(time.process_time() - began, 2) or result.cpu_s
    result.versions = {"python": platform.python_version(), "torch": version("torch")}
    return result


_tasks: dict[str, Task] = {}


def task_of(recipe: Recipe, data: Sequence[Path]) -> Task:
    """The recipe's task; the last one is held, for the next run may want the same."""
    of = msgspec.to_builtins(recipe)
    key = json.dumps([of["modalities"], of["heads"], of["data"], of["tick_ms"], recipe.train.length])
    if key not in _tasks:
        _tasks.clear()
        _tasks[key] = recall(recipe) if recipe.data.kind == "recall" else tasks.create(recipe, data)
    return _tasks[key]


def _first(task: Task, count: int) -> Task:
    """The task with fewer sequences to learn from; their names end in their number."""

    def train(rng: np.random.Generator) -> Iterator[Ticks]:
        return (t for t in task.train(rng) if int(t.name.rsplit(" ", 1)[1]) < count)

    return replace(task, train=train, epoch_ticks=0)


def _train(run: Run, data: Sequence[Path], result: Result) -> None:
    from stream_mmrnn.training.evaluate import by_modalities, evaluate
    from stream_mmrnn.training.train import Diverged, Trainer

    recipe = recipes.with_seed(recipes.parse(run.table), run.seed)
    task = task_of(recipe, data)
    task = _first(task, run.first) if run.first else task
    busy, last = 0.0, time.process_time()

    def progress(what: dict[str, Any]) -> None:
        # a step's time is what passed since the one before; validation comes after an epoch's last step
        nonlocal busy, last
        now = time.process_time()
        if what["event"] == "step":
            busy += now - last
        last = now

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, task, Path(folder))
        last = time.process_time()
        try:
            trainer.run(progress)
        except Diverged as e:
            result.diverged = str(e).split(";")[0]
    predictor = trainer.predictor
    result.weights = sum(p.numel() for p in predictor.parameters())
    result.epochs, result.best_epoch = len(trainer.history), max(trainer.best[1], 0)
    steps = sum(h["steps"] for h in trainer.history)
    result.ticks = steps * recipe.train.batch * recipe.train.length
    if steps and not result.diverged:
        result.ticks_per_s = round(result.ticks / max(busy, 1e-9))
        found = evaluate(predictor, task.test)
        result.figures = {h: {k: f[k] for k in _FIGURES if k in f} for h, f in found.items()}
        if run.alone:
            names = [m for m in recipe.modalities if any(m in s for s in task.sets)] or list(recipe.modalities)
            sets = task.sets or (tuple(names), *((m,) for m in names))
            result.alone = by_modalities(predictor, task.test, sets)


def recall(recipe: Recipe) -> Task:
    """A symbol, marked, at the first tick; others until the last one, where the first is to be said."""
    options = recipe.data.options
    length, (head,) = options["length"], recipe.heads
    present, age_s = np.ones((length, 1), np.float32), np.zeros((length, 1), np.float32)
    last, always = np.zeros(length, np.float32), np.ones(length, np.float32)
    last[-1] = 1

    def sequence(rng: np.random.Generator, name: str, weight: FloatArray) -> Ticks:
        symbols = rng.integers(head.size, size=length)
        x = np.zeros((length, head.size + 1), np.float32)
        x[np.arange(length), symbols] = 1
        x[0, -1] = 1
        target = np.full(length, symbols[0], np.int64)
        return Ticks({"symbols": x}, present, age_s, {head.name: target}, {head.name: weight}, name)

    def some(count: int, rng: np.random.Generator, weight: FloatArray = last) -> Iterator[Ticks]:
        return (sequence(rng, f"recall {i}", weight) for i in range(count))

    held = [list(some(options["held_out"], np.random.default_rng([7, i]))) for i in range(2)]
    asked = {"always": always, "last": last}[options["asked"]]
    return Task(
        lambda rng: some(options["train"], rng, asked), *held, about="made", epoch_ticks=options["train"] * length
    )


# ---- measurements ------------------------------------------------------------------------------------------------


def _bench(run: Run, data: Sequence[Path], result: Result) -> None:
    """tools/bench/cells.py, as it is."""
    program = Path(__file__).parent.parent / "bench" / "cells.py"
    options = [f"--{k}={v}" for k, v in run.table.items()]
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(program), "--cells=" + ",".join(CELLS), *options], capture_output=True, text=True
    )
    if done.returncode:
        raise StreamError(f"tools/bench/cells.py ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    result.figures = json.loads(done.stdout.splitlines()[-1])["cells"]
    result.cpu_s = round(time.monotonic() - began, 2)


def _gradient(run: Run, data: Sequence[Path], result: Result) -> None:
    """How much the last output of an untrained cell depends on the input k ticks before it, against the last one."""
    import torch

    from stream_mmrnn.training.cells import create

    torch.manual_seed(run.seed)
    hidden, distance = run.table["hidden"], run.table["distance"]
    cell = create(run.table["cell"], hidden, hidden)
    x = torch.randn(8, distance + 1, hidden, requires_grad=True)
    y, _ = cell(x)
    (y[:, -1] * torch.randn(8, hidden)).sum().backward()
    assert x.grad is not None
    norm = x.grad.norm(dim=2).mean(0).flip(0).double()
    result.figures = {"ratio": [float(v) for v in (norm / norm[0].clamp(min=1e-30))]}
    result.weights = sum(p.numel() for p in cell.parameters())


def _step(run: Run, data: Sequence[Path], result: Result) -> None:
    """The exported step graph of a fresh network: its size, and the time of one step for one session."""
    import torch

    from stream_mmrnn.graph.runtime import Graph
    from stream_mmrnn.predict.contract import read_contract
    from stream_mmrnn.training.export import export
    from stream_mmrnn.training.predictor import PredictorNetwork

    torch.manual_seed(run.seed)
    predictor = PredictorNetwork(recipes.parse(run.table)).eval()
    result.weights = sum(p.numel() for p in predictor.parameters())
    of_cell = sum(p.numel() for p in predictor.cells.parameters())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "step.onnx"
        export(predictor, path, {})
        graph = Graph(path, "cpu")
        spec = read_contract(graph)
        count = len(spec.modalities)
        inputs = {"active": (1,), "reset": (1,), "present": (1, count), "age": (1, count)}
        binding = graph.bind(
            {**inputs, **{f"input.{m.name}": (1, m.size) for m in spec.modalities}},
            {f"head.{h.name}": (1, h.size) for h in spec.heads},
            {f"state.{s.name}": (f"next.{s.name}", (1, *s.shape)) for s in spec.states},
        )
        binding.inputs["active"][...] = 1
        binding.inputs["present"][...] = 1
        rounds = []
        for _ in range(7):
            began = time.perf_counter()
            for _ in range(500):
                binding.run()
            rounds.append((time.perf_counter() - began) / 500)
        size = path.stat().st_size
    result.figures = {"us": 1e6 * sorted(rounds)[len(rounds) // 2], "bytes": size, "cell_weights": of_cell}
