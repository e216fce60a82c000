"""What a live session takes that hears and sees a person: its CPU time, and the delay of its predictions.

A microphone and a camera without hardware (`tools.virtual_devices`, in a process of its own) play real speech and a
real face over and over. Sessions with more and more streams take turns. Counted is every process of the session, with
its supervisor and the live page that nobody looks at; not the devices, nor the reader that stamps predictions. Delays
count from when the program had the sample: until then it is the virtual device that takes its time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stream_mmrnn.bench import end_to_end
from stream_mmrnn.bench.plots import Pictures
from stream_mmrnn.bench.report import Document, Ratio, document, ratio
from stream_mmrnn.capture import sources
from stream_mmrnn.core import config, processes, topics
from stream_mmrnn.core.errors import ProcessError, UsageError
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.core.settings import EngineSettings, Settings
from stream_mmrnn.core.stream_table import for_model
from stream_mmrnn.live.managed_process import end_forkserver
from stream_mmrnn.predict.engine import check_model

ROOT = Path(__file__).parent.parent.parent
WAV, CLIP = Path("clips") / "dialogue.wav", Path("clips") / "lbbc2a.mpg"
"""Below the folder of the data: 30 s of real speech, and a face that speaks."""
CPU_AT_MOST = 0.8

_MICROPHONE = {"audio": "microphone:pulse"}
SESSIONS: dict[str, dict[str, str]] = {
    "microphone": {**_MICROPHONE, "turn_end": "none"},
    "with_turn_end": _MICROPHONE,
    "with_words": {**_MICROPHONE, "text": "speech"},
    "with_camera": {**_MICROPHONE, "text": "speech", "vision": "camera"},
}
"""The streams of each session; `camera` stands for the virtual one. The first has nothing that is derived."""
DELAYS = {"to_prediction": "", "audio_to_prediction": topics.feature("audio")}
"""Of all ticks, and of those that a block of sound closed, and no picture that came later."""
_NAME = 9
"""Letters of a process's name that the system keeps, without its prefix."""


@contextlib.contextmanager
def devices(wav: Path, clip: Path) -> Iterator[str]:
    """Both devices for as long as it is open; this process's environment has the microphone's. The camera's address.

    Raises:
        UsageError: they do not start.

    """
    command = [sys.executable, "-m", "tools.virtual_devices", "--wav", str(wav), "--clip", str(clip)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        before = dict(os.environ)
        try:
            for line in process.stdout:
                words = line.split()
                if words[:1] == ["export"]:
                    name, _, value = words[1].partition("=")
                    os.environ[name] = value
                elif "camera:" in line:
                    end_forkserver()
                    yield line.partition("camera:")[2].strip()
                    return
            raise UsageError(f"the virtual devices did not start: {process.stderr.read().strip()}")
        finally:
            process.terminate()
            os.environ.clear()
            os.environ.update(before)
            end_forkserver()


def settings_of(streams: dict[str, str], model: str | None, camera: str) -> Settings:
    """The settings of one of `SESSIONS`."""
    source = {name: f"camera:{camera}" if s == "camera" else s for name, s in streams.items()}
    chosen = {f"sources.{name}": source.get(name, "none") for name in sources.SYNTHETIC}
    others = {name: {"source": s} for name, s in source.items() if name not in sources.SYNTHETIC}
    return config.load(None, {**chosen, "engine.model": model, "session.name": "bench"}, others)


def cores_of(settings: Settings, cpu: dict[str, float]) -> float | None:
    """The cores that a session used: its processes, and this one, which supervises it; None where it is not known."""
    names = {"bench", *(p.name[:_NAME] for p in processes.table(settings, True))}
    return round(sum(share for name, share in cpu.items() if name in names), 3) if cpu else None


def run(
    *,
    data: Path,
    model: str | None = None,
    duration_s: float = 30.0,
    rounds: int = 2,
    alive: Callable[[], bool] = lambda: True,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Document, Pictures]:
    """`rounds` times a session of each kind; `data` has the folder `clips`.

    Raises:
        UsageError: a clip is missing, or the devices do not start.
        ProcessError: stopped before all was measured, or a session heard nothing.

    """
    for path in (data / WAV, data / CLIP):
        if not path.is_file():
            raise UsageError(f"there is no {path}; give the folder that holds {WAV} and {CLIP}")
    spec = check_model(config.find_model(model or EngineSettings().model), "cpu")
    pictures = Pictures()
    rows: list[dict[str, Any]] = []
    with devices((data / WAV).resolve(), (data / CLIP).resolve()) as camera:
        for number in range(rounds):
            for name, streams in SESSIONS.items():
                say(f"round {number + 1}, {name}: {duration_s:g} s")
                settings = for_model(settings_of(streams, model, camera), spec.modalities)
                done = end_to_end.Run(settings, duration_s, alive, say)
                if not alive():
                    raise ProcessError("the bench was stopped before it had measured; nothing is reported")
                row, _ = end_to_end.row_of(name, done, 0, spec.tick_ns)
                if not row["streams"]["audio"]["delivered"]:
                    raise ProcessError(f"a session heard nothing from the virtual microphone: {'; '.join(done.notes)}")
                delays = {how: Histogram() for how in DELAYS}
                for seen in done.seen:
                    for how, topic in DELAYS.items():
                        if seen.by.startswith(topic):
                            delays[how].add(seen.owed_ns - seen.took["capture"])
                more = {"cores": cores_of(settings, row["cpu"]), **{f"{how}_ms": h.row() for how, h in delays.items()}}
                rows.append({"round": number + 1, **more, **row})
                pictures.histograms.setdefault(name, {})[f"round {number + 1}"] = delays["to_prediction"]
    about = {"model": spec.name, "sha256": spec.sha256, "duration_s": duration_s, "rounds": rounds}
    return document("devices", about, rows, _ratios(rows)), pictures


def _ratios(rows: list[dict[str, Any]]) -> dict[str, Ratio]:
    """The median over the rounds of each figure, and of its ratio to the first session's."""
    by_name = {name: [r for r in rows if r["modalities"] == name] for name in SESSIONS}
    first = next(iter(SESSIONS))
    found: dict[str, Ratio] = {}
    for name, those in by_name.items():
        others = [r["other_cpu"] for r in those]
        other_cpu = None if None in others else statistics.median(others)
        cores = [r["cores"] for r in those if r["cores"] is not None]
        bound = CPU_AT_MOST if name == "with_camera" else None
        why = "this system does not tell what processes use"
        found[f"{name}_cores"] = ratio(statistics.median(cores) if cores else None, bound, other_cpu=other_cpu, why=why)
        for how, p in itertools.product(DELAYS, ("p50", "p99")):
            delay = f"{how}_ms"
            times = [r[delay][p] for r in those if r[delay]["count"]]
            why = "no prediction was read"
            found[f"{name}_{how}_{p}_ms"] = ratio(statistics.median(times) if times else None, why=why)
            if name != first and len(times) == len(by_name[first]) == len(those):
                pairs = zip(times, (r[delay][p] for r in by_name[first]), strict=True)
                found[f"{name}_{how}_{p}_over_{first}"] = ratio(statistics.median(a / b for a, b in pairs))
    return found
