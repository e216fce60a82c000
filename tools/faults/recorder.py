"""Recordings under kill -9, full and slow disks, cuts and damage.

Most of it runs the recorder's real process on a bus of its own, whose every message is logged where it is published:
what is in the file is compared with that log. Two parts run whole sessions. Knows nothing about how files are mended.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from stream_mmrnn.bus import Address, Publisher, Subscriber, run_broker
from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core import processes as process_table
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import FileError, StreamError, WireError
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.live import nodes
from stream_mmrnn.live.managed_process import process_context
from stream_mmrnn.live.session import LiveSession, for_its_model
from stream_mmrnn.recording.append_file import Disk, part
from stream_mmrnn.recording.mcap_file import Recording
from stream_mmrnn.recording.message_counts import LOST, MessageCounts
from stream_mmrnn.recording.pieces import Chunk, pieces
from stream_mmrnn.recording.recorder import Recorder
from stream_mmrnn.recording.repair import repair
from stream_mmrnn.recording.report import verify
from tools.faults.promise import Figure, Say

TITLE = "Recordings"
NOT_PROMISED = (
    "A power cut: what came after the disk's last sync (`record.fsync_ms`, 1 s) may be lost, and more where it lies.",
    "The 0.5 s while the disk hangs: what waits in memory for a write that does not return dies with the recorder.",
)

_FRAMES_HZ = (20, 80, 320)
"""Each frame is six messages."""
_STREAMS = ("raw/vision", "raw/audio", "feature/vision", "feature/audio", topics.PREDICTION)
_AUDIO_STREAMS = ("raw/audio", "feature/audio")
_LOSS_BOUND_S = 0.5

Key = tuple[str, int]


class Sent(NamedTuple):
    key: Key
    publish_ns: int


class Bus:
    """A broker and one publisher, and what it has published of each session."""

    def __init__(self) -> None:
        self.address = Address.create("ipc")
        self._stop = threading.Event()
        ready = threading.Event()
        self.log: dict[str, list[Sent]] = {}
        self.rate_hz = 50.0
        self.streams: tuple[str, ...] = ()
        self.session = ""
        self._orders: list[Callable[[], None]] = []
        self._threads = [
            threading.Thread(
                target=run_broker, args=(self.address, 20_000, ready.set, lambda: not self._stop.wait(0.05))
            ),
            threading.Thread(target=self._publish),
        ]
        self._threads[0].start()
        ready.wait(10)
        self._threads[1].start()

    def _publish(self) -> None:
        publisher = self._publisher = Publisher(self.address, 20_000)
        rng = np.random.default_rng(0)
        vector = rng.standard_normal(128).astype("<f4")
        sound = rng.integers(-9999, 9999, 320).astype("<i2")
        bodies: dict[str, Any] = dict(zip(_STREAMS, (b"", sound, vector, vector[:81], b""), strict=True))
        tick = 0
        due_ns = now_ns()
        while not self._stop.is_set():
            while self._orders:
                self._orders.pop(0)()
            self._send(topics.CLOCK, topics.EVERYONE, b"")
            if self.session:
                tick += 1  # one that was there already would not be recorded again
                bodies[topics.PREDICTION] = msgspec.json.encode({"event_ns": 1, "tick": tick})
                bodies["raw/vision"] = rng.bytes(8_000)  # never the same: it must not become small in the file
                for name in self.streams:
                    self._send(name, self.session, bodies[name])
            due_ns = max(due_ns + int(1e9 / self.rate_hz), now_ns() - 100_000_000)
            time.sleep(max(due_ns - now_ns(), 0) / 1e9)
        publisher.close(0)

    def _send(self, topic: str, session: str, payload: Any) -> None:
        at_ns = now_ns()
        envelope = self._publisher.publish(topic, session, at_ns, at_ns, payload, "faults")
        if self.session:
            self.log.setdefault(self.session, []).append(Sent((topic, envelope.seq), envelope.publish_ns))

    def _order(self, what: Callable[[], None]) -> None:
        done = threading.Event()
        self._orders.append(lambda: (what(), done.set())[0])
        if not done.wait(10):
            raise RuntimeError("the publisher of this test stands still")

    def open(self, session: str, rate_hz: float, streams: tuple[str, ...]) -> None:
        def go() -> None:
            self.rate_hz, self.streams, self.session = rate_hz, streams, session
            message = wire.pack(wire.SessionMessage("open", now_ns()))
            self._send(topics.SESSION, session, message)

        self._order(go)

    def close_session(self, control: bool = True) -> None:
        def go() -> None:
            session = self.session
            self._send(topics.SESSION, session, wire.pack(wire.SessionMessage("close", now_ns())))
            self.session, self.rate_hz = "", 50.0
            if control:
                at_ns = now_ns()
                self._publisher.publish(topics.CONTROL, session, at_ns, at_ns, b"stop")

        self._order(go)

    def close(self) -> None:
        self._stop.set()
        for thread in reversed(self._threads):
            thread.join(10)
        self.address.remove()


def _run_recorder(context: nodes.Context, limit_bytes: int, write_s: float) -> None:
    """What a recorder's process executes here: as always, on a disk that is slow or ends early."""
    if limit_bytes:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    if write_s:
        write, sync = Disk.write, Disk.sync

        def slow_write(self: Disk, at: int, data: bytes) -> None:
            time.sleep(write_s)
            write(self, at, data)

        def slow_sync(self: Disk) -> None:
            time.sleep(3 * write_s)
            sync(self)

        Disk.write, Disk.sync = slow_write, slow_sync  # type: ignore[method-assign]
    nodes.run(process_table.by_name("recorder").target, context)


class Running:
    """One recorder's process."""

    def __init__(
        self, bus: Bus, session: str, path: Path, queue_mb: float = 64.0, limit_bytes: int = 0, write_s: float = 0.0
    ) -> None:
        mp: Any = process_context()
        settings = config.parse(
            {
                "session": {"name": session},
                "record": {"path": str(path), "queue_mb": queue_mb},
                "engine": {"model": "x/"},
            }
        )
        self.path = path
        # kept: what a context holds lives as long as it does in the process that made it
        self.context = nodes.Context(
            "recorder", settings, bus.address, nodes.Flag(mp), nodes.Flag(mp), mp.Value("q", 0)
        )
        self.process = mp.Process(target=_run_recorder, args=(self.context, limit_bytes, write_s), daemon=True)
        self.process.start()
        self.killed_ns = 0

    def wait(self) -> None:
        if not self.context.ready.wait(60):
            raise RuntimeError("a recorder did not start")

    def kill(self) -> None:
        self.killed_ns = now_ns()
        self.process.kill()
        self.process.join()

    def join(self, seconds: float = 30) -> None:
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()


def _keys(path: Path) -> list[Key]:
    return [(e.topic, e.seq) for e in Recording(path).envelopes()]


class Killed(NamedTuple):
    loss_s: float
    """Age of the oldest message that was published before the kill and is not in the file."""
    out_of_order: int
    """Messages in the file that are not the log's next: holes, doubles."""
    not_recovered: int
    off: int


def _judge(running: Running, log: list[Sent], out: Path) -> Killed:
    before = [s for s in log if s.publish_ns < running.killed_ns]
    try:
        read = _keys(running.path)
        result = verify(running.path)
    except FileError:  # killed before anything was in it
        read, result = [], {"state": "cut off", "adds_up": True}
    lost_ns = [running.killed_ns - s.publish_ns for s in before[len(read) :]]
    wrong = sum(a != b.key for a, b in zip(read, log, strict=False))
    saved: list[Key] = []
    if read:
        repair(running.path, out)
        saved = _keys(out)
    off = int(not result["adds_up"]) + int(result["state"] != "cut off")
    return Killed(max(lost_ns, default=0) / 1e9, wrong, (Counter(read) - Counter(saved)).total(), off)


def _kills(
    bus: Bus, folder: Path, name: str, rate_hz: float, streams: tuple[str, ...], moments: int, seed: int
) -> list[Killed]:
    """Recorders killed at seeded moments, some on the bus at once."""
    rng = random.Random(seed)
    out: list[Killed] = []
    while len(out) < moments:
        count = min(7, moments - len(out))
        session = f"{name}-{len(out)}"
        recorders = [Running(bus, session, folder / f"{session}-{i}.mcap") for i in range(count)]
        for r in recorders:
            r.wait()
        time.sleep(0.1)
        bus.open(session, rate_hz, streams)
        began_s = time.monotonic()
        for r, at_s in zip(
            recorders, sorted(rng.uniform(0.05, 1.5 if moments > 3 else 0.9) for _ in recorders), strict=True
        ):
            time.sleep(max(began_s + at_s - time.monotonic(), 0))
            r.kill()
        bus.close_session(control=False)
        log = bus.log[session]
        out += [_judge(r, log, r.path.with_suffix(".repaired.mcap")) for r in recorders]
        for path in folder.glob(f"{session}-*"):
            path.unlink()
    return out


class _Disturbed(NamedTuple):
    off: int
    """Topics whose produced is not recorded + dropped, or not what was published; 1 more where the file is not
    whole.
    """
    dropped: int
    lost: int
    said: bool
    early_off: int
    """The same of the file as it was in the middle: what a kill would have left."""


def _disturbed(
    bus: Bus, name: str, running: Running, seconds: float, back: Callable[[], None], folder: Path, word: str
) -> _Disturbed:
    """A session on a disk that is slow or full, `back` after two thirds; then the file's own sums against the log."""
    heard = Subscriber(bus.address, [topics.STATUS], 1000)
    reasons: set[str] = set()

    def listen(until_s: float) -> None:
        while time.monotonic() < until_s:
            envelope = heard.receive(50)
            if envelope is not None:
                with contextlib.suppress(WireError):
                    reasons.add(wire.unpack(envelope.payload, wire.StatusMessage).reason)

    running.wait()
    time.sleep(0.1)
    bus.open(name, 100, _STREAMS)
    began_s = time.monotonic()
    listen(began_s + seconds * 2 / 3)
    copy = folder / f"{name}.copy.mcap"
    shutil.copyfile(running.path, copy)
    back()
    listen(began_s + seconds)
    bus.close_session()
    running.join()
    heard.close()
    early = verify(copy)
    result = verify(running.path)
    recording = Recording(running.path)
    there = Counter(e.topic for e in recording.envelopes())
    counts = MessageCounts.of(recording.end)
    published = Counter(s.key[0] for s in bus.log[name])
    # clock messages before the session opened may be the first that the log holds; none is between
    off = {t for t in published | there if counts.produced.get(t) != published[t]} | counts.off.keys()
    off |= {t for t in there if there[t] != counts.recorded.get(t)}
    return _Disturbed(
        len(off) + (not result["whole"]),
        counts.lost,
        sum(counts.by_reason(LOST).values()),
        any(word in reason for reason in reasons),
        int(not early["adds_up"] or early["state"] != "cut off"),
    )


def _full_by_limit(bus: Bus, folder: Path, seconds: float) -> _Disturbed:
    running = Running(bus, "limit", folder / "limit.mcap", 0.3, limit_bytes=700_000)

    def back() -> None:
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    return _disturbed(bus, "limit", running, seconds, back, folder, "cannot be written")


def _full_tmpfs(bus: Bus, folder: Path, seconds: float, say: Say) -> _Disturbed | None:
    mount = folder / "tmpfs"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(mount)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        say("no tmpfs can be mounted here: the full disk is tried by a limit on the file's size alone")
        return None
    try:
        filler = mount / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            for _ in range(32 * 16):
                if shutil.disk_usage(mount).free < 700_000:
                    break
                file.write(bytes(65536))
        running = Running(bus, "tmpfs", mount / "a.mcap", 0.3)
        return _disturbed(bus, "tmpfs", running, seconds, filler.unlink, folder, "No space left on device")
    finally:
        subprocess.run(["umount", "-l", str(mount)], capture_output=True)


# ---- cuts and damage ---------------------------------------------------------------------------------------------


def _small(path: Path, frames: int) -> list[Key]:
    """A recording with its own clock, twenty frames a second; the keys of its messages."""
    recorder = Recorder(path, "live", {"config": "{}", "raw": "true"})
    rng, out = np.random.default_rng(1), []
    for i in range(frames):
        at_ns = 5_000_000_000_000_000 + i * 50_000_000
        for e in (
            Envelope(topics.CLOCK, topics.EVERYONE, i, at_ns, at_ns, at_ns, b""),
            Envelope("feature/audio", "live", i, at_ns, at_ns, at_ns, rng.standard_normal(8).astype("<f4"), "mel@1"),
            Envelope("raw/audio", "live", i, at_ns, at_ns, at_ns, rng.integers(-9, 9, 320).astype("<i2"), "microphone"),
        )[: 2 if frames < 30 else 3]:
            recorder.write(e)
            out.append((e.topic, e.seq))
            if recorder.flush_due(at_ns):
                recorder.note(MessageCounts(recorder.counts, recorder.counts, {}, {}).as_metadata(), at_ns)
    recorder.close({"ended": "clean", **MessageCounts(recorder.counts, recorder.counts, {}, {}).as_metadata()})
    return out


def _chunks(path: Path, keys: list[Key]) -> list[tuple[int, int, list[Key]]]:
    """Where each chunk begins and ends, and what is in it."""
    content, out, taken = path.read_bytes(), [], 0
    for piece in pieces(path):
        if isinstance(piece, Chunk):
            count = len(piece.messages)
            end = piece.at + 9 + int.from_bytes(content[piece.at + 1 : piece.at + 9], "little")
            out.append((piece.at, end, keys[taken : taken + count]))
            taken += count
    return out


class _Cuts(NamedTuple):
    tried: int
    unreadable: int
    misjudged: int
    not_recovered: int


def _cuts(path: Path, keys: list[Key], positions: list[int], folder: Path) -> _Cuts:
    content, chunks = path.read_bytes(), _chunks(path, keys)
    cut_path, out = folder / "cut.mcap", folder / "out.mcap"
    unreadable = misjudged = not_recovered = 0
    kept = -1
    for cut in positions:
        cut_path.write_bytes(content[:cut])
        expected = [k for _, end, ks in chunks if end <= cut for k in ks]
        try:
            if _keys(cut_path) != expected:
                unreadable += 1
        except FileError:
            unreadable += bool(expected)
        except Exception:
            unreadable += 1
        try:
            result = verify(cut_path)
            misjudged += result["whole"] or sum(result["messages"].values()) != len(expected)
            if kept == len(expected) and cut % 7:
                continue  # it holds the same pieces as the one before
            kept = len(expected)
            out.unlink(missing_ok=True)
            repair(cut_path, out)
            not_recovered += (Counter(expected) - Counter(_keys(out))).total()
        except StreamError:
            not_recovered += len(expected)
    return _Cuts(len(positions), unreadable, misjudged, not_recovered)


def _damage(path: Path, keys: list[Key], folder: Path, seed: int, every: int) -> tuple[int, int]:
    """Each chunk in turn loses eight bytes to noise: how many were tried, and sound messages that repair lost."""
    content, chunks, rng = path.read_bytes(), _chunks(path, keys), random.Random(seed)
    damaged_path, out = folder / "damaged.mcap", folder / "out.mcap"
    lost = tried = 0
    for i, (at, end, _) in list(enumerate(chunks))[::every]:
        damaged = bytearray(content)
        where = rng.randrange(at + 45, end - 8)
        damaged[where : where + 8] = rng.randbytes(8)
        damaged_path.write_bytes(damaged)
        out.unlink(missing_ok=True)
        repair(damaged_path, out)
        expected = [k for j, (_, _, ks) in enumerate(chunks) if j != i for k in ks]
        lost += (Counter(expected) - Counter(_keys(out))).total()
        tried += 1
    return tried, lost


# ---- whole sessions ----------------------------------------------------------------------------------------------


def _engine_beside(folder: Path, kills: int, seed: int) -> tuple[int, int, int, int]:
    """A live session whose recorder is killed: ticks that are missing among the predictions, predictions, parts found,
    and messages of the parts that are not in the repaired file.
    """
    path = folder / "engine.mcap"
    settings = config.parse(
        {
            "record": {"path": str(path)},
            "sources": dict.fromkeys(("vision", "audio", "text"), "synthetic"),
            "dashboard": {"enabled": False},
        }
    )
    ticks: list[int] = []
    rng = random.Random(seed)
    next_kill_s = 0.0
    died: list[int] = []

    def see(envelope: Envelope) -> None:
        if envelope.topic == topics.PREDICTION:
            ticks.append(wire.unpack(envelope.payload, wire.PredictionMessage).tick)

    def often() -> None:
        nonlocal next_kill_s
        recorder = next(n for n in session.supervisor.nodes if n.name == "recorder")
        if not ticks or recorder.process is None or recorder.status is None or recorder.process.pid in died:
            return
        next_kill_s = next_kill_s or time.monotonic() + rng.uniform(0.8, 1.6)
        if len(died) < kills and time.monotonic() >= next_kill_s:
            died.append(recorder.process.pid)
            recorder.process.kill()
            next_kill_s = 0.0

    session = LiveSession(for_its_model(settings), True, lambda: True, lambda _: None, see, often)
    session.run(2.0 + 2.5 * kills)
    missing = max(ticks) - min(ticks) + 1 - len(set(ticks)) if ticks else 1
    result = verify(path)
    parts = [path, *(part(path, i) for i in range(1, kills + 1))]
    done = repair(path, folder / "engine.repaired.mcap")
    there = Counter(k for p in parts if p.exists() for k in _keys(p))
    lost = (there - Counter(_keys(Path(done["out"])))).total()
    return missing, len(ticks), 1 + len(result["parts"]), lost


def _whole_session_killed(folder: Path, number: int, rate_hz: float, seed: int) -> float:
    """Every process of a session killed at once: seconds from the last clock message in the file to the kill."""
    path = folder / f"session{number}.mcap"
    settings = folder / f"session{number}.toml"
    settings.write_text(f"[synthetic]\nrate_hz = {rate_hz}\n[dashboard]\nenabled = false\n")
    command = [sys.executable, "-m", "stream_mmrnn", "live", "-s", "synthetic", "-c", str(settings), "-r", str(path)]
    process = subprocess.Popen(
        [*command, "--json"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline_s = time.monotonic() + 60
        while not (path.exists() and path.stat().st_size > 30_000) and time.monotonic() < deadline_s:
            time.sleep(0.02)
        time.sleep(random.Random(seed).uniform(0.0, 1.5))
        killed_ns = now_ns()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    last_ns = max(e.publish_ns for e in Recording(path).envelopes({topics.CLOCK}))
    return (killed_ns - last_ns) / 1e9


# ---- all of it ---------------------------------------------------------------------------------------------------


def run(quick: bool, say: Say) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory(prefix="stream-mmrnn-faults-") as name:
        folder = Path(name)
        bus = Bus()
        try:
            yield from _on_a_bus(bus, folder, quick, say)
        finally:
            bus.close()
        yield from _files(folder, quick, say)
        yield from _sessions(folder, quick, say)


def _on_a_bus(bus: Bus, folder: Path, quick: bool, say: Say) -> Iterator[Figure]:
    moments = 2 if quick else 20
    everything: list[Killed] = []
    for rate_hz in _FRAMES_HZ:
        say(f"the recorder killed at {moments} moments, {rate_hz} frames a second")
        killed = _kills(bus, folder, f"kill{rate_hz}", rate_hz, _STREAMS, moments, rate_hz)
        everything += killed
        yield Figure(
            f"recorder_kill_loss_{rate_hz}hz_s",
            f"recorder killed by SIGKILL at {moments} seeded moments, {rate_hz * 7} messages/s: the most that was lost",
            max(k.loss_s for k in killed),
            "s",
            _LOSS_BOUND_S,
            timed=True,
        )
    say(f"the same with sound alone, {moments} moments")
    killed = _kills(bus, folder, "audio", 50, _AUDIO_STREAMS, moments, 7)
    everything += killed
    what = f"the same with sound alone at 50 blocks/s, {moments} moments"
    yield Figure("recorder_kill_loss_audio_s", what, max(k.loss_s for k in killed), "s", _LOSS_BOUND_S, timed=True)
    what = f"of these {len(everything)} files: messages in a wrong place, doubled or left out before the end"
    yield Figure("recorder_kill_misplaced_messages", what, sum(k.out_of_order for k in everything), "messages", 0, "==")
    what = "of these files: sound messages that `repair` did not save"
    yield Figure("recorder_kill_unsaved_messages", what, sum(k.not_recovered for k in everything), "messages", 0, "==")
    what = "of these files: those that `verify` misjudges, or whose own sums do not hold"
    yield Figure("recorder_kill_misjudged_files", what, sum(k.off for k in everything), "files", 0, "==")

    seconds = 3.0 if quick else 6.0
    say(f"a full disk, by a limit on the file's size, {seconds:g} s")
    cases = [("full", _full_by_limit(bus, folder, seconds))]
    if not quick and (found := _full_tmpfs(bus, folder, seconds, say)) is not None:
        cases.append(("full_tmpfs", found))
    say(f"a disk whose every write takes 0.7 s, {seconds:g} s")
    slow = Running(bus, "slow", folder / "slow.mcap", 0.3, write_s=0.7)
    cases.append(("slow", _disturbed(bus, "slow", slow, seconds, lambda: None, folder, "did not keep up")))
    for case, d in cases:
        disk = {"full": "a disk that ends after 0.7 MB and has space again later", "slow": "every write takes 0.7 s"}
        where = disk.get(case, "a tmpfs that is full and has space again later")
        what = f"{where}: streams whose produced is not recorded + dropped, by the file and by what was published"
        yield Figure(f"recorder_{case}_unbalanced_streams", what, d.off + d.early_off, "streams", 0, "==")
        what = "of it: messages that were dropped and counted (some must be, or nothing was tried)"
        yield Figure(f"recorder_{case}_dropped_messages", what, d.dropped, "messages", 1, ">=")
        what = "of it: messages that the bus could not deliver, because no reader took them"
        yield Figure(f"recorder_{case}_undelivered_messages", what, d.lost, "messages", 0, "==")
        what = "of it: whether the recorder's status says so in a sentence"
        yield Figure(f"recorder_{case}_said", what, int(d.said), "", 1, "==")


def _files(folder: Path, quick: bool, say: Say) -> Iterator[Figure]:
    small, large = folder / "small.mcap", folder / "large.mcap"
    small_keys, large_keys = _small(small, 12), _small(large, 200 if quick else 1000)
    positions = list(range(1, small.stat().st_size, 13 if quick else 1))
    say(f"a small recording cut at {len(positions)} bytes")
    rng = random.Random(3)
    cuts = [_cuts(small, small_keys, positions, folder)]
    seeded = [rng.randrange(1, large.stat().st_size) for _ in range(10 if quick else 100)]
    say(f"a larger one cut at {len(seeded)} bytes")
    cuts.append(_cuts(large, large_keys, seeded, folder))
    tried = sum(c.tried for c in cuts)
    what = f"tail cut at {tried} bytes (of {small.stat().st_size:,} in a small file, seeded in a large): reading raises"
    what += " or does not give all messages of all whole chunks"
    yield Figure("recorder_cut_unreadable_files", what, sum(c.unreadable for c in cuts), "files", 0, "==")
    what = "of these: `verify` takes it for whole, or counts other messages"
    yield Figure("recorder_cut_misjudged_files", what, sum(c.misjudged for c in cuts), "files", 0, "==")
    what = "of these: sound messages that `repair` did not save"
    yield Figure("recorder_cut_unsaved_messages", what, sum(c.not_recovered for c in cuts), "messages", 0, "==")
    say("chunks damaged, one at a time")
    tried, lost = _damage(large, large_keys, folder, 5, 4 if quick else 1)
    what = f"eight bytes of noise in each of {tried} chunks in turn: messages of the others that `repair` did not save"
    yield Figure("recorder_damage_unsaved_messages", what, lost, "messages", 0, "==")


def _sessions(folder: Path, quick: bool, say: Say) -> Iterator[Figure]:
    kills = 1 if quick else 3
    say(f"a live session whose recorder is killed {kills} times")
    missing, predictions, parts, lost = _engine_beside(folder, kills, 11)
    what = f"recorder killed {kills} times in a live session: ticks missing among {predictions} predictions"
    yield Figure("recorder_kill_missing_ticks", what, missing, "ticks", 0, "==")
    what = "of it: parts that `verify` finds beside the first file, and it"
    yield Figure("recorder_kill_parts", what, parts, "parts", 1 + kills, "==")
    what = "of it: messages of the parts that are not in the one file that `repair` makes of them"
    yield Figure("recorder_kill_unjoined_messages", what, lost, "messages", 0, "==")
    rates = (25.0,) if quick else (10.0, 25.0, 50.0)
    say(f"{len(rates)} whole sessions killed")
    losses = [_whole_session_killed(folder, i, rate_hz, 100 + i) for i, rate_hz in enumerate(rates)]
    what = f"every process of a live session killed at once, {len(rates)} times: from the last message to the kill"
    yield Figure("recorder_session_kill_loss_s", what, max(losses), "s", _LOSS_BOUND_S, timed=True)
