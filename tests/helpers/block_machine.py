"""A state machine: six sessions on two engines, stepped as blocks and ticks, compared with an engine for each alone."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from toy_ticks import block_of, tick

from stream_mmrnn.core.block import StateBlock
from stream_mmrnn.core.types import Tick
from stream_mmrnn.predict.engine import StepEngine, move
from stream_mmrnn.predict.protocols import Engine

KINDS = st.sampled_from([np.float32, np.float16])


class Blocks(RuleBasedStateMachine):
    """Six sessions on two engines with other batches; each one's reference is an engine that has it alone."""

    path: Path
    names = tuple("abcdef")

    def __init__(self) -> None:
        super().__init__()
        self.engines: list[Engine] = self.make()
        self.at = {name: i % 2 for i, name in enumerate(self.names)}
        """By session: the engine that has it. Blocks of the first one are split into runs of two."""
        for name in self.names:
            self.engines[self.at[name]].open(name)
        self.alone = StepEngine(self.path)
        self.states: dict[str, dict[str, np.ndarray]] = {name: {} for name in self.names}
        self.saved: list[tuple[tuple[str, ...], StateBlock, list[dict[str, np.ndarray]]]] = []
        self.index = 0

    def make(self) -> list[Engine]:
        return [StepEngine(self.path, 6, batch=2), StepEngine(self.path, 7, batch=64)]

    def expected(self, t: Tick) -> bytes:
        self.alone.open(t.session)
        self.alone.restore(t.session, self.states[t.session])
        said = self.alone.step([t])[0].heads["next"].tobytes()
        self.states[t.session] = self.alone.snapshot(t.session)
        self.alone.close(t.session)
        return said

    def some(self, data: st.DataObject, which: int, unique: bool) -> list[str]:
        mine = [name for name in self.names if self.at[name] == which]
        return data.draw(st.lists(st.sampled_from(mine), unique=unique, max_size=9)) if mine else []

    def ticks(self, names: list[str], kind: type[np.floating]) -> list[Tick]:
        self.index += 1
        return [tick(name, self.index, i, kind) for i, name in enumerate(names)]

    @rule(which=st.integers(0, 1), data=st.data(), kind=KINDS)
    def step_block(self, which: int, data: st.DataObject, kind: type[np.floating]) -> None:
        engine, ticks = self.engines[which], self.ticks(self.some(data, which, unique=True), kind)
        block = block_of(ticks, [engine.handle(t.session) for t in ticks], kind)
        done = engine.step_block(block)
        assert len(done) == len(ticks)
        assert done.model == engine.spec.sha256
        assert done.step_start_ns <= done.step_end_ns
        for column, same in zip(
            (done.handles, done.indices, done.event_ns), msgspec.structs.astuple(block), strict=False
        ):
            assert column.tobytes() == same.tobytes()
        for t, row in zip(ticks, done.heads["next"], strict=True):
            assert row.tobytes() == self.expected(t)

    @rule(which=st.integers(0, 1), data=st.data())
    def step(self, which: int, data: st.DataObject) -> None:
        ticks = self.ticks(self.some(data, which, unique=False), np.float32)
        for t, p in zip(ticks, self.engines[which].step(ticks), strict=True):
            assert p.tick is t
            assert p.heads["next"].tobytes() == self.expected(t)

    @rule(name=st.sampled_from(names))
    def step_one(self, name: str) -> None:
        [t] = self.ticks([name], np.float32)
        assert self.engines[self.at[name]].step([t])[0].heads["next"].tobytes() == self.expected(t)

    @rule(name=st.sampled_from(names))
    def reset(self, name: str) -> None:
        self.engines[self.at[name]].reset(name)
        self.states[name] = {}

    @rule(which=st.integers(0, 1), data=st.data())
    def snapshot(self, which: int, data: st.DataObject) -> None:
        names = self.some(data, which, unique=True)
        engine = self.engines[which]
        states = engine.snapshot_block(np.array([engine.handle(name) for name in names], np.int64))
        self.saved.append((tuple(names), states, [self.states[name] for name in names]))

    @precondition(lambda self: self.saved)
    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        """Into any sessions of one engine, whichever they were of."""
        _, states, expected = data.draw(st.sampled_from(self.saved))
        which = data.draw(st.integers(0, 1))
        mine = [name for name in self.names if self.at[name] == which]
        if len(mine) < len(states):
            return
        names = data.draw(st.permutations(mine))[: len(states)]
        engine = self.engines[which]
        engine.restore_block(np.array([engine.handle(name) for name in names], np.int64), states)
        self.states |= dict(zip(names, expected, strict=True))

    @rule(name=st.sampled_from(names))
    def move(self, name: str) -> None:
        here = self.at[name]
        move(name, self.engines[here], self.engines[1 - here])
        self.at[name] = 1 - here

    @rule()
    def prewarm(self) -> None:
        for engine in self.engines:
            engine.prewarm()

    @invariant()
    def states_are_what_they_would_be_alone(self) -> None:
        for which, engine in enumerate(self.engines):
            names = [name for name in self.names if self.at[name] == which]
            block = engine.snapshot_block(np.array([engine.handle(name) for name in names], np.int64))
            for i, name in enumerate(names):
                expected = {k: v.tobytes() for k, v in self.states[name].items()}
                assert {k: v.tobytes() for k, v in block.row(i).items()} == expected
                assert {k: v.tobytes() for k, v in engine.snapshot(name).items()} == expected
