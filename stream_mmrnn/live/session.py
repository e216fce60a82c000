"""A live session from start to summary: the loop around the supervisor that the verbs `live` and `record` share."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

from stream_mmrnn.core import config, processes, topics, wire
from stream_mmrnn.core.clock import now_ns
from stream_mmrnn.core.dedup import TickDeduplicator
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.latency import StageTable, stages
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.stream_table import for_model, stream_table
from stream_mmrnn.core.types import Envelope
from stream_mmrnn.live.managed_process import ManagedProcess
from stream_mmrnn.live.supervisor import Supervisor

_CHECK_NS = 50_000_000
_LOOK_S = 0.05


def for_its_model(settings: Settings) -> Settings:
    """The settings with the encoders that their own model asks for; raises ModelError if it does not load."""
    from stream_mmrnn.predict.engine import check_model

    spec = check_model(config.find_model(settings.engine.model), settings.engine.provider)
    return for_model(settings, spec.modalities)


class LiveSession:
    """One run of live capture; `run` returns its summary."""

    def __init__(
        self,
        settings: Settings,
        with_engine: bool,
        alive: Callable[[], bool],
        say: Callable[[str], None],
        observe: Callable[[Envelope], None] = lambda _: None,
        often: Callable[[], None] = lambda: None,
        watch: Collection[str] = (),
    ) -> None:
        """`settings` name the encoders that the model takes, as after `for_its_model`. `observe` gets every message
        that the supervisor receives: status, predictions and the topics of `watch`. `often` is called about twenty
        times a second.
        """
        self.settings = settings
        self.supervisor = Supervisor(settings, with_engine, say, watch)
        self._alive, self._observe_too, self._often = alive, observe, often
        self._latency = StageTable()
        self._deduplicator = TickDeduplicator()

    @property
    def page(self) -> str:
        """The address of the live page, once its process has said it; "" until then, and where there is none."""
        status = next((n.status for n in self.supervisor.nodes if n.name == "dashboard" and n.status), None)
        return str(status.detail.get("address", "")) if status else ""

    def run(self, duration_s: float | None) -> dict[str, Any]:
        """Start, go on for `duration_s` (None: until told, or until every source has ended), stop, sum up.

        A session that cannot go on, because a process that it needs died too often, is stopped and summed up like any
        other; `failed` in the summary says why.
        """
        supervisor = self.supervisor
        began_ns = now_ns()
        try:
            supervisor.start(self._alive)
            end_ns = None if duration_s is None else supervisor.opened_ns + int(duration_s * 1e9)
            next_ns = drained_ns = 0
            while self._alive() and (end_ns is None or now_ns() < end_ns):
                # polling, so that predictions wake the processes that wait for them and not this one
                time.sleep(_LOOK_S)
                for envelope in supervisor.messages(0):
                    self._observe(envelope)
                if now_ns() >= next_ns:
                    next_ns = now_ns() + _CHECK_NS
                    supervisor.check()
                    self._often()
                if supervisor.failed or supervisor.requests.asked_to_end:
                    break
                if supervisor.sources_done:
                    # what the sources sent last still has to become a tick
                    drained_ns = drained_ns or now_ns() + 300_000_000
                    if now_ns() >= drained_ns:
                        break
        finally:
            supervisor.stop(self._observe)
        return self._summary(began_ns)

    def _observe(self, envelope: Envelope) -> None:
        self._observe_too(envelope)
        if envelope.topic != topics.PREDICTION:
            return
        try:
            p = wire.unpack(envelope.payload, wire.PredictionMessage)
        except WireError:
            return
        if not self._deduplicator.first(envelope.session, p.tick):
            return
        self._latency.add(stages(p.event_ns, p.closed, p.step_start_ns, p.step_end_ns, envelope.publish_ns))

    def _summary(self, began_ns: int) -> dict[str, Any]:
        supervisor = self.supervisor
        running = {n.name: n for n in supervisor.nodes}
        engine = running["engine"].status if "engine" in running else None
        detail = engine.detail if engine else {}
        aligned = _table(detail, "streams")
        rows = {name: row for name, row in aligned.items() if isinstance(row, dict)}
        by_features = {row.get("features", name): _counts(row) for name, row in rows.items()}
        table = stream_table(self.settings)
        streams = {
            features: stream_summary(n, by_features.get(features), table[n.stream].counted_as(features))
            for n in supervisor.nodes
            if n.is_source
            for features in table[n.stream].features()
        }
        for name, why in _table(detail, "misfits").items():
            features = rows.get(name, {}).get("features", name)
            if features in streams and not streams[features]["reason"]:
                streams[features]["reason"] = f"quarantined, {why}"
        spec = _table(detail, "spec")
        recorder = running["recorder"].status if "recorder" in running else None
        first_ns = supervisor.first_prediction_ns
        said = {name: node.status for name, node in running.items() if node.status is not None}
        return {
            "session": self.settings.session.name,
            "seconds": round((supervisor.closed_ns - supervisor.opened_ns) / 1e9, 3),
            "ticks": engine.counts.get("ticks", 0) if engine else None,
            "predictions": engine.counts.get("predictions", 0) if engine else None,
            "first_prediction_s": round((first_ns - began_ns) / 1e9, 3) if first_ns else None,
            "model": {k: spec.get(k, "") for k in ("name", "sha256", "provider")} if engine else None,
            "streams": streams,
            "balanced": all(s["balanced"] for s in streams.values()),
            "latency_ms": self._latency.table(),
            "recording": {
                "path": recorder.detail.get("path", ""),
                "messages": recorder.counts.get("messages", 0),
                "bytes": recorder.counts.get("bytes", 0),
                "lost": recorder.counts.get("lost", 0),
                "dropped": recorder.counts.get("dropped", 0),
                "finished": recorder.detail.get("finished") is True,
            }
            if recorder
            else None,
            "partial": [*_cut_short(streams), *_incomplete(running.get("recorder"))],
            "repeated": self._deduplicator.count,
            "viewers": {
                name: viewer_summary(status.counts) for name, status in said.items() if processes.is_viewer(name)
            },
            "denied": {name: status.detail["denied"] for name, status in said.items() if status.detail.get("denied")},
            "restarts": {n.name: n.deaths for n in supervisor.nodes if n.deaths},
            "given_up": {n.name: n.given_up for n in supervisor.nodes if n.given_up},
            "failed": supervisor.failed,
        }


def _table(detail: dict[str, Any], key: str) -> dict[str, Any]:
    """A table in a status's detail; empty where it is none: who says he is the engine need not be."""
    value = detail.get(key)
    return value if isinstance(value, dict) else {}


def _cut_short(streams: dict[str, dict[str, Any]]) -> list[str]:
    """A sentence for each stream whose file ended before its end."""
    return [
        f"{name} was done in part: {stream['reason']}"
        for name, stream in streams.items()
        if stream["source"].get("ends_early") is True
    ]


def _incomplete(node: ManagedProcess | None) -> list[str]:
    """A sentence if the recording lacks something, or has no end."""
    if node is None:
        return []
    if node.given_up and node.deaths:
        return [f"the recording is not whole: the recorder {node.given_up}"]
    recorder = node.status
    if recorder is None or "path" not in recorder.detail:
        return []  # it had not begun
    path, finished = recorder.detail["path"], recorder.detail.get("finished")
    if finished is None:  # its last status may have found no bus any more
        finished = node.process is not None and node.process.exitcode == 0
    dropped, written = recorder.counts.get("dropped", 0), recorder.counts.get("messages", 0)
    lacks = [f"lacks at least {dropped} of {dropped + written} messages"] if dropped else []
    lacks += ["has no end"] if not finished else []
    if not lacks:
        return []
    why = recorder.detail.get("refusal") or "it was too slow"
    return [f"{path} {' and '.join(lacks)}, because of the disk ({why}); make room, or record to another disk"]


def _counts(value: Any) -> dict[str, int]:
    table = value if isinstance(value, dict) else {}
    return {key: n for key, n in table.items() if isinstance(n, int)}


def viewer_summary(counts: dict[str, int]) -> dict[str, Any]:
    """What a reader that wants the newest was given of what was sent to it, in messages."""
    dropped = {reason: counts[reason] for reason in ("lost", "oldest", "superseded", "stale") if counts.get(reason)}
    produced, delivered, waiting = (counts.get(name, 0) for name in ("produced", "delivered", "waiting"))
    return {
        "produced": produced,
        "delivered": delivered,
        "waiting": waiting,
        "dropped": dropped,
        "balanced": produced == delivered + waiting + sum(dropped.values()),
    }


def stream_summary(node: ManagedProcess, aligned: dict[str, int] | None, counted: str = "published") -> dict[str, Any]:
    """Where the messages of one stream went, hop by hop.

    Unit of the first four: feature vectors. `produced` is what the worker says it sent (of a killed worker, what the
    engine saw of it), `delivered` what ticks were made of, `dropped` the rest by reason; `balanced` says whether the
    three agree. `capture` counts samples of the device on their way to the encoder, `stale` how often the device fell
    silent for twice its period, and the seconds from there until it was heard again.
    """
    status = node.status
    counts = status.counts if status else {}
    published = node.published_before[counted] + counts.get(counted, 0)
    capture = {
        "produced": counts.get("captured", 0),
        "delivered": counts.get("captured", 0) - counts.get("queue_dropped", 0) - counts.get("undecodable", 0),
        "dropped": {k: counts[k] for k in ("queue_dropped", "undecodable") if counts.get(k)},
    }
    stale = {k: n + counts.get(k, 0) for k, n in node.stale_before.items()}
    summary: dict[str, Any] = {
        "state": status.state if status else "dead",
        "reason": status.reason if status else node.given_up,
        "produced": published,
        "delivered": published,
        "dropped": {},
        "balanced": True,
        "capture": capture,
        "stale": {"count": stale["stale"], "seconds": stale["stale_ms"] / 1000},
        "source": status.detail if status else {},
    }
    if aligned is None:
        return summary
    reasons = ("lost", "late", "duplicate", "quarantined", "superseded", "unclosed", "outside")
    dropped = {r: aligned[r] for r in reasons if aligned.get(r)}
    arrived, used = aligned.get("arrived", 0) + aligned.get("lost", 0), aligned.get("used", 0)
    # a killed worker could not say how much it had sent: what the sequence numbers prove is the truth then
    said_all = not node.deaths and status is not None and status.state in ("closed", "ended")
    produced = published if said_all else max(published, arrived)
    return {
        **summary,
        "produced": produced,
        "delivered": used,
        "dropped": dropped,
        "late_joined": aligned.get("late_joined", 0),
        "balanced": produced == used + sum(dropped.values()),
    }
