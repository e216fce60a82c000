"""Blocks through engines: any mixture of blocks, ticks, resets, snapshots and moves equals each session alone."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import toy_model
from block_machine import Blocks
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from toy_ticks import block_of, tick

from stream_mmrnn.core.block import StateBlock
from stream_mmrnn.core.errors import BadTick, SessionError, UnknownSession
from stream_mmrnn.predict.engine import StepEngine


def test_any_mixture_equals_each_session_alone(toy: Path) -> None:
    machine = type("OfToy", (Blocks,), {"path": toy})
    run_state_machine_as_test(machine, settings=settings(max_examples=25, stateful_step_count=40, deadline=None))


def test_a_refused_block_steps_nothing(toy: Path) -> None:
    engine = StepEngine(toy, 4)
    for name in "abc":
        engine.open(name)
    handles = [engine.handle(name) for name in "abc"]
    block = block_of([tick(name, 0, i) for i, name in enumerate("abc")], handles)
    engine.step_block(block)
    before = engine.snapshot_block(np.array(handles)).states["h"].tobytes()

    def refused(error: type[SessionError], words: str, **change: object) -> None:
        with pytest.raises(error, match=words):
            engine.step_block(msgspec.structs.replace(block, **change))
        assert engine.snapshot_block(np.array(handles)).states["h"].tobytes() == before

    a, b, c = handles
    refused(UnknownSession, "handle 3 belongs to no open session", handles=np.array([a, b, 3]))
    refused(UnknownSession, "handle -1 belongs", handles=np.array([a, -1, c]))
    refused(UnknownSession, "handle 4 belongs", handles=np.array([a, 4, c]))
    refused(BadTick, f"handle {b} occurs twice", handles=np.array([a, b, b]))
    refused(BadTick, "a block of 3 ticks was refused: expected the features of 3", features=block.features[:2])
    refused(BadTick, "`age_ns` as int64", age_ns=block.age_ns[:, :2])
    one = block.take(np.array([True, False, False]))
    for handle in (3, -1, 4):
        with pytest.raises(UnknownSession, match=f"handle {handle} belongs"):
            engine.step_block(msgspec.structs.replace(one, handles=np.array([handle])))
    engine.close("b")
    refused_handles = np.array(handles)
    with pytest.raises(UnknownSession, match=f"handle {b} belongs"):
        engine.step_block(block)
    with pytest.raises(UnknownSession, match=f"handle {b} belongs"):
        engine.snapshot_block(refused_handles)
    with pytest.raises(UnknownSession, match="'b' is not open"):
        engine.handle("b")


def test_states_of_another_model_are_refused_and_nothing_changes(toy: Path) -> None:
    engine = StepEngine(toy, 3)
    for name in "ab":
        engine.open(name)
    handles = np.array([engine.handle(name) for name in "ab"])
    engine.step([tick(name, 0) for name in "ab"])
    before = engine.snapshot_block(handles)
    h = before.states["h"]
    for fresh, states in (
        (np.zeros(2, np.bool_), {}),
        (np.zeros(2, np.bool_), {"h": h[:, :3]}),
        (np.zeros(2, np.bool_), {"h": h.astype(np.float64)}),
        (np.zeros(3, np.bool_), {"h": np.zeros((3, toy_model.HIDDEN), np.float32)}),
    ):
        with pytest.raises(SessionError, match=r"do not fit state 'h'|states of 2 sessions"):
            engine.restore_block(handles, StateBlock(fresh, states))
    with pytest.raises(UnknownSession, match="handle 2 belongs"):
        engine.restore_block(np.array([0, 2]), before)
    assert engine.snapshot_block(handles).states["h"].tobytes() == h.tobytes()
    engine.restore_block(handles, StateBlock(np.array([True, False]), {"h": h}))
    assert engine.snapshot("a") == {}
    assert not engine.snapshot_block(handles).states["h"][0].any()  # what a slot held before is of no use
    assert engine.snapshot("b")["h"].tobytes() == h[1].tobytes()


def test_the_ticks_of_a_few_sessions_are_stepped_in_as_few_runs_as_their_ticks_need(toy: Path) -> None:
    engine = StepEngine(toy, 3)
    for name in "abc":
        engine.open(name)
    ticks = [tick(name, k) for name in "abc" for k in range(4)]  # each session's ticks one after another
    done = engine.step(ticks)
    assert [p.tick for p in done] == ticks
    assert len({p.step_start_ns for p in done}) == 4
