"""The display of `top`: the processes of each session, and below them the session's terminal view."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stream_mmrnn.core.printable import shown
from stream_mmrnn.viewers.terminal_view import STATE_STYLE, lines, render
from stream_mmrnn.viewers.top.system import System, Systems


def _processes(system: System, rows: list[dict[str, Any]]) -> Table:
    entry = system.entry
    seconds = (time.time_ns() - entry.began_unix_ns) / 1e9
    table = Table(
        title=f"session {shown(entry.session, 64)}, process {entry.pid}, {seconds:.0f} s  {shown(entry.page, 128)}",
        title_justify="left",
        box=None,
        header_style="dim",
        expand=True,
    )
    for column in ("process", "pid", "cpu", "memory", "threads", "restarts", "state", ""):
        table.add_column(
            column, justify="left" if column in ("process", "state", "") else "right", ratio=1 if column == "" else None
        )
    for row in rows:
        table.add_row(
            shown(row["node"], 32),
            str(row["pid"] or "–"),
            f"{row['cpu_percent']:.1f} %",
            f"{row['rss_bytes'] / 1e6:.1f} MB",
            str(row["threads"]),
            Text(str(row["restarts"]), "yellow" if row["restarts"] else "dim"),
            Text(row["state"][:16], STATE_STYLE.get(row["state"], "")),
            Text(row["reason"][:200], "dim", no_wrap=True, overflow="ellipsis"),
        )
    total = (sum(r["cpu_percent"] for r in rows), sum(r["rss_bytes"] for r in rows) / 1e6)
    table.add_row("all", "", f"{total[0]:.1f} %", f"{total[1]:.1f} MB", style="bold")
    return table


def draw(systems: Systems, width: int, height: int | None = None) -> RenderableType:
    """All sessions, one below the other. `height`: the lines of the terminal, which one session shall fit into."""
    parts: list[RenderableType] = []
    alone = len(systems.systems) == 1
    for system in systems.systems.values():
        live = system.live()
        names = live["sessions"]["names"]
        headline = f"{live['sessions']['count']} sessions: {', '.join(names)}" if len(names) > 1 else live["session"]
        processes: list[RenderableType] = [_processes(system, system.processes(live)), Text()]
        left = height - lines(processes, width) if height is not None and alone else None
        parts += [*processes, render(live, width, headline, [], left), Text()]
    parts += [Text(f"! {note}", "yellow") for note in systems.notes.values()]
    return Group(*parts[:-1] if parts and parts[-1] == Text() else parts)
