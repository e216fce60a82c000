"""The numbers of a prediction, with names: what outlets, plots and tables have for columns.

Knows nothing about where predictions come from.
"""

from __future__ import annotations

import json

import msgspec

from stream_mmrnn.bus.subscription import model_of
from stream_mmrnn.core import wire
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.types import HeadSpec
from stream_mmrnn.recording.mcap_file import Recording


class Column(msgspec.Struct, frozen=True):
    """One number of a prediction."""

    head: str
    index: int
    label: str
    """`HEAD.LABEL`, as no other column has it."""
    kind: str = ""
    unit: str = ""
    horizon_s: tuple[float, float] | None = None


def columns(heads: tuple[HeadSpec, ...]) -> list[Column]:
    """The numbers of all heads, one after the other."""
    found: list[Column] = []
    for head in heads:
        whole = len(set(head.labels)) == head.size
        for i in range(head.size):
            label = head.labels[i] if whole else str(i)
            horizon_s = head.horizons_s[i] if i < len(head.horizons_s) else None
            found.append(Column(head.name, i, f"{head.name}.{label}", head.kind, head.unit, horizon_s))
    return found


def columns_of(recording: Recording, first: wire.PredictionMessage | None) -> list[Column]:
    """Those of a recording that was read to its end; `first` is its first prediction.

    The names are those that the engine gave at the end, where the file has an end, and numbers otherwise.
    """
    if first is None:
        return []
    sizes = {name: len(values) for name, values in first.heads.items()}
    try:
        engine = json.loads((recording.end or recording.so_far)["statuses"])["status/engine"]
        heads = model_of(engine["detail"]["spec"]).heads
        if {h.name: h.size for h in heads} == sizes:
            return columns(heads)
    except (KeyError, TypeError, ValueError, RecursionError, WireError):
        pass  # the predictions themselves say what there is
    return columns(tuple(HeadSpec(name, "", size) for name, size in sizes.items()))
