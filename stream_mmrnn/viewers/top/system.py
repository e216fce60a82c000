"""A running system as one document: what its bus says, what its processes use, how often they died.

Reads the bus as any viewer does, so the session never waits for it. Knows nothing about terminals.
"""

from __future__ import annotations

import time
from typing import Any

from stream_mmrnn.bus import Subscriber
from stream_mmrnn.bus.registry import Entry, everything, find
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import NotRunning, StreamError, WireError
from stream_mmrnn.viewers.dashboard.state import LiveState
from stream_mmrnn.viewers.terminal_view import WATCHED
from stream_mmrnn.viewers.top.processes import Usage

_QUEUE = 256
_BURST = 2000
"""Messages read at once at most: two seconds of a session."""
_MAX_NODES = 64


class System:
    """One running system, watched from its making until `close`."""

    def __init__(self, entry: Entry) -> None:
        """Raises FileError where the keys of its bus cannot be read."""
        self.entry = entry
        self._live = LiveState()
        self._nodes: dict[int, str] = {}
        self._usage = Usage(entry.pid)
        self._usage.read({})
        self._processes: list[dict[str, Any]] = []
        wanted = [*WATCHED, topics.PREDICTION, topics.STATUS]
        self._subscriber = Subscriber(entry.address(), wanted, _QUEUE, "drop_oldest", midway=True)

    def listen(self) -> None:
        """Take what has come."""
        for _ in range(_BURST):
            envelope = self._subscriber.receive(0)
            if envelope is None:
                return
            self._live.observe(envelope)
            if envelope.topic.startswith(topics.STATUS):
                self._see_status(envelope.payload)

    def _see_status(self, payload: Any) -> None:
        try:
            said = wire.unpack(payload, wire.StatusMessage)
        except WireError:
            return  # the view counts it
        if said.pid and (said.pid in self._nodes or len(self._nodes) < _MAX_NODES):
            self._nodes[said.pid] = said.node[:64]

    def measure(self) -> None:
        """Take the processes' CPU and memory since the last time; some tens of milliseconds' work."""
        self._processes = self._usage.read(self._nodes)
        there = {row["pid"] for row in self._processes}
        self._nodes = {pid: name for pid, name in self._nodes.items() if pid in there}

    def live(self) -> dict[str, Any]:
        """What a view draws: `LiveState.snapshot`."""
        return self._live.snapshot(now_ns())

    def document(self) -> dict[str, Any]:
        """Everything, for JSON; the heads without their history."""
        live = self.live()
        entry = self.entry
        heads = {name: {k: v for k, v in head.items() if k != "history"} for name, head in live["heads"].items()}
        return {
            "session": entry.session,
            "pid": entry.pid,
            "engine": entry.engine,
            "page": entry.page,
            "seconds": round((time.time_ns() - entry.began_unix_ns) / 1e9, 1),
            "processes": self.processes(live),
            "cpu_percent": round(sum(p["cpu_percent"] for p in self._processes), 1),
            "rss_bytes": sum(p["rss_bytes"] for p in self._processes),
            "restarts": entry.restarts,
            "given_up": entry.given_up,
            "sessions": live["sessions"],
            "model": live["model"],
            "tick": live["tick"],
            "predictions_per_s": live["predictions_per_s"],
            "streams": live["streams"],
            "heads": heads,
            "latency_ms": live["latency"],
            "losses": live["losses"],
            "repeated": live["repeated"],
            "malformed": live["malformed"],
        }

    def processes(self, live: dict[str, Any]) -> list[dict[str, Any]]:
        """A row a process, with what it says of itself; and one, without a number, for each that is not there."""
        said: dict[str, dict[str, Any]] = live["nodes"]
        restarts = self.entry.restarts
        rows = []
        for process in self._processes:
            name = process["node"]
            about = said.get(name, {"state": "", "reason": ""})
            words = {"state": about["state"], "reason": about["reason"]}
            rows.append({**process, **words, "restarts": restarts.get(name, 0)})
        here = {p["node"] for p in self._processes}
        nothing = {"pid": None, "cpu_percent": 0.0, "rss_bytes": 0, "threads": 0}
        gone = {n: (s["state"], s["reason"]) for n, s in said.items() if n not in here}
        gone |= {n: ("failed", why) for n, why in self.entry.given_up.items()}
        if self._processes:  # else nobody has looked yet
            rows += [
                {"node": n, **nothing, "state": state, "reason": why, "restarts": restarts.get(n, 0)}
                for n, (state, why) in gone.items()
            ]
        return rows

    def close(self) -> None:
        self._subscriber.close()


class Systems:
    """All running systems of this user, or one of them: those that begin are joined, those that end leave."""

    def __init__(self, session: str | None = None) -> None:
        """`session`: only the one of this name, or of this process.

        Raises:
            NotRunning, UsageError, FileError: there is none, or not just one of that name, or it may not be read.

        """
        self._session = session
        first = find(session) if session is not None else None
        self._wanted = first.pid if first is not None else None
        self.notes: dict[int, str] = {}
        """By process: why a system cannot be watched."""
        self.systems: dict[int, System] = {}
        try:
            self.poll()
            if not self.systems:
                find(session)  # says why
                raise NotRunning("; ".join(self.notes.values()))
        except BaseException:
            self.close()
            raise

    def poll(self) -> None:
        """See who is there, and measure."""
        there = {e.pid: e for e in everything() if self._wanted in (None, e.pid)}
        for pid in self.systems.keys() - there.keys():
            self.systems.pop(pid).close()
        for pid, entry in there.items():
            if pid in self.systems:
                self.systems[pid].entry = entry
            else:
                try:
                    self.systems[pid] = System(entry)
                    self.notes.pop(pid, None)
                except StreamError as e:
                    self.notes[pid] = f"{entry.session!r} (process {pid}) cannot be watched: {e}"
        for system in self.systems.values():
            system.measure()

    def listen(self, seconds: float) -> None:
        """Read for so long, and what there is at the end."""
        until_ns = now_ns() + round(seconds * 1e9)
        while True:
            for system in self.systems.values():
                system.listen()
            left_s = (until_ns - now_ns()) / 1e9
            if left_s <= 0:
                return
            time.sleep(min(left_s, 0.05))

    def document(self) -> dict[str, Any]:
        return {"systems": [s.document() for s in self.systems.values()], "notes": list(self.notes.values())}

    def close(self) -> None:
        for system in self.systems.values():
            system.close()
        self.systems = {}
