"""Peers of `bench step` that need torch or silero VAD, each in a process of its own (`peers/steps.py`)."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stream_mmrnn.bench.measure import Sampler, ratios, sampled
from stream_mmrnn.bench.step import NO_STAMPS, Bench
from stream_mmrnn.core.config import models_folder
from stream_mmrnn.core.errors import ProcessError
from stream_mmrnn.core.types import Tick
from stream_mmrnn.predict.engine import StepEngine

PEER = Path(__file__).parent / "peers" / "steps.py"
SILERO = models_folder() / "encoders" / "silero_vad.onnx"
SILERO_KINDS = {
    "its onnx wrapper": "silero_onnx",
    "its jit": "silero_jit",
    "its VADIterator, onnx": "silero_iterator",
}


class PeerProcess:
    """A contender in a process of its own: `sample(calls)` makes it call so many times and returns the durations."""

    def __init__(self, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(PEER), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.sample(1)

    def sample(self, calls: int) -> list[int]:
        """Nanoseconds of each call."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(f"{calls}\n")
            self._process.stdin.flush()
            took_ns: list[int] = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as e:
            raise ProcessError(f"the peer {self._process.args!r} has ended: {e}") from e
        return took_ns

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class TorchPeers:
    """The peers of `bench step`: torch, numpy, and silero VAD's wrappers."""

    def missing(self, *packages: str) -> str:
        absent = [p for p in packages if importlib.util.find_spec(p) is None]
        return f"{absent[0]} is not installed" if absent else ""

    def start(self, *arguments: str) -> PeerProcess:
        return PeerProcess(*arguments)

    def measure_more(self, bench: Bench) -> None:
        """The engine over silero VAD's graph, against the wrappers of silero's own package."""
        why = self.missing("silero_vad", "torch")
        engine = StepEngine(SILERO)
        engine.open("0")
        ticks = silero_ticks(20.0)
        alone = engine.graph.bind({"input": (1, 576), "sr": ()}, {"output": (1, 1)}, {"state": ("stateN", (2, 1, 128))})
        alone.inputs["sr"][...] = 16000
        samplers: dict[str, Sampler] = {
            "engine": sampled(lambda: engine.step([next(ticks)])),
            "the graph alone": sampled(alone.run),
        }
        with contextlib.ExitStack() as stack:
            for name, kind in ({} if why else SILERO_KINDS).items():
                peer = self.start(kind)
                stack.callback(peer.close)
                samplers[name] = peer.sample
            timings = bench.hot("silero", samplers)
        of, limit = ratios(timings, "engine"), ratios(timings, "the graph alone")
        bench.bound("silero_wrapper_over_engine", of.get("its onnx wrapper"), 1.5, more=True, why=why)
        bench.bound("silero_jit_over_engine", of.get("its jit"), 3.0, more=True, why=why)
        bench.bound("silero_iterator_over_engine", of.get("its VADIterator, onnx"), None, more=True, why=why)
        bench.bound("silero_wrapper_over_graph", limit.get("its onnx wrapper"), None, more=True, why=why)
        bench.bound("silero_jit_over_graph", limit.get("its jit"), None, more=True, why=why)


def silero_ticks(seconds: float) -> Iterator[Tick]:
    """The detector's inputs over synthetic sound, repeated without end."""
    rng = np.random.default_rng(0)
    sound = rng.standard_normal(int(16000 * seconds)).astype(np.float32) * 0.05
    while True:
        before = np.zeros(64, np.float32)
        for k in range(len(sound) // 512):
            chunk = sound[512 * k : 512 * (k + 1)]
            vector = np.concatenate([before, chunk])
            yield Tick("0", k, 0, {"audio": vector}, {"audio": True}, {"audio": 0}, NO_STAMPS)
            before = chunk[-64:]
