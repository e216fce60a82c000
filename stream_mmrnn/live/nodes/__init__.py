"""The processes of a live session: workers, engine, recorder, infrastructure and viewers."""

from stream_mmrnn.live.nodes.process import Context, Flag, Node, Reporter, create, prioritise, run, sharpen_sleep

__all__ = ["Context", "Flag", "Node", "Reporter", "create", "prioritise", "run", "sharpen_sleep"]
