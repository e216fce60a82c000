"""`python -m tools.bench transport` and `train` on tiny durations: what they count, never how fast this machine is."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.bench import contenders, train, transport

pytestmark = pytest.mark.process


def test_transport_measures_ours_and_others_in_turn(model: Path) -> None:
    document, _ = transport.run(duration_s=0.1, sizes=["2kb"], model=str(model))
    rows = {(r["contender"], r.get("mode")): r for r in document["rows"] if "skipped" not in r}
    assert {("ours_ipc", "hot"), ("ours_ipc", "paced"), ("pyzmq_ipc", "hot"), ("ours_tcp", "hot")} <= rows.keys()
    for row in rows.values():
        assert row["sent"] == row["received"] + row["lost"] > 0
        assert row["latency_ms"]["count"] == row["path_ms"]["count"] == row["received"]
    for name, ratio in document["ratios"].items():
        assert ratio["value"] is not None or ratio["why"], name
    for row in document["rows"]:
        assert row.get("skipped", "a reason")


def test_a_peer_whose_package_is_missing_is_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    found, why = contenders.available()
    assert set(found) == {"ours_ipc", "ours_tcp"}
    assert why["pyzmq_ipc"] == "zmq is not installed"
    assert set(why) == {"pyzmq_ipc", "pyzmq_tcp", "zmq_proxy_ipc", "zmq_proxy_tcp", "dora", "lsl"}


def test_the_bare_hop_is_measured() -> None:
    found, why = contenders.bare_hop(324, 50.0, 25)
    assert (found.count, why) == (25, "")


def test_training_speed_is_measured() -> None:
    pytest.importorskip("torch")
    document, _ = train.run(hidden=4, length=8, batch=2, rounds=1)
    assert "train_min_gru_times_nn_gru" in document["ratios"]
    with pytest.raises(Exception, match=r"bench/cells\.py"):
        train.run(hidden=-4, length=8, batch=2, rounds=1)
