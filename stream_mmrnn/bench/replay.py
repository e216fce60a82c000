"""Replay: how many times faster than real time a recording's features go through aligner and engine again.

One session as the verb `replay` does it, and many in lock step: one merged sequence of the same envelopes, the session
renamed. Predictions are compared with the recorded ones, bit for bit. Knows nothing about how a replay works.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from stream_mmrnn.bench.machine import Processes
from stream_mmrnn.bench.plots import Pictures
from stream_mmrnn.bench.report import Document, document, ratio
from stream_mmrnn.bus.socket_dir import temporary_folder
from stream_mmrnn.capture import sources
from stream_mmrnn.core import config, topics
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import FileError, ProcessError
from stream_mmrnn.core.types import Envelope, Prediction, Tick
from stream_mmrnn.graph.runtime import Provider
from stream_mmrnn.live.session import LiveSession, for_its_model
from stream_mmrnn.offline import replay as verb
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.pipeline import NoEngine, predict
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.settings import settings_of

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


def _merged(envelopes: Sequence[Envelope], session: str, count: int) -> list[Envelope]:
    """`count` sessions in lock step; what belongs to no session, such as the clock, stays one."""
    names = [f"{session}-{i}" for i in range(count)]
    return [
        again
        for e in envelopes
        for again in ([msgspec.structs.replace(e, session=n) for n in names] if e.session == session else [e])
    ]


class _Lockstep:
    """Many times the same recording at once."""

    def __init__(self, path: Path, count: int, provider: Provider) -> None:
        self.recording = Recording(path)
        settings = settings_of(self.recording)
        self._count, self._provider, self.settings = count, provider, settings
        self.model = config.find_model(settings.engine.model)
        self._recorded = [e.payload for e in self.recording.envelopes({topics.PREDICTION})]
        self.compared: list[dict[str, Any]] = []

    def read(self, modalities: Sequence[str]) -> list[Envelope]:
        wanted = {topics.CLOCK, topics.SESSION, *map(topics.feature, modalities)}
        return list(self.recording.envelopes(wanted))

    def round(self) -> dict[str, float]:
        """Seconds of one round: the file read once for each session, then all of them predicted."""
        engine = StepEngine(self.model, self._count, self._provider)
        spec = engine.spec
        aligner = Aligner.of(spec.modalities, spec.tick_ns, self.settings)
        began_ns = now_ns()
        envelopes = self.read([m.name for m in spec.modalities])
        read_s = (now_ns() - began_ns) / 1e9
        merged = _merged(envelopes, self.recording.session, self._count)
        began_ns = now_ns()
        # all messages are there already: the sessions' ticks are stepped together
        predictions = list(predict(merged, aligner, engine, more=lambda: True, batch=self._count))
        predict_s = (now_ns() - began_ns) / 1e9
        self._compare(predictions)
        covered_s = len(predictions) * spec.tick_ns / 1e9
        took_s = predict_s + self._count * read_s
        return {"read_s": read_s, "predict_s": predict_s, "covered_s": covered_s, "times": covered_s / took_s}

    def _compare(self, predictions: Sequence[Prediction]) -> None:
        comparisons: dict[str, verb.Comparison] = {}
        for p in predictions:
            if p.tick.session not in comparisons:
                comparison = comparisons[p.tick.session] = verb.Comparison()
                for payload in self._recorded:
                    comparison.see_recorded(payload)
            comparisons[p.tick.session].observe(p)
        self.compared = [c.summary() for c in comparisons.values()]


def _parts(path: Path, count: int, rounds: int, provider: Provider) -> dict[str, float]:
    """Microseconds a tick and session of what a replay of `count` sessions is made of, each alone and in turn."""
    lockstep = _Lockstep(path, count, provider)
    engine = StepEngine(lockstep.model, count, provider)
    spec = engine.spec
    envelopes = lockstep.read([m.name for m in spec.modalities])
    merged = _merged(envelopes, lockstep.recording.session, count) if count > 1 else envelopes

    def align() -> list[Tick]:
        aligner = Aligner.of(spec.modalities, spec.tick_ns, lockstep.settings)
        return list(predict(merged, aligner, NoEngine(), more=lambda: True, batch=count))

    ticks = align()
    for session in {t.session for t in ticks}:
        engine.open(session)
    together = [ticks[i : i + count] for i in range(0, len(ticks), count)]

    def step() -> None:
        for some in together:
            engine.step(some)

    did: dict[str, Callable[[], object]] = {
        "read": lambda: lockstep.read([m.name for m in spec.modalities]),
        "align": align,
        "step": step,
    }
    took: dict[str, list[float]] = {name: [] for name in did}
    for _ in range(rounds):
        for name, call in did.items():
            began_ns = now_ns()
            call()
            # a file holds one session
            ticks_of_it = len(ticks) / count if name == "read" else len(ticks)
            took[name].append((now_ns() - began_ns) / 1e3 / ticks_of_it)
    return {name: round(statistics.median(us), 2) for name, us in took.items()}


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
    lockstep = _Lockstep(path, count, provider)
    processes = Processes()
    done = [lockstep.round() for _ in range(rounds + 1)][1:]
    compared = lockstep.compared
    return {
        "sessions": count,
        "rounds": rounds,
        "covered_s": round(done[-1]["covered_s"], 3),
        "predictions": sum(c["recorded_predictions"] - c["missing"] + c["extra"] for c in compared),
        "times_real_time": round(statistics.median(d["times"] for d in done), 1),
        "best": round(max(d["times"] for d in done), 1),
        "read_s": round(statistics.median(d["read_s"] for d in done), 4),
        "predict_s": round(statistics.median(d["predict_s"] for d in done), 4),
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
        for row in rows:
            row["us_a_tick"] = _parts(path, row["sessions"], rounds, provider)
            row["tick_us"] = row["covered_s"] * 1e6 / row["predictions"]
    ratios = {}
    for row in rows:
        name = "replay_times_real_time" + (f"_{row['sessions']}" if row["sessions"] > 1 else "")
        bound = _BOUNDS.get(row["sessions"])
        ratios[name] = ratio(row["times_real_time"], bound, "more", row["other_cpu"])
        ratios[f"{name}_step_alone"] = ratio(row["tick_us"] / row["us_a_tick"]["step"], None, "more", row["other_cpu"])
        ratios[f"{name}_identical"] = ratio(float(row["identical"]), 1.0, "more")
    settings = {
        "recording": "given" if recording else "made",
        "duration_s": None if recording else duration_s,
        "rounds": rounds,
        "sessions": sessions,
        "provider": provider,
    }
    return document("replay", settings, rows, ratios), Pictures()
