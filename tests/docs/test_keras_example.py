"""The Keras example of docs/model.md. TensorFlow and tf2onnx do not go into this project's environment."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

PYTHON = "STREAM_MMRNN_KERAS_PYTHON"


def keras_python() -> str:
    """A Python that has tf2onnx; skips the test if there is none."""
    if named := os.environ.get(PYTHON):
        return named
    if importlib.util.find_spec("tf2onnx") and importlib.util.find_spec("tensorflow"):
        return sys.executable
    pytest.skip(f"tf2onnx is not installed: name a Python that has tensorflow and tf2onnx in {PYTHON}")


def blocks(page: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", page, re.M | re.S)


@pytest.mark.process
@pytest.mark.slow
def test_the_steps_of_a_keras_gru_equal_its_sequence(tmp_path: Path) -> None:
    python = keras_python()
    page = (ROOT / "docs" / "model.md").read_text(encoding="utf-8")
    code = {b.partition("\n")[0]: b for b in blocks(page, "python")}
    contracts = {b.partition("\n")[0]: b for b in blocks(page, "toml")}
    (tmp_path / "keras_gru.py").write_text(code["import keras"], encoding="utf-8")
    (tmp_path / "compare.py").write_text(code["# compare.py"], encoding="utf-8")
    (tmp_path / "keras_gru.contract.toml").write_text(contracts["# keras_gru.contract.toml"], encoding="utf-8")
    (command,) = [b for b in blocks(page, "sh") if "keras_gru" in b]
    assert command.split() == ["python", "compare.py", "keras_gru.onnx", "keras_gru.npz"]
    for program in ([python, "keras_gru.py"], [sys.executable, *command.split()[1:]]):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=140)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    print(done.stdout)
