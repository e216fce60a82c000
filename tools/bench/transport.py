"""Transport: how long a message takes from one process to another, over our bus and over others, in the same run.

Open loop: each message has its intended time, and its latency counts from there until the reader can use it. `path`
counts from the beginning of the call that sent it. Contenders take turns, round by round. Hot is a rate at which both
processes stay warm, paced is the rate of the stream that has such messages. Knows nothing about how contenders work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from stream_mmrnn.bench import end_to_end
from stream_mmrnn.bench.machine import Processes
from stream_mmrnn.bench.plots import Pictures
from stream_mmrnn.bench.report import Document, Ratio, document, ratio
from stream_mmrnn.core.errors import ProcessError
from tools.bench import contenders
from tools.bench.contenders import Contender
from tools.bench.load import Figures, times

SIZES_BYTES = {"2kb": 2048, "30kb": 30_000, "1mb": 2**20}
"""About a feature vector, a camera's picture as JPEG, and a picture as it is."""

RATES_HZ = {"hot": {"2kb": 1000.0, "30kb": 1000.0, "1mb": 200.0}, "paced": {"2kb": 50.0, "30kb": 25.0, "1mb": 25.0}}

_PAIRS = (
    ("ours_ipc", "pyzmq_ipc"),
    ("ours_tcp", "pyzmq_tcp"),
    ("ours_ipc", "zmq_proxy_ipc"),
    ("ours_ipc", "dora"),
    ("zmq_proxy_ipc", "dora"),
    ("ours_ipc", "lsl"),
)
_BOUNDS = {"ours_ipc_over_dora_2kb_paced": 0.65}


def _row(figures: Figures) -> dict[str, Any]:
    return {
        "sent": figures.requests,
        "received": figures.latency.count,
        "lost": figures.lost,
        "latency_ms": figures.latency.row(),
        "path_ms": figures.path.row(),
        "cpu_share": figures.cpu_share,
        "rss_mb": round(figures.rss_mb, 1),
    }


def _in_turn(field: Sequence[Contender], size: str, mode: str, duration_s: float) -> dict[str, Figures]:
    """Rounds of about a second each, A B C A B C."""
    field = [c for c in field if c.largest_bytes is None or SIZES_BYTES[size] <= c.largest_bytes]
    rate_hz = RATES_HZ[mode][size]
    rounds = max(1, round(duration_s))
    count = max(1, round(rate_hz * duration_s / rounds))
    figures = {c.name: Figures() for c in field}
    for contender in field:
        contender.warm(SIZES_BYTES[size])
    for _ in range(rounds):
        for contender in field:
            processes = Processes(contender.pids)
            done = contender.round(SIZES_BYTES[size], rate_hz, count)
            figures[contender.name].add(done, processes.used(at_least_s=0.0))
    return figures


def _ratios(
    measured: dict[tuple[str, str], dict[str, Figures]],
    others: dict[tuple[str, str], float | None],
    why: dict[str, str],
) -> dict[str, Ratio]:
    """Ours over each other one, pair by pair in each round."""
    found: dict[str, Ratio] = {}
    for (size, mode), figures in measured.items():
        for a, b in _PAIRS:
            name = f"{a}_over_{b}_{size}_{mode}"
            value = None
            if a in figures and b in figures:
                value = times(figures[a].rounds, figures[b].rounds)
            found[name] = ratio(
                value,
                _BOUNDS.get(name),
                other_cpu=others[size, mode],
                why=why.get(a) or why.get(b, "it carries no messages of this size"),
            )
    return found


def _shares(whole: dict[str, Any], picture_path_ms: float | None) -> dict[str, Ratio]:
    """What a camera's frame spends in transport, of its whole way to a readable prediction.

    A ring of shared memory could save at most this: the picture itself crosses processes beside the way (to recorder
    and page), its features on it.
    """
    closed = whole["closed_by_ms"].get("feature/vision")
    why = "no camera frame closed a tick; give a model that takes vision"
    why_picture = why if closed is None else "pictures of 30kb were not sent"
    total = closed["total"]["p50"] if closed else None
    return {
        "camera_features_transport_share": ratio(closed["transport"]["p50"] / total if closed else None, why=why),
        "camera_picture_transport_share": ratio(
            picture_path_ms / total if total and picture_path_ms is not None else None, why=why_picture
        ),
    }


def run(
    *,
    duration_s: float = 3.0,
    sizes: Sequence[str] = tuple(SIZES_BYTES),
    model: str | None = None,
    alive: Callable[[], bool] = lambda: True,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Document, Pictures]:
    """Each contender, size and mode for `duration_s`; then a live session to compare a frame's transport with."""
    pictures = Pictures()
    rows: list[dict[str, Any]] = []
    measured: dict[tuple[str, str], dict[str, Figures]] = {}
    others: dict[tuple[str, str], float | None] = {}
    starts, why = contenders.available()
    with contextlib.ExitStack() as stack:
        field = []
        for name, start in starts.items():
            say(f"starting {name}")
            try:
                contender = stack.enter_context(start())
                if not contender.warm(SIZES_BYTES["2kb"]):
                    raise ProcessError("no message arrived")
                field.append(contender)
            except ProcessError as e:
                if name.startswith("ours"):
                    raise
                why[name] = str(e)
        for mode in RATES_HZ:
            for size in sizes:
                if not alive():
                    raise ProcessError("the bench was stopped before it had measured; nothing is reported")
                say(f"{size} {mode}: {duration_s:g} s for each of {', '.join(c.name for c in field)}")
                processes = Processes()
                figures = measured[size, mode] = _in_turn(field, size, mode, duration_s)
                usage = processes.used()
                others[size, mode] = usage.other_cpu
                what = {"size": size, "bytes": SIZES_BYTES[size], "mode": mode, "rate_hz": RATES_HZ[mode][size]}
                beside = {"other_cpu": usage.other_cpu, "busiest": usage.busiest_other}
                rows += [{"contender": name, **what, **_row(f), **beside} for name, f in figures.items()]
                pictures.histograms[f"{size}_{mode}"] = {name: f.latency for name, f in figures.items()}
    rows += [{"contender": name, "skipped": reason} for name, reason in why.items()]
    ratios = _ratios(measured, others, why)
    say("a live session, to compare a camera frame's transport with its whole way")
    live, _ = end_to_end.run(model=model, duration_s=max(2.0, duration_s), sets=("all",), alive=alive)
    picture = measured.get(("30kb", "paced"), {}).get("ours_ipc")
    ratios |= _shares(live["rows"][0], picture.path.row()["p50"] if picture and picture.path.count else None)
    settings = {"duration_s": duration_s, "sizes_bytes": {s: SIZES_BYTES[s] for s in sizes}, "model": model}
    return document("transport", settings, rows, ratios, live=live["rows"][0]), pictures
