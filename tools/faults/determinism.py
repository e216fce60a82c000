"""Determinism: one recording, replayed in processes of their own at other speeds and in other portions, on the CPU.

`python -m tools.faults.determinism FILE WAY` is one replay; it prints the sha256 of its predictions and how many they
were. Knows nothing about how a model computes.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from stream_mmrnn.core import config, topics
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.offline.pacing import pace
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.predict.pipeline import predict
from stream_mmrnn.predict.sharded_engine import ShardedEngine
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.recorder import Recorder
from stream_mmrnn.recording.settings import settings_of
from tools.faults.promise import Figure, Say

TITLE = "Determinism"
NOT_PROMISED = (
    (
        "The same bits on a GPU, on another kind of processor, or with another release of onnxruntime: their sums are "
        "taken in other orders. On one machine's CPU they are promised."
    ),
)

WAYS = {
    "live": "as it was predicted live",
    "first": "as fast as it goes",
    "second": "as fast as it goes",
    "third": "as fast as it goes",
    "paced": "at eight times the rate at which it was published",
    "small": "from a copy whose chunks hold a few messages",
    "large": "from a copy whose chunks hold 1 MiB",
    "many": "beside seven other sessions, in batches of up to 64",
    "shards": "the same over two processes",
}
_OTHERS = 7


class _Sum:
    """A sha256 over predictions: what they saw and what they said, bit for bit."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.count = 0

    def add(
        self, index: int, event_ns: int, present: dict[str, bool], age_ns: dict[str, int], heads: dict[str, bytes]
    ) -> None:
        self.count += 1
        seen = (index, event_ns, sorted(present.items()), sorted(age_ns.items()), sorted(heads))
        self._hash.update(msgspec.json.encode(seen))
        for name in sorted(heads):
            self._hash.update(heads[name])

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _copy(path: Path, chunk_ms: float) -> Path:
    """The same recording in other chunks: of three messages where `chunk_ms` is 0."""
    old = Recording(path)
    new = path.with_name(f"{path.stem}.{chunk_ms:g}.{id(old)}.mcap")
    ours = ("format", "session", "wall_offset_ns", "started_ns")
    recorder = Recorder(new, old.session, {k: v for k, v in old.metadata.items() if k not in ours}, chunk_ms)
    for number, envelope in enumerate(old.envelopes()):
        recorder.write(envelope)
        if number % 3 == 0:
            recorder.flush_due(now_ns())
    recorder.close({})
    return new


def _beside(envelopes: Iterable[Envelope], names: list[str]) -> Iterator[Envelope]:
    """Every message of the session for others, too, before and after it."""
    for envelope in envelopes:
        if envelope.session == topics.EVERYONE:
            yield envelope
            continue
        for name in names:
            yield msgspec.structs.replace(envelope, session=name or envelope.session)


def replay(path: Path, way: str) -> tuple[str, int]:
    """The sha256 of the predictions of one way, and their number."""
    found = _Sum()
    if way == "live":
        for p in Recording(path).predictions():
            heads = {k: np.array([np.nan if v is None else v for v in row], np.float32) for k, row in p.heads.items()}
            found.add(p.tick, p.event_ns, p.present, p.age_ns, {k: v.tobytes() for k, v in heads.items()})
        return found.hexdigest(), found.count
    if way in ("small", "large"):
        path = _copy(path, 0.0 if way == "small" else 1e9)
    recording = Recording(path)
    settings = settings_of(recording)
    model = config.find_model(settings.engine.model)
    together = way in ("many", "shards")
    engine: StepEngine | ShardedEngine
    if way == "shards":
        engine = ShardedEngine(model, _OTHERS + 1, processes=2)
    else:
        engine = StepEngine(model, 64 if together else 1)
    aligner = Aligner.of(engine.spec.modalities, engine.spec.tick_ns, settings)
    wanted = {topics.CLOCK, topics.SESSION, *(topics.feature(m.name) for m in engine.spec.modalities)}
    envelopes: Iterable[Envelope] = recording.envelopes(wanted)
    if way == "paced":
        envelopes = pace(envelopes, 8.0)
    if together:
        names = [f"other{n}" for n in range(_OTHERS)]
        envelopes = _beside(envelopes, [*names[:3], "", *names[3:]])
    try:
        # `more` says that there is always more: ticks are stepped together until there are 64
        for p in predict(envelopes, aligner, engine, more=(lambda: True) if together else None):
            if p.tick.session == recording.session:
                heads_of = {name: values.astype(np.float32).tobytes() for name, values in p.heads.items()}
                found.add(p.tick.index, p.tick.event_ns, p.tick.present, p.tick.age_ns, heads_of)
    finally:
        engine.stop()
    return found.hexdigest(), found.count


def run(quick: bool, say: Say) -> Iterator[Figure]:
    seconds = 4 if quick else 15
    with tempfile.TemporaryDirectory(prefix="determinism-") as name:
        path = Path(name) / "x.mcap"
        live = [sys.executable, "-m", "stream_mmrnn", "live", "--source", "synthetic", "--duration", str(seconds)]
        done = subprocess.run(
            [*live, "--record", str(path), "--no-dashboard", "--json"], capture_output=True, text=True
        )
        if done.returncode != 0:
            say(done.stderr[-2000:])
        found: dict[str, tuple[str, int]] = {}
        for way in WAYS:
            child = [sys.executable, "-m", "tools.faults.determinism", str(path), way]
            output = subprocess.run(child, capture_output=True, text=True, check=True).stdout
            found[way] = tuple(json.loads(output))
            say(f"{found[way][0][:12]} of {found[way][1]} predictions, {WAYS[way]}")
    yield Figure(
        "determinism_hashes_count",
        f"different sha256 of the predictions of one session of {seconds} s, each by a process: {', '.join(WAYS)}",
        len({digest for digest, _ in found.values()}),
        "",
        1,
        "==",
    )
    yield Figure(
        "determinism_predictions_count",
        "predictions that each of the sums is over",
        min(count for _, count in found.values()),
        "predictions",
        seconds * 20,
        ">=",
    )


if __name__ == "__main__":
    print(json.dumps(replay(Path(sys.argv[1]), sys.argv[2])))
