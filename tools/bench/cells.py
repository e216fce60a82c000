"""Training speed of each cell against torch's nn.GRU: forward and backward over whole sequences, tokens a second.

    python -m tools.bench.cells --hidden 128 --length 1024 --batch 8 --threads 1

A recurrent layer whose gates look at its own state must go through a sequence step by step; one whose gates look at the
input alone (min_gru, rg_lru) is a scan. What bounds the first is the number of steps, what bounds the second is memory
and one matrix product. The rounds are interleaved, so that a machine that slows down slows all of them; medians, after
one round of warm-up. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import torch

from stream_mmrnn.training.cells import CELLS, create


def main() -> int:
    parser = argparse.ArgumentParser(description="Training speed of each cell against nn.GRU.")
    for name, default in (("hidden", 128), ("length", 1024), ("batch", 8), ("threads", 1), ("rounds", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cells", default="min_gru,rg_lru,gru,lstm", help="comma-separated; all: " + ",".join(CELLS))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    hidden, batch, length = asked.hidden, asked.batch, asked.length
    layers: dict[str, torch.nn.Module] = {"nn.GRU": torch.nn.GRU(hidden, hidden, batch_first=True)}
    for name in asked.cells.split(","):
        if name not in CELLS:
            parser.error(f"there is no cell {name!r}; known are {', '.join(CELLS)}")
        layers[name] = create(name, hidden, hidden)
    x, gradient = torch.randn(batch, length, hidden), torch.randn(batch, length, hidden)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(asked.rounds + 1):
        for name, layer in layers.items():
            layer.zero_grad()
            began = time.perf_counter()
            layer(x)[0].backward(gradient)
            seconds[name].append(time.perf_counter() - began)
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    rows = {
        name: {
            "tokens_per_s": round(batch * length / median[name]),
            "times_nn_gru": round(median["nn.GRU"] / median[name], 2),
            "ms": round(1e3 * median[name], 2),
            "ms_min": round(1e3 * min(seconds[name][1:]), 2),
        }
        for name in layers
    }
    print(f"hidden {hidden}, length {length}, batch {batch}, {asked.threads} threads, torch {torch.__version__}")
    for name, row in rows.items():
        print(f"{name:>10}  {row['tokens_per_s']:>10,} tokens/s  {row['times_nn_gru']:>6.2f} x nn.GRU")
    print(json.dumps({"settings": vars(asked), "torch": torch.__version__, "cells": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
