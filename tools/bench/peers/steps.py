"""Peers of `stream-mmrnn bench step` that run in a process of their own, most because they want torch.

    steps.py torch_gru|torch_cells|numpy HIDDEN, steps.py silero_onnx|silero_jit|silero_iterator

Each line of standard input is a number: so many calls are made, and one line of JSON has the nanoseconds of each. All
use one thread. `torch_gru` is the same step in eager mode (fusion, two layers, a head) with the module that trains
them, `torch_cells` with a GRUCell a layer; `numpy` the same by matrix products of numpy; the others are silero VAD's
own wrappers, as its package documents them.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

for _name in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{_name}_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402 the threads are counted when it is loaded

INPUTS, HEAD, LAYERS = 256, 8, 2


def torch_step(hidden: int, cells: bool) -> Callable[[], object]:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    fuse = torch.nn.Linear(INPUTS, INPUTS)
    layers = [torch.nn.GRUCell(INPUTS if i == 0 else hidden, hidden) for i in range(LAYERS)]
    whole = torch.nn.GRU(INPUTS, hidden, LAYERS, batch_first=True)
    head = torch.nn.Linear(hidden, HEAD)
    state = [torch.zeros(1, hidden) for _ in layers]
    carried = torch.zeros(LAYERS, 1, hidden)
    x = torch.randn(1, INPUTS)

    @torch.inference_mode()
    def by_cells() -> object:
        y = torch.tanh(fuse(x))
        for i, cell in enumerate(layers):
            state[i] = y = cell(y, state[i])
        return torch.softmax(head(y), 1).numpy()

    @torch.inference_mode()
    def by_module() -> object:
        nonlocal carried
        y, carried = whole(torch.tanh(fuse(x)).unsqueeze(1), carried)
        return torch.softmax(head(y[:, 0]), 1).numpy()

    return by_cells if cells else by_module


def numpy_step(hidden: int) -> Callable[[], object]:
    rng = np.random.default_rng(0)

    def weights(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / rows**0.5).astype(np.float32)

    fuse, head = weights(INPUTS, INPUTS), weights(hidden, HEAD)
    layers = [(weights(INPUTS if i == 0 else hidden, 3 * hidden), weights(hidden, 3 * hidden)) for i in range(LAYERS)]
    state = [np.zeros((1, hidden), np.float32) for _ in layers]
    x = rng.standard_normal((1, INPUTS)).astype(np.float32)

    def step() -> object:
        y = np.tanh(x @ fuse)
        for i, (w, u) in enumerate(layers):
            a, b = y @ w, state[i] @ u
            r, z = np.split(1 / (1 + np.exp(-(a[:, : 2 * hidden] + b[:, : 2 * hidden]))), 2, 1)
            n = np.tanh(a[:, 2 * hidden :] + r * b[:, 2 * hidden :])
            state[i] = y = (1 - z) * n + z * state[i]
        e = np.exp(y @ head)
        return e / e.sum()

    return step


def silero(onnx: bool, iterator: bool = False) -> Callable[[], object]:
    import silero_vad
    import torch

    torch.set_num_threads(1)
    model = silero_vad.load_silero_vad(onnx=onnx)
    events = silero_vad.VADIterator(model, sampling_rate=16000)
    sound = torch.from_numpy(np.random.default_rng(0).standard_normal(512 * 600).astype(np.float32) * 0.05)
    at = 0

    def step() -> object:
        nonlocal at
        chunk = sound[at : at + 512]
        with torch.inference_mode():
            said = events(chunk) if iterator else model(chunk, 16000).item()
        at = (at + 512) % len(sound)
        return said

    return step


def main(kind: str, *options: str) -> None:
    step = {
        "torch_gru": lambda: torch_step(int(options[0]), False),
        "torch_cells": lambda: torch_step(int(options[0]), True),
        "numpy": lambda: numpy_step(int(options[0])),
        "silero_onnx": lambda: silero(True),
        "silero_jit": lambda: silero(False),
        "silero_iterator": lambda: silero(True, True),
    }[kind]()
    for line in sys.stdin:
        took_ns = [0] * int(line)
        for i in range(len(took_ns)):
            began_ns = time.perf_counter_ns()
            step()
            took_ns[i] = time.perf_counter_ns() - began_ns
        print(json.dumps(took_ns), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
