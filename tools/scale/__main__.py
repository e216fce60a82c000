"""Simulate a million sessions on measured figures.

    python -m tools.scale              # the document as JSON; the same for the same seed
    python -m tools.scale --write      # docs/scale.md with its plot
    python -m tools.scale --measure    # one engine of this machine again, which the simulation is checked against

Knows nothing about how anything is simulated.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stream_mmrnn.core.settings import ClusterSettings
from stream_mmrnn.serve.cluster.subjects import LOG_S
from tools.scale import figures, simulate, text
from tools.scale.figures import GIVEN
from tools.scale.simulate import TICK_S, Engine

DOCS = Path(__file__).parents[2] / "docs"
SESSIONS = 1_000_000
HZ = 1 / TICK_S
MODEL = "turn_taking"
RACKS = 20
REPLICAS = 3
EVERY = (1, 5, 25, 100, 400, 1000)
LOADS = (0.3, 0.5, 0.7, 0.85)


def document(seed: int = 0, sessions: int = SESSIONS) -> dict[str, Any]:
    """Everything that docs/scale.md tells."""
    measured = figures.measured()
    one = Engine(measured["call_s"], measured["tick_s"], tuple(measured["late_s"]))
    bytes_of = figures.of_model(MODEL)
    found: dict[str, Any] = {
        "seed": seed,
        "sessions": sessions,
        "model": MODEL,
        "bytes": bytes_of,
        "measured": measured,
    }
    found["given"] = {name: given.value for name, given in GIVEN.items()}
    found["check"] = check(measured, one, seed)
    found["day"] = simulate.day(sessions, 10.0, 1.0, 0.6, seed)
    found["kinds"] = kinds(sessions, found["day"], bytes_of)
    found["log"] = log(sessions, bytes_of)
    found["partitions"] = partitions(sessions, seed)
    tick_s = 1 / GIVEN["cluster_core_ticks"].value
    found["snapshots"] = [snapshots(sessions, every, bytes_of, tick_s) for every in EVERY]
    found["racks"] = racks(tick_s, seed)
    return found


def check(measured: dict[str, Any], one: Engine, seed: int) -> list[dict[str, Any]]:
    """The same loads, measured and simulated."""
    rows = []
    for load in measured["loads"]:
        took_ms = simulate.queue(one, int(load["sessions"]), 3.0, seed) * 1e3
        simulated = {f"p{p}_ms": round(float(np.percentile(took_ms, p)), 3) for p in (50, 99)}
        rows.append({"sessions": int(load["sessions"]), "measured": load, "simulated": simulated})
    return rows


def kinds(sessions: int, day: dict[str, Any], bytes_of: dict[str, int]) -> list[dict[str, Any]]:
    """What carries the peak, at 70 % of what one holds, and what a session-hour costs over the day's mean."""
    core_h, gpu_h = GIVEN["price_vcpu_h"].value, GIVEN["price_gpu_h"].value
    rows = []
    for name, each, price in (
        ("cores, fp32, the step alone", GIVEN["core_fp32"].value, core_h),
        ("cores, 8-bit weights, the step alone", GIVEN["core_int8"].value, core_h),
        ("H100, by rows, the step alone", GIVEN["gpu_rows"].value, gpu_h),
        ("H100, `StepEngine.step`", GIVEN["gpu_engine"].value, gpu_h),
        ("cores of engines in a cluster over NATS, as built", GIVEN["cluster_core_ticks"].value / HZ, core_h),
        ("cores of NATS beside them, one copy of the log", GIVEN["nats_core_ticks"].value / HZ, core_h),
    ):
        count = int(np.ceil(sessions / (0.7 * each)))
        rows.append(
            {
                "kind": name,
                "each": round(each),
                "count": count,
                "us_dollar_a_session_hour": float(f"{count * price / day['mean']:.3g}"),
            }
        )
    crossing_gb = (bytes_of["step"] + bytes_of["pred"]) * HZ * 3600 / 1e9
    price = GIVEN["price_gb"].value
    rows.append(
        {
            "kind": "traffic, if every tick and answer crosses a zone once",
            "each": 1,
            "count": 0,
            "us_dollar_a_session_hour": float(f"{crossing_gb * price:.3g}"),
        }
    )
    return rows


def log(sessions: int, bytes_of: dict[str, int]) -> dict[str, float]:
    """Gigabytes and messages a second."""
    ticks = sessions * HZ
    written = ticks * bytes_of["step"] * REPLICAS
    return {
        "ticks_per_s": ticks,
        "in_gb_per_s": ticks * bytes_of["step"] / 1e9,
        "out_gb_per_s": ticks * bytes_of["pred"] / 1e9,
        "written_gb_per_s": written / 1e9,
        "kept_tb": written * LOG_S / 1e12,
        "nats_cores": float(np.ceil(ticks * REPLICAS / GIVEN["nats_core_ticks"].value)),
    }


def partitions(sessions: int, seed: int) -> list[dict[str, Any]]:
    """How uneven whole partitions are over a thousand engines, or as many as there are partitions."""
    rows = []
    for count in (ClusterSettings().partitions, 8192, 65_536):
        engines = min(1000, count)
        rows.append(
            {
                "partitions": count,
                "engines": engines,
                "sessions_each": round(sessions / engines),
                "fullest_over_mean": round(simulate.fullest(sessions, count, engines, seed), 3),
            }
        )
    return rows


def snapshots(sessions: int, every: int, bytes_of: dict[str, int], tick_s: float) -> dict[str, Any]:
    """What it costs to keep a state every so many ticks, and what it saves when an engine dies."""
    writes = sessions * HZ / every
    each = round(0.7 / (tick_s * HZ))
    # a survivor takes what one engine in nineteen dealt out leaves it, with the 30 % that it has to spare
    again_s = each / (RACKS - 1) * (every / 2) * tick_s / 0.3
    return {
        "every": every,
        "window_s": every * TICK_S,
        "states_per_s": writes,
        "written_gb_per_s": writes * bytes_of["state"] * REPLICAS / 1e9,
        "share_of_the_log": float(f"{bytes_of['state'] / every / (bytes_of['step'] + bytes_of['pred']):.3g}"),
        "stepped_again_s": float(f"{again_s:.3g}"),
    }


def racks(tick_s: float, seed: int) -> list[dict[str, Any]]:
    """One rack of twenty dies, engines at different loads; a scaled model: twenty racks of ten engines each."""
    rows = []
    for load in LOADS:
        each = round(load / (tick_s * HZ))
        gaps = simulate.rack(
            RACKS * 10, 10, each, load, tick_s, 25, GIVEN["found_s"].value, GIVEN["fetch_s"].value, seed
        )
        rows.append(
            {
                "load": load,
                "sessions_each": each,
                "moved": len(gaps),
                **{f"gap_p{p}_s": round(float(np.percentile(gaps, p)), 3) for p in (50, 99)},
                "gap_worst_s": round(float(gaps.max()), 3),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.scale", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", action="store_true", help="measure one engine of this machine again and keep it")
    parser.add_argument("--write", action="store_true", help="write docs/scale.md and its plot")
    given = parser.parse_args(arguments)
    if given.measure:
        found = figures.measure(seed=given.seed)
        figures.MEASURED.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    made = document(given.seed)
    if given.write:
        (DOCS / "scale.md").write_text(text.page(made), encoding="utf-8")
        text.plot(made, DOCS / "scale.png")
    print(json.dumps(made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
