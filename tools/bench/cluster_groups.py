"""A gateway over NATS: groups of sessions at 25 Hz in one client, a server and engines as processes of their own.

    python -m tools.bench.cluster_groups --sessions 1024 --engines 2 --seconds 10

In an open loop, each group at its own phase; latency counts from a block's due time. The CPU of every process is told
beside it, the client's too. Prints a JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from stream_mmrnn.bench import models
from stream_mmrnn.core import config
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.serve.client_group import AsyncGroup
from stream_mmrnn.serve.cluster.client import ClusterClient
from tools.bench.load import DRAIN_S
from tools.bench.nats_cluster import Cluster

TICK_S = 0.04
SETTLE_S = 1.0
WORDS = ("text", "words")
"""Modalities with these in their names are absent, as they are most of the time."""


class _Load:
    """Blocks of one group: sends them when they are due, and records when their answers came."""

    def __init__(
        self, group: AsyncGroup, features: dict[str, Any], begin_s: float, end_s: float, latency: Histogram
    ) -> None:
        """`latency`: of the blocks that were due after the first `SETTLE_S`."""
        self._group, self._features, self._begin_s, self._end_s = group, features, begin_s, end_s
        self._latency = latency
        self.sent = self.answered = self.unstepped = 0

    async def send(self) -> None:
        while (due_s := self._begin_s + TICK_S * self.sent) < self._end_s:
            if (wait_s := due_s - time.monotonic()) > 0:
                await asyncio.sleep(wait_s)
            self._group.send(self._features)
            self.sent += 1

    async def receive(self) -> None:
        while True:
            answer = await self._group.receive(DRAIN_S)
            if answer is None:
                if time.monotonic() > self._end_s:
                    return
                await asyncio.sleep(0.001)
                continue
            due_s = self._begin_s + TICK_S * answer.block
            self.answered += 1
            self.unstepped += int(np.count_nonzero(~answer.stepped))
            if due_s > self._begin_s + SETTLE_S:
                self._latency.add(round((time.monotonic() - due_s) * 1e9))


async def _run(cluster: Cluster, sessions: int, engines: int, seconds: float, of_group: int) -> dict[str, Any]:
    await cluster.settled(engines)
    async with ClusterClient(cluster.url, prefix=cluster.prefix, timeout_s=DRAIN_S) as client:
        names = [f"s{i}" for i in range(sessions)]
        groups = [await client.group(names[i : i + of_group], timeout_s=DRAIN_S) for i in range(0, sessions, of_group)]
        rng = np.random.default_rng(0)
        heard = [m for m in client.model.modalities if not any(word in m.name for word in WORDS)]
        begin_s, latency = time.monotonic() + 0.2, Histogram()
        loads = [
            _Load(
                group,
                {m.name: (0.5 * rng.standard_normal((len(group), m.size))).astype(np.float16) for m in heard},
                begin_s + TICK_S * i / len(groups),
                begin_s + SETTLE_S + seconds,
                latency,
            )
            for i, group in enumerate(groups)
        ]
        assert cluster.server is not None
        pids = {"client": psutil.Process().pid, "nats": cluster.server.pid}
        pids |= {f"engine_{i}": engine.process.pid for i, engine in enumerate(cluster.engines)}
        processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        before = {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
        began_s = time.monotonic()
        await asyncio.gather(*(of() for load in loads for of in (load.send, load.receive)))
        took_s = time.monotonic() - began_s
        cpu_s = {name: sum(process.cpu_times()[:2]) - before[name] for name, process in processes.items()}
        repeated = client._transport.repeated if client._transport is not None else 0  # type: ignore[attr-defined]
    ticks = sum(load.sent * len(group) for load, group in zip(loads, groups, strict=True))
    return {
        "what": "cluster_groups",
        "sessions": sessions,
        "engines": engines,
        "of_group": of_group,
        "ticks": ticks,
        "lost": sum((load.sent - load.answered) * of_group + load.unstepped for load in loads),
        "repeated": repeated,
        "latency_ms": latency.row(),
        "cpu": {name: round(s / took_s, 3) for name, s in cpu_s.items()},
        "cpu_us_a_tick": {name: round(1e6 * s / ticks, 2) for name, s in cpu_s.items()},
    }


def run(sessions: int, engines: int, seconds: float, of_group: int = 64, model: str = "turn_taking") -> dict[str, Any]:
    """The figures of one run; `model`: of the zoo, or the width of a GRU of the bench."""
    with tempfile.TemporaryDirectory(prefix="stream-mmrnn-cluster-") as folder:
        path = models.write(Path(folder), int(model)) if model.isdigit() else config.find_model(model)
        cluster = Cluster(Path(folder), path)
        try:
            for _ in range(engines):
                cluster.start_engine()
            return asyncio.run(_run(cluster, sessions, engines, seconds, of_group))
        finally:
            cluster.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=1024)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--of-group", type=int, default=64)
    parser.add_argument("--model", default="turn_taking")
    asked = parser.parse_args()
    print(json.dumps(run(asked.sessions, asked.engines, asked.seconds, asked.of_group, asked.model)))
