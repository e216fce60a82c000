"""Groups of sessions that are stepped by blocks: each session as if alone, whatever comes between."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from serving import alone, running, settings_for, tick

from stream_mmrnn import Client
from stream_mmrnn.core.types import Tick
from stream_mmrnn.serve.server import Server


@pytest.fixture
def server(toy: Path, tmp_path: Path) -> Iterator[Server]:
    with running(settings_for(toy, tmp_path, slots=80)) as found:
        yield found


def columns(ticks: list[Tick]) -> dict[str, dict[str, object]]:
    """What `Group.send` takes for these ticks."""
    names = list(ticks[0].features)
    present = {m: np.array([t.present[m] for t in ticks]) for m in names}
    features = {m: np.array([t.features[m] for t in ticks if t.present[m]]) for m in names if present[m].any()}
    return {
        "features": features,
        "present": {m: present[m] for m in features},
        "age_ns": np.array([[t.age_ns[m] for m in names] for t in ticks]),
        "event_ns": np.array([t.event_ns for t in ticks]),
    }


def test_each_session_of_a_group_is_as_if_alone(server: Server, toy: Path) -> None:
    names = [f"s{i}" for i in range(70)]
    ticks = {name: [tick(name, k, 100 * n + k) for k in range(6)] for n, name in enumerate(names)}
    got: list[list[bytes]] = [[] for _ in names]
    with Client(server.address) as client, client.group(names) as group:
        for k in range(6):
            answer = group.step(**columns([ticks[name][k] for name in names]))
            assert answer.stepped.all()
            assert answer.ticks.tolist() == [k] * len(names)
            for row, heads in enumerate(answer.heads["next"]):
                got[row].append(heads.tobytes())
        assert group.flush().tolist() == [6] * len(names)
    for name, mine in zip(names, got, strict=True):
        assert mine == alone(toy, ticks[name])
