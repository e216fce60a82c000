"""docs/reliability.md as text, from the document of a run. Knows nothing about how a figure came to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tools.faults.promise import Subject

_HEAD = """# Reliability

What this program promises about loss, time, state and access, and how near it came when it was tried. Every figure here
is written by `make faults`, which breaks things on purpose; `make test` does the same in quick forms. A bound in time
moves with the machine: these were taken on the one named here.
"""


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.3g}"


def page(document: dict[str, Any], subjects: Mapping[str, Subject]) -> str:
    machine = document["machine"]
    cpu = f"{machine['cpu']}, {machine['cores']} cores, {machine['kernel']}, Python {machine['python']}"
    parts = [_HEAD, f"{document['when']}, {cpu}.\n"]
    not_promised: list[str] = []
    for name, found in document["subjects"].items():
        module = subjects[name]
        parts.append(f"## {module.TITLE}\n\n    python -m tools.faults --only {name}\n")
        parts.append("| figure | what | value | bound | held |\n| --- | --- | --- | --- | --- |")
        for f in found["figures"]:
            unit = f" {f['unit']}" if f["unit"] else ""
            relation = {"<=": "≤", ">=": "≥", "==": "="}[f["relation"]]
            held = "yes" if f["held"] else "**no**"
            parts.append(
                f"| `{f['name']}` | {f['what']} | {_number(f['value'])}{unit} "
                f"| {relation} {_number(f['bound'])}{unit} | {held} |"
            )
        parts.append("")
        not_promised += module.NOT_PROMISED
    parts.append("## What is not promised\n")
    parts += [f"- {sentence}" for sentence in not_promised]
    return "\n".join(parts) + "\n"
