"""The benchmarks on tiny durations: what they count and claim, never how fast this machine is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from harness import run as command

import stream_mmrnn
from stream_mmrnn.bench import (
    end_to_end,
    engine,
    measure,
    models,
    replay,
    report,
    roofline,
    sessions,
    step,
)
from stream_mmrnn.bench.busy import beside
from stream_mmrnn.bench.machine import Processes, _stolen_s, machine
from stream_mmrnn.bench.plots import Curve, Pictures
from stream_mmrnn.bench.reader import Seen
from stream_mmrnn.core.errors import FileError, UsageError
from stream_mmrnn.core.latency import Histogram
from stream_mmrnn.predict.engine import StepEngine

# ---- the harness -----------------------------------------------------------------------------------------------------


def test_contenders_take_turns_and_a_round_of_warm_up_is_thrown_away() -> None:
    calls: list[str] = []
    timings = measure.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, 3)
    assert "".join(calls) == "aaabbb" * 3
    assert {name: t.latency.count for name, t in timings.items()} == {"a": 6, "b": 6}
    assert len(timings["a"].rounds) == 2


def test_ratios_are_made_within_a_round() -> None:
    a, b = measure.Timing("a"), measure.Timing("b")
    for factor in (1, 100, 3):  # a machine that changes its pace from round to round
        a.add_round([2 * factor] * 3, [4 * factor] * 3)
        b.add_round([1 * factor] * 3, [1 * factor] * 3)
    assert measure.ratios({"a": a, "b": b}, "b") == {"a": 2.0, "b": 1.0}
    assert measure.ratios({"a": a, "b": b}, "b", service=True) == {"a": 4.0, "b": 1.0}


def test_latency_counts_from_the_intended_time() -> None:
    """One call of 60 ms among calls that are due every 10 ms: those behind it are late, though they take no time."""
    calls = 0

    def stalls() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            time.sleep(0.06)

    timing = measure.paced({"a": stalls}, 100.0, 0.1)["a"]
    assert timing.latency.count == calls == 10
    # the stall ends 70 ms after the beginning, so what was due at 20 ms is 50 late, then 40, 30, 20, 10
    late = sum(count for value_ns, count in timing.latency.buckets() if value_ns >= 9_000_000)
    assert late >= 5
    assert timing.service.percentile(90) <= timing.latency.percentile(90)
    assert sum(count for value_ns, count in timing.service.buckets() if value_ns >= 50_000_000) >= 1


def test_a_hook_runs_before_each_deadline_of_its_contender() -> None:
    order: list[str] = []
    timings = measure.paced(
        {"a": lambda: order.append("A"), "b": lambda: order.append("B")},
        50.0,
        0.2,
        before={"a": lambda: order.append("a")},
        stretch_s=0.1,
    )
    assert "".join(order).replace("a", "") == "AAAAABBBBB" * 2
    assert "aA" in "".join(order)
    assert [len(t.rounds) for t in timings.values()] == [2, 2]


def test_arrivals() -> None:
    assert measure.due_times("constant", 10.0, 0.5) == [0.0, 0.1, 0.2, 0.3, 0.4]
    poisson = measure.due_times("poisson", 100.0, 10.0, seed=3)
    assert poisson == measure.due_times("poisson", 100.0, 10.0, seed=3) == sorted(poisson)
    assert 800 < len(poisson) < 1200
    assert measure.due_times([0.3, 0.1, 7.0, -1.0], 1.0, 1.0) == [0.1, 0.3]
    with pytest.raises(UsageError, match="no arrivals 'sometimes'"):
        measure.due_times("sometimes", 1.0, 1.0)  # type: ignore[arg-type]


def test_a_stopped_run_says_what_it_has() -> None:
    timings = measure.paced({"a": lambda: None}, 100.0, 0.1, alive=lambda: False)
    assert timings["a"].latency.count == 0
    assert timings["a"].row()["latency_ms"]["count"] == 0


# ---- machine and processes -------------------------------------------------------------------------------------------

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc here")


@pytest.mark.process
@linux
def test_our_processes_are_told_from_others() -> None:
    with beside(1):
        ours, not_ours = Processes(), Processes([2**22 + 1])  # the second has no process
        deadline_s = time.monotonic() + 20
        while not (used := ours.used()).cpu.get("busy") and time.monotonic() < deadline_s:
            time.sleep(0.1)
        strange = not_ours.used()
    assert used.cpu["busy"] > 0
    assert used.rss_mb["bench"] > 10
    assert strange.cpu == {}
    assert strange.other_cpu is not None
    assert strange.other_cpu > 0


@pytest.mark.process
@linux
def test_the_cpu_time_of_a_child_that_ended_is_its_parents() -> None:
    ours, not_ours = Processes(), Processes([2**22 + 1])
    subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)
    strange, used = not_ours.used(), ours.used()
    assert strange.other_cpu is not None
    assert used.other_cpu is not None
    assert strange.other_cpu > used.other_cpu


@linux
def test_what_the_host_took_is_counted_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    taken_s = iter((5.0, 95.0))
    monkeypatch.setattr("stream_mmrnn.bench.machine._stolen_s", lambda: next(taken_s))
    used = Processes().used()
    assert used.other_cpu is not None
    assert used.other_cpu > 0.15
    assert used.busiest_other == "the host"


def test_time_that_was_stolen_is_the_kernels_eighth_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("stream_mmrnn.bench.machine._PROC", tmp_path)
    assert _stolen_s() == 0.0
    (tmp_path / "stat").write_text("cpu  87328 126 17537 176343 884 0 909 7341 0 0\ncpu0 1 2 3 4\n")
    assert _stolen_s() == 7341 / os.sysconf("SC_CLK_TCK")


@pytest.mark.process
def test_without_proc_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("stream_mmrnn.bench.machine._PROC", tmp_path)
    used = Processes().used()
    assert (used.cpu, used.other_cpu) == ({}, None)
    assert machine()["cpu"]
    verdict = report.ratio(1.0, 2.0, other_cpu=used.other_cpu)
    assert verdict["held"] is None
    assert "does not tell" in verdict["why"]


def test_the_machine_is_described_but_not_named() -> None:
    import platform

    told = machine()
    assert {"cpu", "cores", "memory_gb", "kernel", "python", "numpy", "pyzmq", "date", "load"} <= told.keys()
    assert platform.node() not in json.dumps(told) or len(platform.node()) < 4


def test_the_roofline_is_the_longer_of_reading_and_reckoning() -> None:
    line = roofline.Roofline(1e9, 1e9, 1e10)
    assert line.floor_ns(1e6, 1e6) == 1e6
    assert line.floor_ns(1e3, 1e8) == 1e7
    assert roofline.read_again_bytes_per_s(4096) > 0


# ---- documents -------------------------------------------------------------------------------------------------------


def test_a_verdict_is_withheld_where_others_were_busy() -> None:
    assert report.ratio(0.8, 0.9)["held"] is True
    assert report.ratio(0.8, 0.9, "more")["held"] is False
    assert report.ratio(0.8)["held"] is None
    busy = report.ratio(0.8, 0.9, other_cpu=0.31)
    assert (busy["held"], busy["why"]) == (None, "no verdict: others used 31 % of a core")
    nothing = report.ratio(None, 0.9, why="torch is not installed")
    assert (nothing["value"], nothing["held"]) == (None, None)
    assert nothing["why"] == "not measured: torch is not installed"


def some(other_cpu: float = 0.0, **values: float | None) -> dict[str, Any]:
    """A document with these ratios; what begins with `times` is better when more."""
    ratios = {k: report.ratio(v, None, "more" if k.startswith("times") else "less") for k, v in values.items()}
    return report.document("engine", {"model": "toy"}, [{"other_cpu": other_cpu}], ratios)


def test_documents_are_compared_by_name() -> None:
    base, now = some(a=2.0, times=10.0, gone=1.0, none=None), some(a=1.0, times=5.0, new=3.0, none=1.0)
    rows = {r["name"]: (r["base"], r["now"], r["ratio"], r["improved"]) for r in report.compare(base, now)}
    assert rows == {
        "a": (2.0, 1.0, 0.5, True),
        "times": (10.0, 5.0, 0.5, False),
        "gone": (1.0, None, None, None),
        "none": (None, 1.0, None, None),
        "new": (None, 3.0, None, None),
    }


def test_a_comparison_says_where_it_is_doubtful() -> None:
    assert report.cautions(some(), some()) == []
    base = some(other_cpu=0.4)
    base["machine"]["cpu"] = "another"
    said = report.cautions(base, some())
    assert said == ["the base was measured while others used 40 % of a core", "the base has another machine: cpu"]


def test_a_base_is_a_document_or_a_log_that_ends_with_one(tmp_path: Path) -> None:
    base = some(a=1.0)
    (tmp_path / "alone.json").write_text(json.dumps(base, indent=1))
    (tmp_path / "log.txt").write_text(f"some words\n{{not json\n{json.dumps(base)}\n")
    assert report.load(tmp_path / "alone.json", "engine") == report.load(tmp_path / "log.txt", "engine") == base
    with pytest.raises(FileError, match="of bench 'engine'"):
        report.load(tmp_path / "alone.json", "replay")


@pytest.mark.process
@pytest.mark.parametrize(
    "text",
    [
        "",
        "garbage",
        "[1, 2]",
        '{"bench": "engine"}',
        '{"bench": "engine", "ratios": {"a": 1}}',
        '{"bench": "engine", "ratios": {"a": {"better": "less"}}}',
        "\x00\xff",
    ],
)
def test_a_base_that_is_none_is_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "base.json"
    path.write_bytes(text.encode("latin-1"))
    code, document, err = command("bench", "engine", "--compare", path)
    assert (code, document) == (2, {})
    assert err.startswith("error: the base ")
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, histogram = Pictures(), Histogram()
    for value_ns in (1_000, 2_000_000, 3_000_000):
        histogram.add(value_ns)
    pictures.histograms["all"] = {"a": histogram, "none": Histogram()}
    pictures.stages["audio"] = [(0.1, {"step": 1_000_000}), (1.2, {"step": 2_000_000})]
    pictures.curves["sessions"] = Curve("sessions", "p99, ms", [(1, 2.0), (16, 3.0)], 40.0)
    pytest.importorskip("matplotlib")
    made, note = pictures.write(tmp_path / "plots", "toy")
    assert [p.name for p in made] == ["toy_histogram_all.png", "toy_stages_audio.png", "toy_curve_sessions.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in made)
    assert note == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert pictures.write(tmp_path / "none", "toy") == (
        [],
        "no plots: matplotlib is not installed; pip install matplotlib",
    )


# ---- the benches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hot", [True, False])
def test_engine_accounts_for_every_message(toy: Path, hot: bool) -> None:
    document, pictures = engine.run(toy, sessions=2, duration_s=0.6, hot=hot, provider="cpu")
    (row,) = document["rows"]
    assert row["predictions"] == 2 * 15
    for stream in row["streams"].values():
        assert stream["received"] == stream["delivered"] + sum(stream["dropped"].values())
    assert row["latency_ms"]["step"]["count"] == row["predictions"]
    assert ("total" in row["latency_ms"]) is not hot
    assert pictures.histograms["latency"].popitem()[1].count == row["predictions"]


@pytest.mark.process
def test_engine_at_the_terminal_compared_with_itself(toy: Path, tmp_path: Path) -> None:
    args = ("bench", "engine", "--model", toy, "--duration", "0.4", "--sessions", "3")
    code, base, err = command(*args)
    assert code == 0, err
    assert base["rows"][0]["predictions"] == 3 * 10
    assert base["settings"]["model"] == "toy"
    (tmp_path / "base.json").write_text(json.dumps(base))
    code, document, err = command(*args, "--compare", tmp_path / "base.json", "--plots", tmp_path)
    assert code == 0, err
    assert {r["name"] for r in document["compared"]} == set(base["ratios"])
    assert "compared with the base" in err
    assert all((tmp_path / name).is_file() for name in document["plots"])


@pytest.mark.process
def test_end_to_end_adds_up(model: Path) -> None:
    document, pictures = end_to_end.run(model=str(model), duration_s=1.5, provider="cpu", busy=1)
    assert [r["modalities"] for r in document["rows"]] == ["audio", "all"]
    for row in document["rows"]:
        assert row["adds_up"], row["residual"]
        assert row["balanced"]
        assert row["predictions"] == row["read"] + row["before_reader"] + row["lost"] > 10
        assert sum(row["closed_by"].values()) == row["event_to_reader_ms"]["count"] > 0
        assert set(row["stages_ms"]) == {"wait", *end_to_end.STAGES}
        for stream in row["streams"].values():
            assert stream["produced"] == stream["delivered"] + sum(stream["dropped"].values())
        if row["cpu"]:  # where there is /proc
            assert {"bench", "broker", "engine", "clock", "busy", "reader"} <= row["cpu"].keys()
    assert {"audio_to_prediction_p50_busy1_ms", "audio_stages_residual_busy1"} <= document["ratios"].keys()
    for seen in pictures.stages.values():
        assert seen


@pytest.mark.process
def test_replay_is_equal_bit_for_bit(model: Path) -> None:
    document, _ = replay.run(model=str(model), duration_s=1.5, rounds=1, sessions=3)
    one, many = document["rows"]
    assert (one["sessions"], many["sessions"]) == (1, 3)
    assert one["identical"], one["first_difference"]
    assert many["identical"], many["first_difference"]
    assert many["predictions"] == 3 * one["predictions"] > 0
    assert {"replay_times_real_time", "replay_times_real_time_3"} <= document["ratios"].keys()


def test_a_tick_that_waited_in_vain_is_not_counted_from_the_clock() -> None:
    took = dict.fromkeys(end_to_end.STAGES, 1)
    assert Seen(0, "feature/audio", 8_000_000, took, 7).owed_ns == 7
    assert Seen(0, "clock", 80_000_000, took, 7).owed_ns == 80_000_007


@pytest.mark.process
def test_step_measures_all_contenders() -> None:
    document, pictures = step.run(duration_s=1.0, rounds=2, calls=3, sizes=(16,))
    told = {(r["what"], r["contender"]) for r in document["rows"]}
    assert {("gru 16", "bare"), ("gru 16", "engine"), ("gru 16", "session.run"), ("int8 16", "int8")} <= told
    assert {("gru 16", "engine, cold"), ("gru 16", "engine, prewarmed")} <= told
    ratios = document["ratios"]
    for name in ("engine_over_bare_16", "slots_16384_over_64_16", "int8_over_fp32_16", "paced_prewarmed_over_cold_16"):
        assert ratios[name]["value"] > 0
    assert 0 < ratios["int8_drift_rms_16"]["value"] < 0.05
    assert ratios["cold_start_s"]["value"] > 0
    assert "left out" in ratios["torch_gru_over_engine_16"]["why"]
    assert pictures.histograms


def test_the_same_weights_do_not_drift(tmp_path: Path) -> None:
    path = models.write(tmp_path, 16)
    (one, _), (other, _) = step.stepper(path), step.stepper(path)
    assert step.drift_of(one, other, 50) == (0.0, 0.0)


@pytest.mark.parametrize("way", ["step", "step_block"])
@pytest.mark.parametrize("arrivals", ["spread", "together"])
def test_a_load_steps_every_session_at_its_time(tmp_path: Path, arrivals: sessions.Arrivals, way: sessions.Way) -> None:
    engine = StepEngine(models.write(tmp_path, 16), 30)
    load = sessions.Load(engine, 30, arrivals, way=way)
    assert load.run(0.8, lambda: True)
    # what came after the settling: one latency a session and tick, none of them before its time
    assert load.latency.count % 30 == 0 or arrivals == "spread"
    assert 30 * 5 <= load.latency.count <= 30 * 9
    assert load.latency.percentile(0.01) > 0


def test_a_load_that_cannot_be_carried_is_given_up(tmp_path: Path) -> None:
    engine = StepEngine(models.write(tmp_path, 16), 4)

    class Slow:
        spec = engine.spec

        def open(self, name: str) -> None:
            engine.open(name)

        def step(self, ticks: list[object]) -> None:
            time.sleep(0.1)

    load = sessions.Load(Slow(), 4, "together")  # type: ignore[arg-type]
    assert not load.run(5.0, lambda: True, hopeless_ns=200_000_000)


@pytest.mark.slow
def test_sessions_finds_a_capacity(tmp_path: Path) -> None:
    document, pictures = sessions.run(hidden=16, duration_s=0.2, most=8)
    assert set(document["ratios"]) >= {"sessions_per_core_fp32", "sessions_per_core_int8", "loop_over_batched"}
    assert {r["what"] for r in document["rows"]} == {"fp32", "int8", "batching"}
    assert pictures.curves["fp32"].limit == 40.0
    assert set(document["ratios"]) >= {"sessions_block_fp32", "sessions_block_int8"}
    for name in ("loop_over_batched", "step_over_step_block", "step_block_us"):
        assert document["ratios"][name]["value"] > 0


def test_the_package_does_not_reach_into_tools() -> None:
    """A wheel has no `tools`: no import of it, and no path into it."""
    package = Path(stream_mmrnn.__file__).parent
    reaching = re.compile(r"^\s*(from|import) tools\b|tools/\w|\"tools\"", re.MULTILINE)
    assert [p.name for p in package.rglob("*.py") if reaching.search(p.read_text(encoding="utf-8"))] == []


@pytest.mark.process
def test_peers_are_measured_where_they_are_passed_in(tmp_path: Path) -> None:
    class Peer:
        def sample(self, calls: int) -> list[int]:
            return [1000] * calls

        def close(self) -> None:
            closed.append(self)

    class Peers:
        def missing(self, *packages: str) -> str:
            return ""

        def start(self, *arguments: str) -> Peer:
            started.append(arguments)
            return Peer()

        def measure_more(self, bench: step.Bench) -> None:
            bench.bound("more", 1.0, None)

    closed: list[Peer] = []
    started: list[tuple[str, ...]] = []
    document, _ = step.run(duration_s=1.0, rounds=1, calls=2, sizes=(16,), peers=Peers())
    assert started == [("torch_gru", "16"), ("torch_cells", "16"), ("numpy", "16")]
    assert len(closed) == 3
    assert document["ratios"]["torch_gru_over_engine_16"]["value"] > 0
    assert document["ratios"]["more"]["value"] == 1.0


@pytest.mark.slow
def test_sessions_has_the_rows_of_servers_where_they_are_passed_in() -> None:
    def servers(path: Path, **_: Any) -> tuple[list[dict[str, Any]], dict[str, report.Ratio]]:
        return [{"what": "servers", "path": path.suffix}], {"compared": report.ratio(2.0)}

    document, _ = sessions.run(hidden=16, duration_s=0.2, most=8, servers=servers)
    assert document["rows"][-1] == {"what": "servers", "path": ".onnx"}
    assert document["ratios"]["compared"]["value"] == 2.0
