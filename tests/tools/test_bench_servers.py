"""Servers in the bench of sessions: who is skipped and why, whether accounts add up; never how fast anything is."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stream_mmrnn.bench import models, sessions
from stream_mmrnn.core.types import Stamps, Tick
from stream_mmrnn.predict.engine import StepEngine
from tools.bench import asked, servers

pytestmark = pytest.mark.process

FAKE = """
import json, os, sys, time
from pathlib import Path
from stream_mmrnn.core.types import Stamps, Tick
from stream_mmrnn.predict.engine import StepEngine

kind, how = sys.argv[1], os.environ.get("FAKE", "")
engine = StepEngine(Path(sys.argv[2]))
engine.open("x")


def say(answer):
    print(json.dumps(answer), flush=True)


def head(features):
    import numpy as np

    x = np.array(features, np.float32)
    tick = Tick("x", 1, 0, {"signal": x}, {"signal": True}, {"signal": 0}, Stamps(0, 0, 0, 0, ""))
    return engine.step([tick])[0].heads["next"].tolist()


say({"versions": {"fake": kind}})
for line in sys.stdin:
    order = json.loads(line)
    if order["do"] == "probe":
        heads = [head(x) for x in order["features"]]
        say({"heads": heads if how != "other model" else [h[::-1] for h in heads]})
    elif how == "dies" and kind == "bind":
        sys.exit("it broke in two")
    elif how == "more":
        say({"requests": 1, "latency_ns": [1, 2], "path_ns": [1, 2]})
    else:
        calls = len(order["due_ns"]) * round((order["duration_s"] - order["settle_s"]) * 1e9 / order["tick_ns"])
        took_ns = [1_000_000] * (calls - 3) + [50_000_000]
        say({"requests": calls, "latency_ns": took_ns, "path_ns": took_ns, "errors": {"no": 2}})
"""
SMALL: dict[str, Any] = {"sessions": (2,), "duration_s": 0.2, "rounds": 2}


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write(tmp_path_factory.mktemp("models"), 16)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The script that stands for the peer; this Python runs it."""
    monkeypatch.setenv(asked.PYTHON, sys.executable)
    settle(monkeypatch)
    monkeypatch.setattr(asked, "PEER", tmp_path / "peer.py")
    (tmp_path / "peer.py").write_text(FAKE)
    return tmp_path / "peer.py"


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (asked, sessions):
        monkeypatch.setattr(module, "SETTLE_S", 0.1)


def skipped(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {r["contender"]: r["skipped"] for r in rows if "skipped" in r}


def check_nothing_measured(step: Path, reason: str) -> None:
    rows, ratios = servers.measure(step)
    assert len(rows) == 2
    assert all(reason in why for why in skipped(rows).values())
    assert skipped(rows).keys() == {"triton", "pytriton"}
    assert "triton_p50_over_ours_bus_16" in ratios
    for ratio in ratios.values():
        assert ratio["value"] is ratio["held"] is None
        assert reason in ratio["why"]


def test_without_pytriton_a_row_says_how_to_get_it(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(asked.PYTHON, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    check_nothing_measured(step, "pytriton is not installed; make an environment with nvidia-pytriton and onnxruntime")


def test_a_python_that_is_none(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(asked.PYTHON, "/no/such/python")
    check_nothing_measured(step, "STREAM_MMRNN_TRITON_PYTHON names '/no/such/python', which is no program")


def test_the_pytriton_of_this_interpreter_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(asked.PYTHON, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert asked.interpreter() == (sys.executable, "")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("import no_such_package", "it ended: ModuleNotFoundError: No module named 'no_such_package'; make an env"),
        ("", "it ended: it said nothing"),
        ("print('hello')", "it answered 'hello', which is no object of JSON"),
        ("print('[1]')", "it answered '[1]', which is no object of JSON"),
        ("print('{}'); input(); print('{}')", "its answer to a probe cannot be read: 'heads'"),
        ("print('{}'); input(); print('{\"heads\": [[1, 2]]}')", "its answer to a probe"),
    ],
)
def test_a_peer_that_does_not_start(step: Path, peer: Path, script: str, reason: str) -> None:
    peer.write_text(script)
    check_nothing_measured(step, reason)


def test_a_peer_that_serves_something_else(step: Path, peer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "other model")
    check_nothing_measured(step, "it serves something else")


def test_a_peer_that_hangs_is_ended(step: Path, peer: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(asked, "START_TIMEOUT_S", 3.0)
    monkeypatch.setattr(asked, "STOP_TIMEOUT_S", 0.2)
    peer.write_text(
        "import os, pathlib, sys, time\n"
        f"pathlib.Path({str(tmp_path)!r}, f'pid.{{os.getpid()}}').touch()\n"
        "time.sleep(600)\n"
    )
    check_nothing_measured(step, "it said nothing for 3 s")
    pids = [int(p.suffix[1:]) for p in tmp_path.glob("pid.*")]
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_every_request_is_answered_or_lost(step: Path, peer: Path) -> None:
    (*rows, bare), ratios = servers.measure(step, **SMALL)
    found = {r["contender"]: r for r in rows}
    assert found.keys() == {"ours", "ours_bus", "triton", "pytriton"}
    for row in rows:
        assert (row["what"], row["sessions"]) == ("servers", 2)
        assert row["requests"] == row["answers"] + row["lost"] > 0
        assert row["latency_ms"]["count"] == row["answers"]
        assert "other_cpu" in row
        # in our process there is no way, only the step
        assert ("path_ms" in row) == (row["contender"] != "ours")
        assert row.get("path_ms", {}).get("count", row["answers"]) == row["answers"]
    # each of two sessions calls once in each of five ticks, in each of two turns
    assert found["triton"]["requests"] == found["ours_bus"]["requests"] == 20
    assert found["ours_bus"]["lost"] == 0
    assert (found["triton"]["lost"], found["triton"]["late"], found["triton"]["errors"]) == (4, 2, {"no": 4})
    assert found["triton"]["versions"] == {"fake": "backend"}
    assert found["pytriton"]["versions"] == {"fake": "bind"}
    assert bare["contender"] == "two hops over ZeroMQ's own proxy"
    assert bare["latency_ms"]["count"] > 0
    assert {
        f"{peer}_p50_over_{own}_2" for peer in ("triton", "pytriton") for own in ("ours", "ours_bus")
    } == ratios.keys()
    assert all(r["value"] > 0 for r in ratios.values())


def test_a_peer_that_dies_leaves_the_others(step: Path, peer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "dies")
    rows, ratios = servers.measure(step, **SMALL)
    assert skipped(rows) == {"pytriton": "with 2 sessions: it ended: it broke in two"}
    assert {r["contender"] for r in rows[:-1] if "skipped" not in r} == {"ours", "ours_bus", "triton"}
    assert ratios["triton_p50_over_ours_2"]["value"] > 0
    assert "it broke in two" in ratios["pytriton_p50_over_ours_2"]["why"]


def test_more_answers_than_requests_are_not_believed(step: Path, peer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE", "more")
    rows, _ = servers.measure(step, **SMALL)
    assert skipped(rows)["triton"] == "with 2 sessions: it has 2 answers to 1 requests"


def test_a_stopped_bench_says_what_it_has(step: Path, peer: Path) -> None:
    rows, ratios = servers.measure(step, **SMALL, alive=lambda: False)
    assert rows == []
    assert ratios["triton_p50_over_ours_2"]["why"] == "not measured: it was stopped before"


def test_turns_over_the_bus_are_each_complete(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    bus = asked.OverBus(step, 4, seed=0)
    try:
        for count in (1, 4, 3):
            turn = bus.turn(count, 0.2)
            assert turn.requests == len(turn.latency_ns) == 5 * count
            assert all(0 < path <= whole for path, whole in zip(turn.path_ns, turn.latency_ns, strict=True))
    finally:
        bus.close()


def test_what_the_server_computes_is_the_models_step(step: Path) -> None:
    spec = importlib.util.spec_from_file_location("triton_sessions", asked.PEER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows, engine = module.Rows(str(step)), StepEngine(step, 3)
    said = asked.vectors(models.INPUT)
    assert (rows.features, rows.head) == (models.INPUT, models.CLASSES)
    for name in "012":
        engine.open(name)
    for at, batch in enumerate(([0, 1], [2], [1, 0, 1, 1], [2, 0])):  # one is there three times: in turn
        features = said[at : at + len(batch)]
        of, nowhere = models.MODALITY, Stamps(0, 0, 0, 0, "")
        ticks = [
            Tick(str(s), 1, 0, {of: x}, {of: True}, {of: 0}, nowhere) for s, x in zip(batch, features, strict=True)
        ]
        ours = np.stack([p.heads[models.HEAD] for p in engine.step(ticks)])
        assert np.abs(rows.step(batch, features) - ours).max() < 1e-6
