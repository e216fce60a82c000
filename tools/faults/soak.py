"""Soak: hours of sessions in a minute, and whether anything grows (`tools.soak` does the running)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from tools.faults.promise import Figure, Say
from tools.soak.run import after_warm_up, hour_slope, least, medians, soak, step_slope

TITLE = "Soak"
NOT_PROMISED = (
    (
        "That memory is flat from the first second: buffers and the allocator's pages fill for a while, and a reader "
        "that fell behind once keeps what it took. Growth is measured after a warm-up, of what is held at least."
    ),
    "A soak of days has not been run; ten minutes at twenty times real time are 3.3 hours.",
)


def figures(seconds: float, speed: float, say: Say, quick: bool = False, warm_up_s: float = 30.0) -> Iterator[Figure]:
    """`seconds` are looked at after `warm_up_s` that are not."""
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        found = soak(warm_up_s + seconds, speed, Path(name), say)
    held = after_warm_up(found, warm_up_s)
    asked, speed = speed, found.speed
    hours = found.seconds * speed / 3600
    of = f"{seconds:.0f} s at {speed:.3g} times real time, after {warm_up_s:.0f} s"
    slopes = {n: hour_slope(least([(s.at_s, s.uss_mb) for s in samples]), speed) for n, samples in held.items()}
    say(", ".join(f"{n} {slope:+.3f} MB/h" for n, slope in slopes.items()))
    say(f"{hours:.2f} h, {found.predictions} predictions, {found.sessions} sessions came and went")
    # a machine that stands still for a moment fills queues, whose memory stays: a step that comes once
    yield Figure(
        "soak_memory_mb_per_h",
        f"growth of {', '.join(held)} together per hour of event time (USS), steps and all, {of}",
        sum(slopes.values()),
        "MB",
        1.0,
        timed=True,
    )
    steady = {n: step_slope([(s.at_s, s.uss_mb) for s in samples], speed) for n, samples in held.items()}
    say("between one look and the next: " + ", ".join(f"{n} {slope:+.3f} MB/h" for n, slope in steady.items()))
    # in seconds there is more of the allocator's noise than of an hour's growth
    yield Figure(
        "soak_steady_mb_per_h",
        "the same without steps: what the middle one of the twelfths of the time grew by",
        sum(steady.values()),
        "MB",
        1.0,
        timed=quick,
    )
    yield Figure(
        "soak_files_count",
        "open files more at the end than after the warm-up, of all processes",
        sum(_grown([s.fds for s in samples]) for samples in held.values()),
        "",
        0,
    )
    yield Figure(
        "soak_threads_count",
        "threads more at the end than after the warm-up, of all processes",
        sum(_grown([s.threads for s in samples]) for samples in held.values()),
        "",
        0,
    )
    inside = [(at, ms) for at, ms in found.latencies_ms if at >= warm_up_s]
    yield Figure(
        "soak_latency_ms_per_h",
        "growth per hour of event time of the median from the message that closed a tick to its prediction",
        hour_slope(medians(inside, found.seconds), speed),
        "ms",
        1.0,
        timed=True,
    )
    yield Figure(
        "soak_lost_messages",
        "lost, late, refused or garbage at publisher, engine, recorder and reader: "
        + (", ".join(f"{k} {v}" for k, v in found.lost.items() if v) or "none"),
        sum(abs(v) for v in found.lost.values()),
        "messages",
        0,
        "==",
    )
    yield Figure(
        "soak_missing_ticks", "ticks of the long session without a prediction", found.missing, "ticks", 0, "=="
    )
    # a slow machine does not follow at any speed: then the hours take longer, and nothing else is different
    yield Figure(
        "soak_speed",
        f"times real time, over {hours:.2f} hours of event time with {found.sessions} sessions opened and closed",
        speed,
        "",
        0.98 * asked,
        ">=",
        timed=True,
    )
    yield Figure("soak_sessions_count", "sessions that came and went", found.sessions, "sessions", 1, ">=")


def _grown(counts: list[int]) -> int:
    """How much more the last quarter held at least than the first at most; 0 for what comes and goes."""
    part = max(1, len(counts) // 4)
    return max(0, min(counts[-part:]) - max(counts[:part]))


def run(quick: bool, say: Say) -> Iterator[Figure]:
    # what is bounded by a number of sessions that have ended is full after some 0.4 h of event time
    yield from figures(12.0 if quick else 150.0, 20.0, say, quick, 8.0 if quick else 90.0)
