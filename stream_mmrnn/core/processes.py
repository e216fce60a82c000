"""The table of a session's processes: what each is called, what it runs, when, and what happens without it.

The supervisor starts from it, the metrics and the page read it; no other module lists process names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import msgspec

from stream_mmrnn.core.errors import ConfigError
from stream_mmrnn.core.settings import Settings
from stream_mmrnn.core.stream_table import stream_table
from stream_mmrnn.core.streams import Stream

_NODES = "stream_mmrnn.live.nodes."


class ProcessSpec(msgspec.Struct, frozen=True):
    """One row. Vital for `session`: if it fails, the session ends. Vital for `recording`: if it fails, recording stops;
    the session ends only if it has no engine.
    """

    name: str
    target: str
    """`module:class` of the node; the class takes a `Context`."""
    runs: Callable[[Settings, bool], bool]
    """Whether a session has this process; the arguments are the settings and whether it has an engine."""
    vital: Literal["session", "recording", "no"] = "no"
    priority: Literal["latency", "background"] = "latency"
    """`latency`: predictions wait for it, so it gets `supervisor.priority`."""
    viewer: bool = False
    """A read-only consumer: when it is slow, it drops the oldest messages and slows no other process."""
    stream: str = ""
    """The stream that a worker captures."""


PROCESSES = (
    ProcessSpec("broker", _NODES + "infrastructure:BrokerNode", lambda s, engine: True, vital="session"),
    ProcessSpec("clock", _NODES + "infrastructure:ClockNode", lambda s, engine: True, vital="session"),
    ProcessSpec(
        "journal",
        _NODES + "infrastructure:JournalNode",
        lambda s, engine: engine and s.state.snapshot_every > 0,
        priority="background",
    ),
    ProcessSpec(
        "recorder",
        _NODES + "recorder:RecorderNode",
        lambda s, engine: bool(s.record.path),
        vital="recording",
        priority="background",
    ),
    ProcessSpec("engine", _NODES + "engine:EngineNode", lambda s, engine: engine, vital="session"),
    ProcessSpec(
        "dashboard",
        _NODES + "viewers:DashboardNode",
        lambda s, engine: s.dashboard.enabled,
        priority="background",
        viewer=True,
    ),
    ProcessSpec(
        "tracer",
        _NODES + "viewers:TracerNode",
        lambda s, engine: engine and s.trace.ratio > 0,
        priority="background",
        viewer=True,
    ),
    ProcessSpec(
        "foxglove",
        _NODES + "viewers:FoxgloveNode",
        lambda s, engine: s.foxglove.enabled,
        priority="background",
        viewer=True,
    ),
    ProcessSpec(
        "lsl",
        _NODES + "viewers:LslNode",
        lambda s, engine: engine and s.lsl.outlet,
        priority="background",
        viewer=True,
    ),
)
"""All processes except the workers, in start order."""

_WORKER_NAMES = {"vision": "camera", "audio": "microphone"}
"""Names of workers that differ from their stream's name."""
_BY_NAME = {p.name: p for p in PROCESSES}


def worker(stream: str) -> ProcessSpec:
    """The row of the worker that captures a stream."""
    name = _WORKER_NAMES.get(stream, stream)
    return ProcessSpec(name, _NODES + "worker:WorkerNode", lambda s, engine: True, stream=stream)


def captured(settings: Settings) -> dict[str, Stream]:
    """The streams of a session that have a source, by name.

    Raises:
        ConfigError: one has the name of another process.

    """
    found = {name: stream for name, stream in stream_table(settings).items() if stream.source != "none"}
    for name in found:
        if name in _BY_NAME or name == "supervisor" or (name in _WORKER_NAMES.values()):
            raise ConfigError(f"`streams.{name}`: a process of the session has this name; give the stream another")
    return found


def table(settings: Settings, with_engine: bool) -> Iterator[ProcessSpec]:
    """The processes of a session, in start order; workers come last."""
    yield from (p for p in PROCESSES if p.runs(settings, with_engine))
    for name in captured(settings):
        yield worker(name)


def by_name(name: str) -> ProcessSpec:
    """The row of a process that is not a worker."""
    return _BY_NAME[name]


def in_background(name: str) -> bool:
    """Whether a process has background priority."""
    return name in _BY_NAME and _BY_NAME[name].priority == "background"


def is_viewer(name: str) -> bool:
    return name in _BY_NAME and _BY_NAME[name].viewer


VITAL = tuple(p.name for p in PROCESSES if p.vital != "no")
"""Processes that a session needs to predict or to record; readiness checks them."""
