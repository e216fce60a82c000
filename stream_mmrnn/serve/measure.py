"""Measures the steps of an engine with dummy sessions, before it has clients."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stream_mmrnn.core.errors import SessionError
from stream_mmrnn.core.types import Stamps, Tick
from stream_mmrnn.serve.admission import LEAST, Admission

if TYPE_CHECKING:
    from stream_mmrnn.predict.protocols import Engine

_ROUNDS, _LIMIT_NS = 16, 1_000_000_000
"""Rounds over all counts; it stops earlier after so long."""
_COUNTS = (1, 2, 4, 8, 16, 32, 64)
"""Ticks in a step."""


def measure(engine: Engine, admission: Admission) -> None:
    """Step dummy sessions in batches of several sizes, and settle the cost of steps; leaves all slots free."""
    names = _opened(engine)
    features = {m.name: np.zeros(m.size, np.float32) for m in engine.spec.modalities}
    present, age_ns = dict.fromkeys(features, True), dict.fromkeys(features, 0)
    stamps = Stamps(0, 0, 0, 0, "")
    ticks = [Tick(name, 0, 0, features, present, age_ns, stamps) for name in names]
    counts = sorted({min(n, len(ticks)) for n in _COUNTS} - {0})
    spent_ns = measured = 0
    try:
        for round_ in range(_ROUNDS + 1):
            for count in counts:
                predictions = engine.step(ticks[:count])
                took_ns = predictions[-1].step_end_ns - predictions[0].step_start_ns
                spent_ns += took_ns
                if round_:  # the first steps also allocate memory
                    admission.add(count, took_ns)
                    measured += 1
            if measured >= LEAST and spent_ns > _LIMIT_NS:
                break
        admission.settle()
    finally:
        for name in names:
            engine.close(name)


def _opened(engine: Engine) -> list[str]:
    """As many dummy sessions as there are slots, up to the largest count."""
    names: list[str] = []
    try:
        for i in range(max(_COUNTS)):
            engine.open(name := f"\0measured {i}")
            names.append(name)
    except SessionError:
        pass
    return names
