"""A cluster: engines are killed, frozen and replaced, the server is restarted, a client stands still. Who notices?

A NATS server on loopback, three engines as processes, groups of sessions at 25 Hz; every answer is compared with the
session alone on an engine of this process.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from stream_mmrnn.bench import models
from stream_mmrnn.core.settings import StateSettings
from stream_mmrnn.predict.engine import StepEngine
from stream_mmrnn.serve.cluster.client import ClusterClient
from stream_mmrnn.serve.cluster.node import ClusterNode
from tools.bench.crowd import Crowd, GroupCrowd
from tools.bench.load import SessionRecord
from tools.bench.nats_cluster import Cluster
from tools.faults.promise import Figure, Say

TITLE = "Cluster"
NOT_PROMISED = (
    (
        "A log that outlives a power cut: NATS writes its streams at once and syncs them every two minutes unless its "
        "configuration says otherwise (sync_interval)."
    ),
    (
        "Sessions while the NATS server is away: they go on where they were when it is back. Three servers of NATS and "
        "cluster.replicas = 3 are for that."
    ),
)
HIDDEN = 64
ENGINES = 3

_Trouble = Callable[[Cluster, float], Awaitable[None]]


async def _kill(cluster: Cluster, duration_s: float) -> None:
    await asyncio.sleep(duration_s * 0.3)
    victim = cluster.engines.pop(0)
    victim.send(signal.SIGKILL)
    victim.wait()
    cluster.start_engine()


async def _freeze(cluster: Cluster, duration_s: float) -> None:
    """It stands still until others have taken its sessions, then goes on as if nothing had been."""
    await asyncio.sleep(duration_s * 0.25)
    cluster.engines[0].send(signal.SIGSTOP)
    await asyncio.sleep(min(duration_s * 0.4, 5.0))
    cluster.engines[0].send(signal.SIGCONT)


async def _restart(cluster: Cluster, duration_s: float) -> None:
    await asyncio.sleep(duration_s * 0.4)
    cluster.kill_server()
    await asyncio.sleep(0.2)
    cluster.start_server()


async def _upgrade(cluster: Cluster, duration_s: float) -> None:
    """Each engine in turn: a new one comes, the old one leaves in order."""
    for _ in range(ENGINES):
        cluster.start_engine()
        await cluster.settled(ENGINES + 1)
        old = cluster.engines.pop(0)
        old.send(signal.SIGTERM)
        while old.process.poll() is None:
            await asyncio.sleep(0.01)
        _SUMMARIES.append(old.wait())
        await cluster.settled(ENGINES)


class _Deaf(ClusterNode):
    """An engine that can be made to hear nothing of the others, nor they of it, while it reads and writes on."""

    deaf = False

    async def _send_beat(self, gone: bool = False) -> None:
        if not self.deaf:
            await super()._send_beat(gone)

    async def _share(self) -> None:
        if not self.deaf:
            await super()._share()


async def _split(cluster: Cluster, duration_s: float) -> None:
    """Two engines serve the same sessions at once: one that others take for dead goes on."""
    nodes: list[_Deaf] = []
    going = True

    def serve() -> None:
        nodes.append(_Deaf(cluster.settings()))
        asyncio.run(nodes[0].run(lambda: going))

    # in a thread: it loads its model and measures itself, and the clients go on meanwhile
    serving = asyncio.create_task(asyncio.to_thread(serve))
    await cluster.settled(ENGINES + 1)
    await asyncio.sleep(duration_s * 0.2)
    nodes[0].deaf = True
    await cluster.settled(ENGINES)
    await asyncio.sleep(max(0.5, duration_s * 0.2))
    nodes[0].deaf = False
    going = False
    await serving
    _SUMMARIES.append(nodes[0].summary())


_SUMMARIES: list[dict[str, Any]] = []
_REPEATED: list[int] = []
"""Answers that clients had already."""
_TROUBLES: dict[str, tuple[_Trouble, str]] = {
    "kill": (_kill, "an engine killed by SIGKILL, another one started"),
    "freeze": (_freeze, "an engine stopped by SIGSTOP until others have its sessions, and let go on"),
    "split": (_split, "an engine that is taken for dead, does not know it, and reads and writes on"),
    "restart": (_restart, "the NATS server killed by SIGKILL and started again"),
    "upgrade": (_upgrade, "every engine replaced in turn, by SIGTERM"),
}


def run(quick: bool, say: Say) -> Iterator[Figure]:
    sessions, duration_s = (24, 3.0) if quick else (256, 20.0)
    _SUMMARIES.clear()
    _REPEATED.clear()
    with tempfile.TemporaryDirectory(prefix="stream-mmrnn-cluster-") as folder:
        path = models.write(Path(folder), HIDDEN)
        engine = StepEngine(path)
        cluster = Cluster(Path(folder), path)
        try:
            for _ in range(ENGINES):
                cluster.start_engine()
            found = asyncio.run(_all(cluster, sessions, duration_s, say))
        finally:
            _SUMMARIES.extend(cluster.close())
        for name, members in found.items():
            what = f"{_TROUBLES[name][1]}: {ENGINES} engines, {sessions} sessions for {duration_s:g} s"
            yield from _figures(name, what, members, engine)
        yield from _slow_client(quick, say, path, engine, Path(folder) / "slow")
    counts = [summary.get("counts", {}) for summary in _SUMMARIES]
    every = StateSettings().snapshot_every
    yield Figure(
        "cluster_repeated_answers",
        f"that came to clients a second time, and were dropped there; at most {every} for each session and trouble",
        sum(_REPEATED),
        "answers",
        every * sessions * len(_TROUBLES),
    )
    yield Figure(
        "cluster_refused_states",
        "of engines that had lost their lease and wrote on: states that the server refused (or the split was none)",
        sum(c.get("cluster_refused", 0) for c in counts),
        "writes",
        1,
        ">=",
    )


async def _all(cluster: Cluster, sessions: int, duration_s: float, say: Say) -> dict[str, list[SessionRecord]]:
    found: dict[str, list[SessionRecord]] = {}
    await cluster.settled(ENGINES)
    async with GroupCrowd(lambda: ClusterClient(cluster.url, prefix=cluster.prefix), sessions) as crowd:
        for name, (trouble, what) in _TROUBLES.items():
            say(what)
            await cluster.settled(ENGINES)
            load = await crowd.run(duration_s, lambda to=trouble: to(cluster, duration_s))  # type: ignore[misc]
            found[name] = load.records
            for record in load.records:
                if missing := [tick for tick in range(len(record.due_ns)) if tick not in record.answers]:
                    known = f"{crowd.skipped(record)} skipped, errors: {dict(record.errors)}"
                    say(f"{record.name}: no answer to {missing[:10]} of {len(record.due_ns)} ({known})")
        _REPEATED.append(crowd.repeated)
    return found


def _figures(name: str, what: str, members: list[SessionRecord], engine: StepEngine) -> Iterator[Figure]:
    due = sum(len(m.due_ns) for m in members)
    yield from _right(
        name,
        f"{what}; of {due} ticks, those without an answer",
        sum(m.missing for m in members),
        sum(m.differing(engine) for m in members),
        sum(m.repeated for m in members),
    )
    worst_ns = max(max(m.gap_ns(), *m.latencies_ns(), 0) for m in members)
    what = "of these: the longest that a tick waited for its answer, or a session for a new one"
    yield Figure(f"cluster_{name}_gap_s", what, worst_ns / 1e9, "s", 1.0, timed=True)


def _right(name: str, what: str, missing: int, differing: int, doubled: int) -> Iterator[Figure]:
    """No answer is missing, belongs to another session, or comes twice."""
    yield Figure(f"cluster_{name}_missing_ticks", what, missing, "ticks", 0, "==")
    what = "of these: answers that are not the bits of the session alone"
    yield Figure(f"cluster_{name}_differing_answers", what, differing, "answers", 0, "==")
    what = "of these: ticks that a client was answered twice"
    yield Figure(f"cluster_{name}_doubled_answers", what, doubled, "answers", 0, "==")


def _slow_client(quick: bool, say: Say, path: Path, engine: StepEngine, folder: Path) -> Iterator[Figure]:
    """A client in a process of its own is stopped; others have sessions beside it."""
    stopped_s, sessions = (2.0, 8) if quick else (30.0, 32)
    duration_s = stopped_s + 2.0
    say(f"a client stopped for {stopped_s:g} s")
    folder.mkdir()
    cluster = Cluster(folder, path)
    try:
        cluster.start_engine()
        asyncio.run(cluster.settled(1))
        slow = subprocess.Popen(
            [sys.executable, "-m", "tools.faults.cluster", cluster.url, cluster.prefix, str(sessions), str(duration_s)],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stdin=subprocess.PIPE,
            text=True,
        )
        assert slow.stdout is not None
        slow.stdout.readline()

        async def stop(_: Cluster, __: float) -> None:
            await asyncio.sleep(0.5)
            os.kill(slow.pid, signal.SIGSTOP)
            await asyncio.sleep(stopped_s)
            os.kill(slow.pid, signal.SIGCONT)

        async def beside() -> list[SessionRecord]:
            make = lambda: ClusterClient(cluster.url, prefix=cluster.prefix)  # noqa: E731
            async with Crowd(make, sessions, apart=False) as crowd:
                return (await crowd.run(duration_s, lambda: stop(cluster, duration_s))).records

        members = asyncio.run(beside())
        out, _ = slow.communicate(timeout=120)
    finally:
        _SUMMARIES.extend(cluster.close())
    missing, differing, doubled, due = map(int, out.split()[-4:])
    what = f"a client with {sessions} sessions stopped for {stopped_s:g} s; of its {due} ticks, those without an answer"
    yield from _right("slow_client", what, missing, differing, doubled)
    wrong = sum(m.missing + m.differing(engine) for m in members)
    what = f"of {sessions} sessions beside it: answers that are missing or differ"
    yield Figure("cluster_slow_client_others_wrong_answers", what, wrong, "answers", 0, "==")
    worst_ns = max(max(m.latencies_ns(), default=0) for m in members)
    what = "and the longest that one of their ticks waited for its answer"
    yield Figure("cluster_slow_client_others_worst_ms", what, worst_ns / 1e6, "ms", 500, timed=True)


def _client(url: str, prefix: str, sessions: str, duration_s: str) -> None:
    """The client that is stopped: `python -m tools.faults.cluster URL PREFIX SESSIONS SECONDS`."""

    async def go() -> list[SessionRecord]:
        make = lambda: ClusterClient(url, prefix=prefix)  # noqa: E731
        async with Crowd(make, int(sessions), apart=False, named="slow") as crowd:
            print("up", flush=True)
            return (await crowd.run(float(duration_s))).records

    members = asyncio.run(go())
    with tempfile.TemporaryDirectory() as folder:
        engine = StepEngine(models.write(Path(folder), HIDDEN))
        differing = sum(m.differing(engine) for m in members)
    missing, doubled = sum(m.missing for m in members), sum(m.repeated for m in members)
    print(missing, differing, doubled, sum(len(m.due_ns) for m in members), flush=True)


if __name__ == "__main__":
    _client(*sys.argv[1:])
