"""CPU, memory and threads of the processes of a running session, from the operating system."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psutil

_NODE = "mmrnn-"
"""Prefix of our process names, where the system has them (`nodes.run`); they are cut after 15 characters."""


class ProcessUsage:
    """A supervisor and all its descendants. CPU is measured since the last `read`; it is 0 for a new process."""

    def __init__(self, pid: int) -> None:
        self._supervisor = pid
        self._known: dict[psutil.Process, None] = {}

    def read(self, nodes: Mapping[int, str]) -> list[dict[str, Any]]:
        """A row per process, the supervisor first. `nodes`: by process id, the names known from status messages.

        `cpu_percent` is of one core; `rss_bytes` includes memory that is shared with other processes.
        """
        try:
            top = psutil.Process(self._supervisor)
            running = [top, *top.children(recursive=True)]
        except psutil.Error:
            return []
        # psutil compares process id and start time: keep the object that has the earlier CPU time
        before = {p: p for p in self._known}
        self._known = {before.get(p, p): None for p in running}
        rows = (self._row(p, nodes) for p in self._known)
        return sorted((r for r in rows if r is not None), key=lambda r: (r["pid"] != self._supervisor, r["node"]))

    def _row(self, process: psutil.Process, nodes: Mapping[int, str]) -> dict[str, Any] | None:
        """None if the process has just ended."""
        try:
            with process.oneshot():
                return {
                    "node": self._name(process, nodes),
                    "pid": process.pid,
                    "cpu_percent": round(process.cpu_percent(), 1),
                    "rss_bytes": process.memory_info().rss,
                    "threads": process.num_threads(),
                }
        except psutil.Error:
            return None

    def _name(self, process: psutil.Process, nodes: Mapping[int, str]) -> str:
        if process.pid == self._supervisor:
            return "supervisor"
        if process.pid in nodes:
            return nodes[process.pid]
        name = process.name()
        return name.removeprefix(_NODE) if name.startswith(_NODE) else "helper"
