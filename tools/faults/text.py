"""docs/reliability.md as text, from what subjects measured. Knows nothing about how a figure came to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tools.faults.promise import Subject

_HEAD = """# Reliability

What this program promises about loss, time, state and access, and how near it came when it was tried. Every figure here
is written by `make faults`, which breaks things on purpose; `make test` does the same in quick forms. A bound in time
moves with the machine, and with who else used it: both are named.
"""


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"


def _where(found: dict[str, Any]) -> str:
    m, other = found["machine"], found["other_cpu"]
    cpu = f"{m['cpu']} ({m['instructions']})" if m["instructions"] else m["cpu"]
    # processes whose parent was killed on purpose have no parent, and are counted there too
    beside = "" if other is None else f"; others, and ours without a parent, used {100 * other:.0f} % of a core"
    return f"{found['when']}, {found['seconds']:.0f} s on {m['cores']} cores of {cpu}, Python {m['python']}{beside}."


def page(told: Mapping[str, dict[str, Any]], subjects: Mapping[str, Subject], before: str = "") -> str:
    """`told` is by subject what it measured and where; one that is not in it keeps its section of the page `before`."""
    parts = [_HEAD]
    sections = {s.partition("\n")[0]: s.rstrip("\n") for s in before.split("\n## ")[1:]}
    not_promised: list[str] = []
    for name, module in subjects.items():
        command = told.get(name, {}).get("command", f"python -m tools.faults --only {name}")
        not_promised += module.NOT_PROMISED
        if name not in told and module.TITLE in sections:
            parts.append(f"## {sections[module.TITLE]}\n")
            continue
        parts.append(f"## {module.TITLE}\n\n    {command}\n")
        if name not in told:
            parts.append("Not run.\n")
            continue
        parts.append(f"{_where(told[name])}\n")
        parts.append("| figure | what | value | bound | held |\n| --- | --- | --- | --- | --- |")
        for f in told[name]["figures"]:
            unit = f" {f['unit']}" if f["unit"] else ""
            relation = {"<=": "≤", ">=": "≥", "==": "="}[f["relation"]]
            held = "yes" if f["held"] else "**no**"
            parts.append(
                f"| `{f['name']}` | {f['what']} | {_number(f['value'])}{unit} "
                f"| {relation} {_number(f['bound'])}{unit} | {held} |"
            )
        parts.append("")
    parts.append("## What is not promised\n")
    parts += [f"- {sentence}" for sentence in not_promised]
    return "\n".join(parts) + "\n"
