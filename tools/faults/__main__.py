"""Try to break every promise, print a line each, and write docs/reliability.md from what was measured.

    python -m tools.faults [--only recorder,state] [--quick] [--json] [--write]

Knows nothing about single promises: the modules of `SUBJECTS` do.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from stream_mmrnn.bench.machine import machine
from tools.faults.promise import Figure, Subject
from tools.faults.text import page

SUBJECTS = (
    "recorder",
    "state",
    "resume",
    "consumers",
    "overload",
    "workers",
    "clocks",
    "hostile",
    "access",
    "soak",
    "stop",
    "determinism",
)
DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"


def subject(name: str) -> Subject:
    return cast(Subject, importlib.import_module(f"tools.faults.{name}"))


def line(figure: Figure) -> str:
    """Name, figure, bound, held or not."""
    verdict = "held" if figure.held else "NOT HELD"
    unit = f" {figure.unit}" if figure.unit else ""
    return f"{figure.name:44} {figure.value:>12.6g}{unit:10} {figure.relation} {figure.bound:<10g} {verdict}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.faults", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="subjects, with commas between")
    parser.add_argument("--quick", action="store_true", help="what the test suite does")
    parser.add_argument("--json", action="store_true", help="the JSON document alone")
    parser.add_argument("--write", action="store_true", help="write docs/reliability.md (all subjects, in full)")
    given = parser.parse_args(arguments)
    names = tuple(given.only.split(",")) if given.only else SUBJECTS
    unknown = [n for n in names if n not in SUBJECTS]
    if unknown:
        parser.error(f"there is no subject {unknown[0]!r}; there are {', '.join(SUBJECTS)}")
    if given.write and (given.only or given.quick):
        parser.error("--write wants every subject in full: leave --only and --quick out")

    def say(text: str) -> None:
        if not given.json:
            print(f"  {text}", file=sys.stderr, flush=True)

    document: dict[str, Any] = {"when": time.strftime("%Y-%m-%d"), "machine": machine(), "subjects": {}}
    held = True
    for name in names:
        start_s = time.monotonic()
        figures = []
        for figure in subject(name).run(given.quick, say):
            figures.append({**figure._asdict(), "held": figure.held})
            held &= figure.held
            if not given.json:
                print(line(figure), flush=True)
        document["subjects"][name] = {"figures": figures, "seconds": round(time.monotonic() - start_s, 1)}
    document["held"] = held
    if given.write:
        DOCUMENT.write_text(page(document, {n: subject(n) for n in names}), encoding="utf-8")
    print(json.dumps(document))
    return 0 if held else 3


if __name__ == "__main__":
    sys.exit(main())
