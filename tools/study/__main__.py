"""Make docs/study.md and its plots: cells x fusions on the zoo's data.

    python -m tools.study --data DATA            # the folder with the archives; about half an hour of one core
    python -m tools.study --data DATA --list     # what it would run

Results are kept, one file each, so that it goes on where it was broken off. Data that is not there leaves its part out,
says so in the study, and ends with 3.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from stream_mmrnn.core.errors import StreamError

from . import plots, text
from .plan import PARTS, Run, whole
from .runs import Result, keep, kept, make

ROOT = Path(__file__).parent.parent.parent


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.study", description="Make docs/study.md and its plots.")
    parser.add_argument("--data", type=Path, required=True, help="the folder with the archives of the zoo's data")
    parser.add_argument("--work", type=Path, default=ROOT / "trained" / "study", help="where results are kept")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where study.md and its plots are written")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated: make what is not kept of these; all")
    parser.add_argument("--seeds", type=int, default=0, help="of each run; the plan's own number without it")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each with one thread")
    parser.add_argument("--list", action="store_true", help="print the plan and end")
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line of stdout")
    asked = parser.parse_args(arguments)
    parts = asked.parts.split(",")
    for part in parts:
        if part not in PARTS:
            parser.error(f"there is no part {part!r}; known are {', '.join(PARTS)}")
    if asked.jobs < 1 or asked.seeds < 0:
        parser.error("--jobs must be 1 or more, --seeds 0 or more")
    console = Console(stderr=asked.json, highlight=False)

    plan = whole(asked.seeds or None)
    unique = {r.key: r for r in reversed(plan.runs)}
    runs = [r for r in plan.runs if unique[r.key] is r]
    results = {r.key: found for r in runs if (found := kept(r.key, asked.work))}
    todo = [r for r in runs if r.part in parts and r.key not in results]
    if asked.list:
        for r in runs:
            state = "kept" if r.key in results else f"{r.cost_s:.0f} s"
            print(f"{r.part:13} {r.group:10} {r.name:28} seed {r.seed}  {state}")
        print(
            f"{len(runs)} runs, {len(todo)} to make, about {sum(r.cost_s for r in todo) / 60:.0f} minutes of one core"
        )
        return 0

    missing: dict[str, str] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        left_s = sum(r.cost_s for r in todo)
        task = bar.add_task("study", total=left_s, left="")
        for run, outcome in _made(todo, asked.data, asked.jobs):
            left_s -= run.cost_s
            bar.update(task, advance=run.cost_s, left=f"about {left_s / 60 / asked.jobs:.0f} minutes left")
            if isinstance(outcome, StreamError):
                if missing.setdefault(run.part, str(outcome)) == str(outcome):
                    console.print(f"{run.part} {run.group} {run.name}: {outcome}", style="red")
                continue
            keep(outcome, asked.work)
            results[run.key] = outcome
            head = text.head_of(run.part)
            said = text.short(text.mean([outcome], head)) if run.kind == "train" else "measured"
            console.print(f"{run.part} {run.group} {run.name} seed {run.seed}: {said}, {outcome.cpu_s:.0f} s")

    absent = sorted({r.part for r in runs if r.key not in results} - set(missing))
    missing.update({part: f"some runs of {part} were not made" for part in absent})
    found = text.Found(plan, results)
    versions = {f"Python {r.versions['python']}, torch {r.versions['torch']}" for r in results.values()}
    about = {
        "command": "python -m tools.study --data DATA" + (f" --seeds {asked.seeds}" if asked.seeds else ""),
        "runs": len(results),
        "minutes": sum(r.cpu_s for r in results.values()) / 60,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": " and ".join(sorted(versions)),
        "missing": [f"{part} ({why})" for part, why in missing.items()],
    }
    asked.docs.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw(found, asked.docs / "study")
    path = asked.docs / "study.md"
    path.write_text(text.write(found, about), encoding="utf-8")
    console.print(f"{path}: {len(results)} of {len(runs)} runs, {len(drawn)} plots")
    if asked.json:
        document = {"study": str(path), "plots": [str(p) for p in drawn], "runs": len(results), "missing": missing}
        print(json.dumps(document))
    return 3 if missing else 0


def _made(todo: Sequence[Run], data: Path, jobs: int) -> Iterator[tuple[Run, Result | StreamError]]:
    """Each run with its result, or with what stood in its way, as they end.

    No more than `jobs` are begun at a time, in the plan's order: neighbours read the same data, which a process holds.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    waiting = iter(todo)
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running: dict[Future[Result], Run] = {}
        try:
            while True:
                for run in waiting:
                    running[pool.submit(make, run, [data])] = run
                    if len(running) >= jobs:
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    run = running.pop(future)
                    try:
                        yield run, future.result()
                    except StreamError as e:
                        yield run, e
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


if __name__ == "__main__":
    sys.exit(main())
