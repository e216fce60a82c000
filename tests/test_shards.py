"""One engine over several processes: the same numbers, the same errors."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_engine import tick

from stream_mmrnn.config import Engine
from stream_mmrnn.engine import StepEngine
from stream_mmrnn.errors import Busy, DuplicateSession, ModelError, ProcessError, UnknownSession
from stream_mmrnn.shards import ShardedEngine, create


@pytest.fixture
def sharded(toy: Path) -> Iterator[ShardedEngine]:
    engine = ShardedEngine(toy, 12, processes=2, batch=4)
    yield engine
    engine.stop()


def test_it_computes_what_one_process_does(toy: Path, sharded: ShardedEngine) -> None:
    one = StepEngine(toy, 12)
    names = [f"s{i}" for i in range(12)]
    for engine in (one, sharded):
        for name in names:
            engine.open(name)
    rng = np.random.default_rng(0)
    at = dict.fromkeys(names, 0)
    for _ in range(25):
        ticks = []
        for i in rng.integers(0, 12, rng.integers(1, 16)):  # a session may come twice
            ticks.append(tick(names[i], at[names[i]], int(i)))
            at[names[i]] += 1
        if rng.random() < 0.2:
            one.reset(names[0])
            sharded.reset(names[0])
        for a, b in zip(one.step(ticks), sharded.step(ticks), strict=True):
            assert a.tick is b.tick
            assert a.heads["next"].tobytes() == b.heads["next"].tobytes()
            assert a.model == b.model
    sharded.prewarm()
    for name in names:
        a, b = one.arena.snapshot(name), sharded.snapshot(name)
        assert all(a[k].tobytes() == b[k].tobytes() for k in a)


def test_a_session_moves_from_shard_to_engine_and_back(toy: Path, sharded: ShardedEngine) -> None:
    alone = StepEngine(toy)
    alone.open("x")
    expected = [alone.step([tick("x", k)])[0].heads["next"].tobytes() for k in range(9)]
    sharded.open("x")
    got = [sharded.step([tick("x", k)])[0].heads["next"].tobytes() for k in range(3)]
    other = StepEngine(toy)
    other.open("x")
    other.arena.restore("x", sharded.snapshot("x"))
    got += [other.step([tick("x", k)])[0].heads["next"].tobytes() for k in range(3, 6)]
    sharded.close("x")
    sharded.open("x")
    sharded.restore("x", other.arena.snapshot("x"))
    got += [sharded.step([tick("x", k)])[0].heads["next"].tobytes() for k in range(6, 9)]
    assert got == expected


def test_errors_are_those_of_one_process(sharded: ShardedEngine) -> None:
    for i in range(12):
        sharded.open(f"s{i}")
    with pytest.raises(Busy, match="all 12 slots"):
        sharded.open("more")
    with pytest.raises(DuplicateSession):
        sharded.open("s0")
    with pytest.raises(UnknownSession):
        sharded.step([tick("nobody", 0)])
    sharded.close("s3")
    assert "s3" not in sharded
    assert len(sharded) == 11
    with pytest.raises(UnknownSession):
        sharded.reset("s3")
    sharded.open("more")


def test_a_shard_that_dies_is_an_error_and_no_hang(sharded: ShardedEngine) -> None:
    for i in range(4):
        sharded.open(f"s{i}")
    pid = sharded.pids[0]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ProcessError, match=f"process {pid}"):
        sharded.step([tick(f"s{i}", 0) for i in range(4)])


def test_a_model_that_is_none_is_said_before_a_process_starts(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        ShardedEngine(tmp_path / "no.onnx", 4)


def test_the_settings_choose(toy: Path) -> None:
    one = create(Engine(model=str(toy), provider="cpu"))
    assert isinstance(one, StepEngine)
    two = create(Engine(model=str(toy), provider="cpu", slots=4, processes=2))
    assert isinstance(two, ShardedEngine)
    two.stop()
