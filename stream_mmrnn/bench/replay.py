"""Replay: how many times faster than real time a recording's features go through aligner and engine again.

One session as the verb `replay` does it, and many in lock step: the file is read for each of them. Predictions are
compared with the recorded ones, bit for bit. The same file as training data. Knows nothing about how a replay works.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from time import process_time
from typing import Any

import msgspec
import numpy as np

from stream_mmrnn.bench.machine import Processes
from stream_mmrnn.bench.plots import Pictures
from stream_mmrnn.bench.report import Document, document, ratio
from stream_mmrnn.bus.socket_dir import temporary_folder
from stream_mmrnn.capture import sources
from stream_mmrnn.core import config, topics
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import FileError, ProcessError
from stream_mmrnn.core.types import Tick
from stream_mmrnn.graph.runtime import Provider
from stream_mmrnn.live.session import LiveSession, for_its_model
from stream_mmrnn.offline import replay as verb
from stream_mmrnn.offline.lockstep import interleaved, lockstep
from stream_mmrnn.offline.replay_many import Track, outcomes
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.predict.align_columns import align_columns
from stream_mmrnn.predict.engine import StepEngine, check_model
from stream_mmrnn.predict.pipeline import NoEngine, predict
from stream_mmrnn.predict.tick_columns import TickColumns
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.settings import settings_of
from stream_mmrnn.training.tasks.recordings import ticks_of

_BOUNDS = {1: 1200.0, 16: 2000.0}


@contextlib.contextmanager
def _made(duration_s: float, model: str | None, alive: Callable[[], bool]) -> Iterator[Path]:
    """A live recording of the synthetic source, gone afterwards."""
    with temporary_folder("stream-mmrnn-bench-") as folder:
        path = folder / "bench.mcap"
        everything = {f"sources.{m}": "synthetic" for m in sources.SYNTHETIC}
        own = {"record.path": str(path), "engine.model": model, "dashboard.enabled": False, "session.name": "bench"}
        notes: list[str] = []
        settings = for_its_model(config.load(None, {**everything, **own}))
        LiveSession(settings, True, alive, notes.append).run(duration_s)
        if notes:
            raise ProcessError(f"the recording to be replayed did not come about: {notes[0]}")
        yield path


class _Lockstep:
    """Many times the same recording at once."""

    def __init__(self, path: Path, count: int, provider: Provider) -> None:
        self.path, self._count = path, count
        recording = Recording(path)
        self.settings = settings_of(recording)
        self.engine = StepEngine(config.find_model(self.settings.engine.model), count, provider)
        self.spec = self.engine.spec
        self._recorded = [e.payload for e in recording.envelopes({topics.PREDICTION})]
        self.compared: list[dict[str, Any]] = []

    def round(self) -> dict[str, float]:
        """Seconds of one round: the file read, aligned and stepped once for each session."""
        names = [m.name for m in self.spec.modalities]
        began_ns, cpu_s = now_ns(), process_time()
        tracks = {str(i): Track(self.path, self.spec).columns(compare=False) for i in range(self._count)}
        found: list[tuple[str, verb.Outcome]] = []
        steps = []
        for step in lockstep(tracks, self.engine):
            # the features of all steps would not fit in memory
            steps.append(step._replace(block=msgspec.structs.replace(step.block, features=())))
        took_s, cpu_s = (now_ns() - began_ns) / 1e9, process_time() - cpu_s
        for step in steps:
            found += outcomes(step, names)
        self._compare(found)
        covered_s = len(found) * self.spec.tick_ns / 1e9
        return {"took_s": took_s, "cpu_s": cpu_s, "covered_s": covered_s, "times": covered_s / took_s}

    def _compare(self, found: Sequence[tuple[str, verb.Outcome]]) -> None:
        comparisons: dict[str, verb.Comparison] = {}
        for name, outcome in found:
            if name not in comparisons:
                comparison = comparisons[name] = verb.Comparison()
                for payload in self._recorded:
                    comparison.see_recorded(payload)
            comparisons[name].observe_outcome(outcome)
        self.compared = [c.summary() for c in comparisons.values()]


def _alternated(did: Mapping[str, Callable[[], object]], rounds: int, ticks: Mapping[str, int]) -> dict[str, float]:
    """Median microseconds a tick of each call, in turn; `ticks`: how many each call is about."""
    took: dict[str, list[float]] = {name: [] for name in did}
    for _ in range(rounds):
        for name, call in did.items():
            began_ns = now_ns()
            call()
            took[name].append((now_ns() - began_ns) / 1e3 / ticks[name])
    return {name: round(statistics.median(us), 2) for name, us in took.items()}


def _parts_of_one(path: Path, rounds: int, provider: Provider) -> dict[str, float]:
    """Microseconds a tick of what a replay of one session is made of, each alone."""
    many = _Lockstep(path, 1, provider)
    engine, spec = many.engine, many.spec
    recording = Recording(path)
    wanted = {topics.CLOCK, topics.SESSION, *(topics.feature(m.name) for m in spec.modalities)}
    envelopes = list(recording.envelopes(wanted))

    def align() -> list[Tick]:
        return list(predict(envelopes, Aligner.of(spec.modalities, spec.tick_ns, many.settings), NoEngine()))

    ticks = align()
    engine.open(ticks[0].session)

    def step() -> None:
        for tick in ticks:
            engine.step([tick])

    did = {"read": lambda: list(recording.envelopes(wanted)), "align": align, "step": step}
    return _alternated(did, rounds, dict.fromkeys(did, len(ticks)))


def _parts_of_many(path: Path, count: int, rounds: int, provider: Provider) -> dict[str, float]:
    """The same a tick and session, of `count` sessions in lock step."""
    many = _Lockstep(path, count, provider)
    engine, spec = many.engine, many.spec
    recording = Recording(path)
    wanted = {topics.CLOCK, topics.SESSION, *(topics.feature(m.name) for m in spec.modalities)}
    messages = list(recording.columns(wanted))

    def align() -> list[TickColumns]:
        return list(align_columns(messages, Aligner.of(spec.modalities, spec.tick_ns, many.settings)))

    parts = align()
    ticks = sum(map(len, parts))
    for i in range(count):
        engine.open(str(i))
    handles = np.array([engine.handle(str(i)) for i in range(count)], np.int64)
    blocks = [block for part in parts for block in interleaved([part] * count, handles)]

    def interleave() -> None:
        for part in parts:
            for _ in interleaved([part] * count, handles):
                pass

    def step() -> None:
        for block in blocks:
            engine.step_block(block)

    did = {"read": lambda: list(recording.columns(wanted)), "align": align, "interleave": interleave, "step": step}
    return _alternated(did, rounds, {name: ticks * (count if name in ("interleave", "step") else 1) for name in did})


def _training(path: Path, rounds: int) -> dict[str, Any]:
    """Reading a recording as training data of its own model."""
    spec = check_model(config.find_model(settings_of(Recording(path)).engine.model), "cpu")
    specs, took, cpu = spec.modalities, list[float](), list[float]()
    for _ in range(rounds + 1):
        began_ns, cpu_s = now_ns(), process_time()
        ticks = ticks_of(path, specs, spec.tick_ns)
        took.append((now_ns() - began_ns) / 1e9)
        cpu.append(process_time() - cpu_s)
    covered_s = len(ticks.indices) * spec.tick_ns / 1e9
    return {
        "times_real_time": round(covered_s / statistics.median(took[1:]), 1),
        "best": round(covered_s / min(took), 1),
        "cpu_us_a_tick": round(statistics.median(cpu[1:]) * 1e6 / len(ticks.indices), 2),
    }


def _one(path: Path, rounds: int, provider: Provider) -> dict[str, Any]:
    """The verb, again and again."""
    processes = Processes()
    done = [verb.replay(path, provider=provider, verify=True) for _ in range(rounds + 1)][1:]
    last = done[-1]
    return {
        "sessions": 1,
        "rounds": rounds,
        "covered_s": last["covered_s"],
        "predictions": last["predictions"],
        "times_real_time": round(statistics.median(d["times_real_time"] for d in done), 1),
        "best": max(d["times_real_time"] for d in done),
        "identical": all(d["identical"] for d in done),
        "max_abs_difference": max(d["max_abs_difference"] for d in done),
        "first_difference": last["first_difference"],
        **processes.used().row(),
    }


def _many(path: Path, count: int, rounds: int, provider: Provider) -> dict[str, Any]:
    many = _Lockstep(path, count, provider)
    processes = Processes()
    done = [many.round() for _ in range(rounds + 1)][1:]
    compared = many.compared
    return {
        "sessions": count,
        "rounds": rounds,
        "covered_s": round(done[-1]["covered_s"], 3),
        "predictions": sum(c["recorded_predictions"] - c["missing"] + c["extra"] for c in compared),
        "times_real_time": round(statistics.median(d["times"] for d in done), 1),
        "best": round(max(d["times"] for d in done), 1),
        "took_s": round(statistics.median(d["took_s"] for d in done), 4),
        "cpu_s": round(statistics.median(d["cpu_s"] for d in done), 4),
        "identical": len(compared) == count and all(c["identical"] for c in compared),
        "max_abs_difference": max((c["max_abs_difference"] for c in compared), default=0.0),
        "first_difference": next((c["first_difference"] for c in compared if c["first_difference"]), ""),
        **processes.used().row(),
    }


def run(
    *,
    recording: Path | None = None,
    duration_s: float = 20.0,
    rounds: int = 10,
    sessions: int = 16,
    model: str | None = None,
    provider: Provider = "cpu",
    alive: Callable[[], bool] = lambda: True,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Document, Pictures]:
    """Replay `recording` (one of `duration_s` is made where there is none): one session, then `sessions` of it."""
    if recording is not None and not recording.is_file():
        raise FileError(f"the recording {recording} cannot be read; give one that `live --record` made")
    if recording is None:
        say(f"recording {duration_s:g} s")
    with contextlib.nullcontext(recording) if recording else _made(duration_s, model, alive) as path:
        if not alive():
            raise ProcessError("the bench was stopped before it had measured; nothing is reported")
        say(f"replaying one session {rounds} times")
        rows = [_one(path, rounds, provider)]
        say(f"replaying {sessions} sessions in lock step, {rounds} times")
        rows.append(_many(path, sessions, rounds, provider))
        say("what a replay is made of, each part alone")
        rows[0]["us_a_tick"] = _parts_of_one(path, rounds, provider)
        rows[1]["us_a_tick"] = _parts_of_many(path, sessions, rounds, provider)
        for row in rows:
            row["tick_us"] = row["covered_s"] * 1e6 / row["predictions"]
        say("reading it as training data")
        training = _training(path, rounds)
        rows[1]["training_data"] = training
    ratios = {}
    for row in rows:
        name = "replay_times_real_time" + (f"_{row['sessions']}" if row["sessions"] > 1 else "")
        bound = _BOUNDS.get(row["sessions"])
        ratios[name] = ratio(row["times_real_time"], bound, "more", row["other_cpu"])
        ratios[f"{name}_step_alone"] = ratio(row["tick_us"] / row["us_a_tick"]["step"], None, "more", row["other_cpu"])
        ratios[f"{name}_identical"] = ratio(float(row["identical"]), 1.0, "more")
    ratios["training_data_times_real_time"] = ratio(training["times_real_time"], None, "more", rows[1]["other_cpu"])
    settings = {
        "recording": "given" if recording else "made",
        "duration_s": None if recording else duration_s,
        "rounds": rounds,
        "sessions": sessions,
        "provider": provider,
    }
    return document("replay", settings, rows, ratios), Pictures()
