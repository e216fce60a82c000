"""What else a figure depends on: the machine, and the CPU and memory of our processes and of all others.

Processes are read from /proc; where there is none (macOS, Windows) shares are None and nothing is claimed. Knows
nothing about what is measured.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Collection
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

_PROC = Path("/proc")
_ENOUGH_S = 0.5
"""The kernel counts CPU time in hundredths of a second: over this long, 0.15 of a core is 7 of them."""
_INSTRUCTIONS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm", "sve")
"""What decides how fast a matrix is multiplied, as the kernel calls it; a CPU's name alone often hides it."""
_HOST = "the host"
_PACKAGES = ("onnxruntime-gpu", "onnxruntime", "numpy", "pyzmq")


class _Process(NamedTuple):
    name: str
    parent: int
    cpu_s: float
    reaped_s: float
    """Of its children which ended: handed on, so that no CPU time is missed or counted twice."""
    rss_bytes: int


def _read(pid: str) -> _Process | None:
    """None where it is gone."""
    try:
        stat = (_PROC / pid / "stat").read_text()
    except OSError:
        return None
    name, _, rest = stat[stat.index("(") + 1 :].rpartition(") ")
    fields = rest.split()
    per_s = os.sysconf("SC_CLK_TCK")
    return _Process(
        name.removeprefix("mmrnn-"),
        int(fields[1]),
        (int(fields[11]) + int(fields[12])) / per_s,
        (int(fields[13]) + int(fields[14])) / per_s,
        int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
    )


def _snapshot() -> dict[int, _Process]:
    if not (_PROC / "self" / "stat").exists():
        return {}
    found = ((int(p.name), _read(p.name)) for p in _PROC.iterdir() if p.name.isdigit())
    return {pid: process for pid, process in found if process is not None}


def _stolen_s() -> float:
    """CPU time that a virtual machine wanted and its host gave to others, of all cores since the start."""
    try:
        fields = (_PROC / "stat").read_text().split(None, 9)
    except OSError:
        return 0.0
    return int(fields[8]) / os.sysconf("SC_CLK_TCK") if len(fields) > 8 and fields[8].isdigit() else 0.0


def _family(snapshot: dict[int, _Process], roots: Collection[int]) -> set[int]:
    """The processes of `roots` and all that descend from them."""
    children: dict[int, list[int]] = {}
    for pid, process in snapshot.items():
        children.setdefault(process.parent, []).append(pid)
    found, queue = set(), [pid for pid in roots if pid in snapshot]
    while queue:
        pid = queue.pop()
        found.add(pid)
        queue += children.get(pid, ())
    return found


class Usage(NamedTuple):
    """CPU and memory between two moments. A share of 1 is one core."""

    seconds: float
    cpu: dict[str, float]
    """Our processes' shares, by name; processes of one name together."""
    rss_mb: dict[str, float]
    """Resident memory at the second moment, shared pages included."""
    other_cpu: float | None
    """The share of all that are not ours: processes, and what the host took from us; None where it cannot be read."""
    busiest_other: str

    def row(self) -> dict[str, Any]:
        """What goes into a row of a document."""
        return {"cpu": self.cpu, "rss_mb": self.rss_mb, "other_cpu": self.other_cpu, "busiest": self.busiest_other}


class Processes:
    """From its making to `used()`: who used what. Ours are `roots` (this process, without them) and their descendants.

    A process that ends hands its CPU time on to its parent, which is counted with it, so short ones are not missed.
    """

    def __init__(self, roots: Collection[int] = ()) -> None:
        self._roots = roots or (os.getpid(),)
        self._began_s = time.monotonic()
        self._before, self._stolen_s = _snapshot(), _stolen_s()

    def used(self, at_least_s: float = _ENOUGH_S) -> Usage:
        """Until now. Others are watched for `at_least_s` in all: of less, the kernel's counts say nothing."""
        now, seconds = _snapshot(), max(time.monotonic() - self._began_s, 1e-6)
        if not now:
            return Usage(seconds, {}, {}, None, "")
        cpu: dict[str, float] = {}
        rss_mb: dict[str, float] = {}
        for pid in _family(now, self._roots):
            before = self._before.get(pid)
            name = "bench" if pid == os.getpid() else now[pid].name
            used_s = now[pid].cpu_s - (before.cpu_s if before else 0.0)
            cpu[name] = round(cpu.get(name, 0.0) + used_s / seconds, 3)
            rss_mb[name] = round(rss_mb.get(name, 0.0) + now[pid].rss_bytes / 1e6, 1)
        if seconds < at_least_s:
            time.sleep(at_least_s - seconds)
            now = _snapshot()
        share, busiest = self._others(now)
        return Usage(seconds, dict(sorted(cpu.items())), dict(sorted(rss_mb.items())), share, busiest)

    def _others(self, now: dict[int, _Process]) -> tuple[float, str]:
        """Their share until the moment of this snapshot, and the name of the busiest."""
        seconds = max(time.monotonic() - self._began_s, 1e-6)
        ours, ours_before = _family(now, self._roots), _family(self._before, self._roots)
        others = {pid: p.cpu_s + p.reaped_s for pid, p in now.items() if pid not in ours}
        others_before = {pid: p.cpu_s + p.reaped_s for pid, p in self._before.items() if pid not in ours_before}
        used_s = max(sum(others.values()) - sum(others_before.values()), 0.0)
        stolen_s = max(_stolen_s() - self._stolen_s, 0.0)
        each_s = {pid: cpu_s - others_before.get(pid, 0.0) for pid, cpu_s in others.items()}
        pid = max(each_s, key=lambda pid: each_s[pid], default=None)
        busiest = _HOST if pid is None or stolen_s > each_s[pid] else now[pid].name
        return round((used_s + stolen_s) / seconds, 3), busiest if used_s + stolen_s else ""


def _cpu() -> tuple[str, str]:
    """Its name, and those of its instructions that matter here."""
    try:
        lines = (_PROC / "cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), ""
    said = dict(reversed([[p.strip() for p in line.split(":", 1)] for line in lines if ":" in line]))
    flags = (said.get("flags") or said.get("Features") or "").split()
    return said.get("model name") or platform.machine(), " ".join(i for i in _INSTRUCTIONS if i in flags)


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What a reader must know of the machine to judge a figure; nothing that names it or its owner."""
    memory_bytes = None
    cpu, instructions = _cpu()
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": cpu,
        "instructions": instructions,
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(memory_bytes / 1e9, 1) if memory_bytes else None,
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **_versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
    }
