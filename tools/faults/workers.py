"""Workers killed over and over, a camera that freezes and is unplugged, features that are none: masks, no outage."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from stream_mmrnn.bus import Address, Publisher, Subscriber
from stream_mmrnn.capture import encoders
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.recording.mcap_file import Recording
from tools import virtual_devices
from tools.faults.commands import Command, command, wait_for
from tools.faults.promise import Figure, Say

TITLE = "Devices and workers"
NOT_PROMISED = (
    "A worker that is stopped but not dead cannot say that it is stale: its ticks are masked, and views say `silent`.",
)
_T = 40_000_000
_RATE_HZ = 25.0
_WORKERS = {"camera": "vision", "microphone": "audio", "text": "text"}
_SETTINGS = """
[dashboard]
enabled = false
[supervisor]
backoff_s = 0.05
backoff_max_s = 0.1
max_restarts = 1000
"""


class _Heard(threading.Thread):
    """What the processes of a session say of themselves, as it was on the bus."""

    def __init__(self, address: Address) -> None:
        super().__init__(daemon=True)
        self._subscriber = Subscriber(address, [topics.STATUS], 10_000)
        self._going = True
        self.statuses: list[tuple[int, wire.StatusMessage]] = []
        self.start()

    def run(self) -> None:
        while self._going:
            envelope = self._subscriber.receive(50)
            if envelope is not None:
                self.statuses.append((envelope.event_ns, wire.unpack(envelope.payload, wire.StatusMessage)))
        self._subscriber.close()

    def since(self, at_ns: int, node: str, state: str, pid: int = 0) -> int:
        """When `node` was first in that state after `at_ns`; 0 where it was not."""
        for when_ns, s in list(self.statuses):
            if when_ns > at_ns and (s.node, s.state) == (node, state) and pid in (0, s.pid):
                return when_ns
        return 0

    def end(self) -> None:
        self._going = False
        self.join()


def _address(running: Command) -> Address:
    folder = wait_for(lambda: next(running.temp.glob("stream-mmrnn-*/subscribe"), None)).parent
    return Address(f"ipc://{folder}/publish", f"ipc://{folder}/subscribe")


def _grown(path: Path) -> Callable[[], bool]:
    return lambda: path.exists() and path.stat().st_size > 60_000


class _File(NamedTuple):
    """A recording as lists."""

    ticks: list[wire.PredictionMessage]
    features: dict[str, list[Envelope]]
    in_time: dict[str, list[int]]
    """Event times of the samples that came before their tick was closed: no age counts from the others."""

    @classmethod
    def of(cls, path: Path) -> _File:
        ticks: list[wire.PredictionMessage] = []
        features: dict[str, list[Envelope]] = {}
        places: dict[tuple[str, int], int] = {}
        for place, e in enumerate(Recording(path).envelopes()):
            places[e.topic, e.publish_ns] = place
            if e.topic == topics.PREDICTION:
                ticks.append(wire.unpack(e.payload, wire.PredictionMessage))
            elif e.topic.startswith(topics.FEATURE):
                features.setdefault(topics.stream_of(e.topic), []).append(e)
        # the file has the bus's order: a sample was in time if it comes no later than the message that closed its tick
        closed = {t.tick: places.get((t.closed.by, t.closed.publish_ns), -1) for t in ticks}
        in_time = {
            modality: [e.event_ns for e in es if places[e.topic, e.publish_ns] <= closed.get(-(-e.event_ns // _T), -1)]
            for modality, es in features.items()
        }
        return cls(ticks, features, in_time)

    @property
    def missing(self) -> int:
        numbers = [t.tick for t in self.ticks]
        return numbers[-1] - numbers[0] + 1 - len(set(numbers)) if numbers else 1

    def masked(self, modality: str, gone_ns: int) -> tuple[bool, bool]:
        """Of the first tick that begins after `gone_ns`: is it masked, and is its age that of the last sample?"""
        tick = next((t for t in self.ticks if t.event_ns - _T >= gone_ns), None)
        before = [event_ns for event_ns in self.in_time[modality] if event_ns <= gone_ns]
        if tick is None or not before:
            return False, False
        return not tick.present[modality], tick.age_ns[modality] == tick.event_ns - max(before)

    def back_s(self, modality: str, gone_ns: int) -> float:
        """From then until a tick that began later has the modality again."""
        at = (t.event_ns for t in self.ticks if t.event_ns - _T >= gone_ns and t.present[modality])
        return (next(at, 2**62) - gone_ns) / 1e9


def _killed(times: int, say: Say) -> Iterator[Figure]:
    kills: list[tuple[str, int]] = []
    text_back_s: list[float] = []
    more = ("--source", "synthetic", "--other-audio", "none", "--other-text", "none", "--record", "FOLDER/a.mcap")
    with command("live", "-c", "FOLDER/settings.toml", *more, settings=_SETTINGS) as (running, folder):
        wait_for(_grown(folder / "a.mcap"))
        heard = _Heard(_address(running))
        began_s = time.monotonic()
        for k in range(times):
            for node in _WORKERS:
                last_ns = next((at for n, at in reversed(kills) if n == node), 0)
                # killed again as soon as it is up: its process says `open` of itself
                pid = wait_for(lambda node=node: running.node(node))
                up_ns = wait_for(lambda pid=pid, node=node, at=last_ns: heard.since(at, node, "open", pid))
                if node == "text" and last_ns:
                    text_back_s.append((up_ns - last_ns) / 1e9)
                time.sleep(0.25)
                kills.append((node, now_ns()))
                os.kill(pid, signal.SIGKILL)
            if k % 10 == 9:
                say(f"{len(kills)} kills in {time.monotonic() - began_s:.0f} s")
        time.sleep(2.0)
        heard.end()
        running.send(signal.SIGINT)
        code = running.process.wait(30)
        restarts = {name: len(deaths) for name, deaths in running.summary["restarts"].items()}
        file = _File.of(folder / "a.mcap")
    dense = [(_WORKERS[node], at_ns) for node, at_ns in kills if node != "text"]
    masks = [file.masked(modality, at_ns) for modality, at_ns in dense]
    back_s = [file.back_s(modality, at_ns) for modality, at_ns in dense]
    what = f"each of {len(_WORKERS)} workers killed {times} times in one session"
    yield Figure("workers_kills_count", what, len(kills), "kills", times * len(_WORKERS), ">=")
    wrong = sum(restarts.get(node) != times for node in _WORKERS) + bool(set(restarts) - set(_WORKERS)) + bool(code)
    yield Figure(
        "workers_miscounted_count", f"{what}: workers whose kills the summary does not count, "
        "other processes that died, an exit code that is not 0", wrong, "errors", 0, "==",
    )  # fmt: skip
    yield Figure("workers_missing_ticks_count", f"{what}: ticks that are not there", file.missing, "ticks", 0, "==")
    yield Figure(
        "workers_unmasked_count", f"{what}: first whole ticks after a kill with present = 1 ({len(masks)} looked at)",
        sum(not masked for masked, _ in masks), "ticks", 0, "==",
    )  # fmt: skip
    yield Figure(
        "workers_wrong_age_count", "of these, ages that are not the tick's end less the last sample's event time",
        sum(not right for _, right in masks), "ticks", 0, "==",
    )  # fmt: skip
    yield Figure(
        "workers_back_slowest_s", f"{what}: from a kill to the next tick with the modality (text: until it is open)",
        max(back_s + text_back_s), "s", 2, timed=True,
    )  # fmt: skip


class _Frames:
    """Pictures that stop when they are told to."""

    def __init__(self) -> None:
        self.going = threading.Event()
        self.going.set()

    def __call__(self) -> Iterator[bytes]:
        for picture in virtual_devices.numbered_frames()():
            self.going.wait()
            yield picture


def _device(times: int, say: Say) -> Iterator[Figure]:
    frames = _Frames()
    freezes: list[tuple[int, int]] = []
    unplugged: list[tuple[int, int]] = []
    with virtual_devices.mjpeg_camera(frames, _RATE_HZ) as camera:
        more = (
            "--vision",
            f"camera:{camera.url}",
            "--audio",
            "synthetic",
            "--text",
            "none",
            "--record",
            "FOLDER/a.mcap",
        )
        with command("live", "-c", "FOLDER/settings.toml", *more, settings=_SETTINGS) as (running, folder):
            wait_for(_grown(folder / "a.mcap"))
            heard = _Heard(_address(running))
            wait_for(lambda: heard.since(0, "camera", "open"))
            time.sleep(2.0)
            for _ in range(times):
                frames.going.clear()
                gone_ns = now_ns()
                time.sleep(0.7)
                frames.going.set()
                freezes.append((gone_ns, now_ns()))
                time.sleep(1.5)
            for _ in range(max(times // 3, 1)):
                camera.stop()
                gone_ns = now_ns()
                wait_for(lambda at=gone_ns: heard.since(at, "camera", "missing"))
                time.sleep(0.3)
                camera.start()
                unplugged.append((gone_ns, now_ns()))
                wait_for(lambda at=unplugged[-1][1]: heard.since(at, "camera", "open"))
                time.sleep(2.0)
            heard.end()
            running.send(signal.SIGINT)
            running.process.wait(30)
            said = running.summary["streams"]["vision"]["stale"]
            file = _File.of(folder / "a.mcap")
    say(f"{len(freezes)} freezes, {len(unplugged)} times unplugged; the summary says {said}")
    flagged: list[float] = []
    masks = []
    for gone_ns, again_ns in (*freezes, *unplugged):
        last = max((e for e in file.features["vision"] if e.capture_ns < again_ns), key=lambda e: e.capture_ns)
        stale_ns = heard.since(last.capture_ns, "camera", "stale")
        if stale_ns and stale_ns < again_ns:
            flagged.append((stale_ns - last.capture_ns) / 1e6)
        # a picture on its way is let through: from the last one on there is none
        masks.append(file.masked("vision", max(gone_ns, last.event_ns)))
    everything = len(freezes) + len(unplugged)
    what = f"a camera frozen {len(freezes)} times for 0.7 s and unplugged {len(unplugged)} times"
    yield Figure(
        "workers_stale_flagged_count", f"{what}: times it was called stale", len(flagged), "flags", everything, ">=",
        timed=True,
    )  # fmt: skip
    yield Figure(
        "workers_stale_flag_ms", f"{what}: from its last picture to the flag; its period is 40 ms",
        max(flagged, default=1e9), "ms", 100, timed=True,
    )  # fmt: skip
    yield Figure(
        "workers_device_unmasked_count", f"{what}: next ticks with a picture, or with a wrong age",
        sum(not (masked and right) for masked, right in masks), "ticks", 0, "==",
    )  # fmt: skip
    yield Figure(
        "workers_device_back_s", f"{what}: from its return to the next tick with a picture, at the latest",
        max(file.back_s("vision", again_ns) for _, again_ns in (*freezes, *unplugged)), "s", 2, timed=True,
    )  # fmt: skip


def _misfits(seconds: float) -> Iterator[Figure]:
    """A publisher of our own: features that are right, not finite, too short or no vector, in turn, one a tick."""
    encoder = encoders.create_encoder("vision")
    rng = np.random.default_rng(0)
    good: dict[int, bool] = {}
    more = ("--vision", "none", "--audio", "synthetic", "--text", "none", "--record", "FOLDER/a.mcap")
    with command("live", "-c", "FOLDER/settings.toml", *more, settings=_SETTINGS) as (running, folder):
        wait_for(_grown(folder / "a.mcap"))
        publisher = Publisher(_address(running), 1000)
        publisher.wait_for_reader(topics.feature("vision"), 10)
        first = now_ns() // _T + 3
        for k in range(round(seconds * 25)):
            event_ns = (first + k) * _T - _T // 2
            time.sleep(max(event_ns - now_ns(), 0) / 1e9)
            vector = rng.standard_normal(encoder.size).astype(np.float32)
            kind = k % 6
            if kind == 1:
                vector[int(rng.integers(encoder.size))] = (np.nan, np.inf, -np.inf)[k // 6 % 3]
            elif kind == 3:
                vector = vector[: int(rng.integers(encoder.size))]
            elif kind == 5:
                vector = vector.reshape(2, -1)
            good[first + k] = kind % 2 == 0
            publisher.publish(topics.feature("vision"), "live", event_ns, now_ns(), vector, encoder.origin)
        time.sleep(0.5)
        publisher.close()
        running.send(signal.SIGINT)
        running.process.wait(30)
        named = "is quarantined" in running.err
        file = _File.of(folder / "a.mcap")
    present = {t.tick: t.present["vision"] for t in file.ticks}
    bad = [k for k, fine in good.items() if not fine]
    right = len(good) - len(bad)
    what = f"{len(bad)} feature vectors with NaN or infinity, of a wrong size or shape, between {right} right ones"
    yield Figure(
        "workers_misfits_used_count", f"{what}: ticks that hold one, or are not there",
        sum(present.get(k, True) for k in bad), "ticks", 0, "==",
    )  # fmt: skip
    yield Figure("workers_misfits_named_count", f"{what}: sessions that said why", int(named), "sessions", 1, "==")
    yield Figure(
        "workers_misfits_neighbours_share", f"{what}: right ones that are in their tick",
        sum(present.get(k, False) for k, fine in good.items() if fine) / right, "", 0.99, ">=", timed=True,
    )  # fmt: skip


def run(quick: bool, say: Say) -> Iterator[Figure]:
    yield from _killed(2 if quick else 50, say)
    yield from _device(1 if quick else 6, say)
    yield from _misfits(1.0 if quick else 8.0)
