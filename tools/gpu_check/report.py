"""How a report looks: the same tables for a terminal and for a Markdown file with a date.

Knows nothing about how anything was measured.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TextIO

_FACTS: tuple[str, ...] = (
    "date",
    "gpu",
    "driver",
    "gpu_memory",
    "onnxruntime-gpu",
    "onnxruntime",
    "onnxruntime_cuda",
    "torch",
)
_FACTS += ("torch_cuda", "cpu", "cores", "python", "kernel")
_KNOWN = {"check", "ok"}
_COLD = {
    "model": "model",
    "slots": "slots",
    "libraries_s": "CUDA's libraries, s",
    "import_s": "import, s",
    "engine_s": "engine, s",
    "first_step_s": "first step, s",
}
"""Key -> column."""


class Table(NamedTuple):
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.2e}" if 0 < abs(value) < 1e-3 else f"{value:.4g}"
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def _about(row: dict[str, Any]) -> str:
    return ", ".join(f"{k.replace('_', ' ')} {_text(v)}" for k, v in row.items() if k not in _KNOWN)


def tables(document: dict[str, Any]) -> Iterator[Table]:
    """All that a report says, in order."""
    facts = document["machine"]
    yield Table("Machine", ("what", "is"), [(k, _text(facts[k])) for k in _FACTS if facts.get(k) is not None])
    checks = [(c["check"], "ok" if c["ok"] else "WRONG", _about(c)) for c in document["checks"]]
    yield Table("Checks", ("check", "result", "seen"), checks)
    yield _steps(document["steps"])
    columns = ("model", "by", "sessions at 25 Hz", "p99 of a round, ms", "runs of at most")
    yield Table("Sessions", columns, [_sessions(row) for row in document["sessions"]])
    if document["programs"]:
        columns = ("program", "sessions", "ticks", "p50 / p99, ms")
        yield Table("Programs", columns, [_program(row) for row in document["programs"]])
    yield Table("Cold start, a fresh process", list(_COLD.values()), [_cold(row) for row in document["cold_start"]])


def _program(row: dict[str, Any]) -> Sequence[str]:
    took = f"{row['ms']['p50']:.3f} / {row['ms']['p99']:.3f}"
    return row["program"], _text(row["sessions"]), _text(row["ticks"]), took


def _cold(row: dict[str, Any]) -> Sequence[str]:
    return [_text(row[key]) for key in _COLD]


def _steps(rows: Sequence[dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row["ms"]))
    columns = ["model", "batch", *(f"{name}: p50 / p99, ms" for name in names)]

    def cell(ms: dict[str, float] | None) -> str:
        return f"{ms['p50']:.3f} / {ms['p99']:.3f}" if ms else "–"

    found = [[row["model"], _text(row["batch"]), *(cell(row["ms"].get(name)) for name in names)] for row in rows]
    return Table("One step", columns, found)


def _sessions(row: dict[str, Any]) -> Sequence[str]:
    more = "at least " if row["limit_of_search"] else ""
    return row["model"], row["by"], more + _text(row["sessions"]), _text(row["p99_ms"]), _text(row["batch"])


def markdown(document: dict[str, Any]) -> str:
    """The whole report as a Markdown page."""
    lines = [f"# GPU check, {document['machine']['date']}", "", f"`{document['command']}`", ""]
    lines += [verdict(document), ""]
    for table in tables(document):
        lines += [f"## {table.title}", "", _row(table.columns), _row(["---"] * len(table.columns))]
        lines += [*(_row(row) for row in table.rows), ""]
    lines += [f"- {note}" for note in document["notes"]]
    return "\n".join(lines).rstrip() + "\n"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(c.replace('|', '/') for c in cells)} |"


def verdict(document: dict[str, Any]) -> str:
    wrong = [c["check"] for c in document["checks"] if not c["ok"]]
    on = f"on {document['provider']}"
    return f"Wrong {on}: {'; '.join(wrong)}." if wrong else f"All {len(document['checks'])} checks hold {on}."


def show(document: dict[str, Any], stream: TextIO) -> None:
    """To people: tables where rich is installed, else the Markdown."""
    if importlib.util.find_spec("rich") is None:
        stream.write(markdown(document))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    console = Console(file=stream, highlight=False)
    console = console if console.is_terminal else Console(file=stream, highlight=False, width=200)
    for table in tables(document):
        shown = RichTable(*map(escape, table.columns), title=table.title, title_justify="left")
        for row in table.rows:
            shown.add_row(*map(escape, row))
        console.print(shown)
    for note in document["notes"]:
        console.print(f"[yellow]![/yellow] {escape(note)}", soft_wrap=True)
    console.print(escape(verdict(document)))
