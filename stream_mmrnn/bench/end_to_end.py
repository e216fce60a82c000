"""End to end: a whole live session (supervisor, workers, broker, engine) on the synthetic source, seen by a reader.

What is measured is the way of the sample that closes a tick: from its event time (an audio block's end) until a
subscriber can read the prediction, stage by stage. Knows nothing about devices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from stream_mmrnn.bench.busy import beside
from stream_mmrnn.bench.machine import Processes, Usage
from stream_mmrnn.bench.peers import BareHop
from stream_mmrnn.bench.plots import Pictures
from stream_mmrnn.bench.reader import STAGES, Reader, Seen
from stream_mmrnn.bench.report import Document, Ratio, document, ratio
from stream_mmrnn.capture import sources
from stream_mmrnn.core import config
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.errors import ProcessError
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.core.settings import EngineSettings, Settings
from stream_mmrnn.core.stream_table import for_model
from stream_mmrnn.graph.runtime import Provider
from stream_mmrnn.live.session import LiveSession
from stream_mmrnn.predict.engine import check_model

SETS: dict[str, tuple[str, ...]] = {"audio": ("audio",), "all": sources.SYNTHETIC}
"""Which modalities run beside each other."""

_AUDIO_HZ, _FEATURES_BYTES = 50.0, 324
_RESIDUAL_AT_MOST = 0.01


class Run:
    """One live session and what was seen of it."""

    def __init__(
        self, settings: Settings, duration_s: float, alive: Callable[[], bool], say: Callable[[str], None]
    ) -> None:
        self._say, self._told = say, not settings.dashboard.enabled
        self._processes: Processes | None = None
        self.usage: Usage | None = None
        self.notes: list[str] = []
        # the first second is start, not service: pages fault, caches fill, clocks settle
        warm_ns, end_ns = int(min(1.0, duration_s / 4) * 1e9), int((duration_s - min(0.1, duration_s / 8)) * 1e9)
        self.session = LiveSession(settings, True, alive, self.notes.append, often=lambda: self._often(warm_ns, end_ns))
        reader = Reader(settings, self.session.supervisor.address)
        self.summary = self.session.run(duration_s)
        seen = reader.finish()
        opened_ns = self.session.supervisor.opened_ns
        self.began_ns = opened_ns + warm_ns
        # ticks that the end of the sources closes have no deadline
        self.seen = [s for s in seen if self.began_ns <= s.event_ns <= opened_ns + int(duration_s * 1e9)]
        self.before, self.lost = reader.before, reader.lost
        self.read = len(seen)

    def _often(self, warm_ns: int, end_ns: int) -> None:
        if not self._told and (page := self.session.page):
            self._told = True
            self._say(f"dashboard: {page}")
        running_ns = now_ns() - self.session.supervisor.opened_ns if self.session.supervisor.opened_ns else 0
        if self._processes is None and running_ns >= warm_ns:
            self._processes = Processes()
        elif self._processes is not None and self.usage is None and running_ns >= end_ns:
            self.usage = self._processes.used()


def _settings(
    modalities: Sequence[str],
    model: str | None,
    provider: Provider,
    transport: str,
    priority: str,
    seed: int,
    page: bool,
) -> Settings:
    chosen = {f"sources.{m}": "synthetic" if m in modalities else "none" for m in sources.SYNTHETIC}
    return config.load(
        None,
        {
            **chosen,
            "engine.model": model,
            "engine.provider": provider,
            "bus.transport": transport,
            "supervisor.priority": priority,
            "synthetic.seed": seed,
            "session.name": "bench",
            "dashboard.enabled": page,
        },
    )


def row_of(name: str, run: Run, busy: int, tick_ns: int) -> tuple[dict[str, Any], Histogram]:
    """What a document says of one run, and the latencies from event to reader."""
    table = {stage: Histogram() for stage in ("wait", *STAGES)}
    total, owed = Histogram(), Histogram()
    for s in run.seen:
        for stage, value_ns in {"wait": s.wait_ns, **s.took}.items():
            table[stage].add(value_ns)
        total.add(s.total_ns)
        owed.add(s.owed_ns)
    # in the histograms a stamp that goes back counts as 0, so a clock or a stage that lies shows up here
    parts_ns = sum(table[stage].mean_ns for stage in STAGES)
    residual = abs(parts_ns - total.mean_ns) / total.mean_ns if total.mean_ns else 0.0
    predictions = run.summary["predictions"]
    return {
        "modalities": name,
        "busy": busy,
        "predictions": predictions,
        "read": run.read,
        "before_reader": run.before,
        "lost": run.lost,
        "late": sum(s.owed_ns > tick_ns for s in run.seen),
        "event_to_reader_ms": owed.row(),
        "stages_ms": {stage: {**h.row(), "mean": round(h.mean_ns / 1e6, 4)} for stage, h in table.items()},
        "mean_ms": round(total.mean_ns / 1e6, 4),
        "residual": round(residual, 6),
        "adds_up": residual <= _RESIDUAL_AT_MOST,
        "closed_by": dict(Counter(s.by for s in run.seen)),
        "closed_by_ms": _by_topic(run.seen),
        "balanced": run.summary["balanced"] and predictions == run.read + run.before + run.lost,
        "streams": {
            m: {k: s[k] for k in ("produced", "delivered", "dropped", "late_joined", "balanced", "capture") if k in s}
            for m, s in run.summary["streams"].items()
        },
        "restarts": run.summary["restarts"],
        **(run.usage.row() if run.usage else {"cpu": {}, "rss_mb": {}, "other_cpu": None, "busiest": ""}),
    }, owed


def _by_topic(seen: Sequence[Seen]) -> dict[str, dict[str, dict[str, float]]]:
    """For each topic that closed ticks: the whole way, and of it the transport to the engine."""
    found: dict[str, dict[str, Histogram]] = {}
    for s in seen:
        of = found.setdefault(s.by, {"total": Histogram(), "transport": Histogram()})
        of["total"].add(s.total_ns)
        of["transport"].add(s.took["transport"])
    return {by: {name: h.row() for name, h in of.items()} for by, of in found.items()}


def _ratios(rows: dict[str, dict[str, Any]], busy: int, priority: str) -> dict[str, Ratio]:
    """The promises: of the audio block's end to a readable prediction, alone and beside busy processes."""
    found: dict[str, Ratio] = {}
    suffix = (f"_busy{busy}" if busy else "") + ("" if priority == "normal" else f"_{priority}")
    for name, row in rows.items():
        prefix = "audio_to_prediction" if name == "audio" else f"{name}_to_prediction"
        times = row["event_to_reader_ms"]
        bounds: dict[str, float] = {}
        if name == "audio":
            bounds = {"p50": 0.9, "p99": 1.7} if not busy else {"p99": 6.0} if busy == 2 else {}
        for p in ("p50", "p99"):
            value = times[p] if times["count"] else None
            found[f"{prefix}_{p}{suffix}_ms"] = ratio(
                value, bounds.get(p), other_cpu=row["other_cpu"], why="no prediction was read"
            )
        if hops := row.get("bare_hops_ms"):
            for p in ("p50", "p99"):
                value = hops[p] if hops["count"] else None
                found[f"audio_bare_hops_{p}{suffix}_ms"] = ratio(value, why=hops["why"])
        found[f"{name}_stages_residual{suffix}"] = ratio(row["residual"], _RESIDUAL_AT_MOST)
    return found


def no_bare_hop(size_bytes: int, rate_hz: float, count: int) -> tuple[Histogram, str]:
    return Histogram(), "it needs a checkout, where `python -m tools.bench end-to-end` measures it"


def _bare_hops(bare_hop: BareHop, duration_s: float) -> tuple[Histogram, str]:
    """The cost of the way without our code: a sleep until the event, and two hops through ZeroMQ's own proxy."""
    return bare_hop(_FEATURES_BYTES, _AUDIO_HZ, max(25, round(duration_s * _AUDIO_HZ)))


def run(
    *,
    model: str | None = None,
    duration_s: float = 20.0,
    sets: Sequence[str] = tuple(SETS),
    busy: int = 0,
    provider: Provider = "auto",
    transport: str = "ipc",
    priority: str = "normal",
    seed: int = 0,
    page: bool = False,
    bare_hop: BareHop = no_bare_hop,
    alive: Callable[[], bool] = lambda: True,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Document, Pictures]:
    """A live session for each of `sets`, `duration_s` long, beside `busy` busy processes.

    With `page` each session serves the live page, which takes from the machine that is measured; `say` names it.
    """
    spec = check_model(config.find_model(model or EngineSettings().model), provider)
    pictures = Pictures()
    rows: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    for name in sets:
        say(f"{name}: {duration_s:g} s")
        with beside(busy):
            hops, why = _bare_hops(bare_hop, duration_s / 4) if name == "audio" else (Histogram(), "")
            chosen = _settings(SETS[name], model, provider, transport, priority, seed, page)
            done = Run(for_model(chosen, spec.modalities), duration_s, alive, say)
        if not alive():
            raise ProcessError("the bench was stopped before it had measured; nothing is reported")
        rows[name], latency = row_of(name, done, busy, spec.tick_ns)
        if name == "audio":
            rows[name]["bare_hops_ms"] = {**hops.row(), "why": why}
        notes += [f"{name}: {note}" for note in done.notes]
        pictures.histograms.setdefault("event_to_reader", {})[name] = latency
        pictures.stages[name] = [((s.event_ns - done.began_ns) / 1e9, s.took) for s in done.seen]
    settings = {
        "model": spec.name,
        "sha256": spec.sha256,
        "duration_s": duration_s,
        "busy": busy,
        "provider": provider,
        "transport": transport,
        "priority": priority,
        "seed": seed,
        "page": page,
    }
    return document("end-to-end", settings, list(rows.values()), _ratios(rows, busy, priority), notes=notes), pictures
