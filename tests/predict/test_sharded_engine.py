"""One engine over several processes: the same results and errors as one process."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import toy_model
from block_machine import Blocks
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from toy_ticks import block_of, tick

from stream_mmrnn.core.block import Block, BlockPredictions, StateBlock
from stream_mmrnn.core.errors import (
    BadTick,
    Busy,
    DuplicateSession,
    ModelError,
    SessionError,
    ShardDied,
    UnknownSession,
    UsageError,
)
from stream_mmrnn.core.settings import EngineSettings
from stream_mmrnn.predict.engine import StepEngine, move
from stream_mmrnn.predict.protocols import Engine
from stream_mmrnn.predict.sharded_engine import ShardedEngine, create

pytestmark = pytest.mark.process


@pytest.fixture
def sharded(toy: Path) -> Iterator[ShardedEngine]:
    engine = ShardedEngine(toy, 12, processes=2, batch=4)
    yield engine
    engine.stop()


def test_results_equal_those_of_one_process(toy: Path, sharded: ShardedEngine) -> None:
    one = StepEngine(toy, 12)
    names = [f"s{i}" for i in range(12)]
    for engine in (one, sharded):
        for name in names:
            engine.open(name)
    rng = np.random.default_rng(0)
    at = dict.fromkeys(names, 0)
    for _ in range(25):
        ticks = []
        for i in rng.integers(0, 12, rng.integers(1, 16)):  # a session may occur twice
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
    move("x", sharded, other)
    assert "x" not in sharded
    got += [other.step([tick("x", k)])[0].heads["next"].tobytes() for k in range(3, 6)]
    move("x", other, sharded)
    got += [sharded.step([tick("x", k)])[0].heads["next"].tobytes() for k in range(6, 9)]
    assert got == expected


def test_errors_equal_those_of_one_process(sharded: ShardedEngine) -> None:
    for i in range(12):
        sharded.open(f"s{i}")
    with pytest.raises(Busy, match="all 12 slots"):
        sharded.open("more")
    with pytest.raises(DuplicateSession):
        sharded.open("s0")
    with pytest.raises(UnknownSession):
        sharded.step([tick("unknown", 0)])
    sharded.close("s3")
    assert "s3" not in sharded
    assert len(sharded) == 11
    with pytest.raises(UnknownSession):
        sharded.reset("s3")
    sharded.open("more")


def test_a_session_moves_between_processes(toy: Path, sharded: ShardedEngine) -> None:
    alone = StepEngine(toy)
    alone.open("x")
    sharded.open("x")
    for k in range(12):
        assert sharded.shard("x") == k % 2
        [a], [b] = alone.step([tick("x", k)]), sharded.step([tick("x", k)])
        assert a.heads["next"].tobytes() == b.heads["next"].tobytes()
        sharded.move("x", (k + 1) % 2)
    with pytest.raises(UsageError, match="0 to 1"):
        sharded.move("x", 2)
    with pytest.raises(UnknownSession):
        sharded.move("y", 1)
    # a full process refuses the session, and nothing changes
    for i in range(11):
        sharded.open(f"s{i}")
    with pytest.raises(Busy):
        sharded.move("x", 1)
    assert sharded.shard("x") == 0
    assert sharded.snapshot("x")["h"].tobytes() == alone.snapshot("x")["h"].tobytes()


def test_a_failed_move_leaves_the_session_where_it_was(toy: Path, tmp_path: Path) -> None:
    one, full, other = StepEngine(toy), StepEngine(toy), StepEngine(toy_model.make(tmp_path / "b.onnx", seed=1))
    one.open("x")
    one.step([tick("x", 0)])
    before = one.snapshot("x")["h"].tobytes()
    full.open("y")
    with pytest.raises(Busy):
        move("x", one, full)
    with pytest.raises(SessionError, match="another model"):
        move("x", one, other)
    with pytest.raises(UnknownSession):
        move("z", one, full)
    assert one.snapshot("x")["h"].tobytes() == before
    assert "x" not in other


def test_a_dead_shard_is_replaced_and_lost_sessions_are_named(toy: Path, sharded: ShardedEngine) -> None:
    alone = StepEngine(toy, 12)
    names = [f"s{i}" for i in range(4)]
    for engine in (alone, sharded):
        for name in names:
            engine.open(name)
    for engine in (alone, sharded):
        engine.step([tick(name, 0) for name in names])
    kept = {name: sharded.snapshot(name) for name in names}
    pid = sharded.pids[0]
    theirs = {name for name in names if sharded.shard(name) == 0}
    assert len(theirs) == 2
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ShardDied, match=f"process {pid}") as caught:
        sharded.step([tick(name, k) for k in (1, 2) for name in names])
    assert set(caught.value.sessions) == theirs
    # the others' first ticks were stepped, the second ones not
    made = [(p.tick.session, p.tick.index) for p in caught.value.predictions]
    assert made == [(name, 1) for name in names if name not in theirs]
    assert pid not in sharded.pids
    for name in caught.value.sessions:
        sharded.restore(name, kept[name])
    sharded.step([tick(name, 1) for name in sorted(theirs)])
    alone.step([tick(name, 1) for name in names])
    for k in range(2, 6):
        for a, b in zip(*(e.step([tick(n, k) for n in names]) for e in (alone, sharded)), strict=True):
            assert a.heads["next"].tobytes() == b.heads["next"].tobytes()
    # without their snapshots they start over
    os.kill(sharded.pids[1], signal.SIGKILL)
    with pytest.raises(ShardDied) as caught:
        sharded.snapshot(next(n for n in names if n not in theirs))
    [lost, _] = caught.value.sessions
    fresh = StepEngine(toy)
    fresh.open(lost)
    [a], [b] = fresh.step([tick(lost, 9)]), sharded.step([tick(lost, 9)])
    assert a.heads["next"].tobytes() == b.heads["next"].tobytes()


@pytest.mark.slow
def test_any_mixture_of_blocks_and_ticks_equals_each_session_alone(toy: Path, sharded: ShardedEngine) -> None:
    class OfShards(Blocks):
        path = toy

        def make(self) -> list[Engine]:
            for name in self.names:
                if name in sharded:
                    sharded.close(name)
            return [StepEngine(toy, 6, batch=64), sharded]

    run_state_machine_as_test(OfShards, settings=settings(max_examples=15, stateful_step_count=40, deadline=None))


def test_a_handle_stays_when_a_session_moves_between_processes(toy: Path, sharded: ShardedEngine) -> None:
    alone = StepEngine(toy, 5)
    names = [f"s{i}" for i in range(5)]
    for engine in (alone, sharded):
        for name in names:
            engine.open(name)
    handles = [sharded.handle(name) for name in names]
    for k in range(8):
        ticks = [tick(name, k, i) for i, name in enumerate(names)]
        a = alone.step_block(block_of(ticks, [alone.handle(name) for name in names]))
        b = sharded.step_block(block_of(ticks, handles))
        assert a.heads["next"].tobytes() == b.heads["next"].tobytes()
        sharded.move("s1", 1 - sharded.shard("s1"))
        sharded.move("s4", k % 2)
        assert [sharded.handle(name) for name in names] == handles
    sharded.close("s1")
    with pytest.raises(UnknownSession, match=f"handle {handles[1]} belongs"):
        sharded.step_block(block_of(ticks, handles))
    with pytest.raises(BadTick, match="occurs twice"):
        sharded.step_block(block_of(ticks[:1] * 2, handles[:1] * 2))
    with pytest.raises(BadTick, match="was refused"):
        sharded.step_block(block_of(ticks[:1], handles[:2]))
    with pytest.raises(SessionError, match="do not fit state 'h'"):
        sharded.restore_block(np.array(handles[:1]), StateBlock(np.zeros(1, np.bool_), {}))


def test_the_block_of_a_dead_shard_names_what_was_stepped(toy: Path, sharded: ShardedEngine) -> None:
    alone = StepEngine(toy, 4)
    names = [f"s{i}" for i in range(4)]
    for engine in (alone, sharded):
        for name in names:
            engine.open(name)
    handles = [sharded.handle(name) for name in names]

    def blocks(k: int) -> list[Block]:
        ticks = [tick(name, k, i) for i, name in enumerate(names)]
        return [block_of(ticks, [engine.handle(name) for name in names]) for engine in (alone, sharded)]

    for engine, block in zip((alone, sharded), blocks(0), strict=True):
        engine.step_block(block)
    kept = sharded.snapshot_block(np.array(handles))
    os.kill(sharded.pids[0], signal.SIGKILL)
    mine, theirs = blocks(1)
    expected = alone.step_block(mine).heads["next"]
    with pytest.raises(ShardDied) as caught:
        sharded.step_block(theirs)
    lost = np.array([name in caught.value.sessions for name in names])
    assert lost.sum() == 2
    stepped: BlockPredictions = caught.value.block
    assert stepped.handles.tolist() == np.array(handles)[~lost].tolist()
    assert stepped.heads["next"].tobytes() == expected[~lost].tobytes()
    again = StateBlock(kept.fresh[lost], {name: rows[lost] for name, rows in kept.states.items()})
    sharded.restore_block(np.array(handles)[lost], again)
    assert sharded.step_block(theirs.take(lost)).heads["next"].tobytes() == expected[lost].tobytes()


def test_a_bad_model_is_reported_before_a_process_starts(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        ShardedEngine(tmp_path / "no.onnx", 4)


def test_the_settings_choose_the_engine(toy: Path) -> None:
    one = create(EngineSettings(model=str(toy), provider="cpu"))
    assert isinstance(one, StepEngine)
    two = create(EngineSettings(model=str(toy), provider="cpu", slots=4, processes=2))
    assert isinstance(two, ShardedEngine)
    two.stop()
