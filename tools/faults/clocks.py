"""Clocks that go wrong: sound cards and remote publishers 200 ppm off, jumps of 2 s, a wall clock that is set."""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from stream_mmrnn.capture.remote_clock import RemoteClock
from stream_mmrnn.core import topics
from stream_mmrnn.core.clock import DeviceClock, WallClock, now_ns
from stream_mmrnn.core.types import Envelope, ModalitySpec
from stream_mmrnn.predict.align import Aligner
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.recorder import Recorder
from tools.faults.promise import Figure, Say

TITLE = "Clocks"
NOT_PROMISED = (
    "The stamps of a remote clock that only sends are late by the least delay of its way; only an answer could tell.",
    "A remote clock that was set back has stamps that stand still for a second or so: they never go back.",
)
_S, _MS = 1_000_000_000, 1_000_000
_RATE, _BLOCK = 16_000, 320
_BLOCK_NS = _BLOCK * _S // _RATE
_SETTLED_NS = 30 * _S


class _Run:
    """One simulated source: true times, stamps, when its clock jumped."""

    def __init__(self, true: list[int], stamps: list[int], jumped_ns: int) -> None:
        self.true, self.stamps = np.array(true), np.array(stamps)
        since = self.true - self.true[0]
        quiet = (since >= _SETTLED_NS) & ((self.true < jumped_ns) | (self.true >= jumped_ns + _SETTLED_NS))
        self.error_ms = float(np.abs(self.stamps - self.true)[quiet].max()) / _MS
        self.back = int((np.diff(self.stamps) <= 0).sum())


def _card(rng: random.Random, ppm: float, jump_s: int) -> _Run:
    """A sound card under PortAudio: readings late by what the scheduler takes, and at 45 s a stretch of sound lost."""
    clock, true, stamps = DeviceClock(_RATE), [], []
    length_ns = _BLOCK_NS / (1 + ppm * 1e-6)
    for k in range(1, 80 * 50):
        at_ns = 100 * _S + round(k * length_ns) + (jump_s * _S if k >= 45 * 50 else 0)
        late_ns = rng.expovariate(1 / (0.5 * _MS)) + (rng.uniform(0, 15 * _MS) if rng.random() < 0.02 else 0)
        true.append(at_ns)
        stamps.append(clock.stamp(_BLOCK, at_ns + round(late_ns)))
    return _Run(true, stamps, next(t for k, t in enumerate(true, 1) if k >= 45 * 50) if jump_s else 2**62)


def _remote(rng: random.Random, ppm: float, jump_s: int, both_ways: bool) -> _Run:
    """A publisher with a clock of its own, over a way that takes 0.3 ms and up; at 45 s the clock is set."""
    clock, true, stamps, received_ns = RemoteClock(), [], [], 0
    for k in range(80 * 25):
        at_ns = 100 * _S + k * 40 * _MS
        jumped = jump_s and k >= 45 * 25
        remote_ns = 1_700_000_000 * _S + at_ns + round(at_ns * ppm * 1e-6) + (jump_s * _S if jumped else 0)
        there, back = (round((0.3 + rng.expovariate(1 / 2.0)) * _MS) for _ in range(2))
        received_ns = max(received_ns, at_ns + back)
        true.append(at_ns)
        if both_ways:
            if k % 25 == 0:
                clock.exchange(at_ns - there, remote_ns, at_ns + back)
            stamps.append(clock.stamp(remote_ns))
        else:
            stamps.append(clock.arrived(remote_ns, received_ns))
    return _Run(true, stamps, 145 * _S if jump_s else 2**62)


def _misplaced(run: _Run) -> int:
    """Samples that a tick of 40 ms holds which, by more than 5 ms, is not theirs, once the clock is followed."""
    aligner = Aligner([ModalitySpec("signal", 1)], 40 * _MS, {"signal": 80 * _MS}, max_behind_ns=10 * _S)
    aligner.open("s", int(run.true[0]) - 40 * _MS)
    placed: dict[int, float] = {}
    for k, (true, stamp) in enumerate(zip(run.true.tolist(), run.stamps.tolist(), strict=True)):
        clock = Envelope(topics.CLOCK, topics.EVERYONE, k, true + 5 * _MS, 0, 0, b"")
        value = Envelope("feature/signal", "s", k, stamp, 0, 0, np.array([k], np.float32))
        for envelope in (value, clock):
            for tick in aligner.push(envelope):
                if tick.present["signal"]:
                    placed[tick.index] = float(tick.features["signal"][0])
    wrong = 0
    for index, mean in placed.items():
        at_ns = float(np.interp(mean, np.arange(len(run.true)), run.true))
        settled = run.true[0] + _SETTLED_NS < at_ns < 140 * _S
        wrong += bool(settled and not (index - 1) * 40 * _MS - 5 * _MS <= at_ns <= index * 40 * _MS + 5 * _MS)
    return wrong


def _wall(folder: Path, stamped: int) -> tuple[int, int, int, int]:
    """Record while the wall clock is set: stamps that changed, devices' own that did, that go back, notes."""
    true, by = time.time_ns, [0]
    time.time_ns = lambda: true() + by[0]
    try:
        wall = WallClock()
        recorder = Recorder(folder / "a.mcap", "s", {"raw": "true"})
        sent, at_ns = [], now_ns()
        for k in range(stamped):
            if k == stamped // 2:
                by[0] = 7_200 * _S
            at_ns += 20 * _MS  # the recorder's day in a moment: its looks are by the times it is told
            device_ns = 9**19 // 10 + k * 20_004_000  # a clock that is 200 ppm off and lives in another year
            values = np.full(3, k, np.float32)
            sent.append(Envelope("feature/signal", "s", k, at_ns, at_ns, at_ns, values, "", at_ns, device_ns))
            recorder.write(sent[-1])
            recorder.flush_due(at_ns)
            if step_ns := wall.poll(at_ns):
                recorder.note_wall_step(at_ns, step_ns)
        recorder.close({"ended": "clean"})
    finally:
        time.time_ns = true
    recording = Recording(folder / "a.mcap")
    read = list(recording.envelopes())
    changed = abs(len(read) - len(sent)) + sum(
        (a.event_ns, a.capture_ns, a.publish_ns, a.seq) != (b.event_ns, b.capture_ns, b.publish_ns, b.seq)
        for a, b in zip(sent, read, strict=False)
    )
    raw = abs(len(read) - len(sent)) + sum(a.device_ns != b.device_ns for a, b in zip(sent, read, strict=False))
    back = sum(b.publish_ns <= a.publish_ns for a, b in itertools.pairwise(read))
    return changed, raw, back, len(recording.wall_steps)


def run(quick: bool, say: Say) -> Iterator[Figure]:
    rng = random.Random(7)
    runs: dict[str, list[_Run]] = {"card": [], "exchange": [], "arrived": []}
    jumps: dict[str, list[_Run]] = {name: [] for name in runs}
    for _ in range(1 if quick else 10):
        for ppm in (200.0, -200.0):
            # sound is lost, and never comes twice: a card's time only jumps ahead
            for jump_s in (0, 2, -2):
                into = jumps if jump_s else runs
                if jump_s >= 0:
                    into["card"].append(_card(rng, ppm, jump_s))
                into["exchange"].append(_remote(rng, ppm, jump_s, True))
                into["arrived"].append(_remote(rng, ppm, jump_s, False))
        say(f"{sum(map(len, runs.values())) + sum(map(len, jumps.values()))} clocks of 80 s each")
    what = {
        "card": "sound card 200 ppm off, readings up to 15 ms late",
        "exchange": "remote clock 200 ppm off that answers once a second",
        "arrived": "remote clock 200 ppm off that only sends, 2.3 ms late on average",
    }
    for name, done in runs.items():
        text = f"{what[name]} ({len(done)} runs): the largest error of an event time after 30 s"
        yield Figure(f"clocks_{name}_error_ms", text, max(r.error_ms for r in done), "ms", 5)
    for name, done in jumps.items():
        text = f"the same, and a jump of 2 s ({len(done)} runs): the largest error, but in the 30 s after it"
        yield Figure(f"clocks_{name}_jump_error_ms", text, max(r.error_ms for r in done), "ms", 5)
    everyone = [r for done in (*runs.values(), *jumps.values()) for r in done]
    stamps = sum(len(r.stamps) for r in everyone)
    yield Figure(
        "clocks_back_count", f"stamps that are not later than the one before, of {stamps} of all these",
        sum(r.back for r in everyone), "stamps", 0, "==",
    )  # fmt: skip
    remote = [*runs["exchange"], *runs["arrived"]]
    yield Figure(
        "clocks_misplaced_count", f"samples of {len(remote)} remote clocks in a tick that is not theirs, by 5 ms",
        sum(_misplaced(r) for r in remote), "samples", 0, "==",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        count = 500 if quick else 5000
        changed, raw, back, steps = _wall(Path(folder), count)
    text = f"{count} messages recorded while the wall clock is set by two hours"
    yield Figure("clocks_wall_changed_count", f"{text}: stamps that read back other", changed, "stamps", 0, "==")
    yield Figure("clocks_wall_back_count", f"{text}: stamps that go back", back, "stamps", 0, "==")
    yield Figure("clocks_wall_noted_count", f"{text}: times that the file says so", steps, "notes", 1, "==")
    yield Figure(
        "clocks_raw_changed_count", f"{text}: devices' own stamps that read back other", raw, "stamps", 0, "=="
    )
