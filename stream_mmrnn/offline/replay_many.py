"""Several recordings replayed in lock step, and each compared with its recorded predictions.

As `replay` of each alone, bit for bit, but in columns: see `lockstep`. Features only, and as fast as possible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stream_mmrnn.core import config, topics
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import UsageError
from stream_mmrnn.core.types import ModelSpec
from stream_mmrnn.graph.runtime import Provider
from stream_mmrnn.offline.lockstep import Step, lockstep
from stream_mmrnn.offline.replay import Comparison, Outcome, check_comparable, stream_counts
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.predict.align_columns import ColumnAligner
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.tick_columns import TickColumns
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.mcap_format import LATE
from stream_mmrnn.recording.settings import settings_of


class Track:
    """One recording on its way through the engine."""

    def __init__(self, path: Path, spec: ModelSpec) -> None:
        """Raises FileError if it cannot be read, UsageError if it begins in the middle of a session."""
        self.recording = Recording(path)
        if self.recording.metadata.get(LATE):
            raise UsageError(f"{path} begins in the middle of a session; replay it by itself")
        self.aligner = Aligner.of(spec.modalities, spec.tick_ns, settings_of(self.recording))
        self.comparison = Comparison()
        self.ticks = 0

    def columns(self, compare: bool = True) -> Iterator[TickColumns]:
        """Its ticks. The recorded predictions that are read on the way go to the comparison."""
        features = {topics.FEATURE + name for name, _ in self.aligner.feeding.values()}
        wanted = {topics.CLOCK, topics.SESSION, *features}
        align = ColumnAligner(self.aligner)
        for messages in self.recording.columns(wanted | {topics.PREDICTION} if compare else wanted):
            for _, envelope in messages.others:
                if envelope.topic == topics.PREDICTION:
                    self.comparison.see_recorded(envelope.payload)
            yield from align.push(messages)


def outcomes(step: Step, names: Sequence[str]) -> Iterator[tuple[str, Outcome]]:
    """The part of each prediction that is compared, by track; `names`: of the modalities."""
    block, done = step.block, step.predictions
    heads = {name: rows.tolist() for name, rows in done.heads.items()}
    present, age_ns = block.present.tolist(), block.age_ns.tolist()
    for i, (track, tick) in enumerate(zip(step.names, block.indices.tolist(), strict=True)):
        row = {name: rows[i] for name, rows in heads.items()}
        here = dict(zip(names, present[i], strict=True))
        yield track, Outcome(tick, row, here, dict(zip(names, age_ns[i], strict=True)))


def replay_many(
    paths: Sequence[Path],
    *,
    model: str | None = None,
    provider: Provider = "cpu",
    verify: bool = False,
    on_predictions: Callable[[int], None] = lambda _: None,
    alive: Callable[[], bool] = lambda: True,
) -> dict[str, Any]:
    """Run recordings through aligner and engine again, all together; see `replay` for what is compared.

    `on_predictions` is called with the number of predictions of each step.

    Raises:
        FileError: a file or the model is missing, or with `verify` a recording has no predictions.
        UsageError: the recordings are not of one model, and `model` names none.

    """
    named = {str(path): settings_of(Recording(path)).engine.model for path in paths}
    name = model or next(iter(named.values()))
    other = next((path for path, theirs in named.items() if theirs != name), None)
    if model is None and other is not None:
        raise UsageError(
            f"{other} is of the model {named[other]!r}, {paths[0]} of {name!r}; replay them one by one, or name one "
            "model by --model"
        )
    engine = StepEngine(config.find_model(name), len(named), provider)
    tracks = {path: Track(Path(path), engine.spec) for path in named}
    if verify:
        for track in tracks.values():
            check_comparable(track.recording, name, engine.spec)
    modalities = [m.name for m in engine.spec.modalities]
    began_ns = now_ns()
    for step in lockstep({path: track.columns() for path, track in tracks.items()}, engine):
        for path, outcome in outcomes(step, modalities):
            tracks[path].ticks += 1
            tracks[path].comparison.observe_outcome(outcome)
        on_predictions(len(step.block))
        if not alive():
            break
    seconds, whole = (now_ns() - began_ns) / 1e9, alive()
    rows = [
        {
            "recording": path,
            "session": track.recording.session,
            "predictions": track.ticks,
            **track.comparison.summary(whole),
            "streams": stream_counts(track.aligner),
            "covered_s": round(track.ticks * engine.spec.tick_ns / 1e9, 3),
            "damage": track.recording.damage,
        }
        for path, track in tracks.items()
    ]
    covered_s = sum(row["covered_s"] for row in rows)
    return {
        "model": {"name": engine.spec.name, "sha256": engine.spec.sha256, "provider": engine.provider},
        "recordings": rows,
        "predictions": sum(row["predictions"] for row in rows),
        "identical": all(row["identical"] for row in rows),
        "covered_s": round(covered_s, 3),
        "seconds": round(seconds, 4),
        "times_real_time": round(covered_s / seconds, 1) if seconds else 0.0,
    }
