"""The processes of a session, as their status messages describe them: state, counts, restarts, losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec

from stream_mmrnn.viewers.dashboard.heads import HeadMeaning
from stream_mmrnn.viewers.dashboard.limits import clean, ms

_SILENT_MS = 3000.0
"""A process that has sent no status for longer is called silent."""
_MISFIT_NS = 3_000_000_000
"""A stream is called quarantined so long after its last sample was."""
_RECENT_NS = 10_000_000_000
"""So long after a process came back it is said that it died."""
MISSED = "started again"
"""The reason of a death that only the new process id tells of."""
_DEAD = frozenset({"restarting", "failed"})
_MAX_NODES = 64
_MAX_COUNTS = 64
_MAX_LOSSES = 32
_MAX_JSON_BYTES = 256 * 1024
_LOST_WORDS = ("dropped", "lost", "refused", "garbage", "overflow", "rejected", "undecodable")
_LOST_REASONS = frozenset({"late", "duplicate", "quarantined", "superseded", "unclosed", "outside", "oldest", "stale"})
"""Reasons that the aligner and readers count; each is a loss."""


class _ModalityName(msgspec.Struct):
    name: str


class Spec(msgspec.Struct):
    """The model's contract, in the engine's status."""

    heads: list[HeadMeaning] = []
    modalities: list[str | _ModalityName] = []
    name: str = ""
    tick_ns: int = 0

    def modality_names(self, most: int) -> list[str]:
        return [clean(m if isinstance(m, str) else m.name) for m in self.modalities[:most]]


class _StatusDetail(msgspec.Struct):
    """What is shown of a status's detail: the model's contract, and the aligner's counts per stream."""

    spec: Spec | None = None
    streams: dict[str, Any] = {}
    source: str = ""
    misfits: dict[str, str] = {}
    path: str = ""


class _StatusPayload(msgspec.Struct):
    state: str
    pid: int = 0
    modality: str = ""
    reason: str = ""
    counts: dict[str, Any] = {}
    detail: msgspec.Raw = msgspec.Raw(b"{}")
    """Decoded separately: if it is malformed, the state is shown all the same."""


class NodeView(msgspec.Struct):
    """A process's newest status."""

    state: str
    modality: str
    reason: str
    counts: dict[str, int]
    at_ns: int
    source: str = ""
    pid: int = 0
    path: str = ""


class _Deaths(msgspec.Struct):
    count: int
    reason: str
    at_ns: int
    """Of the last one."""
    back_ns: int
    """When the process said something again after it."""


class _Misfit(msgspec.Struct):
    """Samples of a modality that the engine quarantined."""

    why: str
    count: Any
    at_ns: int
    """When the count grew last."""


_read_status = msgspec.json.Decoder(_StatusPayload)
_read_detail = msgspec.json.Decoder(_StatusDetail)
_T = TypeVar("_T")


class Nodes:
    """All processes that were seen."""

    def __init__(self) -> None:
        self.views: dict[str, NodeView] = {}
        self._deaths: dict[str, _Deaths] = {}
        self._misfits: dict[str, _Misfit] = {}
        self.recording = ""
        """The file that is written."""
        self.malformed = 0

    def observe(self, name: str, payload: Any, at_ns: int) -> Spec | None:
        """Take a status of the process `name`; the model's contract, if the status has one."""
        status = self._decode(_read_status, payload)
        if status is None:
            return None
        name = clean(name)
        if not name or (name not in self.views and len(self.views) >= _MAX_NODES):
            self.malformed += 1
            return None
        detail = self._decode(_read_detail, bytes(status.detail)) or _StatusDetail()
        counts = dict(list(_flat({**status.counts, **detail.streams}))[:_MAX_COUNTS])
        before = self.views.get(name)
        self.views[name] = view = NodeView(
            clean(status.state),
            clean(status.modality),
            clean(status.reason, 200),
            counts,
            at_ns,
            clean(detail.source),
            status.pid,
            clean(detail.path, 1024),
        )
        for modality, why in list(detail.misfits.items())[:_MAX_LOSSES]:
            row = detail.streams.get(modality)
            self._count_misfit(clean(modality), why, row.get("quarantined") if isinstance(row, dict) else None, at_ns)
        if name == "recorder" and detail.path:
            self.recording = clean(detail.path, 4096)
        if status.state in _DEAD:
            self._count_death(name, view.reason, at_ns)
        elif before is not None and before.pid and status.pid not in (0, before.pid):
            # a slow viewer may have missed the supervisor's message, but the process id is another one
            self._count_death(name, MISSED, at_ns)
        elif before is not None and before.state in _DEAD and name in self._deaths:
            self._deaths[name].back_ns = at_ns
        return detail.spec

    def _count_misfit(self, modality: str, why: str, count: Any, at_ns: int) -> None:
        before = self._misfits.get(modality)
        if before is not None and before.count == count:
            return
        if before is not None or len(self._misfits) < _MAX_LOSSES:
            self._misfits[modality] = _Misfit(clean(why, 200), count, at_ns)

    def misfit(self, modality: str, now_ns: int) -> str:
        """Why the engine does not take what a modality gives now; "" if it does."""
        found = self._misfits.get(modality)
        return found.why if found is not None and now_ns - found.at_ns <= _MISFIT_NS else ""

    def _count_death(self, name: str, reason: str, at_ns: int) -> None:
        before = self._deaths.get(name)
        self._deaths[name] = _Deaths(1 + (before.count if before else 0), reason, at_ns, at_ns)

    def _decode(self, decoder: msgspec.json.Decoder[_T], payload: Any) -> _T | None:
        """None, and counted, if the payload is malformed."""
        if isinstance(payload, bytes) and len(payload) <= _MAX_JSON_BYTES:
            try:
                return decoder.decode(payload)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                pass
        self.malformed += 1
        return None

    def recent_deaths(self, now_ns: int) -> dict[str, tuple[float, str]]:
        """Processes that came back a moment ago: how many seconds ago they died, and why."""
        return {
            name: ((now_ns - d.at_ns) / 1e9, d.reason)
            for name, d in self._deaths.items()
            if now_ns - d.back_ns <= _RECENT_NS and self.views[name].state not in _DEAD
        }

    def of_modality(self, modality: str) -> NodeView | None:
        """The worker of a modality."""
        return self.views.get(self.name_of(modality))

    def name_of(self, modality: str) -> str:
        """The name of the worker of a modality."""
        return next((name for name, n in self.views.items() if n.modality == modality), modality)

    def typing(self, stream: str) -> dict[str, Any]:
        """Whether a line typed on the page can become an event of this text stream, and if not, why: one sentence."""
        worker = self.of_modality(stream) if stream else None
        if not self.views:
            why = "nothing is known of this session yet; wait a moment"
        elif worker is None:
            why = "this session has no text source; start it with --text page to type here"
        elif worker.state in ("open", "stale"):
            why = ""
        elif worker.state in ("ended", "closed"):
            why = f"the text source {worker.source} has ended; start with --text page, which does not end"
        else:
            why = f"the text source is {worker.state}" + (f": {worker.reason}" if worker.reason else "")
        return {"possible": not why, "why": why}

    def recorder(self) -> dict[str, Any]:
        """Whether the session is being recorded, the name of its newest file, and why it is not recorded although
        somebody asked for it.
        """
        recorder = self.views.get("recorder")
        if recorder is None:
            return {"on": False, "file": "", "why": ""}
        on = recorder.state not in ("closed", "failed", "ended")
        file = recorder.path.replace("\\", "/").rpartition("/")[2]
        return {"on": on, "file": file, "why": recorder.reason if recorder.state == "failed" else ""}

    def losses(self) -> list[dict[str, Any]]:
        """What was lost, by process and reason, the largest count first."""
        rows: list[dict[str, Any]] = [
            {"node": name, "what": what, "count": count}
            for name, node in self.views.items()
            for what, count in node.counts.items()
            if count > 0 and _is_loss(what)
        ]
        rows.sort(key=lambda r: -r["count"])
        return rows[:_MAX_LOSSES]

    def snapshot(self, now_ns: int) -> dict[str, dict[str, Any]]:
        return {name: self._row(name, node, now_ns) for name, node in sorted(self.views.items())}

    def _row(self, name: str, node: NodeView, now_ns: int) -> dict[str, Any]:
        age_ms = ms(now_ns - node.at_ns)
        deaths = self._deaths.get(name)
        return {
            "state": node.state,
            "modality": node.modality,
            "reason": node.reason,
            "age_ms": age_ms,
            "silent": node.state not in ("closed", "ended", "failed") and age_ms > _SILENT_MS,
            "counts": node.counts,
            "deaths": None
            if deaths is None
            else {"count": deaths.count, "reason": deaths.reason, "age_ms": ms(now_ns - deaths.at_ns)},
        }


def _is_loss(what: str) -> bool:
    parts = what.split(".")
    return parts[-1] in _LOST_REASONS or any(word in part for part in parts for word in _LOST_WORDS)


def _flat(counts: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, int]]:
    """`{"vision": {"late": 2}}` -> `vision.late`, 2; values that are no counts are left out."""
    for key, value in counts.items():
        name = clean(f"{prefix}{key}", 80)
        if isinstance(value, dict) and not prefix.count("."):
            yield from _flat(value, name + ".")
        elif isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53:
            yield name, value
