"""The simulation of many sessions: repeatable, right where the answer is known, and the page says what it found."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tools.scale import __main__ as scale
from tools.scale import figures, simulate, text
from tools.scale.simulate import TICK_S, Engine


@pytest.mark.slow
def test_one_seed_is_one_document_and_the_page_is_of_it() -> None:
    one, two = scale.document(0), scale.document(0)
    assert json.dumps(one) == json.dumps(two)
    assert (scale.DOCS / "scale.md").read_text(encoding="utf-8") == text.page(one), "run python -m tools.scale --write"
    assert json.dumps(scale.document(1)) != json.dumps(one)


def test_a_queue_without_load_takes_a_step() -> None:
    engine = Engine(1e-4, 1e-5)
    [took] = {round(t, 9) for t in simulate.queue(engine, 1, 2.0, 0).tolist()}
    assert took == pytest.approx(1.1e-4)


def test_a_queue_serves_every_tick_once_and_later_with_more_load() -> None:
    engine = Engine(1e-4, 1e-5, (0.0, 0.0, 1e-3))
    before = 0.0
    for sessions in (10, 1000, 3000, 3500):
        took = simulate.queue(engine, sessions, 2.0, 0)
        assert len(took) == sessions * 50
        assert took.min() > 0
        assert np.percentile(took, 99) > before
        before = float(np.percentile(took, 99))
    most = simulate.most_sessions(engine, 0)
    assert np.percentile(simulate.queue(engine, most, 2.0, 0), 99) <= TICK_S
    # 64 rows a run: 1e-4 for each run and 1e-5 for each tick fill the tick at most
    assert most <= TICK_S / (1e-5 + 1e-4 / 64)


def test_sessions_of_a_day_without_swing_are_as_many_as_come_times_how_long_they_stay() -> None:
    day = simulate.day(100_000, 10.0, 0.5, 0.0, 0)
    assert day["mean"] == pytest.approx(100_000, rel=0.01)
    assert day["begun_per_s"] * 600 == pytest.approx(100_000, rel=0.02)  # Little's law


def test_more_partitions_are_more_even_and_one_engine_has_all() -> None:
    assert simulate.fullest(10_000, 64, 1, 0) == 1.0
    shares = [simulate.fullest(1_000_000, count, 1000, 0) for count in (1000, 10_000, 100_000)]
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 1.2


def test_more_to_spare_and_newer_states_never_make_a_gap_longer() -> None:
    def worst(load: float, every: int) -> float:
        return float(simulate.rack(20, 1, 200, load, 2e-4, every, 0.45, 4e-4, 0).max())

    assert worst(0.1, 25) < worst(0.5, 25) < worst(0.9, 25)
    assert worst(0.5, 1) < worst(0.5, 100)
    gaps = simulate.rack(20, 1, 200, 0.5, 2e-4, 25, 0.45, 4e-4, 0)
    assert len(gaps) == 200, "every session of the dead engine goes on"
    assert gaps.min() > 0.45


def test_sizes_are_those_of_the_wire() -> None:
    sizes = figures.of_model("turn_taking")
    assert sizes["step"] > 2 * (99 + 81 + 81)
    assert sizes["pred"] < 500
    assert sizes["state"] > 4 * (96 + 256)


def test_the_check_stands_beside_what_was_measured() -> None:
    found = figures.measured()
    rows = scale.check(found, Engine(found["call_s"], found["tick_s"], tuple(found["late_s"])), 0)
    assert [r["sessions"] for r in rows] == sorted(r["sessions"] for r in rows)
    for row in rows[:2]:  # below half of what a core can do, where nothing else decides
        assert row["simulated"]["p50_ms"] == pytest.approx(row["measured"]["p50_ms"], rel=1.0)
