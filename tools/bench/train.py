"""Train: the speed of training each cell, measured by `tools/bench/cells.py` in a process of its own.

Skipped with a reason if torch is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from stream_mmrnn.bench.machine import Processes
from stream_mmrnn.bench.plots import Pictures
from stream_mmrnn.bench.report import Document, document, ratio
from stream_mmrnn.core.errors import ProcessError

_SCRIPT = Path(__file__).parent / "cells.py"


def _missing() -> str:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed: pip install 'stream-mmrnn[train]'"
    return ""


def run(
    *,
    hidden: int = 128,
    length: int = 1024,
    batch: int = 8,
    threads: int = 1,
    rounds: int = 10,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Document, Pictures]:
    """Tokens a second, forward and backward, of each cell; as ratios, times those of torch's `nn.GRU`."""
    settings = {"hidden": hidden, "length": length, "batch": batch, "threads": threads, "rounds": rounds}
    if reason := _missing():
        return document("train", settings, [{"cell": "all", "skipped": reason}], {}, notes=[reason]), Pictures()
    say("training cells: this takes a minute or two")
    processes = Processes()
    options = [f"--{name}={value}" for name, value in settings.items()]
    done = subprocess.run([sys.executable, str(_SCRIPT), *options], capture_output=True, text=True)
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        raise ProcessError(f"tools/bench/cells.py failed with these settings: {last or f'exit code {done.returncode}'}")
    measured = json.loads(done.stdout.strip().rpartition("\n")[2])
    usage = processes.used()
    beside = {"other_cpu": usage.other_cpu, "busiest": usage.busiest_other}
    rows = [{"cell": name, **figures, **beside} for name, figures in measured["cells"].items()]
    ratios = {
        f"train_{name}_times_nn_gru": ratio(figures["times_nn_gru"], better="more")
        for name, figures in measured["cells"].items()
        if name != "nn.GRU"
    }
    return document("train", {**settings, "torch": measured["torch"]}, rows, ratios), Pictures()
