"""docs/performance.md as the suite writes it: every figure from a document, and every name explained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools.bench import __main__ as suite
from tools.bench import text

NAMES = (
    "engine_over_bare_256",
    "slots_16384_over_64_256",
    "session_run_over_engine_512",
    "torch_gru_over_engine_256",
    "torch_cells_over_engine_256",
    "numpy_over_engine_256",
    "engine_over_memory_roofline_1024",
    "int8_over_fp32_512",
    "int8_drift_rms_256",
    "int8_drift_rms_last_tenth_256",
    "paced_prewarmed_over_cold_256",
    "cold_start_s",
    "engine_rss_mb",
    "silero_wrapper_over_engine",
    "silero_jit_over_engine",
    "silero_iterator_over_engine",
    "in_graph_over_copied_64",
    "sessions_per_core_fp32",
    "loop_over_batched",
    "triton_p50_over_ours_16",
    "triton_p50_over_ours_bus_16",
    "pytriton_p50_over_ours_64",
    "pytriton_p50_over_ours_bus_64",
    "audio_to_prediction_p50_ms",
    "audio_to_prediction_p99_busy2_ms",
    "audio_to_prediction_p99_busy2_fifo_ms",
    "audio_to_prediction_p50_nice_ms",
    "all_to_prediction_p99_ms",
    "audio_stages_residual_busy2",
    "audio_stages_residual",
    "ours_ipc_over_dora_2kb_paced",
    "ours_tcp_over_pyzmq_tcp_1mb_hot",
    "camera_features_transport_share",
    "replay_times_real_time",
    "replay_times_real_time_16",
    "replay_times_real_time_16_identical",
    "serve_p99_over_tick_200",
    "cluster_p99_over_tick_64",
    "cluster_p50_over_serve_64",
    "triton_p50_over_serve_200",
    "triton_p50_over_cluster_64",
    "pytriton_p50_over_serve_200",
    "pytriton_p50_over_cluster_200",
    "busy_p99_ms",
    "train_min_gru_times_nn_gru",
)


COMMANDS = {name: suite.shown_command(name) for name in suite.RUNS}


def document(**ratios: dict[str, Any]) -> dict[str, Any]:
    machine = {"date": "2026-01-02 03:04:05 UTC", "cpu": "a CPU", "usable_cores": 2, "kernel": "Linux", "python": "3"}
    return {"bench": "step", "machine": machine, "settings": {}, "rows": [], "ratios": ratios}


def figure(value: float | None, bound: float | None, held: bool | None, why: str = "") -> dict[str, Any]:
    return {"value": value, "bound": bound, "better": "less", "held": held, "why": why}


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_explained(name: str) -> None:
    words = text.meaning(name)
    assert words
    assert "{" not in words


def test_what_does_not_hold_is_said_with_its_bound() -> None:
    told = {"step": document(cold_start_s=figure(0.5, 0.3, False), engine_rss_mb=figure(70.0, 90.0, True))}
    said = text.write(told, COMMANDS, [])
    missed = said[said.index("## Bounds that do not hold") :]
    assert "`cold_start_s`: 0.5, asked ≤ 0.3" in missed
    assert "engine_rss_mb" not in missed
    assert "Not run: `python -m tools.bench sessions`" in said
    held = text.write({"step": document(engine_rss_mb=figure(70.0, 90.0, True))}, COMMANDS, [])
    assert "All bounds hold." in held


def test_a_figure_without_a_verdict_is_listed(tmp_path: Path) -> None:
    work, docs = tmp_path / "work", tmp_path / "docs"
    for run in ("step", "sessions-2"):  # the plots of one run are not those of another
        (work / "plots" / run).mkdir(parents=True)
        (work / "plots" / run / "step_histogram_gru_256_hot.png").write_bytes(run.encode())
    busy = figure(0.2, 0.3, None, "no verdict: others used 31 % of a core")
    (work / "step.json").write_text(json.dumps(document(cold_start_s=busy)))
    (work / "replay.json").write_text("no document")
    assert suite.main(["--only", "", "--work", str(work), "--docs", str(docs)]) == 0
    said = (docs / "performance.md").read_text(encoding="utf-8")
    assert "no verdict: others used 31 % of a core" in said
    assert "performance/step_histogram_gru_256_hot.png" in said
    assert (docs / "performance" / "step_histogram_gru_256_hot.png").read_bytes() == b"step"


def test_an_unknown_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        suite.main(["--only", "nothing", "--work", str(tmp_path)])
    assert e.value.code == 2
    assert "there is no run 'nothing'; known are step, sessions" in capsys.readouterr().err
