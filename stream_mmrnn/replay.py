"""Replay: a recording through the same generator as live, and the comparison with what was predicted then.

Knows nothing about the bus or processes: a recording is an iterable of envelopes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from stream_mmrnn import config, topics
from stream_mmrnn.align import Aligner
from stream_mmrnn.clock import now_ns
from stream_mmrnn.encoders import create
from stream_mmrnn.engine import StepEngine
from stream_mmrnn.errors import ConfigError, FileError, UsageError
from stream_mmrnn.latency import StageTable
from stream_mmrnn.pipeline import pace, predict, reencode
from stream_mmrnn.recording import Recording
from stream_mmrnn.runtime import Provider
from stream_mmrnn.types import Prediction
from stream_mmrnn.wire import PredictionMessage

From = Literal["features", "raw"]


class Comparison:
    """Predictions made now against those in the recording, tick by tick."""

    def __init__(self, recorded: dict[int, PredictionMessage]) -> None:
        self._recorded = recorded
        self._seen: set[int] = set()
        self.different = 0
        self.extra = 0
        self.max_abs_difference = 0.0
        self.first = ""
        """One sentence about the first difference."""

    def see(self, prediction: Prediction) -> None:
        tick = prediction.tick
        then = self._recorded.get(tick.index)
        self._seen.add(tick.index)
        if then is None:
            self.extra += 1
            self._note(f"tick {tick.index} has no recorded prediction")
            return
        if (
            then.present == tick.present
            and then.age_ns == tick.age_ns
            and then.heads == {name: values.tolist() for name, values in prediction.heads.items()}
        ):
            return
        same = (
            then.present == tick.present and then.age_ns == tick.age_ns and then.heads.keys() == prediction.heads.keys()
        )
        if not same:
            self._note(f"tick {tick.index} saw other inputs than when it was recorded")
        for name, values in prediction.heads.items():
            before = then.heads.get(name, [])
            for now, old in zip(values.tolist(), before, strict=False):
                if old is None or math.isnan(now):
                    same = same and old is None and math.isnan(now)
                elif now != old:
                    same = False
                    self.max_abs_difference = max(self.max_abs_difference, abs(now - old))
                    self._note(f"tick {tick.index}, head {name!r}: {now!r} now, {old!r} recorded")
            same = same and len(values) == len(before)
        self.different += not same

    def _note(self, sentence: str) -> None:
        self.first = self.first or sentence

    def summary(self) -> dict[str, Any]:
        missing = len(self._recorded.keys() - self._seen)
        if missing:
            self._note(f"{missing} recorded predictions were not made again")
        return {
            "identical": not (self.different or self.extra or missing) and bool(self._recorded),
            "recorded_predictions": len(self._recorded),
            "different": self.different,
            "missing": missing,
            "extra": self.extra,
            "max_abs_difference": self.max_abs_difference,
            "first_difference": self.first,
        }


def settings_of(recording: Recording) -> config.Settings:
    """The configuration that the recording was made with."""
    try:
        return config.recorded(json.loads(recording.metadata["config"]))
    except (KeyError, ValueError, AttributeError, ConfigError) as e:
        raise FileError(f"{recording.path} holds no configuration that this release can read: {e}") from e


def replay(
    path: Path,
    *,
    speed: float | None = None,
    source: From = "features",
    model: str | None = None,
    provider: Provider = "cpu",
    verify: bool = False,
    see: Callable[[Prediction], None] = lambda _: None,
    alive: Callable[[], bool] = lambda: True,
) -> dict[str, Any]:
    """Run a recording through aligner and engine again.

    `speed` paces it (1 is as it was); None is as fast as it goes. `source` says whether the recorded feature vectors
    are used or made again from the raw samples. Always compares with the recorded predictions where there are some;
    `verify` makes a comparison that cannot be made an error.

    Raises:
        UsageError: the file, its model or its raw streams are not there.

    """
    recording = Recording(path)
    settings = settings_of(recording)
    recorded = {p.tick: p for p in recording.predictions()}
    name = model or settings.engine.model
    engine = StepEngine(config.find_model(name), settings.engine.slots, provider)
    if verify:
        if not recorded:
            raise FileError(f"{path} holds no predictions to compare with; it was made by `record`, or cut off early")
        if engine.spec.sha256 != recording.metadata.get("model_sha256"):
            raise UsageError(f"{path} was predicted by another version of the model {name!r}; give that one by --model")
    aligner = Aligner.of(engine.spec.modalities, engine.spec.tick_ns, settings.align)
    wanted = {topics.CLOCK, topics.SESSION, *(topics.feature(m.name) for m in engine.spec.modalities)}
    if source == "raw":
        if recording.metadata.get("raw") == "false":
            raise UsageError(f"{path} was recorded without raw streams (record.raw = false); replay it from features")
        wanted |= {topics.raw(m.name) for m in engine.spec.modalities}
    envelopes = recording.envelopes(wanted)
    if source == "raw":
        envelopes = reencode(envelopes, {m.name: create(m.name) for m in engine.spec.modalities})
    if speed is not None:
        envelopes = pace(envelopes, speed, alive)
    comparison = Comparison(recorded)
    latency = StageTable(("step",))
    count, first_ns, last_ns = 0, 0, 0
    began_ns = now_ns()
    for prediction in predict(envelopes, aligner, engine):
        count += 1
        first_ns = first_ns or prediction.tick.event_ns
        last_ns = prediction.tick.event_ns
        latency.add({"step": prediction.step_end_ns - prediction.step_start_ns})
        comparison.see(prediction)
        see(prediction)
        if not alive():
            break
    seconds = (now_ns() - began_ns) / 1e9
    covered_s = (last_ns - first_ns + engine.spec.tick_ns) / 1e9 if count else 0.0
    return {
        "recording": str(path),
        "session": recording.session,
        "source": source,
        "model": {"name": engine.spec.name, "sha256": engine.spec.sha256, "provider": engine.provider},
        "ticks": count,
        "predictions": count,
        **comparison.summary(),
        "streams": {
            name: {
                "received": c.received,
                "delivered": c.used,
                "dropped": c.dropped(),
                "late_joined": c.late_joined,
            }
            for name, c in aligner.counts.items()
        },
        "covered_s": round(covered_s, 3),
        "seconds": round(seconds, 4),
        "times_real_time": round(covered_s / seconds, 1) if seconds else 0.0,
        "latency_ms": latency.table(),
        "damage": recording.damage,
    }


def info(path: Path) -> dict[str, Any]:
    """What is in a recording: streams with their counts and times, model, encoders, losses, and whether it is whole."""
    recording = Recording(path)
    channels: dict[str, dict[str, Any]] = {}
    first_ns = last_ns = 0
    for e in recording.envelopes():
        channel = channels.setdefault(e.topic, {"messages": 0, "origin": e.origin, "gaps": 0, "_next": e.seq})
        channel["gaps"] += max(0, e.seq - channel["_next"])
        channel["_next"] = e.seq + 1
        channel["messages"] += 1
        first_ns, last_ns = first_ns or e.publish_ns, max(last_ns, e.publish_ns)
    for channel in channels.values():
        del channel["_next"]
        channel["rate_hz"] = round(channel["messages"] / ((last_ns - first_ns) / 1e9), 2) if last_ns > first_ns else 0.0
    m = recording.metadata
    return {
        "recording": str(path),
        "bytes": path.stat().st_size,
        "session": recording.session,
        "seconds": round((last_ns - first_ns) / 1e9, 3),
        "started_unix_ns": recording.started_unix_ns,
        "model": {"name": m.get("model", ""), "sha256": m.get("model_sha256", "")},
        "raw": m.get("raw") == "true",
        "channels": dict(sorted(channels.items())),
        "lost": msgspec.json.decode(recording.end.get("lost", "{}")),
        "ended": recording.end.get("ended", "not finished"),
        "whole": not recording.damage and bool(recording.end),
        "damage": recording.damage,
    }
