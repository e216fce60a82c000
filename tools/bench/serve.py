"""Serve: clients over the network, each with a session at 25 Hz, and one engine; how soon a client gets `busy`.

Open loop and in turns: `serve` is ours over ZeroMQ, `cluster` the same over NATS with JetStream, where every tick
and answer is kept in a log, and `triton` and `pytriton` are NVIDIA's server; each with its engine in processes of its
own and all its clients in one. The optional ones are skipped with a reason.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from stream_mmrnn.bench import models
from stream_mmrnn.bench.machine import Processes
from stream_mmrnn.bench.plots import Pictures
from stream_mmrnn.bench.report import Document, Ratio, document, ratio
from stream_mmrnn.bench.sessions import SETTLE_S, TICK_NS, phases
from stream_mmrnn.bus import Dealers
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import Busy, ProcessError, StreamError
from stream_mmrnn.core.extras import missing
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.async_client import AsyncClient
from stream_mmrnn.serve.client import QUEUE
from tools.bench.asked import Contender, Peer, Turn, interpreter
from tools.bench.crowd import DRAIN_S, Crowd, Member, vector
from tools.bench.servers import Figures, in_turn, started

CLIENTS = 200
FEWER = 64
"""A second, smaller number of clients: with a log of everything, two cores may not be enough for 200."""
HIDDEN = 256
WAKE_S = 2.0
BEYOND = 100
"""Number of `busy` answers to measure."""


def _turn(members: list[Member]) -> Turn:
    """The figures after the settling time."""
    first_ns = min((m.due_ns[0] for m in members if m.due_ns), default=0) + round(SETTLE_S * 1e9)
    requests = sum(due_ns >= first_ns for m in members for due_ns in m.due_ns)
    errors: dict[str, int] = {}
    for m in members:
        for name, count in m.errors.items():
            errors[name] = errors.get(name, 0) + count
    return Turn(requests, [ns for m in members for ns in m.latencies_ns(first_ns)], [], errors)


class Served:
    """`stream-mmrnn serve` as a process, its clients here."""

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
        """Each client has a connection of its own; all are played by one loop that does as little as it can."""
        self._turns += 1
        dealers = Dealers(self._address, sessions, QUEUE, protocol.MAX_BYTES)
        try:
            return self._play(dealers, sessions, duration_s)
        finally:
            dealers.close()

    def _play(self, dealers: Dealers, sessions: int, duration_s: float) -> Turn:
        names = [f"player-{self._turns}-{i}" for i in range(sessions)]
        for i, name in enumerate(names):
            dealers.send(i, protocol.encode(protocol.Open(session=name)))
        self._await_replies(dealers, sessions, protocol.Ready)
        begin_ns = now_ns() + 50_000_000
        settled_ns = begin_ns + round(SETTLE_S * 1e9)
        end_ns = settled_ns + round(duration_s * 1e9)
        due = [(begin_ns + int(at), i, 0) for i, at in enumerate(phases(sessions, "spread", self._seed))]
        heapq.heapify(due)
        sent: dict[tuple[str, int], int] = {}
        latency_ns: list[int] = []
        requests = 0
        deadline_ns = end_ns + round(DRAIN_S * 1e9)
        while now_ns() < deadline_ns:
            at_ns = now_ns()
            while due and due[0][0] <= at_ns:
                due_ns, i, tick = heapq.heappop(due)
                features = (vector(i, tick).tobytes(),)
                step = protocol.Step(session=names[i], tick=tick, event_ns=due_ns, features=features)
                dealers.send(i, protocol.encode(step))
                sent[names[i], tick] = due_ns
                requests += due_ns >= settled_ns
                if due_ns + TICK_NS < end_ns:
                    heapq.heappush(due, (due_ns + TICK_NS, i, tick + 1))
            if not due and not sent:
                break
            wait_ms = max((due[0][0] - now_ns()) // 1_000_000, 0) if due else 10
            for _, content in dealers.receive(int(wait_ms)):
                said = protocol.read_reply(content)
                if isinstance(said, protocol.Pred):
                    due_ns = sent.pop((said.session, said.tick))
                    if due_ns >= settled_ns:
                        latency_ns.append(now_ns() - due_ns)
        for i, name in enumerate(names):
            dealers.send(i, protocol.encode(protocol.Close(session=name)))
        self._await_replies(dealers, sessions, protocol.Done)
        return Turn(requests, latency_ns, [], {})

    def _await_replies(self, dealers: Dealers, count: int, kind: type[protocol.Reply]) -> None:
        """Wait for `count` replies of one kind; raises ProcessError if others arrive, or none."""
        end_ns = now_ns() + round(DRAIN_S * 1e9)
        while count and now_ns() < end_ns:
            for _, content in dealers.receive(100):
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
            members = await crowd.run(4.0, come)
        found = Figures()
        for ns in _turn(members).latency_ns:
            found.latency.add(ns)
        return {
            "what": "busy",
            "contender": self.name,
            "sessions": sessions,
            "admitted": sessions + opened,
            "busy": refused.count,
            "hintless": hintless,
            "busy_ms": refused.row(),
            "latency_ms": found.latency.row(),
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
            return _turn(await crowd.run(duration_s + SETTLE_S))

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
    say: Callable[[str], None] = lambda _: None,
    alive: Callable[[], bool] = lambda: True,
) -> tuple[Document, Pictures]:
    """`duration_s` is of each turn; `peers`: Triton, too, where it is."""
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
            say(f"{count} clients, {rounds} turns each of {', '.join(c.name for c in field)}")
            watch = Processes()
            figures = in_turn(field, count, duration_s, rounds, why, alive, min(WAKE_S, duration_s))
            usage = watch.used()
            other_cpu = usage.other_cpu
            for contender in field:
                if contender.name in why or not figures[contender.name].requests:
                    continue
                row = {"what": "serve", "contender": contender.name, "sessions": count}
                row |= figures[contender.name].row()
                row |= {"other_cpu": usage.other_cpu, "busiest": usage.busiest_other}
                rows.append({**row, "versions": contender.versions} if contender.versions else row)
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
    busy_ms = beyond["busy_ms"]["p99"] if beyond.get("busy") else None
    ratios["busy_p99_ms"] = ratio(busy_ms, 10.0, "less", other_cpu, "no client was refused as busy")
    settings = {"clients": clients, "duration_s": duration_s, "rounds": rounds, "hidden": hidden, "seed": seed}
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
        times = [
            a / b for a, b in zip(figures[name].rounds, figures[own].rounds, strict=False) if a == a and b == b and b
        ]
        found[f"{name}_p50_over_{own}_{clients}"] = ratio(
            statistics.median(times) if times else None,
            None,
            "less" if name == "cluster" else "more",
            other_cpu,
            why.get(name) or why.get(own) or "it was stopped before",
        )
    return found
