"""Running sessions as documents: state from the bus, resources and restarts of the processes.

It reads the bus as a viewer, so the session never waits for it. Knows nothing about terminals.
"""

from __future__ import annotations

import time
from typing import Any

from stream_mmrnn.bus import Subscriber
from stream_mmrnn.bus.registry import Entry, everything, find
from stream_mmrnn.core import topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import NotRunning, StreamError, WireError
from stream_mmrnn.core.streams import usual
from stream_mmrnn.viewers.dashboard.state import LiveState
from stream_mmrnn.viewers.terminal_view import watched
from stream_mmrnn.viewers.top.processes import ProcessUsage

_QUEUE = 256
_BURST = 2000
"""Messages read in one call at most: two seconds of a session."""
_MAX_NODES = 64


class System:
    """One running session, watched until `close`."""

    def __init__(self, entry: Entry) -> None:
        """Raises FileError if the keys of its bus cannot be read."""
        self.entry = entry
        table = {row.name: row for row in entry.streams} or usual()  # an older release's entry has none
        self._live = LiveState(table=table)
        self._nodes: dict[int, str] = {}
        self._usage = ProcessUsage(entry.pid)
        self._usage.read({})
        self._processes: list[dict[str, Any]] = []
        wanted = [*watched(table.values()), topics.PREDICTION, topics.STATUS]
        self._subscriber = Subscriber(entry.address(), wanted, _QUEUE, "drop_oldest", midway=True)

    def receive(self) -> None:
        """Read the messages that have arrived."""
        for _ in range(_BURST):
            envelope = self._subscriber.receive(0)
            if envelope is None:
                return
            self._live.observe(envelope)
            if envelope.topic.startswith(topics.STATUS):
                self._observe_status(envelope.payload)

    def _observe_status(self, payload: Any) -> None:
        try:
            status = wire.unpack(payload, wire.StatusMessage)
        except WireError:
            return  # LiveState counts it
        if status.pid and (status.pid in self._nodes or len(self._nodes) < _MAX_NODES):
            self._nodes[status.pid] = status.node[:64]

    def measure(self) -> None:
        """Measure CPU and memory of the processes; it takes some tens of milliseconds."""
        self._processes = self._usage.read(self._nodes)
        pids = {row["pid"] for row in self._processes}
        self._nodes = {pid: name for pid, name in self._nodes.items() if pid in pids}

    def live(self) -> dict[str, Any]:
        """The newest `LiveState.snapshot`."""
        return self._live.snapshot(now_ns())

    def document(self) -> dict[str, Any]:
        """Everything for JSON, without the history of the heads."""
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
        """A row per process with its newest status, and one without a process id for each that is not running."""
        statuses: dict[str, dict[str, Any]] = live["nodes"]
        restarts = self.entry.restarts
        rows = []
        for process in self._processes:
            name = process["node"]
            status = statuses.get(name, {"state": "", "reason": ""})
            rows.append(
                {**process, "state": status["state"], "reason": status["reason"], "restarts": restarts.get(name, 0)}
            )
        running = {p["node"] for p in self._processes}
        nothing = {"pid": None, "cpu_percent": 0.0, "rss_bytes": 0, "threads": 0}
        gone = {n: (s["state"], s["reason"]) for n, s in statuses.items() if n not in running}
        gone |= {n: ("failed", why) for n, why in self.entry.given_up.items()}
        if self._processes:  # otherwise nothing was measured yet
            rows += [
                {"node": n, **nothing, "state": state, "reason": why, "restarts": restarts.get(n, 0)}
                for n, (state, why) in gone.items()
            ]
        return rows

    def close(self) -> None:
        self._subscriber.close()


class Systems:
    """All running sessions of this user, or one of them; new ones are added, ended ones removed."""

    def __init__(self, session: str | None = None) -> None:
        """`session`: only the one with this name or process id.

        Raises:
            NotRunning: no such session is running.
            UsageError: several sessions have this name.
            FileError: it may not be read.

        """
        self._session = session
        first = find(session) if session is not None else None
        self._wanted = first.pid if first is not None else None
        self.notes: dict[int, str] = {}
        """By process id: why a session cannot be watched."""
        self.systems: dict[int, System] = {}
        try:
            self.poll()
            if not self.systems:
                find(session)  # raises with the reason
                raise NotRunning("; ".join(self.notes.values()))
        except BaseException:
            self.close()
            raise

    def poll(self) -> None:
        """Find running sessions, and measure their processes."""
        running = {e.pid: e for e in everything() if self._wanted in (None, e.pid)}
        for pid in self.systems.keys() - running.keys():
            self.systems.pop(pid).close()
        self.notes = {pid: note for pid, note in self.notes.items() if pid in running}
        for pid, entry in running.items():
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

    def receive(self, seconds: float) -> None:
        """Read messages for so long."""
        until_ns = now_ns() + round(seconds * 1e9)
        while True:
            for system in self.systems.values():
                system.receive()
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
