"""Run all benches and write docs/performance.md with its plots.

    python -m tools.bench                     # about a quarter of an hour on a machine that does nothing else
    python -m tools.bench --only step,replay  # these again; of the others what is kept is told
    python -m tools.bench --only ""           # write the text anew from what is kept

Each bench is `stream-mmrnn bench NAME --json`, in a process of its own; its document is kept as a file, from which the
text is written. What other packages want (dora-rs, pylsl, Triton) is skipped with a reason where it is not there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import text

ROOT = Path(__file__).parent.parent.parent
RUNS: dict[str, list[str]] = {
    "step": ["step"],
    "sessions": ["sessions"],
    "sessions-together": ["sessions", "--arrivals", "together", "--no-peers"],
    "sessions-2": ["sessions", "--processes", "2", "--no-peers"],
    "end-to-end": ["end-to-end", "--duration", "20"],
    "end-to-end-busy": ["end-to-end", "--duration", "20", "--busy", "2", "--modalities", "audio"],
    "end-to-end-nice": ["end-to-end", "--duration", "20", "--busy", "2", "--modalities", "audio", "--priority", "nice"],
    "end-to-end-fifo": ["end-to-end", "--duration", "20", "--busy", "2", "--modalities", "audio", "--priority", "fifo"],
    "end-to-end-alone-fifo": ["end-to-end", "--duration", "20", "--modalities", "audio", "--priority", "fifo"],
    "transport": ["transport", "--duration", "5"],
    "replay": ["replay"],
    "serve": ["serve", "--rounds", "2", "--duration", "5"],
    "train": ["train"],
}
"""By the name under which a document is kept: the verb and its options."""
PLOTS = {
    "step": ("step_histogram_gru_256",),
    "sessions": ("sessions_curve",),
    "end-to-end": ("end-to-end_stages", "end-to-end_histogram"),
}
"""By the run, beginnings of the names of the plots that the text shows; the others are made and not kept."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description="Run all benches; write their figures.")
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(RUNS)}; all without it")
    parser.add_argument("--work", type=Path, default=ROOT / "trained" / "bench", help="where documents are kept")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where performance.md and its plots go")
    asked = parser.parse_args(arguments)
    names = list(RUNS) if asked.only is None else [n for n in asked.only.split(",") if n]
    for name in names:
        if name not in RUNS:
            parser.error(f"there is no run {name!r}; known are {', '.join(RUNS)}")
    asked.work.mkdir(parents=True, exist_ok=True)
    failed = [name for name in names if not _run(name, asked.work)]
    documents = {name: _kept(asked.work / f"{name}.json") for name in RUNS}
    plots = asked.docs / "performance"
    plots.mkdir(parents=True, exist_ok=True)
    for old in plots.glob("*.png"):
        old.unlink()
    made = ((path, PLOTS[name]) for name in PLOTS for path in _plots(asked.work, name).glob("*.png"))
    shown = sorted(path for path, beginnings in made if path.name.startswith(beginnings))
    for path in shown:
        shutil.copy(path, plots / path.name)
    path = asked.docs / "performance.md"
    told = {name: d for name, d in documents.items() if d is not None}
    path.write_text(text.write(told, RUNS, [p.name for p in shown]), encoding="utf-8")
    print(f"{path}: {len(told)} of {len(RUNS)} runs, {len(shown)} plots")
    for name in failed:
        print(f"{name} failed; its last figures are told, where there are some", file=sys.stderr)
    return 1 if failed else 0


def _plots(work: Path, name: str) -> Path:
    return work / "plots" / name


def _run(name: str, work: Path) -> bool:
    """Run one and keep its document; False where it ended badly, and what was kept before stays."""
    print(f"running {name}", file=sys.stderr)
    command = [sys.executable, "-m", "stream_mmrnn", "bench", *RUNS[name], "--json", "--plots", str(_plots(work, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode or not last.startswith("{"):
        return False
    (work / f"{name}.json").write_text(last + "\n", encoding="utf-8")
    return True


def _kept(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found


if __name__ == "__main__":
    sys.exit(main())
