"""Everything that must be seen on a machine with an NVIDIA GPU, in one command of about five minutes.

    python -m tools.gpu_check --out docs/gpu.md          # in a checkout; onnxruntime-gpu must be there
    python -m tools.gpu_check --provider cpu             # the tool itself, where there is no GPU: small, no CUDA graphs

Is the engine on CUDA; does it compute what the CPU computes (1e-4, 1,000 steps); does capturing CUDA graphs leave the
states alone; are host buffers page-locked; how long is a step with and without CUDA graphs and in torch with a CUDA
graph; how many sessions does the GPU hold at 25 Hz, by rows, as ticks and as blocks; how long does the engine take to
start; a live session and a server as processes. Needs onnxruntime, numpy and msgspec; rich for tables, torch for the
baseline, the whole program for the processes. Exit codes: 0 all checks hold, 1 one does not, 2 usage or no CUDA.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from stream_mmrnn.bench import models
from stream_mmrnn.core.errors import ProviderError, StreamError
from stream_mmrnn.predict.engine import BATCH, StepEngine
from tools.gpu_check import checks, device, programs, report, speed, torch_step

Where: TypeAlias = Literal["cuda", "cpu"]


class Plan(NamedTuple):
    """How much is done; the defaults are the provider's."""

    hidden: tuple[int, ...]
    batches: tuple[int, ...]
    steps: int
    slots: int
    """Of the comparison with the CPU; up to half of them are stepped at once."""
    most_sessions: int
    rounds: int
    """Of sessions, for each number that is tried."""
    seconds: float
    """Of measuring, for each contender and batch."""
    cold_slots: tuple[int, ...]
    clients: int
    """Sessions of the server."""


PLANS: dict[Where, Plan] = {
    "cuda": Plan((256, 512), (1, 8, 64, 256, 1024, 4096, 16384), 1000, 2048, 262_144, 100, 1.5, (64, 4096), 64),
    "cpu": Plan((32,), (1, 8, 64), 200, 128, 4096, 20, 0.2, (64,), 8),
}


class Check:
    """One run of the tool: fills the document, part by part."""

    def __init__(self, where: Where, plan: Plan, folder: Path, say: Callable[[str], None]) -> None:
        self._where, self._plan, self._folder, self._say = where, plan, folder, say
        self._no_torch = torch_step.missing() if where == "cuda" else "the baseline is for CUDA"
        self._modes = {"CUDA graph": True, "no CUDA graph": False} if where == "cuda" else {"no CUDA graph": False}
        self.document: dict[str, Any] = {"bench": "gpu", "provider": where, "plan": plan._asdict(), "notes": []}
        for part in ("checks", "steps", "sessions", "cold_start", "programs"):
            self.document[part] = []
        if self._no_torch:
            self.document["notes"].append(f"torch with CUDA-graph replay was skipped: {self._no_torch}")

    def run(self) -> None:
        """All of it; raises ProviderError at once where CUDA is not active."""
        for hidden in self._plan.hidden:
            path = self._folder / f"gru_{hidden}.onnx"
            path.write_bytes(models.gru_step(hidden))
            self._engine_is_there(path)
            name = f"2 x GRU {hidden}"
            self.document["checks"] += self._checks(name, path, hidden)
            self.document["steps"] += self._steps(name, path, hidden)
            self.document["sessions"] += self._sessions(name, path)
            for slots in self._plan.cold_slots:
                self._say(f"{name}: cold start with {slots} slots")
                self.document["cold_start"].append({"model": name, **speed.cold_start(path, self._where, slots)})
        self._programs(self._folder / f"gru_{self._plan.hidden[0]}.onnx")
        self.document["pinned"] = all(c["pinned"] for c in self.document["checks"] if "pinned" in c)
        if self._where == "cuda" and not self.document["pinned"]:
            self.document["notes"].append("host buffers are not page-locked: this onnxruntime gave none")
        self.document["passed"] = all(c["ok"] for c in self.document["checks"])

    def _programs(self, path: Path) -> None:
        if packages := programs.missing_packages():
            self.document["notes"].append(f"the live session and the server were skipped: {packages} is not installed")
            return
        seconds = max(4 * self._plan.seconds, 1.0)
        self._say("a live session")
        self.document["programs"].append(programs.live_session(self._where, seconds, self._folder))
        self._say("a server and its clients")
        row, check = programs.served(path, self._where, self._plan.clients, seconds, self._folder)
        self.document["programs"].append(row)
        self.document["checks"].append(check)

    def _engine_is_there(self, path: Path) -> None:
        engine = StepEngine(path, 8, self._where)
        if engine.provider != self._where:
            raise ProviderError(f"provider `{self._where}` was asked for and the engine runs on `{engine.provider}`")

    def _checks(self, name: str, path: Path, hidden: int) -> Iterator[checks.Result]:
        plan, where = self._plan, self._where
        most = max(plan.slots // 2, 1)
        for mode, graphs in self._modes.items():
            self._say(f"{name}: {plan.steps} steps against the CPU, {mode}")
            rows = checks.device_rows(path, where, plan.slots, most, cuda_graphs=graphs)
            title = f"{name}, {mode}: as the CPU"
            yield checks.against_the_cpu(title, path, rows, plan.slots, most, plan.steps)
        self._say(f"{name}: the engine against the CPU's")
        title, steps = f"{name}: StepEngine as on the CPU", max(plan.steps // 10, 1)
        yield checks.engine_against_the_cpu(title, path, where, max(plan.slots // 8, 1), steps)
        self._say(f"{name}: blocks against the CPU")
        title = f"{name}: step_block as on the CPU"
        yield checks.blocks_against_the_cpu(title, path, where, max(plan.slots // 8, 1), steps)
        self._say(f"{name}: making runs (on CUDA: their graphs) moves no state")
        yield checks.capture_moves_nothing(f"{name}: making runs moves no state", path, where, plan.slots, most)
        yield checks.another_thread_is_refused(f"{name}: a step by another thread", path, where, plan.slots // 8 or 1)
        if not self._no_torch:
            torch_rows = torch_step.TorchRows(hidden, plan.slots, most)
            title, steps = f"{name}, torch with a CUDA graph: as the CPU", max(plan.steps // 10, 1)
            yield checks.against_the_cpu(title, path, torch_rows, plan.slots, most, steps)

    def _steps(self, name: str, path: Path, hidden: int) -> Iterator[dict[str, Any]]:
        largest = max(self._plan.batches)
        contenders: dict[str, checks.Candidate] = {
            mode: checks.device_rows(path, self._where, largest, largest, cuda_graphs=graphs)
            for mode, graphs in self._modes.items()
        }
        if not self._no_torch:
            contenders["torch with a CUDA graph"] = torch_step.TorchRows(hidden, largest, largest)
        for batch in self._plan.batches:
            self._say(f"{name}: a step of {batch} rows")
            yield {"model": name, "batch": batch, "ms": speed.steps(contenders, batch, self._plan.seconds)}

    def _sessions(self, name: str, path: Path) -> Iterator[dict[str, Any]]:
        plan, batch = self._plan, BATCH[self._where]
        first, most = min(batch, plan.most_sessions), plan.most_sessions
        self._say(f"{name}: sessions at 25 Hz, rows")
        rows = checks.device_rows(path, self._where, most, batch)
        yield {"model": name, "by": "rows", **speed.sessions_of_rows(rows, first, most, plan.rounds)}
        self._say(f"{name}: sessions at 25 Hz, blocks")
        found = speed.sessions_of_blocks(path, self._where, first, most, plan.rounds)
        yield {"model": name, "by": "StepEngine.step_block", **found}
        self._say(f"{name}: sessions at 25 Hz, StepEngine")
        most = min(most, 65_536)  # beyond it, Tick objects alone take longer than a tick
        found = speed.sessions_of_engine(path, self._where, min(first, most), most, plan.rounds)
        yield {"model": name, "by": "StepEngine.step", **found}


def numbers(text: str) -> tuple[int, ...]:
    found = tuple(int(part) for part in text.split(","))
    if min(found) < 1:
        raise argparse.ArgumentTypeError("numbers must be 1 or more")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description="Check and measure a GPU.")
    parser.add_argument("--provider", choices=("cuda", "cpu"), default="cuda", help="cpu tries the tool itself")
    parser.add_argument("--out", type=Path, help="write a dated Markdown page, such as docs/gpu.md")
    parser.add_argument("--json", action="store_true", help="one JSON document as the last line of stdout")
    parser.add_argument("--hidden", type=numbers, help="comma-separated widths of the two layers")
    parser.add_argument("--batches", type=numbers, help="comma-separated batch sizes to time, up to 16384")
    for name, kind, text in (
        ("steps", int, "steps of the comparison with the CPU"),
        ("slots", int, "sessions of that comparison"),
        ("most-sessions", int, "where the search for sessions at 25 Hz ends"),
        ("rounds", int, "rounds for each number of sessions"),
        ("seconds", float, "of measuring, for each contender and batch"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=text)
    return parser


def _plan(asked: argparse.Namespace) -> Plan:
    given = {name: value for name in Plan._fields if (value := getattr(asked, name, None)) is not None}
    return PLANS[asked.provider]._replace(**given)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    asked = parser.parse_args(arguments)
    plan = _plan(asked)
    if max(plan.batches) > 16384:
        parser.error("--batches: 16384 is the most of a run")
    if min(plan.steps, plan.slots, plan.most_sessions, plan.rounds) < 1 or plan.seconds <= 0:
        parser.error("counts and seconds must be more than 0")
    if asked.provider == "cuda":
        device.load_libraries()
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        try:
            check = Check(asked.provider, plan, Path(folder), lambda text: print(text, file=sys.stderr))
            check.run()
        except StreamError as e:
            print(e, file=sys.stderr)
            return e.exit_code
    document = {**check.document, "machine": device.facts()}
    document["command"] = " ".join(("python -m tools.gpu_check", *(sys.argv[1:] if arguments is None else arguments)))
    report.show(document, sys.stderr if asked.json else sys.stdout)
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(report.markdown(document), encoding="utf-8")
    if asked.json:
        print(json.dumps(document))
    return 0 if document["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
