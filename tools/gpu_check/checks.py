"""Does the device compute what the CPU computes? Random sessions, masks, resets and batch sizes, step after step.

Both run closed loops of their own: each carries its own state on, so an error that grows is seen. And does making CUDA
graphs, which runs a graph more than once, leave every session's state alone, to the bit? Knows nothing about time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from stream_mmrnn.bench import models
from stream_mmrnn.core.block import Block
from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.types import Stamps, Tick
from stream_mmrnn.graph.runtime import Array, Graph, Provider
from stream_mmrnn.predict.contract import contract_of
from stream_mmrnn.predict.cpu_batches import Bucket, HostRows
from stream_mmrnn.predict.device_batches import DeviceRows
from stream_mmrnn.predict.engine import StepEngine

BOUND = 1e-4
_HOUR_NS = 3_600_000_000_000
_HOST_BATCH = 64
_STATES_EVERY = 25
"""Steps between two looks at whole states, which are copied from the device for it."""

Result = dict[str, Any]
Feed = dict[str, Array]


class Tensor(Protocol):
    def read(self) -> Array: ...


class Candidate(Protocol):
    """Rows on a device, ours or another's: what is compared and timed."""

    batch: int

    @property
    def arena(self) -> Mapping[str, Tensor]:
        """States by name, one row a slot and some more."""

    def bucket(self, count: int) -> Bucket: ...


def noise(rng: np.random.Generator, count: int) -> Feed:
    """Random inputs of so many rows."""
    return {
        f"input.{models.MODALITY}": rng.standard_normal((count, models.INPUT)).astype(np.float32),
        "present": rng.integers(0, 2, (count, 1)).astype(np.float32),
        "age": rng.uniform(0, 10, (count, 1)).astype(np.float32),
    }


def step(rows: Candidate | HostRows, slots: Array, fresh: Array, feed: Feed) -> Array:
    """One step of these rows, in as few runs as hold them; what the head says."""
    said = np.empty((len(slots), models.CLASSES), np.float32)
    for start in range(0, len(slots), rows.batch):
        part = slice(start, min(start + rows.batch, len(slots)))
        count = part.stop - part.start
        bucket = rows.bucket(count)
        for name, array in feed.items():
            bucket.inputs[name][:count] = array[part]
        bucket.run(slots[part], fresh[part], count)
        said[part] = bucket.outputs[f"head.{models.HEAD}"][:count]
    return said


def host_rows(path: Path, slots: int) -> HostRows:
    graph = Graph(path)
    return HostRows(graph, contract_of(graph), slots, _HOST_BATCH, _HOUR_NS)


def device_rows(path: Path, provider: Provider, slots: int, batch: int, *, cuda_graphs: bool = True) -> DeviceRows:
    graph = Graph(path, provider)
    return DeviceRows(graph, contract_of(graph), slots, batch, cuda_graphs=cuda_graphs)


class _Worst:
    """The largest difference seen; infinite where something was no number, and then None in a document."""

    def __init__(self) -> None:
        self.value = 0.0

    def note(self, a: Array, b: Array) -> None:
        difference = float(np.abs(a.astype(np.float64) - b).max()) if a.size else 0.0
        self.value = max(self.value, difference) if np.isfinite(difference) else float("inf")

    @property
    def said(self) -> float | None:
        return self.value if np.isfinite(self.value) else None


def _count(rng: np.random.Generator, most: int) -> int:
    """1 to `most`, small ones as often as large ones."""
    return int(np.clip(round(np.exp(rng.uniform(0, np.log(most + 0.49)))), 1, most))


def against_the_cpu(name: str, path: Path, rows: Candidate, slots: int, most: int, steps: int) -> Result:
    """Compare outputs at every step and states now and then; `rows` must be untouched and have `slots` slots."""
    host, rng = host_rows(path, slots), np.random.default_rng(1)
    begun = np.zeros(slots, np.bool_)
    outputs, states, moved = _Worst(), _Worst(), 0
    for k in range(steps):
        chosen = rng.permutation(slots)[: _count(rng, most)]
        fresh = ~begun[chosen] | (rng.random(len(chosen)) < 0.05)
        begun[chosen] = True
        feed = noise(rng, len(chosen))
        look = k % _STATES_EVERY == 0 or k == steps - 1
        before = _states(rows, slots) if look else {}
        outputs.note(step(rows, chosen, fresh, feed), step(host, chosen, fresh, feed))
        if look:
            others = np.setdiff1d(np.arange(slots), chosen)
            for state, array in _states(rows, slots).items():
                states.note(array, host.arena[state][:slots])
                moved += _differing(array[others], before[state][others])
    ok = outputs.value <= BOUND and states.value <= BOUND and not moved
    return {
        "check": name,
        "steps": steps,
        "worst_output": outputs.said,
        "worst_state": states.said,
        "moved_rows": moved,
        "bound": BOUND,
        "ok": ok,
    }


def another_thread_is_refused(name: str, path: Path, provider: Provider, slots: int) -> Result:
    """A step by another thread than the one that made the rows is an error; no state has moved, to the bit."""
    rows, rng = device_rows(path, provider, slots, slots), np.random.default_rng(7)
    step(rows, np.arange(slots), np.ones(slots, np.bool_), noise(rng, slots))
    before = _states(rows, slots)
    with ThreadPoolExecutor(1) as other:
        asked = other.submit(step, rows, np.arange(slots), np.zeros(slots, np.bool_), noise(rng, slots))
        refused = isinstance(asked.exception(), UsageError)
    moved = sum(_differing(array, before[state]) for state, array in _states(rows, slots).items())
    return {"check": name, "refused": refused, "moved_rows": moved, "ok": refused and not moved}


def _states(rows: Candidate, slots: int) -> dict[str, Array]:
    return {name: tensor.read()[:slots] for name, tensor in rows.arena.items()}


def _differing(a: Array, b: Array) -> int:
    """How many rows have other bits."""
    return sum(x.tobytes() != y.tobytes() for x, y in zip(a, b, strict=True))


def capture_moves_nothing(name: str, path: Path, provider: Provider, slots: int, batch: int) -> Result:
    """Fill all states with random numbers, make every bucket, prewarm: no row may have changed, to the bit."""
    rows, rng = device_rows(path, provider, slots, batch), np.random.default_rng(2)
    for tensor in rows.arena.values():
        tensor.write(rng.standard_normal(tensor.read().shape).astype(np.float32))
    before = _states(rows, slots)
    rows.capture()
    made = _states(rows, slots)
    rows.prewarm()
    warmed = _states(rows, slots)
    moved = {
        "moved_by_making": sum(_differing(made[s], before[s]) for s in before),
        "moved_by_prewarm": sum(_differing(warmed[s], made[s]) for s in before),
    }
    pinned = all(rows.bucket(size).pinned for size in (1, rows.batch))
    return {"check": name, "slots": slots, **moved, "pinned": pinned, "ok": not any(moved.values())}


def ticks_of(sessions: Sequence[str], index: int, features: Array) -> list[Tick]:
    """A tick of each session, with a row of `features` each."""
    closed = Stamps(0, 0, 0, 0, "clock")
    return [
        Tick(
            session,
            index,
            index * models.TICK_NS,
            {models.MODALITY: features[i]},
            {models.MODALITY: bool((i + index) % 3)},
            {models.MODALITY: (i * 7 + index) % 11 * 1_000_000_000 - 1},
            closed,
        )
        for i, session in enumerate(sessions)
    ]


def block_of(handles: Array, index: int, feed: Feed) -> Block:
    """A tick of each session with the rows of `feed`; absent where its `present` is 0."""
    here = feed["present"] > 0
    return Block(
        handles.astype(np.int64),
        np.full(len(handles), index, np.int64),
        np.full(len(handles), index * models.TICK_NS, np.int64),
        here,
        (feed["age"] * 1e9).astype(np.int64),
        (feed[f"input.{models.MODALITY}"][here[:, 0]],),
    )


def blocks_against_the_cpu(name: str, path: Path, provider: Provider, slots: int, steps: int) -> Result:
    """The same blocks through two engines, of some sessions each time; outputs and, at the end, states."""
    engines = [StepEngine(path, slots, p) for p in (provider, "cpu")]
    rng, outputs, states = np.random.default_rng(9), _Worst(), _Worst()
    for i in range(slots):
        for engine in engines:
            engine.open(f"session {i}")
    for k in range(steps):
        chosen = rng.permutation(slots)[: _count(rng, slots)]
        block = block_of(chosen, k, noise(rng, len(chosen)))
        said, right = (engine.step_block(block) for engine in engines)
        outputs.note(said.heads[models.HEAD], right.heads[models.HEAD])
    held, expected = (engine.snapshot_block(np.arange(slots)) for engine in engines)
    for state, rows in held.states.items():
        states.note(rows, expected.states[state])
    ok = outputs.value <= BOUND and states.value <= BOUND
    return {
        "check": name,
        "steps": steps,
        "worst_output": outputs.said,
        "worst_state": states.said,
        "bound": BOUND,
        "ok": ok,
    }


def engine_against_the_cpu(name: str, path: Path, provider: Provider, slots: int, steps: int) -> Result:
    """The same ticks through two engines, sessions opened, reset and closed on the way."""
    engines = [StepEngine(path, slots, p) for p in (provider, "cpu")]
    rng, worst = np.random.default_rng(3), _Worst()
    everyone = [f"session {i}" for i in range(slots)]
    for k in range(steps):
        chosen = [everyone[i] for i in rng.permutation(slots)[: _count(rng, slots)]]
        for session in chosen:
            what = rng.random()
            for engine in engines:
                if session in engine and what < 0.05:
                    engine.close(session)
                if session not in engine:
                    engine.open(session)
                elif what < 0.1:
                    engine.reset(session)
        ticks = ticks_of(chosen, k, noise(rng, len(chosen))[f"input.{models.MODALITY}"])
        said, right = (engine.step(ticks) for engine in engines)
        for a, b in zip(said, right, strict=True):
            worst.note(a.heads[models.HEAD], b.heads[models.HEAD])
    ok = worst.value <= BOUND and engines[0].provider == provider
    return {
        "check": name,
        "steps": steps,
        "worst_output": worst.said,
        "bound": BOUND,
        "active": engines[0].provider,
        "ok": ok,
    }
