"""The processes: each joins a generator to the bus, says how it is, and ends when told or when its parent is gone.

A node is a function of a `Context`; `run` is what a new process executes. Knows nothing about the order in which
nodes start or what happens when one dies: that is the supervisor's.
"""

from stream_mmrnn.live.nodes.engine import engine
from stream_mmrnn.live.nodes.infrastructure import broker, clock, journal
from stream_mmrnn.live.nodes.process import VIEWERS, Context, Reporter, prioritise, run, sharpen_sleep
from stream_mmrnn.live.nodes.recorder import recorder
from stream_mmrnn.live.nodes.viewers import dashboard, foxglove, lsl, tracer
from stream_mmrnn.live.nodes.worker import worker

__all__ = [
    "VIEWERS",
    "Context",
    "Reporter",
    "broker",
    "clock",
    "dashboard",
    "engine",
    "foxglove",
    "journal",
    "lsl",
    "prioritise",
    "recorder",
    "run",
    "sharpen_sleep",
    "tracer",
    "worker",
]
