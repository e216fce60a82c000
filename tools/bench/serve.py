"""Serve: clients over the network, each with a session at 25 Hz, and one engine; how soon a client gets `busy`.

Open loop and in turns: `serve` is ours over ZeroMQ, `cluster` the same over NATS with JetStream, where every tick
and answer is kept in a log, and `triton` and `pytriton` are NVIDIA's server; each with its engine in processes of its
own and all its clients in one. The optional ones are skipped with a reason. How many sessions one core carries, in
groups and alone, is measured by `blocks`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stream_mmrnn.bench import models
from stream_mmrnn.bench.plots import Pictures
from stream_mmrnn.bench.report import Document, Ratio, document, ratio
from stream_mmrnn.bench.sessions import SETTLE_S, TICK_NS
from stream_mmrnn.bus import Dealers
from stream_mmrnn.core import config
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import Busy, ProcessError, StreamError
from stream_mmrnn.core.extras import missing
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.async_client import AsyncClient
from stream_mmrnn.serve.client import QUEUE
from tools.bench import blocks
from tools.bench.asked import Contender, Peer, interpreter
from tools.bench.crowd import Crowd
from tools.bench.load import DRAIN_S, Figures, OpenLoop, SessionRecord, Transport, Turn, times, vector
from tools.bench.servers import compared, started

CLIENTS = 200
FEWER = 64
"""A second, smaller number of clients: with a log of everything, two cores may not be enough for 200."""
HIDDEN = 256
MODEL = "turn_taking"
"""Of the capacity."""
WAKE_S = 2.0
BEYOND = 100
"""Number of `busy` answers to measure."""


class Served(Transport):
    """`stream-mmrnn serve` as a process, its clients here: all are played by one loop that does as little as it can."""

    name = "serve"

    def __init__(self, path: Path, seed: int, folder: Path) -> None:
        self.versions: dict[str, str] = {}
        self._seed, self._turns = seed, 0
        self._process = subprocess.Popen(
            [sys.executable, "-m", "stream_mmrnn", "serve", "--model", str(path), "--port", "0", "--json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env=os.environ | {"XDG_STATE_HOME": str(folder)},
        )
        assert self._process.stderr is not None
        line = self._process.stderr.readline()
        if " at tcp://" not in line:
            self._process.kill()
            raise ProcessError(f"the server did not start: {line}{self._process.stderr.read()}".strip())
        self._address = line.split(" at ")[1].split(": up")[0]

    def turn(self, sessions: int, duration_s: float) -> Turn:
        """Each client has a connection of its own."""
        self._turns += 1
        names = [f"player-{self._turns}-{i}" for i in range(sessions)]
        self._dealers = Dealers(self._address, sessions, QUEUE, protocol.MAX_BYTES)
        with contextlib.closing(self._dealers):
            self._ask([protocol.Open(session=name) for name in names], protocol.Ready)
            load = OpenLoop(names, self._seed, duration_s + SETTLE_S)
            for wait_s in load.play(self):
                for i, content in self._dealers.receive(int(wait_s * 1e3)):
                    said = protocol.read_reply(content)
                    if isinstance(said, protocol.Pred):
                        load.answered(load.records[i], said.tick)
            self._ask([protocol.Close(session=name) for name in names], protocol.Done)
        return load.turn(SETTLE_S)

    def send(self, record: SessionRecord, tick: int, due_ns: int) -> None:
        features = (vector(record.who, tick).tobytes(),)
        step = protocol.Step(session=record.name, tick=tick, event_ns=due_ns, features=features)
        self._dealers.send(record.who, protocol.encode(step))

    def _ask(self, requests: Sequence[protocol.Request], kind: type[protocol.Reply]) -> None:
        """Send a request over each connection and wait for the replies; raises ProcessError where there are others."""
        for i, request in enumerate(requests):
            self._dealers.send(i, protocol.encode(request))
        count, end_ns = len(requests), now_ns() + round(DRAIN_S * 1e9)
        while count and now_ns() < end_ns:
            for _, content in self._dealers.receive(100):
                said = protocol.read_reply(content)
                if isinstance(said, protocol.BusyNow | protocol.Refused):
                    raise ProcessError(f"{count} clients more were not served: {said.why}")
                count -= isinstance(said, kind)
        if count:
            raise ProcessError(f"{count} clients had no reply")

    def beyond(self, sessions: int) -> dict[str, Any]:
        """With so many active clients, open more until `BEYOND` of them were refused as busy."""
        return asyncio.run(self._beyond(sessions))

    async def _beyond(self, sessions: int) -> dict[str, Any]:
        refused, opened, hintless = Histogram(), 0, 0

        async def come() -> None:
            nonlocal opened, hintless
            async with AsyncClient(self._address, timeout_s=DRAIN_S) as client:
                while refused.count < BEYOND:
                    began_ns = now_ns()
                    try:
                        await client.open(f"more-{opened}-{refused.count}", timeout_s=DRAIN_S)
                        opened += 1
                    except Busy as e:
                        refused.add(now_ns() - began_ns)
                        hintless += e.retry_after_s <= 0
                for session in list(client.client_state.sessions):
                    await client.end(session)

        async with Crowd(lambda: AsyncClient(self._address, timeout_s=DRAIN_S), sessions, self._seed) as crowd:
            load = await crowd.run(4.0, come)
        latency = Histogram()
        for ns in load.turn(SETTLE_S).latency_ns:
            latency.add(ns)
        return {
            "what": "busy",
            "contender": self.name,
            "sessions": sessions,
            "admitted": sessions + opened,
            "busy": refused.count,
            "hintless": hintless,
            "busy_ms": refused.row(),
            "latency_ms": latency.row(),
        }

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            out, _ = self._process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            out, _ = self._process.communicate()
        lines = out.splitlines()
        self.summary: dict[str, Any] = json.loads(lines[-1]) if lines else {}


class Clustered:
    """One engine of a cluster and a NATS server as processes, its clients here."""

    name = "cluster"

    def __init__(self, path: Path, seed: int, folder: Path) -> None:
        if absent := missing(("nats",)):
            raise ProcessError(f"{absent[0]} is not installed; pip install 'stream-mmrnn[cluster]'")
        from tools.bench.nats_cluster import Cluster

        self._seed = seed
        folder.mkdir()
        self._cluster = Cluster(folder, path)
        try:
            self.versions = {"nats-server": self._cluster.version()}
            self._cluster.start_engine()
            asyncio.run(self._cluster.settled(1))
        except BaseException:
            self._cluster.close()
            raise

    def turn(self, sessions: int, duration_s: float) -> Turn:
        return asyncio.run(self._crowd(sessions, duration_s))

    async def _crowd(self, sessions: int, duration_s: float) -> Turn:
        from stream_mmrnn.serve.cluster.client import ClusterClient

        cluster = self._cluster
        make = partial(ClusterClient, cluster.url, prefix=cluster.prefix, timeout_s=DRAIN_S)
        async with Crowd(make, sessions, self._seed) as crowd:
            return (await crowd.run(duration_s + SETTLE_S)).turn(SETTLE_S)

    def close(self) -> None:
        self._cluster.close()


def run(
    *,
    clients: int = CLIENTS,
    duration_s: float = 8.0,
    rounds: int = 3,
    hidden: int = HIDDEN,
    seed: int = 0,
    peers: bool = True,
    capacity: bool = True,
    say: Callable[[str], None] = lambda _: None,
    alive: Callable[[], bool] = lambda: True,
) -> tuple[Document, Pictures]:
    """`duration_s` is of each turn; `peers`: Triton, too, where it is; `capacity`: how many a core carries."""
    rows: list[dict[str, Any]] = []
    why: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stream-mmrnn-serve-")))
        path = models.write(folder, hidden)
        starts: dict[str, Callable[[], Contender]] = {
            "serve": partial(Served, path, seed, folder / "alone"),
            "cluster": partial(Clustered, path, seed, folder / "nats"),
        }
        python, reason = interpreter() if peers else ("", "left out, as asked")
        for name, kind in {"triton": "backend", "pytriton": "bind"}.items():
            if reason:
                why[name] = reason
            else:
                starts[name] = partial(Peer, name, python, kind, path, seed)
        field = started(stack, starts, why, say)
        ratios: dict[str, Ratio] = {}
        other_cpu: float | None = None
        for count in sorted({clients, min(clients, FEWER)}, reverse=True):
            figures, measured, other_cpu = compared(
                "serve", field, count, duration_s, rounds, why, say, alive, min(WAKE_S, duration_s)
            )
            rows += measured
            ratios |= _ratios(count, figures, other_cpu, why)
        rows += [{"what": "serve", "contender": name, "skipped": reason} for name, reason in why.items()]
        beyond: dict[str, Any] = {}
        for contender in field:
            if isinstance(contender, Served) and alive():
                say("more clients than can be served in time")
                try:
                    beyond = contender.beyond(clients)
                except StreamError as e:  # it has measured itself slow just now, and lets in fewer than were there
                    beyond = {"what": "busy", "contender": contender.name, "skipped": str(e)}
                rows.append(beyond)
        if capacity and alive():
            say(f"how many sessions of {MODEL} one core carries")
            more, found = blocks.measure(
                config.find_model(MODEL), folder / "capacity", min(duration_s, 4.0), other_cpu, say, alive
            )
            rows += more
            ratios |= found
    busy_ms = beyond["busy_ms"]["p99"] if beyond.get("busy") else None
    ratios["busy_p99_ms"] = ratio(busy_ms, 10.0, "less", other_cpu, "no client was refused as busy")
    settings: dict[str, Any] = {"clients": clients, "duration_s": duration_s, "rounds": rounds, "hidden": hidden}
    settings |= {"seed": seed, "capacity_model": MODEL if capacity else ""}
    return document("serve", settings, rows, ratios), Pictures()


def _ratios(
    clients: int, figures: dict[str, Figures], other_cpu: float | None, why: dict[str, str]
) -> dict[str, Ratio]:
    found: dict[str, Ratio] = {}
    for name, of in figures.items():
        late = of.latency.percentile(99) / TICK_NS if of.latency.count else None
        if name in ("serve", "cluster"):
            found[f"{name}_p99_over_tick_{clients}"] = ratio(late, 1.0, "less", other_cpu, why.get(name, ""))
    for name in ("serve", "cluster", "triton", "pytriton"):
        figures.setdefault(name, Figures())
    for name, own in (("cluster", "serve"), *((t, o) for t in ("triton", "pytriton") for o in ("serve", "cluster"))):
        found[f"{name}_p50_over_{own}_{clients}"] = ratio(
            times(figures[name].rounds, figures[own].rounds),
            None,
            "less" if name == "cluster" else "more",
            other_cpu,
            why.get(name) or why.get(own) or "it was stopped before",
        )
    return found
