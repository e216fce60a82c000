"""Servers: a prediction asked for across processes, ours over the bus and NVIDIA's Triton, for sessions at 25 Hz.

Open loop and in turns: each session has its own phase, the same for all contenders, and an answer's latency counts from
the intended time until the client can read it. `triton` is the server with ONNX Runtime in its Python backend,
`pytriton` the same by `Triton().bind`; both are skipped with a reason where they cannot run. Knows nothing about how a
contender (`asked`) is asked.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stream_mmrnn.bench.machine import Processes
from stream_mmrnn.bench.report import Ratio, ratio
from stream_mmrnn.bench.sessions import TICK_NS
from stream_mmrnn.core.errors import ProcessError
from tools.bench.asked import INSTALL, Contender, Ours, OverBus, Peer, interpreter
from tools.bench.contenders import bare_hop
from tools.bench.load import Figures, times

SESSIONS = (1, 8, 16, 64)
BOUNDS = {"triton_p50_over_ours_bus_16": 2.0}
"""Across processes on both sides, and against the fastest way to have Triton serve the step."""

BARE_SESSIONS = 16
_RESTS, _REST_AT_MOST = 0.2, 40
"""Of a core, all our processes together; looks, each of half a second."""
_REQUEST_BYTES = 1024
_KINDS = {"triton": "backend", "pytriton": "bind"}


def measure(
    path: Path,
    *,
    sessions: Sequence[int] = SESSIONS,
    duration_s: float = 3.0,
    rounds: int = 3,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
    alive: Callable[[], bool] = lambda: True,
) -> tuple[list[dict[str, Any]], dict[str, Ratio]]:
    """Rows and ratios for the model at `path` (of `models`); `duration_s` is of each turn.

    Without any server to compare with nothing is measured: there are a row and ratios that say why.
    """
    python, missing = interpreter()
    why = dict.fromkeys(_KINDS, missing) if missing else {}
    rows: list[dict[str, Any]] = []
    rounds_of: dict[tuple[int, str], list[float]] = {}
    others: dict[int, float | None] = {}
    with contextlib.ExitStack() as stack:
        field: list[Contender] = []
        if not missing:
            starts: dict[str, Callable[[], Contender]] = {
                name: partial(Peer, name, python, kind, path, seed) for name, kind in _KINDS.items()
            }
            field += started(stack, starts, why, say)
        if field:
            own: dict[str, Callable[[], Contender]] = {
                "ours": partial(Ours, path, seed),
                "ours_bus": partial(OverBus, path, max(sessions), seed),
            }
            field = started(stack, own, why, say) + field
        for count in sessions if field else ():
            if not alive():
                break
            figures, measured, others[count] = compared("servers", field, count, duration_s, rounds, why, say, alive)
            rows += measured
            rounds_of |= {(count, row["contender"]): figures[row["contender"]].rounds for row in measured}
    rows += [{"what": "servers", "contender": name, "skipped": reason} for name, reason in why.items()]
    found = _ratios(sessions, rounds_of, others, why)
    if rounds_of and alive():
        say("the two ways over a bare proxy")
        rows.append(bare := _bare_hops(duration_s))
        asked_ns = rounds_of.get((BARE_SESSIONS, "triton"))
        if asked_ns and "latency_ms" in bare:
            value = statistics.median(asked_ns) / 1e6 / bare["latency_ms"]["p50"]
            name = f"triton_p50_over_bare_hops_{BARE_SESSIONS}"
            found[name] = ratio(value, None, "more", others.get(BARE_SESSIONS))
    return rows, found


def _bare_hops(duration_s: float) -> dict[str, Any]:
    """The cost of our way over the bus without engine, aligner and messages: two hops over ZeroMQ's own proxy."""
    row: dict[str, Any] = {"what": "servers", "contender": "two hops over ZeroMQ's own proxy"}
    rate_hz = BARE_SESSIONS * 1e9 / TICK_NS
    found, why = bare_hop(_REQUEST_BYTES, rate_hz, round(rate_hz * duration_s))
    if not found.count:
        return {**row, "skipped": why}
    return {**row, "sessions": BARE_SESSIONS, "latency_ms": found.row()}


def started(
    stack: contextlib.ExitStack,
    starts: dict[str, Callable[[], Contender]],
    why: dict[str, str],
    say: Callable[[str], None],
) -> list[Contender]:
    """Those that start; of the others, why not."""
    found = []
    for name, start in starts.items():
        say(f"starting {name}")
        try:
            contender = start()
        except ProcessError as e:
            why[name] = f"{e}; {INSTALL}" if "No module named" in str(e) else str(e)
            continue
        stack.callback(contender.close)
        found.append(contender)
    return found


def _rest() -> None:
    """Until none of our processes does much, or for long."""
    for _ in range(_REST_AT_MOST):
        watch = Processes()
        time.sleep(0.5)
        if sum(watch.used(at_least_s=0.0).cpu.values()) < _RESTS:
            return


def compared(
    what: str,
    field: Sequence[Contender],
    sessions: int,
    duration_s: float,
    rounds: int,
    why: dict[str, str],
    say: Callable[[str], None],
    alive: Callable[[], bool],
    wake_s: float = 0.0,
) -> tuple[dict[str, Figures], list[dict[str, Any]], float | None]:
    """A B C A B C: figures, a row of each that did not break, and the share of the CPU that other programs used.

    One that breaks is left out from then on, with its reason. `wake_s`: of a turn before each that is not counted,
    where contenders have rested for long: systems take the memory of those who rest. And before that it is waited until
    those who had more than they could do have done it.
    """
    say(f"{sessions} sessions, {rounds} turns each of {', '.join(c.name for c in field if c.name not in why)}")
    whole = Processes()
    figures = {c.name: Figures() for c in field}
    for _ in range(rounds):
        for contender in field:
            if contender.name in why or not alive():
                continue
            try:
                if wake_s:
                    _rest()
                    contender.turn(sessions, wake_s)
                watch = Processes()
                turn = contender.turn(sessions, duration_s)
            except ProcessError as e:
                why[contender.name] = f"with {sessions} sessions: {e}"
                continue
            figures[contender.name].add(turn, watch.used(at_least_s=0.0))
    usage = whole.used()
    rows: list[dict[str, Any]] = []
    for contender in field:
        found = figures[contender.name]
        if contender.name in why or not found.requests:
            continue
        row = {"what": what, "contender": contender.name, "sessions": sessions, **found.row()}
        row |= {"other_cpu": usage.other_cpu, "busiest": usage.busiest_other}
        rows.append({**row, "versions": contender.versions} if contender.versions else row)
    return figures, rows, usage.other_cpu


def _ratios(
    sessions: Sequence[int],
    rounds_of: dict[tuple[int, str], list[float]],
    others: dict[int, float | None],
    why: dict[str, str],
) -> dict[str, Ratio]:
    """Median latencies of servers over ours: in each round, of which the median."""
    found: dict[str, Ratio] = {}
    for count in sessions:
        for peer in _KINDS:
            for own in ("ours", "ours_bus"):
                name = f"{peer}_p50_over_{own}_{count}"
                found[name] = ratio(
                    times(rounds_of.get((count, peer), ()), rounds_of.get((count, own), ())),
                    BOUNDS.get(name),
                    "more",
                    others.get(count),
                    why.get(peer) or why.get(own) or "it was stopped before",
                )
    return found
