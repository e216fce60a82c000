"""Readers that stop: does the engine notice, does memory grow, what do they get on their return, and who counts it?

A live session on the synthetic source, with its page and readers of each policy as processes of their own; all of them
are stopped by SIGSTOP at once and let go on again. A reader that never stops says what there was.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stream_mmrnn.core import config, topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.settings import Policy
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.live.session import LiveSession, for_its_model
from tools.faults.listener import Listener
from tools.faults.promise import Figure, Say

TITLE = "Slow consumers"
NOT_PROMISED = (
    (
        "A reader that stops does not get what was sent meanwhile: the broker keeps at most bus.view_queue, "
        "bus.bulk_queue or bus.queue messages for it and drops the newest beyond; the reader counts every one."
    ),
    (
        "The queue of a reader of pictures is bounded in messages, not in bytes: it may take their number times the "
        "size of a picture (of all messages about one in ten is a picture)."
    ),
)
_POLICIES: tuple[Policy, ...] = ("latest", "drop_oldest", "block")
_SETTLE_S = 2.0


def _rss_mb(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class _Run:
    """The session, and what is done to its readers: `quiet` seconds, `stopped` seconds, `quiet` seconds."""

    def __init__(self, stopped_s: float, quiet_s: float) -> None:
        self.settings = config.load(
            None,
            {
                **{f"sources.{m}": "synthetic" for m in ("vision", "audio", "text", "other_audio", "other_text")},
                "session.name": "consumers",
            },
        )
        self.notes: list[str] = []
        self._stopped_s, self._quiet_s = stopped_s, quiet_s
        self.session = LiveSession(
            for_its_model(self.settings), True, lambda: True, self.notes.append, self._see, self._often
        )
        self._stage = 0
        self._next_ns = 0
        self.latency_ns: dict[bool, list[int]] = {False: [], True: []}
        """From the sample that closes a tick to the prediction sent, while readers run and while they stand."""
        self.stood = (2**63, 2**63)
        """When the readers were stopped, and let go on."""
        self._before_mb: dict[str, float] = {}
        self.grown_mb: dict[str, float] = defaultdict(float)
        address, bus = self.session.supervisor.address, self.settings.bus
        queues = {"latest": bus.view_queue, "drop_oldest": bus.view_queue, "block": bus.bulk_queue}
        self.witness = Listener(address, "block", bus.queue)
        self.readers = [Listener(address, policy, queues[policy]) for policy in _POLICIES]

    def run(self) -> dict[str, Any]:
        try:
            return self.session.run(_SETTLE_S + 2 * self._quiet_s + self._stopped_s)
        finally:
            self._signal(signal.SIGCONT)

    def _pids(self) -> dict[str, int]:
        nodes = {n.name: n.process for n in self.session.supervisor.nodes}
        pids = {f"reader {r.policy}": r.pid for r in self.readers}
        return pids | {n: p.pid or 0 for n in ("broker", "dashboard") if (p := nodes[n]) is not None}

    def _signal(self, number: int) -> None:
        for name, pid in self._pids().items():
            if name != "broker":
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def _often(self) -> None:
        opened_ns = self.session.supervisor.opened_ns
        seconds = (now_ns() - opened_ns) / 1e9 if opened_ns else 0.0
        if self._stage == 0 and seconds >= _SETTLE_S + self._quiet_s:
            self._before_mb = {name: _rss_mb(pid) for name, pid in self._pids().items()}
            self._signal(signal.SIGSTOP)
            self.stood = (now_ns(), 2**63)
            self._stage = 1
        elif self._stage == 1:
            for name, pid in self._pids().items():
                self.grown_mb[name] = max(self.grown_mb[name], _rss_mb(pid) - self._before_mb[name])
            if now_ns() - self.stood[0] >= self._stopped_s * 1e9:
                self.stood = (self.stood[0], now_ns())
                self._signal(signal.SIGCONT)
                self._stage = 2
        elif self._stage == 2 and now_ns() - self.stood[1] < 1_000_000_000:
            # what was kept for them is sent now: that is part of the price
            for name, pid in self._pids().items():
                self.grown_mb[name] = max(self.grown_mb[name], _rss_mb(pid) - self._before_mb[name])

    def _see(self, envelope: Envelope) -> None:
        opened_ns = self.session.supervisor.opened_ns
        if envelope.topic != topics.PREDICTION or envelope.publish_ns < opened_ns + _SETTLE_S * 1e9 or not opened_ns:
            return
        with contextlib.suppress(WireError):
            p = wire.unpack(envelope.payload, wire.PredictionMessage)
            if p.closed.by.startswith(topics.FEATURE):
                stood = self.stood[0] <= envelope.publish_ns < self.stood[1]
                self.latency_ns[stood].append(envelope.publish_ns - p.closed.event_ns)

    def kill(self) -> None:
        for reader in (self.witness, *self.readers):
            if reader.process.poll() is None:
                reader.kill()


def _streams(got: list[list[Any]]) -> dict[str, dict[str, set[int]]]:
    """Numbers by topic and session."""
    found: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for topic, session, seq, _, _ in got:
        found[topic][session].add(seq)
    return found


def _uncounted(reader: dict[str, Any], witness: dict[str, Any]) -> tuple[int, dict[str, int]]:
    """Messages that the reader missed, by the witness; and by how many its own counts are off, by topic."""
    there, had = _streams(witness["got"]), _streams(reader["got"])
    true: Counter[str] = Counter()
    before: Counter[str] = Counter()
    for topic, session, first, newest in reader["came"]:
        name, seqs = topics.counted_as(topic), had[topic][session]
        heard = there[topic][session]
        # a reader may have been heard of before the witness was: nothing is numbered that was not sent
        heard |= set(range(first, min(heard, default=newest + 1)))
        true[name] += sum(first <= seq <= newest and seq not in seqs for seq in heard)
        # a session's streams begin with it: what was sent before the reader was heard of is counted as lost
        before[name] += first if session != topics.EVERYONE else 0
    said = {n: c["produced"] - c["delivered"] - c["waiting"] - before[n] for n, c in reader["tally"].items()}
    return true.total(), {name: said[name] - true[name] for name in said if said[name] != true[name]}


def _wrong_sums(reader: dict[str, Any]) -> int:
    """Topics of which produced = delivered + waiting + dropped is not so, or not what was handed out."""
    handed: dict[str, int] = defaultdict(int)
    for topic, *_ in reader["got"]:
        handed[topics.counted_as(topic)] += 1
    wrong = 0
    for topic, counts in reader["tally"].items():
        parts = sum(n for name, n in counts.items() if name != "produced")
        wrong += counts["produced"] != parts or counts["delivered"] != handed[topic]
    return wrong


def _first_age_ms(reader: dict[str, Any], returned_ns: int) -> float:
    """Of the first message it was given after it was let go on."""
    ages = (age_ns for _, _, _, read_ns, age_ns in reader["got"] if read_ns >= returned_ns)
    return float(next(ages)) / 1e6


def run(quick: bool, say: Say) -> Iterator[Figure]:
    stopped_s, quiet_s = (3.0, 2.0) if quick else (30.0, 15.0)
    what = f"the page and a reader of each policy, stopped for {stopped_s:g} s"
    say(f"a session with {what}")
    tried = _Run(stopped_s, quiet_s)
    try:
        summary = tried.run()
        witness, *readers = [r.finish() for r in (tried.witness, *tried.readers)]
    finally:
        tried.kill()
    for note in tried.notes:
        say(note)
    p99 = {stood: float(np.percentile(of, 99)) if of else float("nan") for stood, of in tried.latency_ns.items()}
    say(f"p99 {p99[False] / 1e6:.2f} ms while they run ({len(tried.latency_ns[False])} predictions),")
    say(f"{p99[True] / 1e6:.2f} ms while they stand ({len(tried.latency_ns[True])})")
    say(f"grown, MB: { {name: round(mb, 1) for name, mb in tried.grown_mb.items()} }")
    yield Figure(
        "consumers_engine_p99_ratio",
        f"sample to prediction sent, p99: {what}, over the same session with them running",
        p99[True] / p99[False],
        "",
        1.1,
        timed=True,
    )
    engine_lost = sum(s["dropped"].get("lost", 0) for s in summary["streams"].values())
    yield Figure("consumers_engine_lost_messages", f"{what}; features the engine missed", engine_lost, "", 0, "==")
    yield Figure(
        "consumers_broker_growth_mb", f"{what}; resident memory of the broker", tried.grown_mb["broker"], "MB", 20
    )
    stood = max(mb for name, mb in tried.grown_mb.items() if name != "broker")
    yield Figure("consumers_stopped_growth_mb", f"{what}; of the stopped process that grew most", stood, "MB", 20)
    missed, off = zip(*(_uncounted(r, witness) for r in readers), strict=True)
    lines = ", ".join(f"{r.policy} {n}" for r, n in zip(tried.readers, missed, strict=True))
    for r, of in zip(tried.readers, off, strict=True):
        if of:
            say(f"{r.policy}: counted more than it missed, or less: {of}")
    yield Figure(
        "consumers_gap_wrong_messages",
        f"missed as a reader that never stopped saw it ({lines}), against what each counted, per stream",
        sum(abs(n) for of in off for n in of.values()),
        "messages",
        0,
        "==",
    )
    sums = sum(map(_wrong_sums, readers)) + sum(not v["balanced"] for v in summary["viewers"].values())
    yield Figure(
        "consumers_sums_wrong_streams",
        "produced = delivered + waiting + dropped by reason, each policy and the page",
        sums,
        "streams",
        0,
        "==",
    )
    ages = {r.policy: _first_age_ms(found, tried.stood[1]) for r, found in zip(tried.readers, readers, strict=True)}
    say(f"age of the first message on return, ms: {ages}")
    yield Figure(
        "consumers_first_age_ms",
        "the first message that `latest` and `drop_oldest` give on their return, since it was sent",
        max(ages["latest"], ages["drop_oldest"]),
        "ms",
        250,
        timed=True,
    )
    page_said = any("dashboard: was away" in note for note in tried.notes)
    unsaid = sum(not found["said"] for found in readers[:2]) + (not page_said)
    yield Figure(
        "consumers_absences_unsaid", "the page and both viewers: no sentence on what it missed", unsaid, "", 0, "=="
    )
