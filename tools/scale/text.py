"""docs/scale.md and its plot, from what was simulated. Knows nothing about how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.scale.figures import GIVEN


def _n(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [f"| {' | '.join(head)} |", "| " + "--- | " * len(head)]
    lines += [f"| {' | '.join(v if isinstance(v, str) else _n(v) for v in row)} |" for row in rows]
    return "\n".join(lines).replace(" | \n", " |\n")


def page(d: dict[str, Any]) -> str:
    """The page."""
    m, log, day = d["measured"], d["log"], d["day"]
    busy = m["other_cpu"]
    beside = "" if busy is None else f"; others used {100 * busy:.0f} % of a core"
    worst = max(row["gap_worst_s"] for row in d["racks"] if row["load"] <= 0.5)
    bent = d["partitions"][0]
    as_built = d["kinds"][4]
    return f"""# A million sessions

What {d["sessions"]:,} sessions at 25 Hz would take, by a simulation with a seed; no such system was built or run. Every figure
is written by

    python -m tools.scale --write

from what was measured of single engines, what our own encoders make of a `{d["model"]}` tick, and what is assumed; these are
in [the last table](#what-it-stands-on). One engine alone is simulated, too, beside what was measured of it.

## Is the simulation right about one engine?

An engine on one core, two GRU layers of {m["hidden"]}, an open loop: measured on {m["machine"]["date"]} on a core of
{m["machine"]["cpu"]}{beside}. A step was {1e6 * m["call_s"]:.0f} us and {1e6 * m["tick_s"]:.1f} us a tick; how late steps end on
top of that is drawn from what was measured.

{_table(["sessions", "measured p50, ms", "simulated", "measured p99, ms", "simulated"], [[r["sessions"], r["measured"]["p50_ms"], r["simulated"]["p50_ms"], r["measured"]["p99_ms"], r["simulated"]["p99_ms"]] for r in d["check"]])}

Where the two differ it is by disturbances that come in a row on a shared machine: the simulation draws each by itself.

## How many engines, and what a session-hour costs

Sessions come and go over a day: they last ten minutes in the mean (lognormal), and six in ten more begin at the peak than in
the mean. For a peak of {day["peak"]:,} that is {_n(day["mean"])} in the mean, {_n(day["lowest"])} at the lowest and
{_n(day["begun_per_s_peak"])} beginning a second. Engines are paid for all day and filled to 70 % at the peak.

{_table(["what carries it", "sessions each", "needed", "US$ a session-hour"], [[r["kind"], r["each"], r["count"] if r["count"] else "", f"{r['us_dollar_a_session_hour']:.2g}"] for r in d["kinds"]])}

As built, {as_built["count"]:,} cores read frames of some sixty ticks from NATS, step them and answer, where the steps alone take
{d["kinds"][0]["count"]:,} (of another model: [what it stands on](#what-it-stands-on)).

## Network and log

In blocks of 64 a tick is {d["bytes"]["step"]:,} bytes with picture and two voices in float16 and no words, an answer {d["bytes"]["pred"]:,}, a state
{d["bytes"]["state"]:,}.

{_table(["", "a second"], [["ticks", log["ticks_per_s"]], ["into the log, GB", log["in_gb_per_s"]], ["answers, which are not logged, GB", log["out_gb_per_s"]], ["written, three copies, GB", log["written_gb_per_s"]], ["kept for two minutes, TB", log["kept_tb"]], ["cores of NATS for three copies", log["nats_cores"]]])}

## Partitions

A session's partition is a hash of its name, and a partition has one engine, so there are never more engines than partitions.

{_table(["partitions", "engines", "sessions each", "the fullest over the mean"], [[r["partitions"], r["engines"], r["sessions_each"], r["fullest_over_mean"]] for r in d["partitions"]])}

## Snapshots against the loss window

No tick is lost whatever the interval, for the log has them; what grows is what is stepped again after a death. The last column is
of engines filled to 70 %, whose sessions are dealt out to nineteen others.

{_table(["every so many ticks", "window, s", "states a second", "written, GB/s", "over the log's bytes", "stepped again, s"], [[r["every"], r["window_s"], r["states_per_s"], r["written_gb_per_s"], r["share_of_the_log"], r["stepped_again_s"]] for r in d["snapshots"]])}

## A rack dies

One rack of twenty, all its engines at once; the others find out after {GIVEN["found_s"].value:g} s, take its sessions in even
shares, fetch their states and step again what came since, with what their own sessions leave them. How long is a session without
an answer?

{_table(["load before", "sessions an engine", "moved", "p50, s", "p99, s", "worst, s"], [[r["load"], r["sessions_each"], r["moved"], r["gap_p50_s"], r["gap_p99_s"], r["gap_worst_s"]] for r in d["racks"]])}

Engines at half their load or less keep the worst gap at {worst:g} s. The model is of twenty racks of ten engines; what counts is
the share that dies and the load, not how many there are. Measured with three engines and 256 sessions: [Cluster](reliability.md#cluster).

![Gap after a rack has died, and what snapshots cost](scale.png)

## Where the design bends, and what would replace it

| what | bends at | what would replace it |
| --- | --- | --- |
| {bent["partitions"]:,} partitions | {bent["engines"]:,} engines, the fullest {bent["fullest_over_mean"]:g} of the mean | more of them: `cluster.partitions = 8192` keeps a thousand engines even, in a new cluster |
| frames in Python at both ends | {as_built["each"]:,} sessions a core, {d["kinds"][0]["each"]:,} without | a reader in C; ticks of several gateways are stepped together already |
| 64 lanes | more engines than lanes: each reads ticks of others, too | as many lanes as engines; a gateway may use any number |
| one log for all | {_n(log["nats_cores"])} cores of NATS; {_n(log["written_gb_per_s"])} GB/s written | a stream for each partition, so that servers share them; features as float16, or encoded at the engine's side |
| states at every 25th tick | {_n(d["snapshots"][2]["states_per_s"])} a second, in pieces of up to 64 partitions | every 100th tick: {d["snapshots"][3]["stepped_again_s"]:g} s to step again |
| one table of leases | every engine gets every change: a thousand copies of some 100 kB when one engine dies | a table for each group of partitions |
| one site | a rack is survived, a site is not | a cluster a region, sessions opened in the nearest; states mirrored if they must outlive it |
| `StepEngine.step` on a GPU | {GIVEN["gpu_engine"].value:,.0f} of {GIVEN["gpu_rows"].value:,.0f} sessions | columns instead of objects for each tick: the rows are there already |

## What it stands on

{_table(["figure", "value", "from"], [[g.what, f"{g.value:,g}", g.source] for g in GIVEN.values()])}
"""


def plot(d: dict[str, Any], path: Path) -> None:
    """Two panels: gaps by load, and bytes and time by the interval of snapshots."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    loads = [row["load"] for row in d["racks"]]
    for key, label in (("gap_p50_s", "p50"), ("gap_p99_s", "p99"), ("gap_worst_s", "worst")):
        left.plot(loads, [row[key] for row in d["racks"]], marker="o", label=label)
    left.axhline(1.0, color="grey", linewidth=0.8)
    left.set(xlabel="load of engines before", ylabel="s without an answer", yscale="log", title="a rack of twenty dies")
    left.legend()
    every = [row["every"] for row in d["snapshots"]]
    right.plot(every, [row["written_gb_per_s"] for row in d["snapshots"]], marker="o", label="written, GB/s")
    right.plot(every, [row["stepped_again_s"] for row in d["snapshots"]], marker="o", label="stepped again, s")
    right.set(xlabel="ticks from one snapshot to the next", xscale="log", yscale="log", title="snapshots")
    right.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
