"""What the processes of a running system use: CPU, memory, threads. Asks the operating system; knows no bus."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psutil

_NODE = "mmrnn-"
"""How a process of ours calls itself, where the system lets it (`nodes.run`); cut after 15 characters."""


class Usage:
    """A supervisor and all its descendants. CPU is that since the last `read`; of a process new to us it is 0."""

    def __init__(self, pid: int) -> None:
        self._supervisor = pid
        self._known: dict[psutil.Process, None] = {}

    def read(self, nodes: Mapping[int, str]) -> list[dict[str, Any]]:
        """A row a process, the supervisor first; `nodes` names those that have said who they are, by number.

        `cpu_percent` is of one core, `rss_bytes` counts what is shared with others in full.
        """
        try:
            top = psutil.Process(self._supervisor)
            there = [top, *top.children(recursive=True)]
        except psutil.Error:
            return []
        # equal where number and beginning are: the same process, with its CPU time of before
        before = {p: p for p in self._known}
        self._known = {before.get(p, p): None for p in there}
        rows = (self._row(p, nodes) for p in self._known)
        return sorted((r for r in rows if r is not None), key=lambda r: (r["pid"] != self._supervisor, r["node"]))

    def _row(self, process: psutil.Process, nodes: Mapping[int, str]) -> dict[str, Any] | None:
        """None of one that has just ended."""
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
