"""The GPU check, on the CPU: what is right passes, what is broken is found, what is not there is one sentence."""

from __future__ import annotations

import ctypes
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stream_mmrnn.bench import models
from stream_mmrnn.core.errors import ProcessError, ProviderError
from stream_mmrnn.graph import runtime
from stream_mmrnn.predict.device_batches import DeviceBucket, DeviceRows
from tools.gpu_check import checks, report, speed, torch_step
from tools.gpu_check.__main__ import main

TINY = ["--provider", "cpu", "--hidden", "16", "--batches", "1,8", "--steps", "60", "--slots", "24"]
TINY += ["--most-sessions", "64", "--rounds", "3", "--seconds", "0.01"]


@pytest.fixture(scope="module")
def gru(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "gru.onnx"
    path.write_bytes(models.gru_step(16))
    return path


def document(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main([*TINY, "--json", *arguments])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.process
def test_all_of_it_runs_on_the_cpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "docs" / "gpu.md"
    code, said = document(capsys, "--out", str(page))
    assert code == 0
    assert said["passed"]
    assert [c["ok"] for c in said["checks"]] == [True] * 6
    assert said["checks"][0]["steps"] == 60
    assert [row["batch"] for row in said["steps"]] == [1, 8]
    assert all(row["ms"]["no CUDA graph"]["p99"] >= row["ms"]["no CUDA graph"]["p50"] > 0 for row in said["steps"])
    assert [row["by"] for row in said["sessions"]] == ["rows", "StepEngine.step_block", "StepEngine.step"]
    assert [(row["program"], row["ms"]["p99"] > 0) for row in said["programs"]] == [
        ("live session", True),
        ("serve", True),
    ]
    assert set(said["cold_start"][0]) == {"model", "slots", "libraries_s", "import_s", "engine_s", "first_step_s"}
    assert not said["pinned"]
    assert any("torch" in note and "skipped" in note for note in said["notes"])
    text = page.read_text(encoding="utf-8")
    assert said["machine"]["date"] in text
    assert "| 2 x GRU 16 | 8 |" in text
    for part in ("Checks", "One step", "Sessions", "Programs", "Cold start"):
        assert f"## {part}" in text


@pytest.mark.process
def test_without_rich_it_says_the_same_as_markdown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else real(name))
    assert main(TINY) == 0
    assert "## Cold start" in capsys.readouterr().out


@pytest.mark.process
def test_wrong_numbers_are_found(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = DeviceBucket.run

    def wrong(self: DeviceBucket, slots: Any, fresh: Any, count: int) -> None:
        right(self, slots, fresh, count)
        if count == 3:
            self.outputs["head.next"][2, 0] += 2e-4

    monkeypatch.setattr(DeviceBucket, "run", wrong)
    code, said = document(capsys)
    assert code == 1
    assert not said["passed"]
    assert [c["ok"] for c in said["checks"]] == [False, *[True] * 5]
    assert said["checks"][0]["worst_output"] == pytest.approx(2e-4, rel=0.01)
    assert said["checks"][0]["worst_state"] == 0
    assert "Wrong on cpu: 2 x GRU 16, no CUDA graph" in report.verdict(said)


def test_what_is_no_number_is_found(gru: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = checks.device_rows(gru, "cpu", 8, 8)
    right = DeviceBucket.run

    def wrong(self: DeviceBucket, slots: Any, fresh: Any, count: int) -> None:
        right(self, slots, fresh, count)
        self.outputs["head.next"][0] = np.nan

    monkeypatch.setattr(DeviceBucket, "run", wrong)
    said = checks.against_the_cpu("", gru, rows, 8, 8, 5)
    assert not said["ok"]
    assert said["worst_output"] is None
    json.dumps(said, allow_nan=False)


def test_a_step_that_moves_others_is_found(gru: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = checks.device_rows(gru, "cpu", 8, 8)
    right = DeviceBucket.run

    def wrong(self: DeviceBucket, slots: Any, fresh: Any, count: int) -> None:
        right(self, slots, fresh, count)
        seventh = np.array([7])
        states = rows.read(seventh)
        states["cell.0.h"][0, 0] += 1e-6  # far below the bound, and yet another session's
        rows.write(seventh, states)

    monkeypatch.setattr(DeviceBucket, "run", wrong)
    said = checks.against_the_cpu("", gru, rows, 8, 4, 30)
    assert said["moved_rows"] > 0
    assert not said["ok"]


def test_a_capture_that_moves_a_state_is_found(gru: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a capture on rows of a session would do."""
    assert checks.capture_moves_nothing("", gru, "cpu", 8, 8)["ok"]

    def on_session_rows(self: DeviceBucket) -> None:
        self._slots[...] = 3
        if self._active is not None:
            self._active[...] = True
        self._binding.run()

    monkeypatch.setattr(DeviceBucket, "run_dummy", on_session_rows)
    said = checks.capture_moves_nothing("", gru, "cpu", 8, 8)
    assert not said["ok"]
    assert said["moved_by_making"] == 2  # the row's state in both layers
    assert said["moved_by_prewarm"] == 2


def test_a_step_by_another_thread_is_refused(gru: Path) -> None:
    assert checks.another_thread_is_refused("another", gru, "cpu", 8) == {
        "check": "another",
        "refused": True,
        "moved_rows": 0,
        "ok": True,
    }


def test_cuda_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        runtime.resolve("cuda")
    except ProviderError:
        pass
    else:
        pytest.skip("this machine has a GPU")
    assert main(["--json"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "provider `cuda` was asked for" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("wrong", [["--batches", "16385"], ["--hidden", "0"], ["--steps", "0"], ["--batches", "few"]])
def test_usage(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--provider", "cpu", *wrong])
    assert end.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_the_search_finds_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def p99_ns(once: Any, _rounds: int) -> int:
        tried.append(once())
        return int(once()) * 10_000  # 4,000 sessions take 40 ms

    monkeypatch.setattr(speed, "_p99_ns", p99_ns)
    found = speed.most_sessions(lambda count: lambda: count, 64, 100_000, 3)
    assert 3800 <= found["sessions"] < 4000
    assert found["p99_ms"] < 40
    assert not found["limit_of_search"]
    assert speed.most_sessions(lambda count: lambda: count, 4096, 100_000, 3)["sessions"] >= 3800
    assert speed.most_sessions(lambda count: lambda: count, 64, 100, 3)["limit_of_search"]
    nothing = speed.most_sessions(lambda count: lambda: 10**6, 64, 1000, 3)
    assert nothing["sessions"] == 0
    assert nothing["p99_ms"] is None


@pytest.mark.process
def test_a_cold_start_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match="cannot be read"):
        speed.cold_start(tmp_path / "none.onnx", "cpu", 4)


def test_the_baseline_computes_the_same_step(gru: Path) -> None:
    """Without its CUDA graph, which needs a GPU."""
    pytest.importorskip("torch")
    rows = torch_step.TorchRows(16, 24, 24, device="cpu")
    said = checks.against_the_cpu("torch", gru, rows, 24, 24, 60)
    assert said["ok"], said
    assert "CUDA" in torch_step.missing()


def test_page_locked_memory_is_whole_pages_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a CUDA runtime that only writes down what it is asked."""
    held: dict[int, int] = {}

    class Library:
        def __init__(self, _name: str) -> None: ...

        def cudaHostRegister(self, address: Any, size: Any, _flags: int) -> int:  # noqa: N802
            held[address.value] = size.value
            return 0

        def cudaHostUnregister(self, address: Any) -> int:  # noqa: N802
            del held[address.value]
            return 0

    monkeypatch.setattr(ctypes, "CDLL", Library)
    pair = runtime._pinned(np.zeros((3, 5), np.float32))
    assert pair is not None
    value, array = pair
    assert (array.shape, array.dtype) == ((3, 5), np.float32)
    array[1, 2] = 7
    assert value.numpy()[1, 2] == 7
    ((address, size),) = held.items()
    assert address % runtime.mmap.PAGESIZE == size % runtime.mmap.PAGESIZE == 0
    assert address <= array.ctypes.data < array.ctypes.data + array.nbytes <= address + size
    del value, array, pair
    assert not held


def test_memory_that_cannot_be_locked_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", nowhere)
    assert runtime._pinned(np.zeros(4, np.float32)) is None


def test_rows_are_compared_in_as_few_runs_as_hold_them(gru: Path) -> None:
    rows = checks.device_rows(gru, "cpu", 40, 16)
    assert isinstance(rows, DeviceRows)
    feed = checks.noise(np.random.default_rng(0), 40)
    fresh = np.ones(40, np.bool_)
    said = checks.step(rows, np.arange(40), fresh, feed)
    one = checks.step(checks.host_rows(gru, 40), np.arange(40), fresh, feed)
    assert said.tobytes() == one.tobytes()
