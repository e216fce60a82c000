"""Floods: one client sends each kind of request as fast as it can, or is killed; what do others notice?

A real server as a process, floods from processes of their own, the other client in this one. `FLOODS` is every request
of the protocol; tests of the server in one process use it, too.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypeAlias

import numpy as np

from stream_mmrnn import Client
from stream_mmrnn.bench import models
from stream_mmrnn.bench.measure import sleep_until
from stream_mmrnn.bench.step import NO_STAMPS
from stream_mmrnn.bus import Dealer
from stream_mmrnn.core import config
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import Busy, StreamError
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.core.types import Tick
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.client import QUEUE, ServedSession
from tools.faults.commands import Command, command, wait_for
from tools.faults.promise import Figure, Say

TITLE = "Floods"
NOT_PROMISED = (
    "The pace of a client that floods: the others' share comes first, and what it may have open is bounded.",
    "Ticks in time while the first raw session of a server loads its encoders: that is once, for some 0.1 s.",
    "Times beside a flood, when other programs take the processor away from the server.",
)

MODEL = "turn_taking"
"""Takes pictures, sound and words, so that the floods of a raw session are pushes."""
TICK_NS = 40_000_000
OWN = 16
"""Slots that a client may have, where all are taken and where a flood opens what it can."""
HIDDEN = 64
OTHER = "v"
"""The session of the client that does not flood."""
WRONG = "x"
"""A token that is none."""

# ---- every request ---------------------------------------------------------------------------------------------------

Steps: TypeAlias = Callable[[str, int], protocol.Step]
"""A step by session and index."""


def _steps(name: str, step: Steps) -> Iterator[protocol.Request]:
    yield protocol.Open(session=name)
    for i in itertools.count():
        yield step(name, i)


def _and(name: str, ask: protocol.Request, step: Steps | None = None) -> Iterator[protocol.Request]:
    yield protocol.Open(session=name)
    for i in itertools.count():
        if step is not None:
            yield step(name, i)
        yield ask


def _pushes(name: str, data: bytes, stream: str) -> Iterator[protocol.Request]:
    yield protocol.Open(session=name, raw=True)
    for i in itertools.count():
        yield protocol.PushSample(session=name, push=i, stream=stream, data=data)


def _reopened(name: str, step: Steps) -> Iterator[protocol.Request]:
    while True:
        yield protocol.Open(session=name)
        yield step(name, 0)
        yield protocol.Close(session=name)


def _blocks(name: str, step: Steps) -> Iterator[protocol.Request]:
    """Of a group of four, each as if it were sent for the first time."""
    sessions = tuple(f"{name}g{i}" for i in range(4))
    yield protocol.OpenGroup(group=0, sessions=sessions)
    for i in itertools.count():
        features = tuple(None if vector is None else vector * 4 for vector in step(name, i).features)
        yield protocol.Steps(group=0, block=i, ticks=np.full(4, i, "<i8").tobytes(), features=features)


def _bad_blocks(name: str, step: Steps) -> Iterator[protocol.Request]:
    """Columns that do not fit, of a group that is open."""
    yield protocol.OpenGroup(group=0, sessions=(f"{name}g",))
    for i in itertools.count():
        yield protocol.Steps(group=0, block=i, ticks=bytes(8 * (i % 3)), features=(bytes(7),) * (i % 5))


FLOODS: dict[str, Callable[[str, Steps], Iterator[protocol.Request]]] = {
    "hello": lambda name, step: itertools.repeat(protocol.Hello()),
    "open": lambda name, step: (protocol.Open(session=f"{name}{i}") for i in itertools.count()),
    "open of another": lambda name, step: itertools.repeat(protocol.Open(session=OTHER, token=WRONG)),
    "open and close": _reopened,
    "step": _steps,
    "group": lambda name, step: (
        protocol.OpenGroup(group=i % 100, sessions=tuple(f"{name}{i}_{k}" for k in range(6))) for i in itertools.count()
    ),
    "group of another": lambda name, step: itertools.repeat(
        protocol.OpenGroup(group=0, sessions=(OTHER,), tokens=(WRONG,))
    ),
    "steps": _blocks,
    "steps that do not fit": _bad_blocks,
    "flush": lambda name, step: _and(name, protocol.Flush(session=name)),
    "step and flush": lambda name, step: _and(name, protocol.Flush(session=name), step),
    "reset": lambda name, step: _and(name, protocol.Reset(session=name)),
    "step and reset": lambda name, step: _and(name, protocol.Reset(session=name), step),
    "flush of another": lambda name, step: itertools.repeat(protocol.Flush(session=OTHER)),
    "close of another": lambda name, step: itertools.repeat(protocol.Close(session=OTHER, token=WRONG)),
    "close of none": lambda name, step: itertools.repeat(protocol.Close(session="none", token=WRONG)),
    "push of sound": lambda name, step: _pushes(name, bytes(640), "audio"),
    "push of pictures": lambda name, step: _pushes(name, b"\xff\xd8" + bytes(50), "vision"),
}
"""By name, what a client sends without end, of a session by name; `OTHER` is another client's."""

# ---- processes -------------------------------------------------------------------------------------------------------


def _ticks(welcome: protocol.Welcome) -> list[dict[str, np.ndarray]]:
    """Features of 64 ticks, which come round."""
    rng = np.random.default_rng(7)
    return [{m.name: rng.standard_normal(m.size).astype(np.float32) for m in welcome.modalities} for _ in range(64)]


def _flood(address: str, say: Connection) -> None:
    """Told a name by `say`, it sends that flood until it is told to stop, and says (requests, replies, refusals)."""
    with Client(address) as client:
        kinds = [tuple(v.tobytes() for v in features.values()) for features in _ticks(client.model)]
    ages = (0,) * len(kinds[0])

    def step(session: str, index: int) -> protocol.Step:
        return protocol.Step(session=session, tick=index, event_ns=0, features=kinds[index % 64], age_ns=ages)

    for number in itertools.count():
        requests = FLOODS[say.recv()](f"f{number}_", step)
        dealer = Dealer(address, QUEUE, protocol.MAX_BYTES)
        sent = replies = refused = 0
        say.send("ready")
        while not say.poll():
            for request in itertools.islice(requests, 32):
                content = protocol.encode(request)
                while not (taken := dealer.send(content)) and not say.poll():
                    time.sleep(0.0005)  # the server does not read: that is its right
                sent += taken
            while (got := dealer.receive(0)) is not None:
                replies += 1
                refused += isinstance(protocol.read_reply(got), protocol.Refused | protocol.BusyNow)
        say.recv()
        say.send((sent, replies, refused))
        dealer.close()


def _hold(address: str, count: int, say: Connection) -> None:
    """Opens sessions with a state each, says their tokens, and does nothing until it is killed."""
    client = Client(address)
    sessions = [client.open(f"held{i}") for i in range(count)]
    for session in sessions:
        session.step(_ticks(client.model)[0])
        session.flush()
    say.send([session.token for session in sessions])
    time.sleep(600)


@contextmanager
def _beside(what: Callable[..., None], *args: object) -> Iterator[tuple[int, Connection]]:
    """`what` in a process of its own: its pid and the other end of its connection."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=what, args=(*args, there), daemon=True)
    process.start()
    there.close()
    assert process.pid is not None
    try:
        yield process.pid, here
    finally:
        process.kill()
        process.join()
        here.close()


@contextmanager
def _server(model: str | Path, settings: str) -> Iterator[tuple[str, Command]]:
    """A server's address, with its states in a folder of its own."""
    with TemporaryDirectory(prefix="stream-mmrnn-floods-") as states:
        options = ("--model", model, "--port", 0, "--config", "FOLDER/settings.toml")
        with command("serve", *options, settings=settings, env={"XDG_STATE_HOME": states}) as (running, _):
            wait_for(lambda: "serving" in running.err or running.process.poll() is not None)
            if running.process.poll() is not None:
                raise RuntimeError(f"the server ended at once: {running.err}")
            yield running.err.split(" at ")[1].split(": ")[0].strip(), running
            running.send(signal.SIGTERM)
            running.process.wait(30)


# ---- what is measured ------------------------------------------------------------------------------------------------


class _Other:
    """A client with one session at 25 Hz, an open loop: the times of its ticks are fixed, however long answers take."""

    def __init__(self, session: ServedSession, kinds: list[dict[str, np.ndarray]]) -> None:
        self.session, self.kinds = session, kinds
        self.heads: dict[int, dict[str, bytes]] = {}
        self.sent = 0

    def run(self, seconds: float) -> Histogram:
        """From the due time of each tick to its answer."""
        latency = Histogram()
        due_ns = now_ns() + TICK_NS
        for _ in range(round(seconds * 1e9 / TICK_NS)):
            sleep_until(due_ns, now_ns)
            index = self.sent
            self.sent += 1
            try:
                answer = self.session.step(self.kinds[index % 64], tick=index)
            except StreamError:
                answer = None
            if answer is not None:
                self.heads[answer.tick] = {name: vector.tobytes() for name, vector in answer.heads.items()}
            latency.add(now_ns() - due_ns)
            due_ns += TICK_NS
        return latency

    def differing(self) -> int:
        """Answers that are not the bits of the session alone on an engine of this process."""
        engine = StepEngine(config.find_model(MODEL))
        engine.open(OTHER)
        differing = 0
        for index in range(self.sent):
            features = self.kinds[index % 64]
            present, age_ns = dict.fromkeys(features, True), dict.fromkeys(features, 0)
            (said,) = engine.step([Tick(OTHER, index, 0, features, present, age_ns, NO_STAMPS)])
            heads = {name: vector.tobytes() for name, vector in said.heads.items()}
            differing += index in self.heads and self.heads[index] != heads
        return differing


class _Flooded(NamedTuple):
    name: str
    p50_ms: float
    p99_ms: float
    requests: int


def _floods(seconds: float, say: Say) -> Iterator[Figure]:
    settings = f"[admission]\nshare = 1.0\n[serve]\nslots = {8 * OWN}\nclient_slots = {OWN}\n"
    found: list[_Flooded] = []
    with _server(MODEL, settings) as (address, _), Client(address) as client:
        kinds = _ticks(client.model)
        other = _Other(client.open(OTHER), kinds)
        calm = other.run(min(seconds, 5.0))
        say(f"alone: p50 {calm.percentile(50) / 1e6:.2f} ms, p99 {calm.percentile(99) / 1e6:.2f} ms")
        with _beside(_flood, address) as (_, flood):

            def beside(name: str, seconds: float) -> tuple[Histogram, tuple[int, int, int]]:
                flood.send(name)
                flood.recv()
                latency = other.run(seconds)
                flood.send("enough")
                return latency, flood.recv()

            first_raw_ms = max(beside(name, 0.4)[0].percentile(100) / 1e6 for name in FLOODS if "push" in name)
            for name in FLOODS:
                latency, (sent, replies, refused) = beside(name, seconds)
                found.append(_Flooded(name, latency.percentile(50) / 1e6, latency.percentile(99) / 1e6, sent))
                say(
                    f"{name}: {sent} requests, {replies} replies, {refused} of them refusals; "
                    f"p50 {found[-1].p50_ms:.2f} ms, p99 {found[-1].p99_ms:.2f} ms"
                )
    slow50, slow99 = max(found, key=lambda f: f.p50_ms), max(found, key=lambda f: f.p99_ms)
    few = min(found, key=lambda f: f.requests)
    what = f"{len(found)} floods, one of each kind of request, {seconds:g} s each, beside a session at 25 Hz"
    yield Figure("floods_p50_ms", f"{what}: its p50 in the worst, {slow50.name!r}", slow50.p50_ms, "ms", 20, timed=True)
    yield Figure(
        "floods_p99_ms", f"its p99 in the worst, {slow99.name!r}", slow99.p99_ms, "ms", TICK_NS / 1e6, timed=True
    )
    yield Figure(
        "floods_first_raw_ms", "the longest that one of its ticks waited while the server loaded the encoders of its "
        "first raw sessions", first_raw_ms, "ms", 500, timed=True,
    )  # fmt: skip
    yield Figure(
        "floods_missing_ticks", f"of its {other.sent} ticks, those without an answer", other.sent - len(other.heads),
        "ticks", 0, "==",
    )  # fmt: skip
    yield Figure(
        "floods_differing_ticks", "of these: answers that are not the bits of the session alone", other.differing(),
        "ticks", 0, "==",
    )  # fmt: skip
    yield Figure(
        "floods_requests_messages", f"that the least of the floods sent, {few.name!r} (some must be, or nothing was "
        "tried)", few.requests, "messages", 100, ">=",
    )  # fmt: skip


def _killed(model: Path, rounds: int, say: Say) -> Iterator[Figure]:
    """A client that has every slot is killed; another one asks for one until it gets it."""
    free_s, resumed, tokens_of = 0.0, 0, 0
    settings = f"[admission]\nshare = 1.0\n[serve]\nslots = {OWN}\nclient_slots = {OWN}\n"
    for _ in range(rounds):
        with _server(model, settings) as (address, _), Client(address) as client:
            with _beside(_hold, address, OWN) as (pid, holder):
                tokens = holder.recv()
                os.kill(pid, signal.SIGKILL)
                began_s = time.monotonic()
                # every slot: as long as one session is held, one of so many is refused
                opened: list[ServedSession] = []
                while len(opened) < OWN and time.monotonic() - began_s < 60:
                    try:
                        opened.append(client.open(f"new{len(opened)}"))
                    except Busy:
                        time.sleep(0.02)
                free_s = max(free_s, time.monotonic() - began_s)
            for session in opened:
                session.close()
            again = [client.open(f"held{i}", token) for i, token in enumerate(tokens)]
            resumed += sum(session.resumed and session.next_tick == 1 for session in again)
            tokens_of += len(tokens)
    say(f"{rounds} clients killed with {OWN} sessions each: their slots were free after {free_s:.2f} s at most")
    yield Figure(
        "floods_killed_client_s", f"a client with all {OWN} slots is killed, {rounds} times: until another one has "
        "them all", free_s, "s", 6,
    )  # fmt: skip
    yield Figure(
        "floods_killed_resumed_share", f"of its {tokens_of} sessions, those that go on with their tokens",
        resumed / tokens_of, "", 1, "==",
    )  # fmt: skip


def _single(model: Path, count: int, say: Say) -> Iterator[Figure]:
    """Clients that send one tick and wait for it, each with a session more, on a server that does nothing else."""
    busy = 0
    with _server(model, f"[serve]\nclient_slots = {count}\n") as (address, running):
        said = running.err.strip().splitlines()[0]
        with Client(address) as client:
            (kind, *_) = _ticks(client.model)
            sessions: list[ServedSession] = []
            for i in range(count):
                try:
                    sessions.append(client.open(f"s{i}"))
                except Busy as e:
                    busy += 1
                    say(f"refused with {len(sessions)} sessions: {e}")
                for session in sessions[-8:]:
                    session.step(kind)
    say(said.partition(": ")[2])
    yield Figure(
        "floods_single_busy_count", f"{count} sessions that are stepped one tick at a time on an idle server: refused "
        "as busy", busy, "", 0, "==",
    )  # fmt: skip


def run(quick: bool, say: Say) -> Iterator[Figure]:
    with TemporaryDirectory(prefix="stream-mmrnn-floods-") as folder:
        model = models.write(Path(folder), HIDDEN)
        yield from _floods(0.4 if quick else 8.0, say)
        yield from _killed(model, 1 if quick else 3, say)
        yield from _single(model, 100 if quick else 600, say)
