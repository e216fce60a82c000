"""Servers: a prediction asked for across processes, ours over the bus and NVIDIA's Triton, for sessions at 25 Hz.

Open loop and in turns: each session has its own phase, the same for all contenders, and an answer's latency counts from
the intended time until the client can read it. `triton` is the server with ONNX Runtime in its Python backend,
`pytriton` the same by `Triton().bind`; both are skipped with a reason where they cannot run. Knows nothing about how a
contender (`asked`) is asked.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stream_mmrnn.bench.machine import Processes, Usage
from stream_mmrnn.bench.report import Ratio, ratio
from stream_mmrnn.bench.sessions import TICK_NS
from stream_mmrnn.core.errors import ProcessError
from stream_mmrnn.core.latency import Histogram
from tools.bench.asked import INSTALL, Contender, Ours, OverBus, Peer, Turn, interpreter
from tools.bench.contenders import bare_hop

SESSIONS = (1, 8, 16, 64)
BOUNDS = {"triton_p50_over_ours_bus_16": 2.0}
"""Across processes on both sides, and against the fastest way to have Triton serve the step."""

BARE_SESSIONS = 16
_RESTS, _REST_AT_MOST = 0.2, 40
"""Of a core, all our processes together; looks, each of half a second."""
_REQUEST_BYTES = 1024
_KINDS = {"triton": "backend", "pytriton": "bind"}


class Figures:
    """What one contender did with so many sessions."""

    def __init__(self) -> None:
        self.latency, self.path = Histogram(), Histogram()
        self.rounds: list[float] = []
        """Median latency of each round; nan where nothing was answered."""
        self.requests = self.late = 0
        self._errors: dict[str, int] = {}
        self._cpu_s = self._seconds = 0.0

    def add(self, turn: Turn, usage: Usage) -> None:
        self.requests += turn.requests
        self.rounds.append(statistics.median(turn.latency_ns) if turn.latency_ns else math.nan)
        for value_ns in turn.latency_ns:
            self.latency.add(value_ns)
            self.late += value_ns > TICK_NS
        for value_ns in turn.path_ns:
            self.path.add(value_ns)
        for why, count in turn.errors.items():
            self._errors[why] = self._errors.get(why, 0) + count
        self._cpu_s += sum(usage.cpu.values()) * usage.seconds
        self._seconds += usage.seconds

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = {
            "requests": self.requests,
            "answers": self.latency.count,
            "lost": self.requests - self.latency.count,
            "late": self.late,
            "latency_ms": self.latency.row(),
            # of all our processes in its turns: those of the others rest meanwhile
            "cpu_share": round(self._cpu_s / self._seconds, 3) if self._seconds else None,
        }
        if self.path.count:
            row["path_ms"] = self.path.row()
        return {**row, "errors": self._errors} if self._errors else row


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
            say(f"{count} sessions, {rounds} turns each of {', '.join(c.name for c in field)}")
            watch = Processes()
            figures = in_turn(field, count, duration_s, rounds, why, alive)
            usage = watch.used()
            others[count] = usage.other_cpu
            for contender in field:
                if contender.name in why or not figures[contender.name].requests:
                    continue
                rounds_of[count, contender.name] = figures[contender.name].rounds
                row = {"what": "servers", "contender": contender.name, "sessions": count}
                row |= figures[contender.name].row()
                row |= {"other_cpu": usage.other_cpu, "busiest": usage.busiest_other}
                rows.append({**row, "versions": contender.versions} if contender.versions else row)
            field = [c for c in field if c.name not in why]
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


def in_turn(
    field: Sequence[Contender],
    sessions: int,
    duration_s: float,
    rounds: int,
    why: dict[str, str],
    alive: Callable[[], bool],
    wake_s: float = 0.0,
) -> dict[str, Figures]:
    """A B C A B C; one that breaks is left out from then on, with its reason.

    `wake_s`: of a turn before each that is not counted, where contenders have rested for long: systems take the memory
    of those who rest. And before that it is waited until those who had more than they could do have done it.
    """
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
    return figures


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
                # a round that was not finished has turns of the first contenders only
                pairs = zip(rounds_of.get((count, peer), ()), rounds_of.get((count, own), ()), strict=False)
                times = [a / b for a, b in pairs if a == a and b == b and b]
                name = f"{peer}_p50_over_{own}_{count}"
                found[name] = ratio(
                    statistics.median(times) if times else None,
                    BOUNDS.get(name),
                    "more",
                    others.get(count),
                    why.get(peer) or why.get(own) or "it was stopped before",
                )
    return found
