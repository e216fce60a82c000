"""Hostile input: generated messages and files at every door, each door in a process of its own (`tools.hostile`).

The caps, each where it is held:

    wire        frames of 16 MiB (also ZeroMQ's own limit), 3 frames, topics of 64 bytes, sessions of 64 characters,
                origins of 256, 4 axes, JSON of 1 MiB, whole numbers of 64 bits
    bus         65,536 streams' numbers, and 1,024 of sessions that ended
    aligner     500 ms ahead of the clock and 10 s behind it, 4,096 samples for a tick, 1,024 messages beyond a gap,
                a clock that leaps 10 minutes at most (more only if a second message agrees, and then without ticks)
    text        lines of `text.max_line_bytes`, 64 clients; the one silent longest makes room
    recording   records of 256 MiB, chunks of 64 MiB unpacked, as many bytes as they say; written: 1,024 channels
    model       2 GiB, graphs 8 deep, no weights in other files, no operators of other libraries, rows of 4 Mi numbers,
                256 modalities or heads, ticks of a minute
    snapshot    64 MiB, a header of 1 MiB, sealed by a sha256, in a folder of this user's own
    settings    files of 1 MiB; every number has its range
    page        64 connections, 64 more that wait for a request, 16 streams of events, 5 s between requests,
                64 processes, 8 heads of 32 numbers
    supervisor  a sentence a second of each process, 500 printable characters
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from tools.faults.promise import Figure, Say
from tools.hostile import watch

TITLE = "Hostile input"
NOT_PROMISED = (
    (
        "A peer who is let in (the same user on this machine, or one with a key) can say what it likes in the name of "
        "any process: it can confuse a session, end it or fill its queues. It crashes no process and hangs none."
    ),
    (
        "How many frames a message may have is ZeroMQ's to limit, and it does not: a peer who is let in can make a "
        "reader hold one message of many small frames, up to the memory that ZeroMQ takes for it."
    ),
    (
        "A model file is a program. Our own checks refuse what is malformed, and onnxruntime refuses most of the rest, "
        "but one that asks for more memory or time than there is gets it: serve models that you trust."
    ),
)

FULL = {
    "wire": 12_000, "json": 8_000, "bus": 5_000, "journal": 2_000, "tcp": 3_000, "pipe": 2_000, "zmq": 2_000,
    "recordings": 4_000, "models": 6_000, "contracts": 2_000, "snapshots": 2_000, "settings": 2_000, "readers": 4_000,
    "page": 1_000, "names": 1_000,
}  # fmt: skip
QUICK = {
    "wire": 1_000, "json": 1_000, "bus": 600, "journal": 200, "tcp": 300, "pipe": 150, "zmq": 150, "recordings": 200,
    "models": 400, "contracts": 100, "snapshots": 200, "settings": 150, "readers": 400, "page": 50, "names": 200,
}  # fmt: skip

_MODULES = frozenset({"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml"})
_CALLS = frozenset({"eval", "exec", "compile", "__import__"})
_ROOT = Path(__file__).parents[2]


def unsafe_loads(folders: tuple[Path, ...]) -> list[str]:
    """Places in sources where bytes could become code: `file:line what`."""
    found = []
    for path in sorted(p for folder in folders for p in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            what = _unsafe(node)
            if what:
                found.append(f"{path.name}:{getattr(node, 'lineno', 0)} {what}")
    return found


def _unsafe(node: ast.AST) -> str:
    if isinstance(node, ast.Import):
        return next((a.name for a in node.names if a.name.split(".")[0] in _MODULES), "")
    if isinstance(node, ast.ImportFrom):
        return node.module if node.module and node.module.split(".")[0] in _MODULES else ""
    if not isinstance(node, ast.Call):
        return ""
    said = {k.arg: k.value for k in node.keywords}

    def is_set(name: str, value: bool) -> bool:
        got = said.get(name)
        return isinstance(got, ast.Constant) and got.value is value

    if isinstance(node.func, ast.Name):
        return node.func.id if node.func.id in _CALLS else ""
    if not isinstance(node.func, ast.Attribute):
        return ""
    # what multiprocessing hands from our own processes to our own is not from outside
    of = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
    if of == "torch" and node.func.attr == "load" and not is_set("weights_only", True):
        return "torch.load without weights_only"
    if "allow_pickle" in said and not is_set("allow_pickle", False):
        return "allow_pickle"
    return ""


def run(quick: bool, say: Say) -> Iterator[Figure]:
    outcomes = {}
    for name, count in (QUICK if quick else FULL).items():
        outcomes[name] = found = watch.run(name, count, say)
        counts = ", ".join(f"{k} {v}" for k, v in sorted(found.counts.items()))
        say(f"{name}: {found.cases} cases, {found.refused} refused, {found.seconds:.1f} s; {counts}")
    all_of = list(outcomes.values())
    counted = {k: sum(o.counts.get(k, 0) for o in all_of) for o in all_of for k in o.counts}
    yield Figure(
        "hostile_cases_messages",
        f"generated messages, files and requests at {len(all_of)} doors: {', '.join(outcomes)}",
        sum(o.cases for o in all_of),
        "messages",
        sum((QUICK if quick else FULL).values()) if quick else 50_000,
        ">=",
    )
    crashes = sum(len(o.crashes) + len(o.native) for n, o in outcomes.items() if n != "models")
    yield Figure("hostile_crashes_count", "of them, errors that are none of ours", crashes, "", 0, "==")
    yield Figure(
        "hostile_hangs_count", "of them, not done with in 30 s", sum(len(o.hangs) for o in all_of), "", 0, "=="
    )
    models = outcomes["models"]
    yield Figure(
        "hostile_model_crashes_count",
        f"the same of {models.cases} model files, which onnxruntime reads: foreign errors, and processes that ended",
        len(models.crashes) + len(models.native),
        "",
        0,
        "==",
    )
    yield Figure(
        "hostile_uncounted_messages",
        f"of {counted['bad']} bad messages through a broker, not among the reader's garbage",
        counted["uncounted"],
        "messages",
        0,
        "==",
    )
    yield Figure(
        "hostile_honest_messages",
        "honest messages, lines and requests sent between the hostile ones, and answered",
        counted["honest"],
        "messages",
        sum(o.cases // every for n, o in outcomes.items() if (every := _HONEST_EVERY.get(n))),
        "==",
    )
    yield Figure(
        "hostile_log_lines_per_s",
        "lines printed, at the door where it was most",
        max(o.lines / max(o.seconds, 1.0) for o in all_of),
        "",
        1,
    )
    yield Figure(
        "hostile_notes_too_often_lines",
        "sentences that a supervisor said of one process beyond one a second, whatever its status said",
        counted["said_too_often"],
        "lines",
        0,
        "==",
    )
    yield Figure(
        "hostile_names_count", "session names taken that lead out of a folder", counted["escaped"], "", 0, "=="
    )
    yield Figure(
        "hostile_memory_mb",
        "the most memory that a door took more, bombs and forged sizes among the cases",
        max(o.peak_mb for o in all_of),
        "MB",
        512,
    )
    loads = unsafe_loads((_ROOT / "stream_mmrnn", _ROOT / "tools"))
    for place in loads:
        say(f"unsafe: {place}")
    yield Figure(
        "hostile_pickle_count",
        "places in the sources where bytes could become code: pickle, marshal, eval, exec and their like",
        len(loads),
        "",
        0,
        "==",
    )


_HONEST_EVERY = {"bus": 50, "tcp": 50, "pipe": 50, "zmq": 50, "page": 25}
