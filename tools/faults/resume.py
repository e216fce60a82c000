"""Engines killed in the middle of live sessions, and sessions moved between engines and shards.

The session is a real one of synthetic sources with the default model: the supervisor and its processes, a recording,
and a kill at seeded moments. What it is compared with is a replay of its recording, which was not interrupted.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.settings import EngineSettings
from stream_mmrnn.core.types import Envelope, Stamps, Tick
from stream_mmrnn.live.session import LiveSession, for_its_model
from stream_mmrnn.offline.replay import replay
from stream_mmrnn.predict.engine import Engine, StepEngine, move
from stream_mmrnn.predict.sharded_engine import ShardedEngine
from stream_mmrnn.recording.mcap_file import Recording
from tools.faults.promise import Figure, Say

TITLE = "Snapshot, resume, migrate"
NOT_PROMISED = (
    "An engine and the journal that keeps its snapshots, killed together: the session then begins anew, and says so.",
    "Three engines in a row that end on the same messages: the session begins anew behind them.",
)
_SYNTHETIC = {"sources.vision": "synthetic", "sources.audio": "synthetic", "sources.text": "synthetic"}
_GIVE_UP_NS = 20_000_000_000


class _Kills:
    """Kills the engine of a running session at seeded moments, and looks when new ticks come again."""

    def __init__(self, session: LiveSession, count: int, seed: int) -> None:
        self._engine = next(n for n in session.supervisor.nodes if n.name == "engine")
        self._supervisor = session.supervisor
        self._chance, self._left = random.Random(seed), count
        self._at_ns = 0
        self._killed_ns = self._due_ns = 0
        self._done_ns = 0
        self.seconds: list[float] = []
        self.said: dict[int, Any] = {}
        self.different = 0
        """Ticks that were said again with other numbers."""

    def observe(self, envelope: Envelope) -> None:
        if envelope.topic != topics.PREDICTION:
            return
        try:
            p = wire.unpack(envelope.payload, wire.PredictionMessage)
        except WireError:
            return
        new = p.tick not in self.said
        content = (p.heads, p.present, p.age_ns)
        self.different += self.said.setdefault(p.tick, content) != content
        if self._killed_ns and new and envelope.publish_ns > self._killed_ns:
            self.seconds.append((envelope.publish_ns - self._killed_ns) / 1e9)
            self._killed_ns = self._due_ns = 0
            self._done_ns = now_ns() if not self._left else 0

    def often(self) -> None:
        if self._killed_ns or not self._left or not self.said:
            return
        if not self._due_ns:
            self._due_ns = now_ns() + round(self._chance.uniform(1.2, 3.2) * 1e9)
        process = self._engine.process
        if now_ns() >= self._due_ns and process is not None and process.pid and process.exitcode is None:
            self._left -= 1
            self._killed_ns = now_ns()
            os.kill(process.pid, signal.SIGKILL)

    def alive(self) -> bool:
        """Until a second after the last one is back."""
        opened_ns = self._supervisor.opened_ns
        if self._killed_ns and now_ns() - self._killed_ns > _GIVE_UP_NS:
            self.seconds.append(_GIVE_UP_NS / 1e9)
            return False
        if opened_ns and now_ns() - opened_ns > 120_000_000_000:
            return False
        return not self._done_ns or now_ns() - self._done_ns < 1_000_000_000


def _run(folder: Path, count: int, seed: int, every: int, say: Say) -> tuple[_Kills, dict[str, Any], Path]:
    path = folder / f"{seed}.mcap"
    settings = config.load(
        None, {**_SYNTHETIC, "dashboard.enabled": False, "record.path": str(path), "state.snapshot_every": every}
    )
    kills: list[_Kills] = []
    session = LiveSession(
        for_its_model(settings),
        True,
        lambda: not kills or kills[0].alive(),
        say,
        lambda envelope: kills[0].observe(envelope),
        lambda: kills[0].often(),
    )
    kills.append(_Kills(session, count, seed))
    return kills[0], session.run(None), path


def _killed(quick: bool, say: Say) -> Iterator[Figure]:
    runs, each = (1, 2) if quick else (4, 5)
    seconds: list[float] = []
    missing = different = left = unbalanced = again = 0
    with tempfile.TemporaryDirectory(prefix="stream-mmrnn-faults-") as folder:
        for run in range(runs):
            kills, summary, path = _run(Path(folder), each, run, (25, 10, 50, 1)[run], say)
            seconds += kills.seconds
            again += summary["repeated"]
            unbalanced += not summary["balanced"]
            compared = replay(path)
            ticks = [wire.tick_index(e.payload) for e in Recording(path).envelopes({topics.PREDICTION})]
            expected = set(range(min(ticks), max(ticks) + 1))
            missing += max(len(expected - set(ticks)), compared["extra"] + compared["missing"])
            different += compared["different"] + kills.different
            left += len(ticks) - len(set(ticks))
            say(f"{len(ticks)} ticks, back in {', '.join(f'{s:.2f}' for s in kills.seconds)} s")
    kind = f"{len(seconds)} kills of the engine in {runs} live sessions"
    yield Figure("resume_kills", "engines killed", len(seconds), "", runs * each, "==")
    yield Figure(
        "resume_back_s", f"{kind}: to the next new tick, at most", max(seconds, default=99), "s", 1.0, timed=True
    )
    yield Figure("resume_missing_ticks", f"{kind}: ticks that no prediction was made for", missing, "ticks", 0, "==")
    what = f"{kind}: predictions other than an uninterrupted run's"
    yield Figure("resume_different_predictions", what, different, "predictions", 0, "==")
    what = f"{kind}: of {again} republished ticks, those that are in the recording twice"
    yield Figure("resume_repeats_left", what, left, "ticks", 0, "==")
    yield Figure("resume_unbalanced_runs", f"{kind}: sessions whose losses do not add up", unbalanced, "", 0, "==")


def _tick(engine: StepEngine, session: str, index: int, rng: np.random.Generator) -> Tick:
    at_ns = index * engine.spec.tick_ns
    features = {m.name: rng.standard_normal(m.size).astype(np.float32) for m in engine.spec.modalities}
    present = {name: bool(rng.random() < 0.8) for name in features}
    age_ns = {name: int(rng.integers(-1, 10**9)) for name in features}
    return Tick(session, index, at_ns, features, present, age_ns, Stamps(at_ns, at_ns, at_ns, at_ns, topics.CLOCK))


def _moved(quick: bool) -> Iterator[Figure]:
    """Sessions that change their process every few ticks, between engines and within them, against one that stays."""
    path, sessions = config.find_model(EngineSettings().model), [f"s{i}" for i in range(4)]
    steps = 60 if quick else 1000
    stays = StepEngine(path, len(sessions))
    shards = [ShardedEngine(path, 8, processes=2), ShardedEngine(path, 8, processes=2)]
    engines: list[Engine] = [*shards, StepEngine(path, 8)]
    chance, rng = random.Random(0), np.random.default_rng(0)
    where = {}
    moves = bits = 0
    try:
        for i, session in enumerate(sessions):
            stays.open(session)
            where[session] = engines[i % 3]
            where[session].open(session)
        for index in range(steps):
            for session in sessions:
                tick = _tick(stays, session, index, rng)
                if chance.random() < 0.3:
                    target = chance.choice(engines)
                    if target is not where[session]:
                        move(session, where[session], target)
                        where[session] = target
                        moves += 1
                    elif isinstance(target, ShardedEngine):
                        target.move(session, 1 - target.shard(session))
                        moves += 1
                [expected], [got] = stays.step([tick]), where[session].step([tick])  # type: ignore[attr-defined]
                for name, values in expected.heads.items():
                    bits += int(np.count_nonzero(np.unpackbits(np.frombuffer(
                        bytes(a ^ b for a, b in zip(values.tobytes(), got.heads[name].tobytes(), strict=True)), np.uint8
                    ))))  # fmt: skip
    finally:
        for sharded in shards:
            sharded.stop()
    what = f"{len(sessions)} sessions moved {moves} times between 5 processes in {steps} ticks"
    yield Figure("resume_moves", f"{what}: moves", moves, "", 10 if quick else 500, ">=")
    yield Figure("resume_moved_bits", f"{what}: bits other than in one that stays", bits, "bits", 0, "==")


def run(quick: bool, say: Say) -> Iterator[Figure]:
    yield from _killed(quick, say)
    yield from _moved(quick)
