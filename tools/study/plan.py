"""The plan: every run of the study, each a recipe of the zoo with changes, and what it is expected to cost.

Sizes are such that the whole costs half an hour to an hour of one core. Knows nothing about torch, files or text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from stream_mmrnn.core.config import models_folder
from stream_mmrnn.training import recipe as recipes

VERSION = 1
"""Of what a kept result holds and means: a higher one makes all of them again."""

CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru", "min_gru", "rg_lru")
LOOPS = CELLS[:4]
FUSIONS = ("add", "concat", "gated", "attention", "attention_state", "cross", "memory")
CONTENDERS = ("add", "concat", "gated", "attention")
DISTANCES = (20, 50, 100, 200)
REMEMBERED = DISTANCES[:3]
"""Distances at which a plain cell that may look back is tried: the look back costs memory for every tick."""

HEADS = {"turn_taking": "turn_over", "activity": "activity", "polarity": "polarity", "recall": "symbol"}
"""The head whose primary figure a part is judged by; `digit` where none is named."""
TASKS = ("digits", "turn_taking", "activity", "mnist_rows", "polarity")
"""Each a recipe of the zoo."""
PARTS = ("speed", "recall", *TASKS)

Table = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One result to be had. `table` is a recipe's, or a measurement's settings."""

    part: str
    group: str
    """Which table or sentence of the study it is for."""
    name: str
    """What it is within the group."""
    table: Table
    kind: str = "train"
    """`train`; or a measurement: `bench`, `gradient`, `step`."""
    cost_s: float = 30.0
    """Expected, for the time left."""
    first: int = 0
    """Learn from the first so many sequences alone; 0 takes all."""
    alone: bool = False
    """Measure each modality alone, too."""
    seed: int = 0

    @property
    def key(self) -> str:
        """What the result depends on, and nothing else: two parts may share one."""
        seed = () if self.kind == "bench" else (self.seed,)
        content = [VERSION, self.kind, self.table, self.first, self.alone, *seed]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Plan:
    runs: tuple[Run, ...]
    bases: Mapping[str, Table] = field(default_factory=dict)
    """The zoo's recipe of each part, as it is."""


def changed(table: Table, changes: Mapping[str, Any]) -> Table:
    """A table with some values, each by its dotted name, in place of its own."""
    out = json.loads(json.dumps(table))
    for name, value in changes.items():
        *way, last = name.split(".")
        at = out
        for step in way:
            at = at[step]
        at[last] = value
    return out


def zoo(name: str) -> Table:
    """The table of a recipe of the zoo."""
    return msgspec.to_builtins(recipes.load(models_folder() / name / "recipe.toml"))


def recall(length: int, symbols: int = 8) -> Table:
    """Made data: the first tick's symbol is to be said at the last one, and others come in between.

    In training it is asked for at every tick, so that what holds it for a few may learn to hold it for longer.
    """
    return msgspec.to_builtins(
        recipes.parse(
            {
                "name": "recall",
                "modalities": {"symbols": {"size": symbols + 1}},
                "heads": [{"name": "symbol", "kind": "classification", "size": symbols}],
                "data": {
                    "kind": "recall",
                    "options": {"length": length, "train": 3200, "held_out": 500, "asked": "always"},
                },
                "fusion": {"kind": "add", "width": 16, "modality_dropout": 0.0},
                "cell": {"hidden": 48},
                "train": {"epochs": 5, "batch": 32, "length": length, "learning_rate": 4e-3, "patience": 0},
            }
        )
    )


SIZES: dict[str, Table] = {
    "digits": {
        "data.options.train": 50,
        "data.options.validation": 12,
        "data.options.test": 50,
        "data.options.items": 12,
        "fusion.width": 64,
        "cell.hidden": 128,
        "train.epochs": 8,
        "train.patience": 0,
        "train.learning_rate": 4e-3,
    },
    "turn_taking": {
        "events": {},  # the words are to be fused, too
        "evidence": {},
        "data.options.train": 40,
        "data.options.validation": 10,
        "data.options.test": 60,
        "fusion.width": 64,
        "cell.hidden": 96,
        "train.epochs": 2,
        "train.batch": 16,
        "train.patience": 0,
    },
    "activity": {"cell.hidden": 96, "cell.layers": 1, "train.epochs": 4, "train.patience": 0},
    "mnist_rows": {
        "data.options.sequences": 10000,
        "data.options.validation": 1000,
        "data.options.shift": 0,
        "data.options.turn": 0,
        "data.options.stretch": 0,
        "cell.hidden": 128,
        "cell.layers": 1,
        "cell.dropout": 0.0,
        "train.epochs": 3,
        "train.patience": 0,
    },
    "polarity": {
        "events": {},  # frozen vectors, so that a cell of each kind reads the words
        "data.options.word_dropout": 0.2,
        "data.options.early": 0.1,
        "fusion.kind": "add",
        "fusion.width": 96,
        "cell.hidden": 96,
        "train.epochs": 5,
        "train.batch": 32,
        "train.length": 64,
        "train.learning_rate": 1e-3,
        "train.weight_decay": 0.05,
        "train.patience": 0,
    },
}
"""What every run of a part changes of the zoo's recipe."""
LARGER: Table = {"data.options.train": 100, "data.options.test": 100, "train.epochs": 10}
"""And those that settle attention against concatenation."""
COSTS = {"digits": 22, "turn_taking": 40, "activity": 25, "mnist_rows": 25, "polarity": 20}


def whole(seeds: int | None = None) -> Plan:
    """Every run, in the order in which they are made; `seeds` for each, where the plan has its own number of them."""
    bases = {part: zoo(part) for part in TASKS}
    small = {part: changed(bases[part], SIZES[part]) for part in TASKS}
    # a cell of each kind can read vectors, not ids, and nothing is trained on the ends of turns
    for part in ("turn_taking", "polarity"):
        for name in [n for n in small[part]["modalities"] if n.endswith((".tokens", "turn_end"))]:
            del small[part]["modalities"][name]
    runs: list[Run] = []

    def add(run: Run, count: int = 1) -> None:
        runs.extend(replace(run, seed=seed) for seed in range(seeds or count))

    def train(part: str, group: str, name: str, changes: Table, count: int = 1, **more: Any) -> None:
        more.setdefault("cost_s", COSTS[part])
        add(Run(part, group, name, changed(small[part], changes), **more), count)

    for length in (64, 256, 1024):
        settings = {"hidden": 128, "batch": 8, "length": length, "rounds": 5}
        runs.append(Run("speed", "bench", str(length), settings, "bench", cost_s=length / 50))
    for cell in CELLS:
        step = changed(small["digits"], {"cell.kind": cell, "fusion.kind": "concat", "cell.hidden": 128})
        runs.append(Run("speed", "step", cell, step, "step", cost_s=8))

    for cell in CELLS:
        settings = {"cell": cell, "hidden": 64, "distance": 200}
        add(Run("recall", "gradient", cell, settings, "gradient", cost_s=1), 5)
    for length in DISTANCES:
        for cell in CELLS:
            table = changed(recall(length), {"cell.kind": cell})
            add(Run("recall", "distance", f"{cell} {length}", table, cost_s=2 + length / 15), 3)
    for length in REMEMBERED:
        table = changed(recall(length), {"cell.kind": "rnn_tanh", "fusion.kind": "memory", "fusion.memory": length})
        add(Run("recall", "look back", f"rnn_tanh {length}", table, cost_s=4 + length / 3), 3)

    for fusion in CONTENDERS:
        changes = {"cell.kind": "gru", "fusion.kind": fusion, **LARGER}
        train("digits", "larger", fusion, changes, 3, alone=True, cost_s=2 * COSTS["digits"])
    for cell in CELLS:
        for fusion in FUSIONS:
            train("digits", "grid", f"{cell} {fusion}", {"cell.kind": cell, "fusion.kind": fusion})
    for fusion in FUSIONS:
        base = fusion == "concat"
        changes = {"cell.kind": "gru", "fusion.kind": fusion}
        train("turn_taking", "fusions", fusion, changes, 3 if base else 1, alone=base)
    apart = {
        "cell.kind": "gru",
        "fusion.kind": "concat",
        "events": changed(bases["turn_taking"]["events"], {"tokens": []}),
    }
    train("turn_taking", "advice", "words in a GRU of their own", apart)
    for part in ("turn_taking", "activity", "mnist_rows", "polarity"):
        for cell in CELLS:
            if part == "turn_taking" and cell == "gru":  # it is among the fusions
                changes, more = {"fusion.kind": "concat", "cell.kind": cell}, {"alone": True}
            else:
                changes = {"fusion.kind": "concat" if part == "turn_taking" else "add", "cell.kind": cell}
                more = {}
            train(part, "cells", cell, changes, 3 if cell == "gru" else 1, **more)
    runs.extend(_advice(small, seeds))
    return Plan(tuple(runs), bases)


def _advice(small: Mapping[str, Table], seeds: int | None) -> Iterable[Run]:
    """What the seeds say of reduction, selection, regularisation, the rate and the amount of data."""
    rate = {part: small[part]["train"]["learning_rate"] for part in small}
    epochs = small["polarity"]["train"]["epochs"]
    every: list[tuple[str, str, Table, int, float]] = [
        ("mnist_rows", "PCA .9", {"modalities.vision.energy": 0.9}, 0, 1),
        ("polarity", "PCA .9", {"modalities.text.energy": 0.9}, 0, 1),
        ("activity", "accelerations alone", {"modalities.signal.select": [0, 1, 2, 6, 7, 8]}, 0, 1),
        ("polarity", "no regularisation", {"cell.dropout": 0.0, "train.weight_decay": 0.0}, 0, 1),
        ("activity", "no regularisation", {"train.weight_decay": 0.0, "cell.dropout": 0.0}, 0, 1),
        ("mnist_rows", "rate / 10", {"train.learning_rate": rate["mnist_rows"] / 10}, 0, 1),
        ("mnist_rows", "rate x 10", {"train.learning_rate": rate["mnist_rows"] * 10}, 0, 1),
        ("mnist_rows", "constant rate", {"train.schedule": "constant"}, 0, 1),
        ("mnist_rows", "two layers", {"cell.layers": 2}, 0, 2),
        # ten times the epochs, so that the number of steps is the same
        ("polarity", "a tenth of the data", {"train.epochs": 10 * epochs}, 853, 1.5),
    ]
    for part, name, changes, first, times in every:
        table = changed(small[part], {"cell.kind": "gru", "fusion.kind": "add", **changes})
        run = Run(part, "advice", name, table, cost_s=times * COSTS[part], first=first)
        yield from (replace(run, seed=seed) for seed in range(seeds or 1))
