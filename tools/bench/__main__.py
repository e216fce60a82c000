"""Run all benches and write docs/performance.md with its plots.

    python -m tools.bench                     # about 15 minutes on an idle machine
    python -m tools.bench --only step,replay  # run these again; the others from their kept documents
    python -m tools.bench --only ""           # write the text again from the documents that are kept
    python -m tools.bench VERB --help         # run one: step, sessions, end-to-end, transport, serve, train, devices

Each benchmark is a command with `--json` in a process of its own; its document is kept as a file, from which the text
is written. A peer whose package is missing (dora-rs, pylsl, Triton) is skipped with a reason.
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

from tools.bench import text, verbs

ROOT = Path(__file__).parent.parent.parent
RUNS: dict[str, list[str]] = {
    "step": ["step"],
    "sessions": ["sessions"],
    "sessions-together": ["sessions", "--arrivals", "together"],
    "sessions-2": ["sessions", "--processes", "2"],
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
"""Name under which a document is kept -> the verb and its options."""
WITHOUT_PEERS = ("sessions-together", "sessions-2", "replay")
"""Runs of the program's own verb; the others are verbs of `python -m tools.bench`."""
PLOTS = {
    "step": ("step_histogram_gru_256",),
    "sessions": ("sessions_curve",),
    "end-to-end": ("end-to-end_stages", "end-to-end_histogram"),
}
"""Run -> beginnings of the names of the plots that the text shows; other plots are not kept."""


def shown_command(name: str) -> str:
    """The command of a run, as the text shows it."""
    return " ".join(["stream-mmrnn bench" if name in WITHOUT_PEERS else "python -m tools.bench", *RUNS[name]])


def main(arguments: Sequence[str] | None = None) -> int:
    if arguments is None:
        arguments = sys.argv[1:]
    if arguments and arguments[0] in verbs.VERBS:
        verbs.run(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description=f"Run all benchmarks; or one: {', '.join(verbs.VERBS)}."
    )
    parser.add_argument("--only", help=f"comma-separated, of {', '.join(RUNS)}; all without it")
    parser.add_argument("--work", type=Path, default=ROOT / "trained" / "bench", help="where documents are kept")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where performance.md and its plots go")
    options = parser.parse_args(arguments)
    names = list(RUNS) if options.only is None else [n for n in options.only.split(",") if n]
    for name in names:
        if name not in RUNS:
            parser.error(f"there is no run {name!r}; known are {', '.join(RUNS)}")
    options.work.mkdir(parents=True, exist_ok=True)
    failed = [name for name in names if not _run(name, options.work)]
    read = {name: _kept(options.work / f"{name}.json") for name in RUNS}
    documents = {name: d for name, d in read.items() if d is not None}
    plots = options.docs / "performance"
    plots.mkdir(parents=True, exist_ok=True)
    for old in plots.glob("*.png"):
        old.unlink()
    made = ((path, PLOTS[name]) for name in PLOTS for path in _plots(options.work, name).glob("*.png"))
    shown = sorted(path for path, beginnings in made if path.name.startswith(beginnings))
    for path in shown:
        shutil.copy(path, plots / path.name)
    path = options.docs / "performance.md"
    commands = {name: shown_command(name) for name in RUNS}
    path.write_text(text.write(documents, commands, [p.name for p in shown]), encoding="utf-8")
    print(f"{path}: {len(documents)} of {len(RUNS)} runs, {len(shown)} plots")
    for name in failed:
        print(f"{name} failed; the text has its last figures, if there are any", file=sys.stderr)
    return 1 if failed else 0


def _plots(work: Path, name: str) -> Path:
    return work / "plots" / name


def _run(name: str, work: Path) -> bool:
    """Run one and keep its document; False if it failed, then the older document stays."""
    print(f"running {name}", file=sys.stderr)
    program = ("stream_mmrnn", "bench") if name in WITHOUT_PEERS else ("tools.bench",)
    command = [sys.executable, "-m", *program, *RUNS[name], "--json", "--plots", str(_plots(work, name))]
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
