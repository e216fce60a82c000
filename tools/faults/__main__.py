"""Try to break every promise, print a line each, and write docs/reliability.md from what was measured.

    python -m tools.faults [--only recorder,state] [--quick] [--json] [--write]

What a subject measured last is kept under trained/faults, so that one can be run again and the page holds them all; of
what was measured elsewhere the page keeps what it says.
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

from stream_mmrnn.bench.machine import Processes, machine
from tools.faults.promise import Figure, Subject
from tools.faults.text import page

SUBJECTS = (
    "recorder",
    "state",
    "resume",
    "consumers",
    "overload",
    "floods",
    "workers",
    "clocks",
    "hostile",
    "inputs",
    "access",
    "soak",
    "stop",
    "determinism",
    "cluster",
)
_ROOT = Path(__file__).parents[2]
PAGE = _ROOT / "docs" / "reliability.md"
KEPT = _ROOT / "trained" / "faults"


def subject(name: str) -> Subject:
    return cast(Subject, importlib.import_module(f"tools.faults.{name}"))


def line(figure: Figure) -> str:
    """Name, figure, bound, held or not."""
    verdict = "held" if figure.held else "NOT HELD"
    unit = f" {figure.unit}" if figure.unit else ""
    return f"{figure.name:44} {figure.value:>12.6g}{unit:10} {figure.relation} {figure.bound:<10g} {verdict}"


def keep(name: str, about: dict[str, Any], found: dict[str, Any], folder: Path = KEPT) -> None:
    """What a subject measured, and when and on which machine, for the page."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"when": about["when"], "machine": about["machine"], **found}
    (folder / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")


def write() -> None:
    """The page, of all that is kept; the sections of other subjects stay as they are."""
    before = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    PAGE.write_text(page(kept(KEPT), {n: subject(n) for n in SUBJECTS}, before), encoding="utf-8")


def kept(folder: Path) -> dict[str, dict[str, Any]]:
    """What each subject measured last, in the order of `SUBJECTS`; those that never ran are left out."""
    files = {name: folder / f"{name}.json" for name in SUBJECTS}
    return {name: json.loads(f.read_text(encoding="utf-8")) for name, f in files.items() if f.exists()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.faults", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="subjects, with commas between")
    parser.add_argument("--quick", action="store_true", help="what the test suite does")
    parser.add_argument("--json", action="store_true", help="the JSON document alone")
    parser.add_argument("--write", action="store_true", help="keep the figures and write docs/reliability.md")
    given = parser.parse_args(arguments)
    names = tuple(given.only.split(",")) if given.only else SUBJECTS
    unknown = [n for n in names if n not in SUBJECTS]
    if unknown:
        parser.error(f"there is no subject {unknown[0]!r}; there are {', '.join(SUBJECTS)}")
    if given.write and given.quick:
        parser.error("--write wants figures in full: leave --quick out")

    def say(text: str) -> None:
        if not given.json:
            print(f"  {text}", file=sys.stderr, flush=True)

    document: dict[str, Any] = {"when": time.strftime("%Y-%m-%d"), "machine": machine(), "subjects": {}}
    held = True
    for name in names:
        start_s = time.monotonic()
        figures, processes = [], Processes()
        for figure in subject(name).run(given.quick, say):
            figures.append({**figure._asdict(), "held": figure.held})
            held &= figure.held
            if not given.json:
                print(line(figure), flush=True)
        seconds, others = round(time.monotonic() - start_s, 1), processes.used().other_cpu
        document["subjects"][name] = {"figures": figures, "seconds": seconds, "other_cpu": others}
        if given.write and figures:
            keep(name, document, document["subjects"][name])
    document["held"] = held
    if given.write:
        write()
    print(json.dumps(document))
    return 0 if held else 3


if __name__ == "__main__":
    sys.exit(main())
