"""A benchmark's document as tables in a terminal, without line wrapping when the output is a file.

Knows nothing about what the figures mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from stream_mmrnn.bench.report import Document, Ratio
from stream_mmrnn.cli.terminal import Console
from stream_mmrnn.core.printable import escape
from stream_mmrnn.viewers.terminal_view import stage_table

_FEW = 4
"""Rows that stand side by side, each a column."""


def console(*, stderr: bool) -> Console:
    """Where the tables go."""
    plain = Console(stderr=stderr, highlight=False)
    return plain if plain.is_terminal else Console(stderr=stderr, highlight=False, width=200)


def _number(value: Any) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{k} {_number(v)}" for k, v in value.items()) or "–"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "–" if value is None else escape(str(value))


def _is_latency(value: Any) -> bool:
    return isinstance(value, dict) and {"p50", "p99"} <= value.keys()


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values; of a latency p50 and p99."""
    out: dict[str, Any] = {}
    for name, value in row.items():
        if _is_latency(value):
            what, _, unit = name.rpartition("_")
            out |= {f"{what} {p} {unit}": value[p] for p in ("p50", "p99")}
        elif not isinstance(value, dict | list):
            out[name] = value
    return out


def _rows(rows: list[dict[str, Any]]) -> Table:
    flat = [_flat(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    few = len(rows) <= _FEW
    table = Table(header_style="dim", show_header=not few)
    cells = [[_number(row[name]) if name in row else "" for name in names] for row in flat]
    titles = [name.replace("_", " ") for name in names]
    if few:
        for title, *values in zip(titles, *cells, strict=True):
            table.add_row(title, *values)
        return table
    for name, title in zip(names, titles, strict=True):
        words = any(isinstance(row.get(name), str) for row in flat)
        table.add_column(title, justify="left" if words else "right")
    for line in cells:
        table.add_row(*line)
    return table


def _nested(to: Console, row: Mapping[str, Any]) -> None:
    """What belongs to one row and is a table of its own: its stages, and where its messages went."""
    name = next((value for value in row.values() if isinstance(value, str)), "")
    for value in row.values():
        if isinstance(value, dict) and value and all(map(_is_latency, value.values())):
            to.print(f"[bold]{escape(name)}[/bold]")
            to.print(stage_table(value))
    for name, stream in row.get("streams", {}).items():
        to.print(f"{name}: {_number({k: v for k, v in stream.items() if k != 'capture'})}", soft_wrap=True)


def _ratios(ratios: Mapping[str, Ratio]) -> Table:
    table = Table(header_style="dim")
    for name in ("figure", "value", "bound", "holds"):
        table.add_column(name, justify="right" if name in ("value", "bound") else "left")
    for name, r in ratios.items():
        sign = "≤" if r["better"] == "less" else "≥"
        bound = "" if r["bound"] is None else f"{sign} {_number(r['bound'])}"
        holds = escape(r["why"]) or {True: "[green]yes[/green]", False: "[red]no[/red]", None: ""}[r["held"]]
        table.add_row(name, _number(r["value"]), bound, holds)
    return table


def _compared(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="compared with the base", title_justify="left", header_style="dim")
    for name in ("figure", "base", "now", "now / base", ""):
        table.add_column(name, justify="left" if name in ("figure", "") else "right")
    for row in rows:
        words = {True: "better", False: "worse", None: ""}[row["improved"]]
        table.add_row(row["name"], *(_number(row[k]) for k in ("base", "now", "ratio")), words)
    return table


def show(to: Console, found: Document) -> None:
    """All of a document."""
    m = found["machine"]
    where = f"{m['cpu']}, {m['usable_cores']} cores, {m['date']}, load {m['load']}"
    to.print(f"[bold]{found['bench']}[/bold]  {escape(where)}", soft_wrap=True)
    to.print(_rows(found["rows"]))
    for row in found["rows"]:
        _nested(to, row)
    if found["ratios"]:
        to.print(_ratios(found["ratios"]))
    if "compared" in found:
        to.print(_compared(found["compared"]))
    for note in found.get("notes", ()):
        to.print(f"[yellow]![/yellow] {escape(note)}", soft_wrap=True)
