"""Named columns for the numbers of a prediction, used by outlets, plots and tables."""

from __future__ import annotations

import json

import msgspec

from stream_mmrnn.bus.prediction_reader import model_of
from stream_mmrnn.core import wire
from stream_mmrnn.core.errors import WireError
from stream_mmrnn.core.types import HeadSpec
from stream_mmrnn.recording.mcap_file import Recording


class Column(msgspec.Struct, frozen=True):
    """One number of a prediction."""

    head: str
    index: int
    label: str
    """`HEAD.LABEL`, unique."""
    kind: str = ""
    unit: str = ""
    horizon_s: tuple[float, float] | None = None


def columns(heads: tuple[HeadSpec, ...]) -> list[Column]:
    """A column for each number of each head, in order."""
    found: list[Column] = []
    for head in heads:
        has_labels = len(set(head.labels)) == head.size
        for i in range(head.size):
            label = head.labels[i] if has_labels else str(i)
            horizon_s = head.horizons_s[i] if i < len(head.horizons_s) else None
            found.append(Column(head.name, i, f"{head.name}.{label}", head.kind, head.unit, horizon_s))
    return found


def columns_of(recording: Recording, first: wire.PredictionMessage | None) -> list[Column]:
    """The columns of a recording that was read to its end; `first` is its first prediction.

    The names are from the engine's last status, or numbers if the file does not have it.
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
        pass  # use the sizes in the prediction
    return columns(tuple(HeadSpec(name, "", size) for name, size in sizes.items()))
