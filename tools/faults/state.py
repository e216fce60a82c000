"""State: does state leak between sessions or get lost, and are refusals immediate?"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from stream_mmrnn.bench import models
from stream_mmrnn.core.clock import now_ns, wall_offset_ns
from stream_mmrnn.core.errors import Busy, DuplicateSession, Evicted, SessionError, SnapshotError, UnknownSession
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.core.settings import AdmissionSettings, StateSettings
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.sharded_engine import ShardedEngine
from stream_mmrnn.predict.snapshots import StateStore
from stream_mmrnn.serve.sessions import Sessions
from tools.faults import session_machine
from tools.faults.promise import Figure, Say
from tools.faults.session_machine import SLOTS, tick_of

TITLE = "State of sessions"
NOT_PROMISED = (
    "A state that survives a power cut on a disk that says it has written what it has not.",
    "What a session did after its newest snapshot when its engine is killed: it is told from where to send again.",
    "Times to live that are right although the wall clock was stepped between two runs of an engine.",
    "A folder of states that two engines use at once.",
)

HIDDEN = 16
REFUSAL_MS = 10.0


def run(quick: bool, say: Say) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="stream-mmrnn-state-") as folder:
        path = models.write(Path(folder), HIDDEN)
        yield from _actions(path, quick, say)
        yield from _resumed(path, Path(folder) / "resumed", quick)
        yield from _refusals(path, Path(folder) / "refusals", quick)
        yield from _killed_saves(Path(folder) / "saves", quick, say)


def _actions(path: Path, quick: bool, say: Say) -> Iterator[Figure]:
    """StepEngine runs batches of 1, 2 and 4, so five sessions are two runs; ShardedEngine has two processes."""
    one, many = (400, 150) if quick else (10_000, 2_000)
    kinds: tuple[tuple[str, Callable[[], session_machine.Engine], int, int], ...] = (
        ("one process", lambda: StepEngine(path, SLOTS, batch=4), one, 1),
        ("two processes", lambda: ShardedEngine(path, SLOTS, processes=2, batch=2), many, 3 if quick else 4),
    )
    all_found = []
    for name, make, actions, kill_one_in in kinds:
        found = session_machine.run(make, path, actions, kill_one_in=kill_one_in)
        told = ", ".join(f"{count} {what}" for what, count in found.actions.most_common())
        say(f"{name}: {found.actions.total()} actions ({told}); {found.compared} predictions compared")
        for wrong in found.wrong[:5]:
            say(f"wrong: {wrong}")
        all_found.append(found)
    done = sum(f.actions.total() for f in all_found)
    compared = sum(f.compared for f in all_found)
    about = f"of {done} actions (open, step, cancel, time-out, kill, reopen, reset, close), over one and two processes"
    yield Figure("state_actions_count", f"done by the state machine: {about[3:]}", done, "", one + many, ">=")
    yield Figure(
        "state_leaks_sessions",
        "sessions that began with a state, another's or an old one",
        sum(f.leaks for f in all_found),
        "sessions",
        0,
        "==",
    )
    yield Figure(
        "state_differing_predictions",
        f"of {compared}, interleaved, that are not the bits of the session alone",
        sum(f.differing for f in all_found),
        "predictions",
        0,
        "==",
    )
    yield Figure(
        "state_unnoticed_evictions_sessions",
        "sessions that lost their slot without a notice",
        sum(f.unnoticed for f in all_found),
        "sessions",
        0,
        "==",
    )
    wrong = sum(len(f.wrong) for f in all_found)
    yield Figure("state_wrong_answers_count", "answers and errors that were not the due ones", wrong, "", 0, "==")


def _resumed(path: Path, folder: Path, quick: bool) -> Iterator[Figure]:
    """Every session is evicted a few times, and goes on over the other kind of engine."""
    sessions, ticks, every = (12, 40, 10) if quick else (60, 200, 20)
    names = [f"s{i}" for i in range(sessions)]
    alone = StepEngine(path, 1)
    expected = []
    for key in range(sessions):
        alone.open("x")
        expected.append([_said(alone.step([tick_of(alone.spec, "x", k, key)])[0].heads) for k in range(ticks)])
        alone.close("x")
    engines = (StepEngine(path, sessions), ShardedEngine(path, sessions, processes=2))
    store = StateStore(folder, 3600)
    at_ns, differing = 10**15, 0
    tokens: list[str | None] = [None] * sessions
    try:
        for part, start in enumerate(range(0, ticks, every)):
            served = Sessions(engines[part % 2], store, StateSettings(idle_s=1))
            for i, name in enumerate(names):
                opened = served.open(name, tokens[i], now_ns=at_ns)
                tokens[i] = opened.token
                differing += opened.next_index != start
            for k in range(start, start + every):
                said = served.step([tick_of(alone.spec, n, k, i) for i, n in enumerate(names)], now_ns=at_ns)
                differing += sum(_said(p.heads) != expected[i][k] for i, p in enumerate(said))
            at_ns += 2 * 10**9
            served.evict_idle(at_ns)
    finally:
        for engine in engines:
            engine.stop()
    what = f"of {sessions * ticks}, of sessions evicted every {every} ticks and resumed by token over another engine"
    yield Figure("state_resumed_differing_predictions", what, differing, "predictions", 0, "==")


def _said(heads: dict[str, object]) -> bytes:
    return b"".join(head.tobytes() for head in heads.values())  # type: ignore[attr-defined]


def _refusals(path: Path, folder: Path, quick: bool) -> Iterator[Figure]:
    """Each error, asked for often, beside sessions that have filled all slots of a measured engine."""
    times = 200 if quick else 2000
    store = StateStore(folder, 3600)
    engine = StepEngine(path, SLOTS)
    served = Sessions(
        engine,
        store,
        StateSettings(idle_s=1e6),
        admission=AdmissionSettings(),
        wall_offset_ns=wall_offset_ns(),
    )
    served.open("asleep", now_ns=now_ns())
    served.cancel("asleep", now_ns=now_ns())
    for i in range(SLOTS):
        served.open(f"s{i}", now_ns=now_ns())
    tick = tick_of(engine.spec, "unknown", 0, 0)
    asleep = tick_of(engine.spec, "asleep", 0, 0)
    asked: dict[str, tuple[type[SessionError], Callable[[], object]]] = {
        "busy": (Busy, lambda: served.open("more", now_ns=now_ns())),
        "unknown": (UnknownSession, lambda: served.step([tick], now_ns=now_ns())),
        "duplicate": (DuplicateSession, lambda: served.open("s0", now_ns=now_ns())),
        "evicted": (Evicted, lambda: served.step([asleep], now_ns=now_ns())),
    }
    for name, (error, call) in asked.items():
        took = Histogram()
        for _ in range(times):
            began_ns = now_ns()
            try:
                call()
            except error:
                took.add(now_ns() - began_ns)
        missing = times - took.count
        yield Figure(
            f"state_refusal_{name}_p99_ms",
            f"until {error.__name__} is raised, p99 of {times}"
            + (f"; {missing} times it was not raised" if missing else ""),
            took.percentile(99) / 1e6 if not missing else float("inf"),
            "ms",
            REFUSAL_MS,
            timed=not missing,
        )


_SAVER = """
import sys
from pathlib import Path
import numpy as np
from stream_mmrnn.predict.snapshots import Snapshot, StateStore
store = StateStore(Path(sys.argv[1]), 1e9)
print("ready", flush=True)
for k in range(int(sys.argv[2]), 1 << 30):
    for name in ("small", "large"):
        state = {"h": np.full(32 if name == "small" else 1 << 18, k, np.float32)}
        store.save(Snapshot(name, "m", k, state), 10**18)
        print(name, k, flush=True)
"""


def _killed_saves(folder: Path, quick: bool, say: Say) -> Iterator[Figure]:
    """A process saves states of 128 bytes and 1 MB in turn, and is killed at a seeded moment."""
    rounds = 6 if quick else 40
    rng = random.Random(0)
    store = StateStore(folder, 1e9)
    broken = older = saves = 0
    newest: dict[str, int] = {}
    for _ in range(rounds):
        first = max(newest.values(), default=0) + 1
        child = subprocess.Popen(
            [sys.executable, "-c", _SAVER, str(folder), str(first)], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(rng.uniform(0.0, 0.2))
        child.send_signal(signal.SIGKILL)
        for line in child.stdout.read().splitlines():  # what it said of finished saves is still in the pipe
            if line.count(" ") == 1:
                name, k = line.split()
                newest[name] = int(k)
                saves += 1
        child.wait()
        child.stdout.close()
        for name, k in newest.items():
            try:
                found = store.load(name, 10**18)
            except SnapshotError as e:
                say(f"broken: {e}")
                broken += 1
                continue
            if found is None or not (found.state["h"] == found.tick_index).all():
                broken += 1
            elif found.tick_index < k:
                older += 1
    left = sum(1 for path in folder.iterdir() if path.suffix == ".tmp")
    store.sweep(time.time_ns() + 120 * 10**9)
    after = sum(1 for path in folder.iterdir() if path.suffix == ".tmp")
    say(f"{rounds} processes killed while they saved, {saves} saves done, {left} half-written files swept away")
    where = f"after each of {rounds} processes was killed while it saved"
    yield Figure("state_killed_saves_broken_count", f"states that are not whole {where}", broken, "", 0, "==")
    yield Figure("state_killed_saves_older_count", f"states older than the last one saved, {where}", older, "", 0, "==")
    yield Figure("state_killed_saves_left_files", "half-written files after the next sweep", after, "files", 0, "==")
