"""How many sessions one server carries on one core: in groups of 64, and each with a connection of its own.

The server is pinned to one core, and the clients, which are one process, to another; the CPU of both is said. Open
loop, 25 ticks a second of each session: latency counts from the due time until the answer can be read. Groups are
stepped by the public client; single ones by a loop that does as little as it can. The number of sessions grows until
p99 is above a tick. Knows nothing about other contenders.
"""

from __future__ import annotations

import contextlib
import heapq
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from stream_mmrnn.bench import sessions as engine_bench
from stream_mmrnn.bench.report import Ratio, ratio
from stream_mmrnn.bench.sessions import SETTLE_S, TICK_NS
from stream_mmrnn.bus import Dealers
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import ProcessError, StreamError, TimedOut
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.serve import protocol
from stream_mmrnn.serve.client import QUEUE, Client

GROUP = 64
BOUNDS = {"groups": 2000, "singles": 400}
OVER_ENGINE = 0.6
START = {"groups": 512, "singles": 100}
_DRAIN_S = 5.0
_SERVER_CORE, _CLIENT_CORE = 0, 1


class Load(NamedTuple):
    """What came of one number of sessions."""

    latency: Histogram
    sent: int
    server_cpu: float
    """Of a core."""
    client_cpu: float

    @property
    def holds(self) -> bool:
        return self.latency.count >= self.sent and self.latency.percentile(99) <= TICK_NS

    def row(self) -> dict[str, Any]:
        return {
            "requests": self.sent,
            "answers": self.latency.count,
            "lost": self.sent - self.latency.count,
            "latency_ms": self.latency.row(),
            "server_cpu": round(self.server_cpu, 3),
            "client_cpu": round(self.client_cpu, 3),
            "holds": self.holds,
        }


@contextlib.contextmanager
def pinned(core: int) -> Iterator[None]:
    """Keep this process on one core, where the system can do that."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {core} & before or before)
        yield
    finally:
        os.sched_setaffinity(0, before)


class Server:
    """`stream-mmrnn serve` on one core."""

    def __init__(self, path: Path | str, folder: Path, slots: int = 16_384) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "serve.toml").write_text(
            f"[serve]\nslots = {slots}\nclient_slots = {slots}\n"
            f"[admission]\nshare = 1.0\n[state]\nfolder = '{folder}'\n"
        )
        options = ["--model", str(path), "--port", "0", "--config", str(folder / "serve.toml"), "--json"]
        with pinned(_SERVER_CORE):
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stream_mmrnn", "serve", *options],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                stdin=subprocess.DEVNULL,
                text=True,
                start_new_session=True,
            )
        assert self._process.stderr is not None
        line = self._process.stderr.readline()
        while line and " at tcp://" not in line:  # it may say first that there are fewer slots
            line = self._process.stderr.readline()
        if not line:
            self._process.kill()
            raise ProcessError("the server did not start")
        self.address = line.split(" at ")[1].split(": up")[0].strip()
        self._watched = psutil.Process(self._process.pid)

    def cpu_s(self) -> float:
        times = self._watched.cpu_times()
        return float(times.user + times.system)

    def close(self) -> dict[str, Any]:
        self._process.send_signal(signal.SIGTERM)
        try:
            out, _ = self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            out, _ = self._process.communicate()
        lines = out.splitlines()
        found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        return found


class _Watch:
    """CPU of server and clients since it was made."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._begin = time.monotonic(), server.cpu_s(), time.process_time()

    def used(self) -> tuple[float, float]:
        seconds = time.monotonic() - self._begin[0]
        return (
            (self._server.cpu_s() - self._begin[1]) / seconds,
            (time.process_time() - self._begin[2]) / seconds,
        )


def groups(server: Server, sessions: int, duration_s: float, turn: int) -> Load:
    """Groups of `GROUP` sessions over one connection, as a gateway has them."""
    latency = Histogram()
    count = max(sessions // GROUP, 1)
    rng = np.random.default_rng(0)
    with Client(server.address, timeout_s=20) as client:
        modality = next((m for m in client.model.modalities if m.name == "audio"), client.model.modalities[0])
        kinds = [rng.standard_normal((GROUP, modality.size)).astype(np.float32) for _ in range(16)]
        made = [client.group([f"g{turn}-{i}-{k}" for k in range(GROUP)], timeout_s=20) for i in range(count)]
        begin_ns = now_ns() + 50_000_000
        settled_ns = begin_ns + round(SETTLE_S * 1e9)
        end_ns = settled_ns + round(duration_s * 1e9)
        due = [(begin_ns + TICK_NS * i // count, i) for i in range(count)]
        heapq.heapify(due)
        due_of: list[dict[int, int]] = [{} for _ in made]
        watch: _Watch | None = None
        sent = 0
        while due or any(due_of):
            at_ns = now_ns()
            if watch is None and at_ns >= settled_ns:
                watch = _Watch(server)
            while due and due[0][0] <= at_ns:
                due_ns, i = heapq.heappop(due)
                if made[i].waiting >= 200:
                    raise ProcessError("the server does not keep up")
                due_of[i][made[i].send({modality.name: kinds[(due_ns + i) % 16]}, event_ns=due_ns)] = due_ns
                sent += due_ns >= settled_ns
                if due_ns + TICK_NS < end_ns:
                    heapq.heappush(due, (due_ns + TICK_NS, i))
            wait_ns = due[0][0] if due else at_ns + 10_000_000
            with contextlib.suppress(TimedOut):
                client.wait(lambda: any(g.unread for g in made), wait_ns, "")
            came_ns = now_ns()
            for i, group in enumerate(made):
                while group.unread:
                    answer = group.receive()
                    assert answer is not None
                    due_ns = due_of[i].pop(answer.block)
                    if due_ns >= settled_ns and answer.stepped.all():
                        latency.add(came_ns - due_ns)
            if came_ns > end_ns + round(_DRAIN_S * 1e9):
                break
        used = watch.used() if watch is not None else (0.0, 0.0)
        for group in made:
            group.close(timeout_s=30)
    return Load(latency, sent, *used)


def singles(server: Server, sessions: int, duration_s: float, turn: int) -> Load:
    """Sessions with a connection each."""
    latency = Histogram()
    names = [f"s{turn}-{i}" for i in range(sessions)]
    with Client(server.address, timeout_s=20) as client:
        modalities = client.model.modalities
    rng = np.random.default_rng(0)
    spoken = next((i for i, m in enumerate(modalities) if m.name == "audio"), 0)
    kinds = [
        tuple(
            rng.standard_normal(m.size).astype("<f4").tobytes() if i == spoken else None
            for i, m in enumerate(modalities)
        )
        for _ in range(16)
    ]
    dealers = Dealers(server.address, sessions, QUEUE, protocol.MAX_BYTES)
    with contextlib.closing(dealers):
        _ask(dealers, [protocol.Open(session=name) for name in names], protocol.Ready)
        begin_ns = now_ns() + 50_000_000
        settled_ns = begin_ns + round(SETTLE_S * 1e9)
        end_ns = settled_ns + round(duration_s * 1e9)
        due = [(begin_ns + TICK_NS * i // sessions, i, 0) for i in range(sessions)]
        heapq.heapify(due)
        watch: _Watch | None = None
        sent = waiting = 0
        while due or waiting:
            at_ns = now_ns()
            if watch is None and at_ns >= settled_ns:
                watch = _Watch(server)
            while due and due[0][0] <= at_ns:
                due_ns, i, tick = heapq.heappop(due)
                step = protocol.Step(session=names[i], tick=tick, event_ns=due_ns, features=kinds[tick % 16])
                dealers.send(i, protocol.encode(step))
                waiting += 1
                sent += due_ns >= settled_ns
                if due_ns + TICK_NS < end_ns:
                    heapq.heappush(due, (due_ns + TICK_NS, i, tick + 1))
            wait_ms = max((due[0][0] - now_ns()) // 1_000_000, 0) if due else 10
            for _, content in dealers.receive(wait_ms):
                said = protocol.read_reply(content)
                if isinstance(said, protocol.Pred):
                    waiting -= 1
                    if said.event_ns >= settled_ns:
                        latency.add(now_ns() - said.event_ns)
            if at_ns > end_ns + round(_DRAIN_S * 1e9):
                break
        used = watch.used() if watch is not None else (0.0, 0.0)
        _ask(dealers, [protocol.Close(session=name) for name in names], protocol.Done)
    return Load(latency, sent, *used)


def _ask(dealers: Dealers, requests: list[Any], kind: type[protocol.Reply]) -> None:
    for i, request in enumerate(requests):
        dealers.send(i, protocol.encode(request))
    left, end_ns = len(requests), now_ns() + 30_000_000_000
    while left and now_ns() < end_ns:
        for _, content in dealers.receive(100):
            said = protocol.read_reply(content)
            if isinstance(said, protocol.BusyNow | protocol.Refused):
                raise ProcessError(f"{left} clients more were not served: {said.why}")
            left -= isinstance(said, kind)
    if left:
        raise ProcessError(f"{left} clients had no reply")


KINDS: dict[str, Callable[[Server, int, float, int], Load]] = {"groups": groups, "singles": singles}


def capacity(
    kind: str,
    server: Server,
    duration_s: float,
    say: Callable[[str], None],
    alive: Callable[[], bool],
    most: int = 8192,
) -> tuple[int, list[dict[str, Any]]]:
    """The most sessions whose p99 is within a tick, and a row for each number that was tried."""
    unit = GROUP if kind == "groups" else 50
    holds, fails, rows, sessions = 0, most + 1, list[dict[str, Any]](), START[kind]
    turn = 0
    while alive() and unit <= sessions <= most and (not holds or fails - holds > max(holds // 8, unit)):
        turn += 1
        try:
            with pinned(_CLIENT_CORE):
                load = KINDS[kind](server, sessions, duration_s, turn)
        except StreamError as e:
            rows.append({"what": kind, "sessions": sessions, "holds": False, "error": str(e)})
            good = False
        else:
            rows.append({"what": kind, "sessions": sessions, **load.row()})
            good = load.holds
            say(
                f"{kind}, {sessions} sessions: p99 {load.latency.percentile(99) / 1e6:.1f} ms, server "
                f"{load.server_cpu:.0%} of a core, clients {load.client_cpu:.0%}{'' if good else ', too late'}"
            )
        holds, fails = (max(holds, sessions), fails) if good else (holds, min(fails, sessions))
        middle = (holds + fails) // 2 // unit * unit
        sessions = min(holds * 2, most) if fails > most else middle
        if sessions in (holds, fails):
            break
    return holds, rows


def measure(
    path: Path | str,
    folder: Path,
    duration_s: float,
    other_cpu: float | None,
    say: Callable[[str], None],
    alive: Callable[[], bool],
) -> tuple[list[dict[str, Any]], dict[str, Ratio]]:
    """Rows and ratios for a model."""
    rows: list[dict[str, Any]] = []
    found: dict[str, Ratio] = {}
    with pinned(_SERVER_CORE):
        alone, _ = engine_bench.run(model=Path(path), duration_s=duration_s, say=say, alive=alive)
    engine = alone["ratios"]["sessions_per_core_model"]["value"]
    held: dict[str, int] = {}
    for kind in KINDS:
        server = Server(path, folder / kind)
        try:
            held[kind], more = capacity(kind, server, duration_s, say, alive)
        finally:
            server.close()
        rows += more
        found[f"serve_{kind}_sessions_per_core"] = ratio(float(held[kind]), BOUNDS[kind], "more", other_cpu)
    rows.append({"what": "engine", "sessions": engine})
    share = held["groups"] / engine if engine else None
    found["serve_groups_over_engine"] = ratio(share, OVER_ENGINE, "more", other_cpu)
    return rows, found
