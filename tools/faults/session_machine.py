"""A hypothesis state machine of sessions that open, close, are evicted, are killed and resume.

After every action what `Sessions` says is compared with a model of what it must say; at the end every history of every
session is stepped alone, by an engine of one slot that has no other session, and each number of it must be the same
bits. Knows nothing about how many actions are asked for, nor what is made of the counts.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from stream_mmrnn.core.errors import Busy, DuplicateSession, Evicted, SessionError, UnknownSession
from stream_mmrnn.core.settings import StateSettings
from stream_mmrnn.core.types import ModelSpec, Stamps, Tick
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.sharded_engine import ShardedEngine
from stream_mmrnn.predict.snapshots import StateStore
from stream_mmrnn.serve.open_sessions import Notice
from stream_mmrnn.serve.sessions import Sessions

SECOND_NS = 1_000_000_000
SLOTS = 5
IDLE_S, TTL_S, EVERY = 30.0, 1000.0, 4
NAMES = tuple("abcdefgh")
NOWHERE = Stamps(0, 0, 0, 0, "")
RESET = -1
WHO = st.integers(0, 99)

Engine = StepEngine | ShardedEngine


def tick_of(spec: ModelSpec, session: str, index: int, key: int) -> Tick:
    """The same for the same arguments; `key` tells sessions of one name apart."""
    rng = np.random.default_rng([key, index])
    features = {m.name: rng.standard_normal(m.size).astype(np.float32) for m in spec.modalities}
    present = {m.name: bool(rng.integers(2)) for m in spec.modalities}
    age_ns = {m.name: int(rng.integers(-1, 20)) * SECOND_NS for m in spec.modalities}
    return Tick(session, index, index * spec.tick_ns, features, present, age_ns, NOWHERE)


class Life:
    """A session as its client knows it."""

    def __init__(self, key: int, token: str) -> None:
        self.key, self.token = key, token
        self.log: list[tuple[int, bytes]] = []
        """Each tick with what was said, and each reset as (RESET, b"")."""
        self.kept: int | None = None
        """The length of `log` that is on disk."""
        self.kept_ns = self.heard_ns = 0

    @property
    def last(self) -> int:
        return max((index for index, _ in self.log), default=-1)


class Found:
    """What a run counted."""

    def __init__(self) -> None:
        self.actions: Counter[str] = Counter()
        self.leaks = 0
        """Sessions that began with a state, their own old one or another's."""
        self.differing = 0
        """Predictions that are not the bits of the session alone."""
        self.compared = 0
        self.unnoticed = 0
        """Sessions that lost their slot, and no notice said so."""
        self.wrong: list[str] = []
        """Answers that were not those of the model."""


def machine(make: Callable[[], Engine], path: Path, found: Found, kill_one_in: int) -> type[RuleBasedStateMachine]:
    """A state machine over engines that `make` makes of the model at `path`; it adds to `found`.

    `kill_one_in`: how rarely a kill that could be is one: new processes take a second.
    """
    held: dict[str, Any] = {"engine": None, "keys": 0}
    reference = StepEngine(path, 1)
    spec = reference.spec

    class Machine(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.now_ns = 10**15
            self.folder = Path(tempfile.mkdtemp(prefix="stream-mmrnn-states-"))
            self.live: dict[str, Life] = {}
            self.gone: dict[str, Life] = {}
            """Not open, but on disk."""
            self.ended: list[Life] = []
            self.since_kill = self.since_cancel = 0
            self.begin()

        def begin(self) -> None:
            if held["engine"] is None:
                held["engine"] = make()
            state = StateSettings(idle_s=IDLE_S, ttl_s=TTL_S, snapshot_every=EVERY)
            self.sessions = Sessions(held["engine"], StateStore(self.folder, TTL_S), state)

        def did(self, what: str) -> None:
            found.actions[what] += 1
            self.since_kill += 1
            self.since_cancel += 1
            self.now_ns += SECOND_NS // 100
            if len(self.sessions) != len(self.live) or set(self.live) != {n for n in NAMES if n in self.sessions}:
                found.wrong.append(f"after {what} other sessions are open than should be")

        def expect(self, error: type[SessionError], call: Callable[[], object], what: str) -> None:
            try:
                call()
            except error as e:
                if isinstance(e, Busy) and e.retry_after_s <= 0:
                    found.wrong.append(f"{what}: busy without a hint")
                return
            except SessionError as e:
                found.wrong.append(f"{what}: {type(e).__name__} where {error.__name__} was due")
                return
            found.wrong.append(f"{what}: no error where {error.__name__} was due")

        def lives_on_disk(self, name: str) -> bool:
            return name in self.gone and self.now_ns - self.gone[name].kept_ns <= TTL_S * SECOND_NS

        def pick(self, who: int) -> str:
            """Mostly one who is open, sometimes one who left, now and then anybody."""
            of = sorted(self.live) if who % 10 < 7 else sorted(self.gone) if who % 10 < 9 else list(NAMES)
            return (of or list(NAMES))[who // 10 % len(of or NAMES)]

        # ---- actions -------------------------------------------------------------------------------------------

        @initialize(count=st.integers(2, SLOTS))
        def several(self, count: int) -> None:
            for name in NAMES[:count]:
                self.open(name)

        @rule(name=st.sampled_from(NAMES))
        def open_one(self, name: str) -> None:
            self.open(name)

        def open(self, name: str) -> None:
            def call() -> object:
                return self.sessions.open(name, now_ns=self.now_ns)

            if name in self.live:
                self.expect(DuplicateSession, call, "open twice")
            elif self.lives_on_disk(name):
                self.expect(Evicted, call, "open without the token")
            elif len(self.live) >= SLOTS:
                self.expect(Busy, call, "open beyond the slots")
            else:
                opened = self.sessions.open(name, now_ns=self.now_ns)
                if name in self.gone:
                    self.ended.append(self.gone.pop(name))
                held["keys"] += 1
                life = self.live[name] = Life(held["keys"], opened.token)
                life.heard_ns = self.now_ns
                if self.sessions.engine.snapshot(name) or opened.resumed or opened.next_index != 0:
                    found.leaks += 1
            self.did("open")

        @precondition(lambda self: self.gone)
        @rule(who=WHO, right=st.booleans())
        def reopen_one(self, who: int, right: bool) -> None:
            self.reopen(sorted(self.gone)[who % len(self.gone)], right)

        @rule(who=WHO, right=st.booleans())
        def reopen_any(self, who: int, right: bool) -> None:
            self.reopen(self.pick(who), right)

        def reopen(self, name: str, right: bool) -> None:
            life = self.live.get(name) or self.gone.get(name)
            token = life.token if life is not None and right else "wrong"

            def call() -> object:
                return self.sessions.open(name, token, now_ns=self.now_ns)

            if name in self.live:
                if not right:
                    self.expect(DuplicateSession, call, "take over with a wrong token")
                else:
                    opened = self.sessions.open(name, token, now_ns=self.now_ns)
                    self.live[name].heard_ns = self.now_ns
                    if opened.next_index != self.live[name].last + 1:
                        found.wrong.append("taken over at another tick")
            elif not self.lives_on_disk(name):
                self.expect(UnknownSession, call, "resume what is not kept")
            elif not right:
                self.expect(Evicted, call, "resume with a wrong token")
            elif len(self.live) >= SLOTS:
                self.expect(Busy, call, "resume beyond the slots")
            else:
                opened = self.sessions.open(name, token, now_ns=self.now_ns)
                life = self.live[name] = self.gone.pop(name)
                assert life.kept is not None
                if life.kept < len(life.log):  # what a crash took: sent again, or something else instead
                    taken = Life(life.key, life.token)
                    taken.log = list(life.log)
                    self.ended.append(taken)
                    del life.log[life.kept :]
                life.heard_ns = self.now_ns
                if opened.next_index != life.last + 1 or not opened.resumed or opened.token != token:
                    found.wrong.append("resumed at another tick, or with another token")
            self.did("reopen")

        @precondition(lambda self: self.live)
        @rule(rounds=st.integers(1, 6))
        def step_all(self, rounds: int) -> None:
            self.step(sorted(self.live) * rounds, 0)

        @rule(whos=st.lists(WHO, min_size=1, max_size=8), skip=st.integers(0, 2))
        def step_some(self, whos: list[int], skip: int) -> None:
            self.step([self.pick(who) for who in whos], skip)

        def step(self, names: list[str], skip: int) -> None:
            nexts: dict[str, int] = {}
            ticks = []
            for name in names:
                life = self.live.get(name)
                index = nexts.get(name, life.last + 1 + skip if life else 0)
                nexts[name] = index + 1
                ticks.append(tick_of(spec, name, index, life.key if life else 0))
            self.send(ticks)
            self.did("step")

        @precondition(lambda self: any(life.log for life in self.live.values()))
        @rule(data=st.data())
        def repeat(self, data: st.DataObject) -> None:
            """Ticks that were stepped, sent again, and one of them new."""
            name = data.draw(st.sampled_from(sorted(n for n, life in self.live.items() if life.log)))
            life = self.live[name]
            back = data.draw(st.integers(0, 4))
            first = max(life.last - back, 0)
            self.send([tick_of(spec, name, k, life.key) for k in range(first, life.last + 2)])
            self.did("repeat")

        def send(self, ticks: list[Tick]) -> None:
            errors: list[tuple[Tick, SessionError]] = []
            said = self.sessions.step(ticks, now_ns=self.now_ns, refused=lambda t, e: errors.append((t, e)))
            due = []
            for tick in ticks:
                life = self.live.get(tick.session)
                if life is None:
                    error = Evicted if self.lives_on_disk(tick.session) else UnknownSession
                    if not errors or errors[0][0] is not tick or type(errors[0][1]) is not error:
                        found.wrong.append(f"a tick of a session that is not open was not {error.__name__}")
                        return
                    errors.pop(0)
                else:
                    life.heard_ns = self.now_ns
                    if tick.index > life.last:
                        life.log.append((tick.index, b""))
                        due.append((life, len(life.log) - 1, tick))
            if errors or len(said) != len(due):
                found.wrong.append(f"{len(said)} predictions where {len(due)} were due")
                return
            for prediction, (life, at, tick) in zip(said, due, strict=True):
                if prediction.tick is not tick:
                    found.wrong.append("a prediction is of another tick")
                life.log[at] = (tick.index, b"".join(prediction.heads[h.name].tobytes() for h in spec.heads))

        @precondition(lambda self: self.since_cancel >= 5)
        @rule(who=WHO)
        def cancel(self, who: int) -> None:
            name = self.pick(who)

            def call() -> object:
                return self.sessions.cancel(name, now_ns=self.now_ns)

            if name in self.live:
                self.left([self.sessions.cancel(name, now_ns=self.now_ns)], {name}, "cancelled")
            else:
                self.expect(Evicted if self.lives_on_disk(name) else UnknownSession, call, "cancel")
            self.since_cancel = 0
            self.did("cancel")

        @rule(seconds=st.sampled_from((2, 12, 31)))
        def time_out(self, seconds: int) -> None:
            self.now_ns += seconds * SECOND_NS
            due = {n for n, life in self.live.items() if self.now_ns - life.heard_ns > IDLE_S * SECOND_NS}
            self.left(self.sessions.evict_idle(self.now_ns), due, "idle")
            self.did("time-out")

        def left(self, notices: list[Notice], due: set[str], reason: str) -> None:
            found.unnoticed += len(due ^ {n.session for n in notices})
            for notice in notices:
                life = self.gone[notice.session] = self.live.pop(notice.session)
                life.kept, life.kept_ns = len(life.log), self.now_ns
                if (notice.token, notice.next_index, notice.reason) != (life.token, life.last + 1, reason):
                    found.wrong.append("a notice says something else")

        @precondition(lambda self: self.gone)
        @rule(part=st.sampled_from((0.2, 0.6, 1.1)))
        def outlive(self, part: float) -> None:
            self.now_ns += round(part * TTL_S * SECOND_NS)
            self.left(self.sessions.evict_idle(self.now_ns), set(self.live), "idle")
            self.sessions.sweep(self.now_ns)
            for name in [n for n in self.gone if not self.lives_on_disk(n)]:
                self.ended.append(self.gone.pop(name))
            self.did("outlive")

        @rule(most=st.integers(1, 3))
        def keep(self, most: int) -> None:
            for name in self.sessions.save(self.now_ns, most):
                life = self.live[name]
                life.kept, life.kept_ns = len(life.log), self.now_ns
            self.did("keep")

        @precondition(lambda self: self.since_kill >= 10)
        @rule(roll=st.integers(0, 99))
        def kill(self, roll: int) -> None:
            """Everything that is in memory is lost."""
            if roll % kill_one_in != kill_one_in // 2:
                return
            engine, held["engine"] = held["engine"], None
            if isinstance(engine, ShardedEngine):
                for pid in engine.pids:
                    os.kill(pid, signal.SIGKILL)
            engine.stop()
            for name, life in self.live.items():
                if life.kept is None:
                    self.ended.append(life)  # its client is told that the session is unknown
                else:
                    self.gone[name] = life
            self.live.clear()
            self.since_kill = 0
            self.begin()
            self.did("kill")

        @rule(who=WHO)
        def reset(self, who: int) -> None:
            name = self.pick(who)

            def call() -> object:
                return self.sessions.reset(name, now_ns=self.now_ns)

            if name in self.live:
                call()
                self.live[name].log.append((RESET, b""))
                self.live[name].heard_ns = self.now_ns
            else:
                self.expect(Evicted if self.lives_on_disk(name) else UnknownSession, call, "reset")
            self.did("reset")

        @rule(who=WHO, right=st.booleans())
        def close(self, who: int, right: bool) -> None:
            name = self.pick(who)
            kept = self.lives_on_disk(name)
            token = self.gone[name].token if kept and right else "wrong"

            def call() -> object:
                return self.sessions.close(name, token, now_ns=self.now_ns)

            if name in self.live:
                call()
                self.ended.append(self.live.pop(name))
            elif kept and right:
                call()
                self.ended.append(self.gone.pop(name))
            else:
                self.expect(Evicted if kept else UnknownSession, call, "close")
            self.did("close")

        # ---- at the end ----------------------------------------------------------------------------------------

        def teardown(self) -> None:
            if self.live:
                self.step(sorted(self.live) * 2, 0)
            for life in [*self.ended, *self.live.values(), *self.gone.values()]:
                self.compare(life)
            for name in list(self.live):
                self.sessions.close(name, now_ns=self.now_ns)
            if len(held["engine"]):
                found.wrong.append("slots are taken by no session")
            shutil.rmtree(self.folder)

        def compare(self, life: Life) -> None:
            reference.open("alone")
            for index, said in life.log:
                if index == RESET:
                    reference.reset("alone")
                    continue
                heads = reference.step([tick_of(spec, "alone", index, life.key)])[0].heads
                found.compared += 1
                found.differing += b"".join(heads[h.name].tobytes() for h in spec.heads) != said
            reference.close("alone")

    def end() -> None:
        if held["engine"] is not None:
            held["engine"].stop()
            held["engine"] = None

    Machine.end = staticmethod(end)  # type: ignore[attr-defined]
    return Machine


def run(make: Callable[[], Engine], path: Path, actions: int, *, kill_one_in: int = 1, steps: int = 30) -> Found:
    """Take at least so many actions, the same ones in every run."""
    found = Found()
    kind = machine(make, path, found, kill_one_in)
    profile = settings(
        max_examples=max(min(actions // steps, 20), 1),
        stateful_step_count=steps,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    number = 0
    try:
        while found.actions.total() < actions and not found.wrong:
            kind_of_round = type(f"Round{number}", (kind,), {})
            seed(number)(kind_of_round)
            run_state_machine_as_test(kind_of_round, settings=profile)
            number += 1
    finally:
        kind.end()  # type: ignore[attr-defined]
    return found
